"""TensorBoard and Weights & Biases, both optional, beside the run's own metrics.csv.

A missing package stops the run before it starts. A later failure (no login, no network, a full disk) never stops
training: it is reported once, in one line on stderr, and that tracker is switched off.
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

from isomorphic import progress
from isomorphic.errors import UserError, first_line
from isomorphic.files import atomic_write
from isomorphic.processes import distributed

ID_FILE = "wandb_id"
INIT_SECONDS = "30"  # where there is no network, training goes on without it
FINISH_SECONDS = "15"  # less than the time that the other processes wait for this one at the end

_NEEDS = {  # package: its flag, the module to import, and the attribute that is used
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
    """The open trackers of the main process; other processes have none."""

    def __init__(self, trackers: Iterable[Tracker] = ()) -> None:
        self._open = list(trackers)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the named values of optimizer step `step` to every open tracker. Never raises."""
        self._each(lambda tracker: tracker.log(step, values))

    def close(self) -> None:
        """Flushes and closes all trackers; later calls do nothing. Never raises."""
        self._each(lambda tracker: tracker.close())
        self._open = []

    def _each(self, call: Callable[[Tracker], object]) -> None:
        for tracker in tuple(self._open):
            try:
                call(tracker)
            except Exception as error:  # a tracker's library may raise anything
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
    """Returns the requested trackers, open in the main process; all processes call this.

    Args:
        folder: folder of the run; TensorBoard's files go to `tensorboard/` in it, those of W&B to `wandb/`.
        run_name: name of the run in W&B.
        config: configuration of the run in W&B, as JSON values.
        tensorboard: open TensorBoard.
        wandb_project: project in W&B; None opens no run there.
        resumed_step: number of finished optimizer steps. TensorBoard hides values that an earlier attempt logged for
            later steps; W&B continues the run whose id is in `folder`. With 0, both start anew.

    Raises:
        UserError: a package is not installed; raised in all processes.
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
    """Raises a UserError in all processes if the main one, which alone needs the packages, cannot import one."""
    packages = list(packages)
    if not packages:
        return
    found = [problem for package in packages if (problem := _problem(package))] if distributed.is_main() else []
    if problems := distributed.gather_objects(found)[0]:
        raise UserError(problems[0])


def _problem(package: str) -> str | None:
    """Returns a message for the user if a package cannot be used, else None."""
    flag, module, attribute = _NEEDS[package]
    advice = f"{flag} needs the package {package}: pip install {package}"
    try:
        # W&B leaves a folder of its name in the working directory, which Python would import as an empty package.
        return None if hasattr(importlib.import_module(module), attribute) else advice
    except ModuleNotFoundError as error:
        return advice if error.name == package else f"{advice} ({first_line(error)})"
    except Exception as error:  # a broken installation raises anything: protobuf alone has three kinds
        return f"{advice} ({first_line(error)})"


def _open_tensorboard(folder: Path, resumed_step: int) -> Tracker:
    writer_class = importlib.import_module("torch.utils.tensorboard").SummaryWriter
    # Older event files in the folder are hidden from this step on: completely if the run starts anew.
    purge_step = resumed_step + 1 if resumed_step else 0
    writer = writer_class(log_dir=str(folder / "tensorboard"), purge_step=purge_step)

    def log(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Tracker("tensorboard", log, writer.close)


def _open_wandb(folder: Path, project: str, run_name: str, config: dict[str, Any], resumed_step: int) -> Tracker:
    wandb = importlib.import_module("wandb")
    run_id = _run_id(folder, resumed_step)
    # Without this limit, a run ends only once the network is back. Data that was not sent stays in the folder.
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", FINISH_SECONDS)
    os.environ.setdefault("WANDB_INIT_TIMEOUT", INIT_SECONDS)
    progress.stage("connecting to Weights & Biases")
    run = wandb.init(project=project, name=run_name, dir=str(folder), config=config, id=run_id, resume="allow")
    # W&B's own step must increase, or values are dropped, as after resuming from an older state: log ours as a metric.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")

    def log(step: int, values: Mapping[str, float]) -> None:
        run.log({"step": step, **values})

    return Tracker("wandb", log, run.finish)


def _run_id(folder: Path, resumed_step: int) -> str:
    """Returns the stored id of a resumed run, else a new one, which it stores in the folder."""
    path = folder / ID_FILE
    if resumed_step and path.is_file() and (stored := path.read_text().strip()):
        return stored
    run_id = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    with atomic_write(path) as temporary:
        temporary.write_text(run_id + "\n")
    return run_id


def _warn(name: str, error: Exception) -> None:
    print(f"warning: {name} is off from here on ({first_line(error)}); training goes on", file=sys.stderr, flush=True)
