"""SIGTERM asks a run to save and stop, SIGUSR1 to save and go on: all processes do so after the same step."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Literal

from isomorphic.processes import distributed

Request = Literal["save", "stop"]
_NUMBERS = {signal.SIGUSR1: 1, signal.SIGTERM: 2}  # the larger one wins
_REQUESTS: tuple[Request | None, ...] = (None, "save", "stop")


class Signals:
    """Takes SIGTERM and SIGUSR1 instead of dying of them, while it is entered.

    A signal may reach one process only, so `poll` takes the maximum over all processes. That runs on the CPU beside the
    next step, which keeps the device out of it: several processes learn of a request one step later than a single one,
    which learns at once. Further signals change nothing but a save into a stop. Outside of the main thread Python
    allows no signal handlers, and none are set.
    """

    def __init__(self) -> None:
        self._signalled = self._agreed = 0  # numbers of `_NUMBERS`: this process's own, and that of all processes
        self._pending: distributed.PendingMax | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._take) for number in _NUMBERS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def poll(self) -> Request | None:
        """Returns what was asked for, the same in all processes; every process calls this once a step.

        "stop" is returned from then on, "save" once for each signal.

        Raises:
            LostContact: another process is gone.
        """
        if self._agreed == _NUMBERS[signal.SIGTERM]:
            return "stop"
        number, self._signalled = self._signalled, 0
        if not distributed.is_distributed():
            self._agreed = number
        else:
            earlier, self._pending = self._pending, distributed.PendingMax(number)
            self._agreed = earlier.wait() if earlier else 0
        return _REQUESTS[self._agreed]

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._signalled = max(self._signalled, _NUMBERS[signal.Signals(number)])
