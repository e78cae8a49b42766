"""How a command begins, and what happens when it fails."""

from __future__ import annotations

import random
import subprocess
import sys
import traceback

import numpy as np
import pytest
import torch

from isomorphic.commands import entry
from isomorphic.errors import UserError
from isomorphic.processes import distributed
from tests.unit.commands.conftest import parse


def test_start_seeds_everything():
    def draw(seed: str) -> tuple[float, float, float]:
        device = entry.start(parse("--model", "x", "--seed", seed, "--device", "cpu"))
        assert device == torch.device("cpu")
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    assert draw("3") == draw("3") != draw("4")
    entry.start(parse("--model", "x", "--seed", str(2**32 + 1), "--device", "cpu"))


def test_auto_is_the_cpu_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert entry.pick_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("name", ["banana", "cuda:99", "", "cpu:x", "meta"])
def test_devices_that_are_not_there(name: str):
    with pytest.raises(UserError, match=f"--device {name}: not to be had here") as error:
        entry.pick_device(name)
    assert "\n" not in str(error.value)


def test_only_the_first_process_talks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    entry.say("first")
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    entry.say("second")
    assert capsys.readouterr().out == "first\n"


def failing(error: BaseException) -> tuple[int, type[BaseException]]:
    def main() -> None:
        raise error

    with pytest.raises(BaseException) as stop:
        entry.run(main)
    return getattr(stop.value, "code", None), type(stop.value)  # type: ignore[return-value]


def test_what_the_user_can_put_right_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/prune.py"])
    assert failing(UserError("no such\nfolder")) == (1, SystemExit)
    assert capsys.readouterr().err == "prune.py: no such folder\n"
    assert failing(KeyboardInterrupt()) == (130, SystemExit)
    assert capsys.readouterr().err == "prune.py: interrupted\n"


def test_what_a_loader_process_found_is_one_line_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", ["evaluate.py"])
    try:
        raise UserError("cannot read image a.png")
    except UserError:
        formatted = traceback.format_exc()
    failing(UserError(f"Caught UserError in DataLoader worker process 0.\nOriginal {formatted}"))
    assert capsys.readouterr().err == "evaluate.py: cannot read image a.png\n"


def test_bugs_keep_their_traceback():
    assert failing(KeyError("bug"))[1] is KeyError
    assert failing(RuntimeError("bug"))[1] is RuntimeError


def test_a_command_that_succeeds_returns():
    entry.run(lambda: None)


def test_a_dead_loader_process_ends_the_command_at_once():
    """torch may wait for the dead one's lock when Python ends; here something waits for sure."""
    script = """
import atexit, time
from isomorphic.commands import entry, flags, opening
from isomorphic.data.workers import DeadWorker

def main():
    atexit.register(time.sleep, 1000)
    raise DeadWorker("a data loader process died")

entry.run(main)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr == "-c: a data loader process died\n"
