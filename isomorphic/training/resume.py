"""What a run must remember to go on as if nothing had happened, and the file that it is kept in.

Model, optimizer, gradient scaler, epoch, step, best result, and the random state of every process. The schedule
and the order of the images are functions of the epoch and need no memory. The file is plain data: it is written
atomically and read with `weights_only=True`.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from isomorphic import distributed
from isomorphic.errors import UserError
from isomorphic.files import atomic_write
from isomorphic.training.recipe import LoopRecipe
from isomorphic.training.sampling import mix_seeds

FORMAT = 1
COUNTERS = ("epoch", "step", "best_top1", "best_loss", "best_epoch")


@dataclass
class TrainState:
    """Everything that training changes.

    `epoch` and `step` count what is done; the best values are those of the epoch (from 1) with the highest
    validation top-1, the earliest where several tie.
    """

    model: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    epoch: int = 0
    step: int = 0
    best_top1: float = -1.0
    best_loss: float = 0.0
    best_epoch: int = 0

    def is_finished(self, loop: LoopRecipe) -> bool:
        """Whether all epochs, or all steps that were asked for, are done."""
        return self.epoch >= loop.epochs or (loop.max_steps is not None and self.step >= loop.max_steps)

    def note_result(self, top1: float, loss: float) -> bool:
        """Takes the validation result of epoch `epoch` into account; True where it is the best so far."""
        if top1 <= self.best_top1:
            return False
        self.best_top1, self.best_loss, self.best_epoch = top1, loss, self.epoch
        return True


def seed_process(seed: int) -> None:
    """Gives each process random numbers of its own, for mixup and dropout, after all built the same model."""
    torch.manual_seed(mix_seeds(seed, distributed.rank()))


def save_state(path: Path, state: TrainState, settings: dict[str, Any], device: torch.device) -> None:
    """Writes `state` and the settings that it belongs to. Every process calls this; the first one writes."""
    random_states = distributed.gather_objects(_random_state(device))
    if not distributed.is_main():
        return
    content = {
        "format": FORMAT,
        "settings": settings,
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "counters": {name: getattr(state, name) for name in COUNTERS},
        "random_states": random_states,
    }
    with atomic_write(path) as temporary:
        torch.save(content, temporary)


def load_state(path: Path, state: TrainState, settings: dict[str, Any], device: torch.device) -> None:
    """Puts what `save_state` wrote into `state` and this process's random generators.

    Raises:
        UserError: no such file, a torn or foreign one, or one that belongs to a run with other settings; each
            difference is named.
    """
    content = _read(path)
    _check_settings(path, content["settings"], settings)
    state.model.load_state_dict(content["model"])
    state.optimizer.load_state_dict(content["optimizer"])
    state.scaler.load_state_dict(content["scaler"])
    for name in COUNTERS:
        setattr(state, name, content["counters"][name])
    _set_random_state(content["random_states"][distributed.rank()], device)


def find_state(resume: str | None, folder: Path) -> Path | None:
    """The file that `--resume` means: none, the one in the run's own folder if it is there, or the named one."""
    if resume != "auto":
        return Path(resume) if resume else None
    path = folder / "state.pt"
    return path if path.exists() else None


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"no such training state: {path} (--resume auto starts anew where there is none)")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a whole training state: remove it to train anew, or resume from another file"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a training state of this version: remove it to train anew")
    return content


def _check_settings(path: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    names = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    if names:
        changes = ", ".join(f"{name} {then.get(name)} (now {now.get(name)})" for name in names)
        raise UserError(
            f"{path} belongs to a run with other settings: {changes}; repeat those, or choose another --output-dir"
        )


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_random_state(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
