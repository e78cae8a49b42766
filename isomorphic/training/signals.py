"""Handles signals in all processes after the same step.

SIGTERM, Ctrl-C (SIGINT) and a terminal that closes (SIGHUP) save and stop; SIGUSR1 saves and goes on. A second Ctrl-C
ends the process at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, Literal

from isomorphic.processes import distributed

Request = Literal["save", "stop"]
_NUMBERS = {signal.SIGUSR1: 1, signal.SIGTERM: 2, signal.SIGHUP: 3, signal.SIGINT: 4}  # the larger one wins
_SAVE = 1
# Ignored where they were ignored before: by nohup, and in a shell's background.
_OPTIONAL = (signal.SIGHUP, signal.SIGINT)
ECHO_SECONDS = 1.0  # torchrun, mpirun and srun pass a Ctrl-C on that the terminal may have sent to all processes


class Signals:
    """A context in which the signals do not end the process; `poll` returns what they ask for.

    A signal may reach one process only, so `poll` takes the maximum over all processes. That runs on the CPU during the
    next step, without involving the device, so several processes see a request one step later than a single process.
    A request to stop overrides a pending SIGUSR1. Python allows signal handlers in the main thread only; in other
    threads none are set.
    """

    def __init__(self) -> None:
        self._signalled = self._agreed = 0  # numbers of `_NUMBERS`: of this process, and of all processes
        self._pending: distributed.PendingMax | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._interrupted_at: float | None = None

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in _NUMBERS:
                if number not in _OPTIONAL or signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    @property
    def stopped_by(self) -> signal.Signals:
        """The signal that asked to stop, once `poll` has returned "stop"; the same in all processes."""
        return next(number for number, value in _NUMBERS.items() if value == self._agreed)

    def poll(self) -> Request | None:
        """Returns the request, the same in all processes, or None; every process calls this once per step.

        "stop" is returned from then on, "save" once for each signal.

        Raises:
            LostContact: another process is gone.
        """
        if self._agreed > _SAVE:
            return "stop"
        number, self._signalled = self._signalled, 0
        if not distributed.is_distributed():
            self._agreed = number
        else:
            earlier, self._pending = self._pending, distributed.PendingMax(number)
            self._agreed = earlier.wait() if earlier else 0
        if self._agreed > _SAVE:
            return "stop"
        return "save" if self._agreed == _SAVE else None

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._signalled = max(self._signalled, _NUMBERS[signal.Signals(number)])
        if number == signal.SIGINT:
            self._interrupt()

    def _interrupt(self) -> None:
        """Prepares for a second Ctrl-C, which is to end the process whatever it is in the middle of."""
        now, first = time.monotonic(), self._interrupted_at
        if first is None:
            self._interrupted_at = now
            _tell("interrupted: stops after this step, with the training state written; Ctrl-C again ends it at once")
        if not distributed.is_distributed():
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        elif first is not None and now - first >= ECHO_SECONDS:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)


def _tell(message: str) -> None:
    """Prints a line in the first process; a handler may interrupt a print, so that it must not call print itself."""
    if distributed.is_main() and sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            os.write(sys.stderr.fileno(), f"{os.path.basename(sys.argv[0])}: {message}\n".encode())
