"""Printing ends nothing: neither a reader that went away, nor a full disk, nor a stream that was never there."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from isomorphic.commands.output import lasting

REPOSITORY = Path(__file__).resolve().parents[3]


class Broken(io.StringIO):
    """A stream that takes nothing while `error` is set."""

    error: int | None = errno.EPIPE

    def write(self, text: str) -> int:
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        return super().write(text)


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_what_cannot_be_printed_is_told_once_on_the_other_stream(name: str, monkeypatch: pytest.MonkeyPatch):
    other = io.StringIO()
    monkeypatch.setattr(sys, "stdout", other)
    monkeypatch.setattr(sys, "stderr", other)
    broken = Broken()
    monkeypatch.setattr(sys, name, broken)
    with lasting("prune.py"):
        for number in range(3):
            print(number, file=getattr(sys, name), flush=True)
        broken.error = None  # there is room again
        print("later", file=getattr(sys, name), flush=True)
    assert getattr(sys, name) is broken
    assert other.getvalue() == f"prune.py: cannot print to {name} (Broken pipe); the work goes on\n"
    assert broken.getvalue() == "later\n"


def test_streams_that_were_closed_from_the_start(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with lasting("prune.py"):
        print("nowhere", flush=True)
        assert not sys.stderr.isatty()
    assert sys.stdout is None


COMMAND = """
import sys
from isomorphic.commands import entry, flags

def main():
    for number in range(10_000):
        print(f"line {number}")
        entry.say("and flushed")
    open(sys.argv[1], "w").close()

entry.run(main)
"""


def start(result: Path, **streams: Any) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", COMMAND, str(result)]
    return subprocess.Popen(words, cwd=REPOSITORY, text=True, **streams)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is what a full disk looks like")
def test_a_process_on_a_full_disk_has_its_result_and_exits_with_0(tmp_path: Path):
    with open("/dev/full", "w") as full:
        process = start(tmp_path / "a", stdout=full, stderr=subprocess.PIPE)
        both = start(tmp_path / "b", stdout=full, stderr=full)
        _, err = process.communicate(timeout=300)
        assert both.wait(timeout=300) == 0 and (tmp_path / "b").exists()
    assert process.returncode == 0 and (tmp_path / "a").exists()
    assert err == "-c: cannot print to stdout (No space left on device); the work goes on\n"


def test_a_process_whose_reader_went_away_has_its_result_and_exits_with_0(tmp_path: Path):
    process = start(tmp_path / "a", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr
    assert process.stdout.readline() == "line 0\n"  # as head -n 1 does
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=300) == 0 and (tmp_path / "a").exists()
    assert err == "-c: cannot print to stdout (Broken pipe); the work goes on\n"
