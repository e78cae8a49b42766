"""Tells what a command is doing: a line when a stage begins, and how far it is where one takes long, on stderr.

    [   0 s] opening deit_tiny_patch16_224
    [   3 s] scoring
    [  13 s] scoring: 3 of 10
    [  23 s] scoring: 7 of 10

Results go to stdout, so a pipe gets them alone. All is silent until a command says `telling`: nothing is printed in
Python, and of several processes only the first one speaks. Where a person watches, what can be counted has a bar with
the time that is left, and signs of life are for the rest.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

SIGN_SECONDS = 10.0  # of silence before a sign of life
LATER_SIGN_SECONDS = 60.0  # the same, once a command has run for an hour: a log of days stays readable
FIRST_SIGN_SECONDS = 1.0  # until a command says that it is loading: a slow disk has torch after a minute
BAR_SECONDS = 2.0  # until the bar of some steps is shown: most are over by then


class Teller:
    """What is told of one command.

    Attributes:
        doing: its present stage.
        count: how much of that is done, of how many; None where nothing is counted.
        bars: how many a person can see now.
        around: the bar of the steps inside of which others are counted.
    """

    def __init__(self, doing: str, *, first_sign: float) -> None:
        self.doing = doing
        self.count: tuple[int, int | None] | None = None
        self.bars = 0
        self.around: Bar | None = None
        self.begun = time.monotonic()
        self.said_at = self.begun - SIGN_SECONDS + first_sign
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._live, name="progress", daemon=True)

    def start(self) -> None:
        """Starts the signs of life."""
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def line(self) -> str:
        """Returns what is being done, and since when the command runs."""
        done, total = self.count or (0, None)
        far = "" if self.count is None else _counted(done, total)
        return f"[{time.monotonic() - self.begun:4.0f} s] {self.doing}{far}"

    def say(self) -> None:
        if _is_first() and sys.stderr is not None:
            with contextlib.suppress(OSError, ValueError):  # nobody reads it
                print(f"{self.line()}\n", end="", file=sys.stderr, flush=True)  # in one piece
        self.said_at = time.monotonic()

    def is_silent(self) -> bool:
        """Returns True once nothing was said for so long that a sign of life is due, and no bar moves either."""
        now = time.monotonic()
        return not self.bars and now - self.said_at >= (SIGN_SECONDS if now - self.begun < 3600 else LATER_SIGN_SECONDS)

    def _live(self) -> None:
        while not self._stop.wait(0.5):
            if self.is_silent():
                self.say()


_teller: Teller | None = None


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def telling(doing: str = "working", *, first_sign: float = FIRST_SIGN_SECONDS) -> Iterator[None]:
    """Returns a context in which stages are told; inside of another one, it is that one's.

    Args:
        doing: what is being done until the first stage.
        first_sign: seconds until the first sign of life.
    """
    global _teller
    if _teller is not None:
        yield
        return
    _teller = Teller(doing, first_sign=first_sign)
    _teller.start()
    try:
        yield
    finally:
        _teller.stop()
        _teller = None


def stage(doing: str, *, said: bool = False) -> None:
    """Says what begins now, in a few words, unless another line has `said` it."""
    if _teller is not None:
        _teller.doing, _teller.count = doing, None
        if not said:
            _teller.say()


def has_spoken() -> None:
    """Notes that something else was printed just now, so that no sign of life is due."""
    if _teller is not None:
        _teller.said_at = time.monotonic()


class Bar(tqdm):
    """A progress bar where a person watches, and elsewhere the count in signs of life. A stage by its title.

    Only the first process has one.
    """

    def __init__(self, *args: Any, shown: bool = True, **options: Any) -> None:
        super().__init__(*args, disable=None if shown and _is_first() else True, **options)  # None: on a terminal
        self.title, self.length = options.get("desc", ""), options.get("total")
        around = _teller.around if _teller is not None else None
        if around is not None:  # "pruning in 20 steps: 8 of 20, tracing"
            self.title = f"{around.title}{_counted(around.counted, around.length)}, {self.title}"
        if self.length is None and hasattr(self.iterable, "__len__"):
            self.length = len(self.iterable)
        self.counted = options.get("initial", 0)
        self.told_by = None if self.disable else _teller  # whose signs of life it stands for
        if self.told_by:
            self.told_by.bars += 1
        if self.iterable is None:
            self._count(0)

    def __iter__(self) -> Iterator[Any]:
        self._count(0)
        for item in super().__iter__():
            yield item
            if self.disable:  # else `update` has counted it
                self._count(1)

    def update(self, n: float | None = 1) -> bool | None:
        self._count(int(n or 0))
        return super().update(n)

    def expect(self, more: int) -> None:
        """Notes that it is known now how many steps come next."""
        self.total = self.length = self.counted + more
        self._count(0)

    def close(self) -> None:
        teller: Teller | None = getattr(self, "told_by", None)  # tqdm may close what it has not opened
        if teller is not None:
            teller.bars -= 1
            teller.said_at = time.monotonic()
            self.told_by = None
        super().close()

    def _count(self, n: int) -> None:
        self.counted += n
        if _teller is not None and self.title:
            _teller.doing, _teller.count = self.title, (self.counted, self.length)


def _counted(done: int, total: int | None) -> str:
    return f": {done}" + (f" of {total}" if total else "")


@contextlib.contextmanager
def steps(doing: str, total: int | None = None, *, unit: str = "step") -> Iterator[Bar]:
    """Returns a bar to be updated inside of a stage: silent outside of a command, and shown when it takes long.

    Args:
        doing: its title.
        total: how many steps there are; None if nobody knows.
        unit: what is counted.
    """
    before = (_teller.doing, _teller.count, _teller.around) if _teller is not None else None
    shown = _teller is not None
    with Bar(total=total, desc=doing, unit=unit, leave=False, delay=BAR_SECONDS, shown=shown) as bar:
        if _teller is not None:
            _teller.around = bar
        yield bar
    if _teller is not None and before is not None:
        _teller.doing, _teller.count, _teller.around = before
