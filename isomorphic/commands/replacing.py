"""What is already there where a command is to write: only what can be made again in minutes is replaced unasked."""

from __future__ import annotations

import csv
import json
import mmap
from collections.abc import Callable
from pathlib import Path

from isomorphic import progress
from isomorphic.checkpoints.hub import CHECKPOINT
from isomorphic.checkpoints.open import read_header
from isomorphic.errors import UserError
from isomorphic.exporting.card import MARK, PROJECT
from isomorphic.provenance import file_sha256

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


def _not_exported(path: Path) -> str:
    with open(path, "rb") as file:
        if not path.stat().st_size:
            return "no exported model"
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return "" if content.find(MARK.encode()) >= 0 else "not written by this command"


def _not_of_a_hub_folder(path: Path) -> str:
    """Of model.safetensors, and of config.json and README.md, which are made of it."""
    if path.name != CHECKPOINT:
        return "" if f"library_name: {PROJECT}" in _plain(path) else "not written by this command"
    config = _plain(path.parent / "config.json")
    return "" if file_sha256(path) in config else "not the checkpoint of a config.json beside it"


def _plain(path: Path) -> str:
    """Returns a text without quotes, so that JSON reads like YAML; "" where there is none."""
    return path.read_text(encoding="utf-8", errors="replace").replace('"', "") if path.is_file() else ""


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
    "OUT": _not_exported,
    "OUT/": _not_of_a_hub_folder,
}
