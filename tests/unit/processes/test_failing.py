"""The board where processes meet and fail; `tests/e2e/test_all_rank_failing.py` has real ones."""

from __future__ import annotations

import threading

import pytest

from isomorphic.processes import failing
from isomorphic.processes.failing import Board, LostContact, OthersFailed, Watch


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


def meeting(*boards: Board) -> None:
    """All of them meet."""
    threads = [threading.Thread(target=board.meet) for board in boards]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len({board.name for board in boards}) == 1 and boards[0].name


def test_only_the_first_that_fails_reports():
    store = Memory()
    boards = [Board(store, rank, 3) for rank in range(3)]
    meeting(*boards)
    assert not any(board.has_failed() for board in boards)
    assert [board.claim() for board in (boards[2], boards[0], boards[1])] == [True, False, False]
    assert all(board.has_failed() for board in boards)


def test_an_attempt_knows_nothing_of_those_before_it():
    store = Memory()
    before = [Board(store, rank, 2) for rank in range(2)]
    meeting(*before)
    assert before[1].claim()
    late = Board(store, 1, 2)
    assert not late.enter()  # the name that is there belongs to the attempt before
    now = [Board(store, 0, 2), late]
    meeting(*now)
    assert now[0].name != before[0].name and not now[1].has_failed()
    assert now[0].claim()


def test_a_meeting_ends_where_one_fails_before_it():
    store = Memory()
    first, second = Board(store, 0, 2), Board(store, 1, 2)
    first.enter()
    assert second.claim()
    with pytest.raises(OthersFailed):
        first.meet()


def test_those_who_do_not_come_are_waited_for_only_so_long(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(failing, "MEETING", 0.1)
    with pytest.raises(LostContact, match="not all 2 processes have come"):
        Board(Memory(), 0, 2).meet()


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    monkeypatch.setattr(failing, "LOOK_EVERY", 0.01)
    monkeypatch.setattr(failing, "GRACE", 0.01)
    return []


def watch(board: Board, ends: list[object]) -> Watch:
    watch = Watch(board, lost=lambda: ends.append("lost"), end=ends.append)
    watch.start()
    return watch


def test_a_watch_ends_the_process_when_another_fails(ends: list[object]):
    board = Board(Memory(), 0, 1)
    board.meet()
    thread = watch(board, ends)
    assert board.claim()
    thread._thread.join(timeout=30)
    assert ends == [1]


def test_a_watch_notices_that_the_store_is_gone(ends: list[object]):
    board = Board(Memory(), 0, 1)
    board.meet()
    board.store.gone = True  # pyright: ignore[reportAttributeAccessIssue]
    watch(board, ends)._thread.join(timeout=30)
    assert ends == ["lost"]


def test_a_watch_that_was_stopped_ends_nothing(ends: list[object]):
    board = Board(Memory(), 0, 1)
    board.meet()
    watch(board, ends).stop()
    assert board.claim()
    assert ends == []
