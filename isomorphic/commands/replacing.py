"""What is already there where a command is to write: only what can be made again in minutes is replaced unasked."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

from isomorphic import progress
from isomorphic.checkpoints.open import read_header
from isomorphic.errors import UserError

RESULT_KEYS = {"model", "gmacs"}  # of every results file
PLAN_KEYS = {"format", "groups", "kept_blocks"}


def check_outputs(outputs: dict[str, str | None], *, overwrite: bool) -> None:
    """Makes sure that files to write replace nothing but what the same command has written before.

    Args:
        outputs: paths, or None, by one of the flags of `JUDGES`.
        overwrite: whatever is there may go.

    Raises:
        UserError: one of them is a trained model, or not a file of these commands.
    """
    for flag, path in outputs.items():
        if path is None or not Path(path).is_file():
            continue
        found = "" if overwrite else _judge(flag, Path(path))
        if found:
            raise UserError(f"{path} is {found}: choose another {flag}, or replace it by --overwrite")
        progress.stage(f"{path} is there already and will be replaced")


def _judge(flag: str, path: Path) -> str:
    try:
        return JUDGES[flag](path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _trained(path: Path) -> str:
    try:
        origin = read_header(path).get("provenance")
    except UserError:
        return "no checkpoint of a pruned model"
    epoch = origin.get("epoch") if isinstance(origin, dict) else None
    return "" if epoch is None else f"a trained model (of epoch {epoch})"


def _no_results(path: Path) -> str:
    keys = _columns(path) if path.suffix == ".csv" else _json_keys(path)
    return "" if keys >= RESULT_KEYS else "no results file"


def _no_plan(path: Path) -> str:
    return "" if _json_keys(path) >= PLAN_KEYS else "no plan"


def _no_picture(path: Path) -> str:
    with open(path, "rb") as file:
        return "" if b"Matplotlib" in file.read(1000) else "no picture of scores"


def _json_keys(path: Path) -> set[str]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        return set()
    return set(found) if isinstance(found, dict) else set()


def _columns(path: Path) -> set[str]:
    with open(path, newline="", errors="replace") as file:
        return set(next(csv.reader(file), []))


# Of each flag: what a file is that must not be replaced, "" for one that the command writes in minutes.
JUDGES: dict[str, Callable[[Path], str]] = {
    "--save-as": _trained,
    "OUT.safetensors": _trained,
    "--results-file": _no_results,
    "--plan-file": _no_plan,
    "--report": _no_picture,
}
