"""Commands and tools: as modules, and as a user calls them."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from isomorphic.commands import entry
from tests.processes import without_stages

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def run_tool() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_tool("convert", *flags)` runs tools/convert.py in the repository, and waits; stderr is without stages."""

    def run(name: str, *flags: str | Path) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, f"tools/{name}.py", *map(str, flags)]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
        done.stderr = without_stages(done.stderr)
        return done

    return run


@pytest.fixture
def run_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`run_command("prune", *flags)` runs prune.py in this process: (exit status, stdout, stderr without stages)."""

    def run(command: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{command}.py", *map(str, arguments)])
        status = 0
        capsys.readouterr()
        try:
            entry.run(importlib.import_module(command).main)
        except SystemExit as stop:
            status = int(stop.code or 0)
        output = capsys.readouterr()
        return status, output.out, without_stages(output.err)

    return run
