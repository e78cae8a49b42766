"""SIGTERM asks a run to save and stop, SIGUSR1 to save and go on: all processes do so after the same step."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Literal

from isomorphic.processes import distributed

Request = Literal["save", "stop"]
_WISHES = {signal.SIGUSR1: 1, signal.SIGTERM: 2}  # the larger one wins
_REQUESTS: tuple[Request | None, ...] = (None, "save", "stop")


class Signals:
    """Takes SIGTERM and SIGUSR1 instead of dying of them, while it is entered.

    A signal may reach one process only, so the processes ask each other in `poll`. They do it on the CPU and look at
    the answer one `poll` later, which keeps the device out of it: a request is known after one more step than in one
    process, where it is known at once. Further signals change nothing but a save into a stop. Outside of the main
    thread no signal can be taken, and none is.
    """

    def __init__(self) -> None:
        self._wish = self._answer = 0
        self._question: distributed.Question | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._take) for number in _WISHES}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def poll(self) -> Request | None:
        """What was asked for, once a step in every process: the same answer in all of them.

        "stop" stays the answer from then on, "save" is given once for each signal.

        Raises:
            LostContact: another process is gone.
        """
        if self._answer == _WISHES[signal.SIGTERM]:
            return "stop"
        wish, self._wish = self._wish, 0
        if not distributed.is_distributed():
            self._answer = wish
        else:
            earlier, self._question = self._question, distributed.Question(wish)
            self._answer = earlier.answer() if earlier else 0
        return _REQUESTS[self._answer]

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._wish = max(self._wish, _WISHES[signal.Signals(number)])
