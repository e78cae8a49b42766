"""How processes that work together fail together: one of them says why, and none is left waiting for the others.

Why not torch elastic's `record` (in its `multiprocessing.errors`): it writes an uncaught exception into a file, which
torchrun reads after the process has ended. Nothing in it tells the other ranks. torchrun sends those of its own host
SIGTERM, which training takes as a request to save and which a rank inside a collective never gets to handle, and
SIGKILL 30 s later. Nor does `record` choose who prints: every rank prints its own error, and torchrun adds a report.
`tests/e2e/test_all_rank_failing.py` holds this file to both: the others end within seconds, and one line is printed.

When rank 2 of four fails (all times in seconds):

    0.0   rank 2 raises a UserError; ranks 0, 1 and 3 wait for it in an all_reduce
    0.0   rank 2: claim_first_report() adds 1 to the store's "<attempt>/failed" and gets 1: it is the first.
          It prints "finetune.py: rank 2 of 4: cannot read image 7.png" and exits with status 1
    0.1   rank 3: its connection to rank 2 breaks, so the all_reduce raises. That looks like a consequence: it waits up
          to PATIENCE_SECONDS for another rank to claim, finds that one has, gets 2 from the store, and exits silently
    0.5   ranks 0 and 1, still inside the collective: the FailureMonitor's thread polls the store, every POLL_SECONDS,
          and sees "<attempt>/failed"
    1.5   after GRACE_SECONDS, in which a rank may end on its own, the threads end their processes with status 1

If rank 2 was killed instead, it claims nothing. The first rank whose collective breaks waits PATIENCE_SECONDS in vain,
claims the report itself, and prints "lost contact with another process (…)".

The store is the one that torchrun keeps. It outlives the ranks, and it outlives a restart: what an earlier attempt
wrote is still there, and the hosts need not agree on how many attempts there were. So rank 0 gives each attempt a new
name, each other rank accepts a name once, and all keys of the attempt begin with it.
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

POLL_SECONDS = 0.5  # between two looks of the monitor at the store
GRACE_SECONDS = 1.0  # that a process has for ending on its own once another failed
PATIENCE_SECONDS = 2.0  # to wait for the cause where a failure looks like the consequence of another
RENDEZVOUS_SECONDS = 1800.0  # until all processes must have arrived
LATE_SECONDS = 20.0  # that rank 0 may arrive after a rank that failed


class Store(Protocol):
    """The methods of torch's stores that are used here; each may raise RuntimeError where the store is gone."""

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def add(self, key: str, amount: int, /) -> int: ...
    def check(self, keys: list[str], /) -> bool: ...


class LostContact(UserError):
    """Another process is gone, and did not say why."""

    @classmethod
    def because(cls, error: BaseException) -> LostContact:
        """Returns the error to raise in place of the one that a collective raised."""
        cause = first_line(error).partition(". This is typically")[0]
        return cls(f"lost contact with another process ({cause})")


class OthersFailed(Exception):
    """Another process has failed and says why: this one has only to end."""


class FailureStore:
    """The keys of one attempt of `world_size` processes on their store, as the process `rank` sees them.

    Keys: "attempt" is the newest attempt's name; "<attempt>/here/<rank>" counts how often that rank has accepted it;
    "<attempt>/complete" is there once all have; "<attempt>/failed" counts the processes that failed.
    """

    def __init__(self, store: Store, rank: int, world_size: int, *, attempt: str = "") -> None:
        """`attempt` is the name of the attempt, where it is known already."""
        self.store = store
        self.rank = rank
        self.world_size = world_size
        self.attempt = attempt

    def join_attempt(self) -> bool:
        """In rank 0, names the attempt; elsewhere, accepts its name. Returns False where there is no name yet.

        A name that this rank's number has accepted before belongs to an earlier attempt.
        """
        if self.rank == 0:
            if not self.attempt:
                self.attempt = uuid.uuid4().hex
                self.store.set("attempt", self.attempt)
            return True
        if self.store.check(["attempt"]):
            newest = self.store.get("attempt").decode()
            if newest != self.attempt and self.store.add(f"{newest}/here/{self.rank}", 1) == 1:
                self.attempt = newest
        return bool(self.attempt)

    def rendezvous(self) -> None:
        """Waits until all processes are here.

        Raises:
            OthersFailed: one of them fails before that.
            LostContact: some do not come.
        """
        self.join_attempt()
        others = [f"here/{rank}" for rank in range(1, self.world_size)]
        failed_attempt, failed_at = "", 0.0
        deadline = time.monotonic() + RENDEZVOUS_SECONDS
        while time.monotonic() < deadline:
            self.join_attempt()
            if self.has_failed():
                if failed_attempt != self.attempt:
                    failed_attempt, failed_at = self.attempt, time.monotonic()
                # The failure may be that of an earlier attempt: rank 0 knows, others give a new name time to appear.
                if self.rank == 0 or time.monotonic() > failed_at + LATE_SECONDS:
                    raise OthersFailed
            if self.rank == 0 and self._has(*others):
                self.store.set(f"{self.attempt}/complete", "")
            if self.attempt and self._has("complete"):
                return
            time.sleep(0.02)
        minutes = RENDEZVOUS_SECONDS / 60
        raise LostContact(f"not all {self.world_size} processes have come within {minutes:.0f} minutes")

    def has_failed(self) -> bool:
        """Returns True once one of the processes has claimed the report."""
        return bool(self.attempt) and self._has("failed")

    def claim_first_report(self, *, patience: float = 0.0) -> bool:
        """Returns True in the first process that fails, which then says why.

        A process whose failure looks like the consequence of another's first waits up to `patience` seconds for that
        one to claim.
        """
        wait_until(self.join_attempt, LATE_SECONDS)
        if not self.attempt:
            return True  # rank 0, which names the attempt, is not here to say anything
        wait_until(self.has_failed, patience)
        return self.store.add(f"{self.attempt}/failed", 1) == 1

    def _has(self, *keys: str) -> bool:
        return self.store.check([f"{self.attempt}/{key}" for key in keys]) if keys else True


class FailureMonitor:
    """A thread that ends this process when another one of its attempt has failed, until it is told to stop."""

    def __init__(
        self, failures: FailureStore, *, on_lost_store: Callable[[], None], end: Callable[[int], object] | None = None
    ) -> None:
        """
        Args:
            failures: polled by the thread, over a connection of its own: one that another thread uses may be busy.
            on_lost_store: called where the store is gone.
            end: replaces `end_process` in tests.
        """
        self._failures = failures
        self._on_lost_store = on_lost_store
        self._end = end or end_process
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="failure monitor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; nothing ends the process from then on."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _poll(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            try:
                failed = self._failures.has_failed()
            except RuntimeError:
                if not self._stop.is_set():
                    self._on_lost_store()
                return
            if failed:
                if not self._stop.wait(GRACE_SECONDS):
                    self._end(1)
                return


def end_process(status: int) -> NoReturn:
    """Ends this process at once, whatever its other threads wait for, and the processes that load its images."""
    with contextlib.suppress(Exception):
        for child in multiprocessing.active_children():
            child.terminate()
    os._exit(status)


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Waits for `condition` to hold, at most so many seconds; returns False where it does not in that time."""
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return met
