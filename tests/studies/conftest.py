"""Studies, as a user calls them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def run_study() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_study("coverage", *flags)` runs `python -m studies.coverage` in the repository, and waits."""

    def run(name: str, *flags: str | Path) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", f"studies.{name}", *map(str, flags)]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        return subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)

    return run
