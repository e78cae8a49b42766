"""Training states: saving and loading everything that a resumed run needs to continue exactly.

A state holds the model, its moving average, the optimizer, the gradient scaler, the progress of the run and its epoch,
the best result, and the random state of every process. The schedule and the order of the images are functions of the
epoch and the position in it, so they need not be stored. A file is plain data: it is written atomically and read with
`weights_only=True`. `state.pt` is the newest state, `state.1.pt` the one before it, and so on.
"""

from __future__ import annotations

import math
import os
import pickle
import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from isomorphic.errors import UserError
from isomorphic.files import atomic_write
from isomorphic.masks import Masks
from isomorphic.processes import distributed
from isomorphic.training.meter import LossMeter
from isomorphic.training.parallel import load_model_state, load_optimizer_state, model_state, optimizer_state
from isomorphic.training.recipe import LoopRecipe, default_values
from isomorphic.training.sampling import mix_seeds

FORMAT = 2
# Settings that say how long a run is.
LENGTHS = ("epochs", "max_steps")
# Settings that may be the path of a file, and those that hold its checksum.
SOURCES = {"model": "parent", "teacher_model": "teacher"}
COUNTERS = ("epoch", "step", "images", "loss_sum", "best_top1", "best_loss", "best_epoch")


class Stateful(Protocol):
    """What has a state of plain values and tensors."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class TrainState:
    """Everything that training changes.

    `epoch` and `step` count finished epochs and steps; `images` and `loss_sum` are sums over the current epoch and all
    processes. The best values are those of the epoch (from 1) with the highest validation top-1, the first one if
    several tie. `masks` are those of the model that training started from, and never change. `regularizer` is what
    makes the model sparse, if anything does.
    """

    model: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None = None
    epoch: int = 0
    step: int = 0
    images: int = 0
    loss_sum: float = 0.0
    best_top1: float = -1.0
    best_loss: float = 0.0
    best_epoch: int = 0
    masks: Masks = field(default_factory=Masks)
    regularizer: Stateful | None = None

    @property
    def result(self) -> nn.Module:
        """The model to validate and save: the moving average if there is one, else the trained model."""
        return self.ema.module if self.ema else self.model

    def models(self) -> list[nn.Module]:
        """Returns the model, and its moving average if there is one."""
        return [self.model, self.ema.module] if self.ema else [self.model]

    def is_finished(self, loop: LoopRecipe) -> bool:
        """Returns True if all epochs, or `max_steps` steps, are done, and the last epoch is validated."""
        out_of_steps = loop.max_steps is not None and self.step >= loop.max_steps
        return self.epoch >= loop.epochs or (out_of_steps and self.images == 0)

    def is_best(self) -> bool:
        """Returns True if the last finished epoch is the best one."""
        return self.best_epoch == self.epoch

    def take_sums(self, meter: LossMeter) -> None:
        """Takes over the sums of the current epoch from its settled meter."""
        self.images, self.loss_sum = meter.images, meter.loss_sum

    def end_epoch(self, top1: float, loss: float) -> None:
        """Counts the finished epoch, and records its validation top-1 and loss if they are the best."""
        self.epoch, self.images, self.loss_sum = self.epoch + 1, 0, 0.0
        if top1 > self.best_top1:
            self.best_top1, self.best_loss, self.best_epoch = top1, loss, self.epoch


@dataclass(frozen=True)
class SavedState:
    """A training state as read from a file.

    Attributes:
        path: the file.
        content: see `save_state`.
        notes: messages to the user about newer files that were skipped, one line each.
    """

    path: Path
    content: dict[str, Any]
    notes: tuple[str, ...] = ()


def seed_process(*seeds: int) -> None:
    """Seeds this process's random generators, differently in each process.

    Called once all processes have built the same model: mixup and dropout should differ between them.
    """
    seed = mix_seeds(*seeds, distributed.rank())
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def save_state(
    path: Path,
    state: TrainState,
    settings: dict[str, Any],
    layout: dict[str, int],
    device: torch.device,
    *,
    keep: int = 1,
) -> None:
    """Writes `state` with the run's settings; the `keep` - 1 states before it are renamed and stay.

    Every process calls this; the first one writes. `layout` is how the images of a step are split: over processes,
    batches and accumulation.
    """
    content = {
        "format": FORMAT,
        "settings": settings,
        "layout": layout,
        "model": model_state(state.model),
        "ema": model_state(state.ema.module) if state.ema else None,
        "optimizer": optimizer_state(state.model, state.optimizer),
        "scaler": state.scaler.state_dict(),
        "counters": {name: getattr(state, name) for name in COUNTERS},
        "random_states": distributed.gather_objects(_random_state(device)),
        "regularizer": state.regularizer.state_dict() if state.regularizer else None,
    }
    if not distributed.is_main():
        return
    with atomic_write(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # torch raises this for a full disk
            raise UserError(f"cannot write {path}: {_reason(error)}") from error
        _make_room(path, keep)


def find_state(resume: str | None, folder: Path) -> SavedState | None:
    """Reads the training state that `--resume` asks for; returns None if there is none.

    For "auto" it is the newest readable one of the run's folder, otherwise the named file. Every process calls this.

    Raises:
        UserError: the named file is missing or damaged; the folder has only damaged states; or the processes find
            different states.
    """
    found = _find_here(resume, folder)
    progress = found and tuple(found.content["counters"][name] for name in ("epoch", "step"))
    if len(set(distributed.gather_objects(progress))) > 1:
        raise UserError(f"not all processes see the same states in {folder}: all hosts must share --output-dir")
    return found


def _find_here(resume: str | None, folder: Path) -> SavedState | None:
    if resume != "auto":
        return _named_state(Path(resume)) if resume else None
    torn: list[str] = []
    for path in kept_states(folder):
        try:
            return SavedState(path, _read(path), tuple(torn))
        except UserError as error:
            torn.append(f"skipping it: {error}")
    if torn:
        raise UserError(
            f"no state in {folder} is whole: remove its state*.pt to train anew, or resume from another file"
        )
    return None


def _named_state(path: Path) -> SavedState:
    """Returns the state that a user named; a file that is none may be dear to them."""
    if path.suffix == ".safetensors":
        raise UserError(
            f"{path} holds weights and no training state to go on with: for that name a state.pt; to start from these "
            f"weights leave out --resume and pass --model {path}"
        )
    if not path.is_file():
        raise UserError(f"no such training state: {path} (--resume auto starts anew where there is none)")
    try:
        return SavedState(path, _read(path))
    except UserError as error:
        raise UserError(f"{error}: resume from another file, or leave out --resume to train anew") from error


def kept_states(folder: Path) -> Iterator[Path]:
    """Returns the paths of the training states in a run's folder, the newest first."""
    ages = {0: folder / "state.pt"}
    for path in folder.glob("state.*.pt"):
        age = path.name.split(".")[1]
        if age.isdecimal():
            ages[int(age)] = path
    return (ages[age] for age in sorted(ages) if ages[age].exists())


