"""TensorBoard and Weights & Biases beside the run's own metrics.csv: both optional, neither ever in training's way.

A package that is not installed stops the run before it starts. Whatever fails later (no login, no network, a full disk)
is one line on stderr, once; that tracker is off from then on, and training goes on.
"""

from __future__ import annotations

import functools
import importlib
import os
import secrets
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isomorphic.errors import UserError, first_line
from isomorphic.files import atomic_write
from isomorphic.processes import distributed

ID_FILE = "wandb_id"
FINISH_SECONDS = "15"  # less than processes that wait for this one are given to end

_NEEDS = {  # package: the flag that asks for it, the module that is used, and what in it
    "tensorboard": ("--tensorboard", "torch.utils.tensorboard", "SummaryWriter"),
    "wandb": ("--wandb-project", "wandb", "init"),
}


@dataclass(frozen=True)
class Tracker:
    """One open tracker; both calls may raise anything."""

    name: str
    log: Callable[[int, Mapping[str, float]], object]
    close: Callable[[], object]


class Trackers:
    """What is open, in the main process; none elsewhere."""

    def __init__(self, trackers: Iterable[Tracker] = ()) -> None:
        self._open = list(trackers)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hands values, by name, of optimizer step `step` to every open tracker. Never raises."""
        self._each(lambda tracker: tracker.log(step, values))

    def close(self) -> None:
        """Writes out what is still held; nothing is logged from then on. Never raises, and may be called again."""
        self._each(lambda tracker: tracker.close())
        self._open = []

    def _each(self, call: Callable[[Tracker], object]) -> None:
        for tracker in tuple(self._open):
            try:
                call(tracker)
            except Exception as error:  # whatever another's library and its network come up with
                self._open.remove(tracker)
                _warn(tracker.name, error)


def open_trackers(
    folder: Path,
    run_name: str,
    config: dict[str, Any],
    *,
    tensorboard: bool,
    wandb_project: str | None,
    resumed_step: int = 0,
) -> Trackers:
    """Opens the trackers that were asked for, in the main process; all processes call it.

    Args:
        folder: of the run; event files go to `tensorboard/` in it, those of W&B to `wandb/`.
        run_name: as shown by W&B.
        config: what W&B shows as the run's configuration, as JSON values.
        tensorboard: whether to open TensorBoard's.
        wandb_project: W&B's project; None opens none.
        resumed_step: optimizer steps that are done. What an earlier attempt logged for later ones is hidden in
            TensorBoard; W&B goes on with the run whose id is in `folder`. With 0, both start anew.

    Raises:
        UserError: a package is not installed; in all processes.
    """
    openers: dict[str, Callable[[], Tracker]] = {}
    if tensorboard:
        openers["tensorboard"] = functools.partial(_open_tensorboard, folder, resumed_step)
    if wandb_project:
        openers["wandb"] = functools.partial(_open_wandb, folder, wandb_project, run_name, config, resumed_step)
    _check_installed(openers)
    if not distributed.is_main():
        return Trackers()
    trackers = []
    for name, opener in openers.items():
        try:
            trackers.append(opener())
        except Exception as error:  # no login, no network, no space …
            _warn(name, error)
    return Trackers(trackers)


def _check_installed(packages: Iterable[str]) -> None:
    """Raises in all processes what the main one finds: only that one needs the packages, but none can go on alone."""
    packages = list(packages)
    if not packages:
        return
    found = [problem for package in packages if (problem := _problem(package))] if distributed.is_main() else []
    if problems := distributed.gather_objects(found)[0]:
        raise UserError(problems[0])


def _problem(package: str) -> str | None:
    """What keeps a package from being used, for its user; None where nothing does."""
    flag, module, attribute = _NEEDS[package]
    advice = f"{flag} needs the package {package}: pip install {package}"
    try:
        # A folder of that name in the working directory, as W&B leaves them, is imported as an empty package.
        return None if hasattr(importlib.import_module(module), attribute) else advice
    except ModuleNotFoundError as error:
        return advice if error.name == package else f"{advice} ({first_line(error)})"
    except Exception as error:  # a broken installation raises anything: protobuf alone has three kinds
        return f"{advice} ({first_line(error)})"


def _open_tensorboard(folder: Path, resumed_step: int) -> Tracker:
    writer_class = importlib.import_module("torch.utils.tensorboard").SummaryWriter
    # Hides the steps from this one on of older event files in the folder: all of them for a run that starts anew.
    purge_step = resumed_step + 1 if resumed_step else 0
    writer = writer_class(log_dir=str(folder / "tensorboard"), purge_step=purge_step)

    def log(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Tracker("tensorboard", log, writer.close)


def _open_wandb(folder: Path, project: str, run_name: str, config: dict[str, Any], resumed_step: int) -> Tracker:
    wandb = importlib.import_module("wandb")
    run_id = _run_id(folder, resumed_step)
    # Without a limit, the end of a run waits for a network that has gone. What was not sent stays in the folder.
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", FINISH_SECONDS)
    run = wandb.init(project=project, name=run_name, dir=str(folder), config=config, id=run_id, resume="allow")
    # W&B drops values of a step of its own that is not above the last one, as after going on from an older state.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")

    def log(step: int, values: Mapping[str, float]) -> None:
        run.log({"step": step, **values})

    return Tracker("wandb", log, run.finish)


def _run_id(folder: Path, resumed_step: int) -> str:
    """The id in the folder where a run goes on, else a new one, which is stored there."""
    path = folder / ID_FILE
    if resumed_step and path.is_file() and (stored := path.read_text().strip()):
        return stored
    run_id = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    with atomic_write(path) as temporary:
        temporary.write_text(run_id + "\n")
    return run_id


def _warn(name: str, error: Exception) -> None:
    print(f"warning: {name} is off from here on ({first_line(error)}); training goes on", file=sys.stderr, flush=True)
