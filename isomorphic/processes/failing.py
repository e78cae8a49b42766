"""How processes that work together fail together: one of them says why, and none is left waiting for the others.

They meet on a board, the store that torchrun keeps for them. It outlives their death, and it outlives a restart: what
an earlier attempt wrote is still there, and the hosts need not agree on how many attempts there were. So the
first process names each attempt anew, the others answer to the name once, and all that they write begins with it.

In an attempt, the first process to fail claims the report. A thread in each of the others sees the claim and
ends its process, which may be waiting in a collective where no Python code, and no signal handler, would run again.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
import uuid
from collections.abc import Callable
from typing import NoReturn, Protocol

from isomorphic.errors import UserError, first_line

LOOK_EVERY = 0.5  # seconds between two looks of the thread at the board
GRACE = 1.0  # seconds that a process has for ending on its own once another failed
PATIENCE = 2.0  # seconds to wait for the cause where a failure looks like the consequence of another
MEETING = 1800.0  # seconds until all must have arrived
LATE = 20.0  # seconds that the first process may arrive after one that failed


class Store(Protocol):
    """What is used of torch's stores; anything may raise RuntimeError where the store is gone."""

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def add(self, key: str, amount: int, /) -> int: ...
    def check(self, keys: list[str], /) -> bool: ...


class LostContact(UserError):
    """Another process is gone, and did not say why."""

    @classmethod
    def because(cls, error: BaseException) -> LostContact:
        """In place of what a collective says in that case."""
        cause = first_line(error).partition(". This is typically")[0]
        return cls(f"lost contact with another process ({cause})")


class OthersFailed(Exception):
    """Another process has failed and says why: this one has only to end."""


class Board:
    """One attempt of `world_size` processes, as the one of number `rank` sees it on their store."""

    def __init__(self, store: Store, rank: int, world_size: int, *, name: str = "") -> None:
        """`name` is that of the attempt, where it is known already."""
        self.store = store
        self.rank = rank
        self.world_size = world_size
        self.name = name

    def enter(self) -> bool:
        """Gives the attempt its name, or takes the name over from the first process; False where it has none yet.

        A name that was answered to before, by the process that had this number then, belongs to an earlier attempt.
        """
        if self.rank == 0:
            if not self.name:
                self.name = uuid.uuid4().hex
                self.store.set("attempt", self.name)
            return True
        if self.store.check(["attempt"]):
            name = self.store.get("attempt").decode()
            if name != self.name and self.store.add(f"{name}/here/{self.rank}", 1) == 1:
                self.name = name
        return bool(self.name)

    def meet(self) -> None:
        """Waits until all processes are here.

        Raises:
            OthersFailed: one of them fails before that.
            LostContact: some do not come.
        """
        self.enter()
        everyone = [f"here/{rank}" for rank in range(1, self.world_size)]
        failed_since: tuple[str, float] = "", 0.0
        deadline = time.monotonic() + MEETING
        while time.monotonic() < deadline:
            self.enter()
            if self.has_failed() and failed_since[0] != self.name:
                failed_since = self.name, time.monotonic()
            if self.has_failed() and (self.rank == 0 or time.monotonic() > failed_since[1] + LATE):
                raise OthersFailed  # the name is not that of an earlier attempt, whose successor would be here by now
            if self.rank == 0 and self._has(*everyone):
                self.store.set(f"{self.name}/complete", "")
            if self.name and self._has("complete"):
                return
            time.sleep(0.02)
        raise LostContact(f"not all {self.world_size} processes have come within {MEETING / 60:.0f} minutes")

    def has_failed(self) -> bool:
        """Whether one of the processes has claimed the report."""
        return bool(self.name) and self._has("failed")

    def claim(self, *, patience: float = 0.0) -> bool:
        """True in the first process that fails, for it to say why.

        One that looks like the victim of another shows `patience`: it claims where nobody does within so many seconds.
        """
        wait_for(self.enter, LATE)
        if not self.name:
            return True  # whoever names the attempt is not here to say anything
        wait_for(self.has_failed, patience)
        return self.store.add(f"{self.name}/failed", 1) == 1

    def _has(self, *keys: str) -> bool:
        return self.store.check([f"{self.name}/{key}" for key in keys]) if keys else True


class Watch:
    """A thread that ends this process when another one of the board has failed, until it is told to stop."""

    def __init__(self, board: Board, *, lost: Callable[[], None], end: Callable[[int], object] | None = None) -> None:
        """`lost` is called where the store is gone; `end` is `end_process` but for tests."""
        self._board = board
        self._lost = lost
        self._end = end or end_process
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch for failures", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; nothing ends the process from then on."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _look(self) -> None:
        while not self._stop.wait(LOOK_EVERY):
            try:
                failed = self._board.has_failed()
            except RuntimeError:
                if not self._stop.is_set():
                    self._lost()
                return
            if failed:
                if not self._stop.wait(GRACE):
                    self._end(1)
                return


def end_process(status: int) -> NoReturn:
    """Ends this process here and now, whatever its other threads wait for, and the processes that load its images."""
    with contextlib.suppress(Exception):
        for child in multiprocessing.active_children():
            child.terminate()
    os._exit(status)


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether `condition` comes true within so many seconds."""
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return met