def load_state(
    saved: SavedState,
    state: TrainState,
    settings: dict[str, Any],
    layout: dict[str, int],
    device: torch.device,
    *,
    may_grow: Collection[str] = (),
) -> list[str]:
    """Loads a saved state into `state` and this process's random generators; returns notes for the user.

    The settings in `may_grow` may differ where the run is to be longer than the saved one was (see `is_longer`).

    Raises:
        UserError: the saved state belongs to a run with other settings; the message names them.
    """
    content = saved.content
    _check_settings(saved.path, content["settings"], settings, may_grow)
    load_model_state(state.model, content["model"])
    if state.ema:
        load_model_state(state.ema.module, content["ema"])
    load_optimizer_state(state.model, state.optimizer, content["optimizer"])
    state.scaler.load_state_dict(content["scaler"])
    if state.regularizer:
        state.regularizer.load_state_dict(content["regularizer"])
    for name in COUNTERS:
        setattr(state, name, content["counters"][name])
    return _resume_random_state(state, content, settings, layout, device)


def _resume_random_state(
    state: TrainState, content: dict[str, Any], settings: dict[str, Any], layout: dict[str, int], device: torch.device
) -> list[str]:
    then = content["layout"]
    if then == layout:
        _set_random_state(content["random_states"][distributed.rank()], device)
        return []
    seed_process(settings["seed"], state.step)
    changes = ", ".join(f"{name} {then[name]} (now {layout[name]})" for name in layout if then[name] != layout[name])
    return [f"{changes}: the images of each step stay the same, the random numbers of dropout and mixup do not"]


def _make_room(path: Path, keep: int) -> None:
    """Renames the existing states, each to the next older name, and removes those beyond `keep`."""
    places = [path] + [path.with_suffix(f".{age}{path.suffix}") for age in range(1, keep)]
    for newer, older in reversed(list(pairwise(places))):
        if newer.exists():
            os.replace(newer, older)
    for older in kept_states(path.parent):
        if older not in places:
            older.unlink()


def _read(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, LookupError) as error:
        raise UserError(f"{path} is not a whole training state") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a training state of this version")
    return content


def _check_settings(path: Path, then: dict[str, Any], now: dict[str, Any], may_grow: Collection[str]) -> None:
    defaults = default_values()  # a state of before there was such a setting belongs to a run with its default
    then = {name: defaults[name] for name in now if name in defaults} | then
    names = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    names = [name for name in names if not (name in SOURCES and _is_same_file(name, then, now))]
    longer = is_longer(then, now)
    if any(name not in may_grow or not longer for name in names):
        changes = ", ".join(f"{name} {then.get(name)} (now {now.get(name)})" for name in names)
        hint = " (--extend lets a run go on for more epochs)" if longer and "model_ema_decay" not in may_grow else ""
        raise UserError(
            f"{path} belongs to a run with other settings: {changes}; repeat those, or choose another --output-dir"
            f"{hint}"
        )


def _is_same_file(name: str, then: dict[str, Any], now: dict[str, Any]) -> bool:
    """Returns True if a model comes from the same file as then, which may be addressed by another path."""
    checksum = then.get(SOURCES[name])
    return (
        checksum is not None
        and checksum == now.get(SOURCES[name])
        and Path(str(then.get(name))).name == Path(str(now.get(name))).name
    )


def is_longer(then: dict[str, Any], now: dict[str, Any]) -> bool:
    """Returns True if settings ask for more epochs or steps than others, and less of neither. No limit is most."""
    before, after = ([math.inf if each.get(name) is None else each[name] for name in LENGTHS] for each in (then, now))
    return before != after and all(more >= less for less, more in zip(before, after, strict=True))


def _reason(error: RuntimeError) -> str:
    """Returns the operating system's error message, which torch hides, or a guess if there is none."""
    cause = error.__context__
    return (cause.strerror if isinstance(cause, OSError) else None) or "is the disk full?"


def _random_state(device: torch.device) -> dict[str, Any]:
    numpy_state = np.random.get_state(legacy=False)
    states: dict[str, Any] = {
        "cpu": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": numpy_state | {"state": numpy_state["state"] | {"key": numpy_state["state"]["key"].tolist()}},
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_random_state(states: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    random.setstate(states["python"])
    key = np.array(states["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state(states["numpy"] | {"state": states["numpy"]["state"] | {"key": key}})
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
