"""The flags that a script of scripts/ gives its command, read from the call itself: a recorder stands in for python."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from isomorphic.commands.prune_flags import parse_args
from isomorphic.commands.train_flags import parse_convnext_args, parse_finetune_args
from isomorphic.errors import UserError

PRUNING_SCRIPTS = Path("scripts/pruning")
TRAINING_SCRIPTS = Path("scripts/finetuning")
TRAINING_PARSERS: dict[str, Callable[[Sequence[str]], Namespace]] = {
    "finetune.py": parse_finetune_args,
    "convnext_train.py": parse_convnext_args,
}
# Stands in for python: says with which words it was called.
RECORDER = """#!/usr/bin/env bash
printf '%s\\0' "$@"
"""


class Call(NamedTuple):
    """What a script gave the interpreter, and how the script itself ended."""

    words: list[str]
    status: int
    stderr: str


def record(script: Path, *flags: str) -> Call:
    """Runs a script with `flags` of its own and the recorder for python."""
    with tempfile.TemporaryDirectory() as folder:
        recorder = Path(folder, "python")
        recorder.write_text(RECORDER)
        recorder.chmod(0o755)
        environment = os.environ | {"ISOMORPHIC_PYTHON": str(recorder)}
        command = ["bash", str(script), *flags]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return Call(done.stdout.split("\0")[:-1], done.returncode, done.stderr)


def read_pruning_script(path: Path) -> Namespace:
    """The flags that a script gives prune.py, its published MACs among them.

    Raises:
        UserError: its comment does not say which MACs to ask for, or it calls something else.
    """
    target = re.search(r"append --target-macs (\S+)", path.read_text(encoding="utf-8"))
    if not target:
        raise UserError(f"{path} does not say which --target-macs to append")
    call = record(path, "--target-macs", target[1])
    if call.status or call.words[:1] != ["prune.py"]:
        raise UserError(f"{path} does not call prune.py: {call.stderr.strip() or call.words[:1]}")
    return parse_args(call.words[1:])


def find_pruning_script(name: str) -> Path:
    """Returns a script by its name in scripts/pruning, or by its path.

    Raises:
        UserError: there is no such script.
    """
    found = next((path for path in (Path(name), PRUNING_SCRIPTS / f"{name}.sh") if path.is_file()), None)
    if not found:
        raise UserError(f"{name}: no such script in {PRUNING_SCRIPTS}, and no file")
    return found


def prune(script: Path, folder: Path, *more: str) -> Path:
    """Returns the checkpoint that a script makes of random weights, by L1 to its published MACs; `more` flags go last.

    What is in `folder` already is not made again.

    Raises:
        UserError: it fails; its last line is the reason.
    """
    path = folder / f"{'_'.join([script.stem, *(word.strip('-') for word in more)])}.safetensors"
    if path.exists():
        return path
    macs = round(read_pruning_script(script).target_macs.value)
    flags = ["--pruning-type", "l1", "--target-macs", str(macs), "--save-as", str(path)]
    dry = ["--no-pretrained", "--dataset", "synthetic", "--device", "cpu"]
    environment = os.environ | {"ISOMORPHIC_PYTHON": sys.executable}
    command = ["bash", str(script), *flags, *dry, *more]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{script} failed: {done.stderr.strip().splitlines()[-1:]}")
    return path


def read_training_script(path: Path, more: Sequence[str]) -> Namespace:
    """The flags that a script gives a training command, and `more` after them.

    Raises:
        UserError: it calls something else.
    """
    words = record(path).words
    position = next((number for number, word in enumerate(words) if word in TRAINING_PARSERS), None)
    if position is None:
        raise UserError(f"{path} calls none of {', '.join(TRAINING_PARSERS)}")
    return TRAINING_PARSERS[words[position]]([*words[position + 1 :], *more])
