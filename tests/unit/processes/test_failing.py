"""The store where processes rendezvous and fail; `tests/e2e/test_all_rank_failing.py` has real ones."""

from __future__ import annotations

import threading

import pytest

from isomorphic.processes import failing
from isomorphic.processes.failing import FailureMonitor, FailureStore, LostContact, OthersFailed


class Memory:
    """A store in this process."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.gone = False

    def set(self, key: str, value: str, /) -> None:
        self.values[key] = value.encode()

    def get(self, key: str, /) -> bytes:
        return self.values[key]

    def add(self, key: str, amount: int, /) -> int:
        total = int(self.values.get(key, b"0")) + amount
        self.values[key] = str(total).encode()
        return total

    def check(self, keys: list[str], /) -> bool:
        if self.gone:
            raise RuntimeError("connection refused")
        return all(key in self.values for key in keys)


def rendezvous(*processes: FailureStore) -> None:
    """All of them at once, each in a thread."""
    threads = [threading.Thread(target=one.rendezvous) for one in processes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len({one.attempt for one in processes}) == 1 and processes[0].attempt


def test_only_the_first_that_fails_reports():
    store = Memory()
    processes = [FailureStore(store, rank, 3) for rank in range(3)]
    rendezvous(*processes)
    assert not any(one.has_failed() for one in processes)
    assert [one.claim_first_report() for one in (processes[2], processes[0], processes[1])] == [True, False, False]
    assert all(one.has_failed() for one in processes)


def test_an_attempt_knows_nothing_of_those_before_it():
    store = Memory()
    before = [FailureStore(store, rank, 2) for rank in range(2)]
    rendezvous(*before)
    assert before[1].claim_first_report()
    late = FailureStore(store, 1, 2)
    assert not late.join_attempt()  # the name that is there belongs to the attempt before
    now = [FailureStore(store, 0, 2), late]
    rendezvous(*now)
    assert now[0].attempt != before[0].attempt and not now[1].has_failed()
    assert now[0].claim_first_report()


def test_a_rendezvous_ends_where_one_fails_before_it():
    store = Memory()
    first, second = FailureStore(store, 0, 2), FailureStore(store, 1, 2)
    first.join_attempt()
    assert second.claim_first_report()
    with pytest.raises(OthersFailed):
        first.rendezvous()


def test_those_who_do_not_come_are_waited_for_only_so_long(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(failing, "RENDEZVOUS_SECONDS", 0.1)
    with pytest.raises(LostContact, match="not all 2 processes have come"):
        FailureStore(Memory(), 0, 2).rendezvous()


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    monkeypatch.setattr(failing, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(failing, "GRACE_SECONDS", 0.01)
    return []


def monitor(failures: FailureStore, ends: list[object]) -> FailureMonitor:
    thread = FailureMonitor(failures, on_lost_store=lambda: ends.append("lost"), end=ends.append)
    thread.start()
    return thread


def test_a_monitor_ends_the_process_when_another_fails(ends: list[object]):
    failures = FailureStore(Memory(), 0, 1)
    failures.rendezvous()
    thread = monitor(failures, ends)
    assert failures.claim_first_report()
    thread._thread.join(timeout=30)
    assert ends == [1]


def test_a_monitor_notices_that_the_store_is_gone(ends: list[object]):
    failures = FailureStore(Memory(), 0, 1)
    failures.rendezvous()
    failures.store.gone = True  # pyright: ignore[reportAttributeAccessIssue]
    monitor(failures, ends)._thread.join(timeout=30)
    assert ends == ["lost"]


def test_a_monitor_that_was_stopped_ends_nothing(ends: list[object]):
    failures = FailureStore(Memory(), 0, 1)
    failures.rendezvous()
    monitor(failures, ends).stop()
    assert failures.claim_first_report()
    assert ends == []
