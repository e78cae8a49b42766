"""What a command tells of its stages: by the first process only, on stderr, and never in Python."""

from __future__ import annotations

import io
import re
import sys
import time

import pytest

from isomorphic import progress
from isomorphic.progress import Bar, Teller, stage, steps, telling
from tests.processes import without_stages


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of day, which the test sets."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_stage_is_one_line_on_stderr_with_the_time(capsys: pytest.CaptureFixture[str], clock: list[float]):
    with telling():
        stage("opening resnet50")
        clock[0] += 12.4
        stage("scoring")
        stage("timing", said=True)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "[   0 s] opening resnet50\n[  12 s] scoring\n"
    assert without_stages(f"a\n{printed.err}[b]\n") == "a\n[b]\n"


def test_nothing_is_told_outside_a_command_nor_by_other_processes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    stage("opening")
    monkeypatch.setenv("RANK", "1")
    with telling():
        stage("opening")
        assert list(Bar(range(3), desc="Scoring")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_a_sign_of_life_is_due_after_ten_seconds_of_silence(clock: list[float]):
    teller = Teller("tracing", first_sign=10.0)
    clock[0] += 9.9
    assert not teller.is_silent()
    clock[0] += 0.1
    assert teller.is_silent()
    teller.say()
    assert not teller.is_silent()
    clock[0] += 3600
    teller.say()
    clock[0] += 30
    assert not teller.is_silent()
    clock[0] += 30
    assert teller.is_silent()


def test_a_sign_of_life_comes_by_itself_where_nobody_watches(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(progress, "SIGN_SECONDS", 0.0)
    said = ""
    with telling():
        stage("tracing")
        deadline = time.monotonic() + 60
        while said.count("tracing") < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
            said += capsys.readouterr().err
    assert re.fullmatch(r"(\[ *\d+ s\] tracing\n){2,}", said)


@pytest.mark.parametrize("kind", ["a loader", "an iterator", "by hand"])
def test_what_is_counted_stands_in_the_sign_of_life(kind: str, capsys: pytest.CaptureFixture[str]):
    with telling():
        assert progress._teller is not None
        if kind == "by hand":
            with Bar(total=4, desc="Scoring") as bar:
                bar.update(3)
        else:
            bar = iter(Bar(range(4) if kind == "a loader" else iter(range(4)), desc="Scoring"))
            assert [next(bar) for _ in range(4)] == [0, 1, 2, 3]  # the fourth is under way
        progress._teller.say()
    far = "3" if kind == "an iterator" else "3 of 4"
    assert capsys.readouterr().err == f"[   0 s] Scoring: {far}\n"


def test_the_first_sign_may_come_sooner_and_the_stages_are_one_command_s(
    capsys: pytest.CaptureFixture[str], clock: list[float]
):
    with telling("loading", first_sign=2.0):
        teller = progress._teller
        assert teller is not None and not teller.is_silent()
        clock[0] += 2
        assert teller.is_silent() and teller.line() == "[   2 s] loading"
        with telling():
            assert progress._teller is teller
            stage("opening")
        assert progress._teller is teller
    assert progress._teller is None
    assert capsys.readouterr().err.endswith("[   2 s] opening\n")


def test_other_lines_count_as_signs_of_life(clock: list[float]):
    with telling():
        clock[0] += 60
        assert progress._teller is not None and progress._teller.is_silent()
        progress.has_spoken()
        assert not progress._teller.is_silent()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def watched(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A person watches stderr from now on."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


def test_on_a_terminal_bars_move_and_signs_of_life_are_for_the_rest(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
):
    terminal = watched(monkeypatch)
    with telling():
        stage("scoring")
        assert progress._teller is not None
        bar = iter(Bar(range(3), desc="Scoring", mininterval=0))
        next(bar)
        clock[0] += 60
        assert progress._teller.bars == 1 and not progress._teller.is_silent(), "the bar is to be seen"
        assert list(bar) == [1, 2]
        assert progress._teller.count == (3, 3)
        assert progress._teller.bars == 0 and not progress._teller.is_silent(), "it has moved just now"
        clock[0] += 10
        assert progress._teller.is_silent(), "ranking has no bar"
    assert terminal.getvalue().startswith("[   0 s] scoring\n") and "3/3" in terminal.getvalue()


def test_a_command_that_loads_speaks_within_a_second(clock: list[float]):
    with telling("loading"):
        assert progress._teller is not None and not progress._teller.is_silent()
        clock[0] += 1
        assert progress._teller.is_silent() and progress._teller.line() == "[   1 s] loading"


def test_steps_are_counted_inside_of_a_stage(capsys: pytest.CaptureFixture[str]):
    with telling():
        stage("checking the plan", said=True)
        assert progress._teller is not None
        lines = []
        with steps("tracing", unit="call") as bar:
            bar.update(7)
            lines.append(progress._teller.line())
            bar.expect(20)  # the first run is over, and the second one makes as many calls
            bar.update()
            lines.append(progress._teller.line())
        lines.append(progress._teller.line())
    stages = ["tracing: 7", "tracing: 8 of 27", "checking the plan"]
    assert lines == [f"[   0 s] {told}" for told in stages]
    assert capsys.readouterr() == ("", "")


def test_steps_inside_of_steps_tell_both(clock: list[float]):
    with telling():
        stage("pruning")
        teller = progress._teller
        assert teller is not None
        with steps("pruning in 20 steps", 20) as outer:
            outer.update(8)
            with steps("searching", unit="plan") as inner:
                inner.update(2)
                assert teller.line() == "[   0 s] pruning in 20 steps: 8 of 20, searching: 2"
            outer.update()
            assert teller.line() == "[   0 s] pruning in 20 steps: 9 of 20"
            list(Bar(range(3), desc="Scoring"))
            assert teller.line() == "[   0 s] pruning in 20 steps: 9 of 20, Scoring: 3 of 3"
        assert teller.line() == "[   0 s] pruning"


def test_steps_that_take_long_show_what_is_left_and_none_are_shown_in_python(monkeypatch: pytest.MonkeyPatch):
    terminal = watched(monkeypatch)
    with steps("hashing", 4) as bar:
        bar.update()
    with telling(), steps("hashing", 4) as bar:
        bar.update(3)
    assert terminal.getvalue() == "", "they took no time"
    monkeypatch.setattr(progress, "BAR_SECONDS", 0.0)
    with telling(), steps("hashing", 4, unit="MiB") as bar:
        bar.mininterval = 0
        bar.update(3)
    assert re.search(r"hashing: +75%.* 3/4 \[\d\d:\d\d<\d\d:\d\d, .*MiB", terminal.getvalue())
