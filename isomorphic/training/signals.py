"""Handles SIGTERM (save and stop) and SIGUSR1 (save and go on), in all processes after the same step."""

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
    """A context in which SIGTERM and SIGUSR1 do not end the process; `poll` returns what they ask for.

    A signal may reach one process only, so `poll` takes the maximum over all processes. That runs on the CPU during the
    next step, without involving the device, so several processes see a request one step later than a single process.
    A SIGTERM overrides a pending SIGUSR1. Python allows signal handlers in the main thread only; in other threads none
    are set.
    """

    def __init__(self) -> None:
        self._signalled = self._agreed = 0  # numbers of `_NUMBERS`: of this process, and of all processes
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
        """Returns the request, the same in all processes, or None; every process calls this once per step.

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
