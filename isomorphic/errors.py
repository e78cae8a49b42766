"""The one exception that a user can put right, and what others are quoted as."""

from __future__ import annotations

import signal


class UserError(RuntimeError):
    """What is wrong and what to do about it, in one line.

    Entry points print it without a traceback and exit with status 1. Everything else that goes wrong
    is a bug of ours and keeps its traceback.

    A data loader's worker process hands its exception over as a formatted traceback. The last line of one
    holds the message that was meant for the user, so only that is kept: a file that a worker could not
    read is reported in one line like any other.
    """

    def __init__(self, message: str) -> None:
        if message.startswith("Caught UserError in "):
            message = message.rstrip().rpartition(f"{__name__}.UserError: ")[2]
        super().__init__(" ".join(message.splitlines()))


class Stopped(UserError):
    """Somebody asked the run to stop, by a signal, and it did, with nothing lost.

    Attributes:
        status: the exit status, by which shells and schedulers know a process that the signal ended.
    """

    def __init__(self, message: str, number: signal.Signals = signal.SIGTERM) -> None:
        super().__init__(message)
        self.status = 128 + number


def first_line(error: BaseException) -> str:
    """What an error says, in one line: its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
