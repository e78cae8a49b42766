"""Running the commands as a user does: in a process of their own, or, to save its start, in this one."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.processes import without_stages
from tests.versions import IS_NEWEST_TORCH

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Finished:
    """What a command left behind: its exit status and what it printed, progress aside."""

    status: object
    out: str
    err: list[str]


def without_bars(text: str) -> list[str]:
    lines = [line for line in without_stages(text).splitlines() if line.strip() and "it/s]" not in line]
    if IS_NEWEST_TORCH:
        return lines
    return [line for line in lines if not line.startswith("No CUDA runtime is found")]  # torch 2.6 says so, compiling


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Finished]:
    """`start("prune.py", *flags, **environment)` runs python with these words in `tmp_path`."""

    def run(command: str, *words: str, **environment: str) -> Finished:
        first = [str(REPOSITORY / command)] if command.endswith(".py") else ["-m", command]
        done = subprocess.run(
            [sys.executable, *first, *words],
            cwd=tmp_path,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        return Finished(done.returncode, done.stdout, without_bars(done.stderr))

    return run


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Finished]:
    """`call("prune.py", *flags)` runs a command's main in this process, with `tmp_path` as the working folder."""
    monkeypatch.chdir(tmp_path)

    def run(command: str, *words: str) -> Finished:
        monkeypatch.setattr(sys, "argv", [command, *words])
        status: object = 0
        capsys.readouterr()
        try:
            runpy.run_path(str(REPOSITORY / command), run_name="__main__")
        except SystemExit as stop:
            status = stop.code
        printed = capsys.readouterr()
        return Finished(status, printed.out, without_bars(printed.err))

    return run
