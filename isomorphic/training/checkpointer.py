"""Decides when the training state is written: at the recipe's intervals, and when a signal asks for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from isomorphic.errors import Stopped, UserError
from isomorphic.processes import distributed
from isomorphic.training.meter import LossMeter
from isomorphic.training.recipe import LoopRecipe
from isomorphic.training.resume import TrainState
from isomorphic.training.signals import Signals
from isomorphic.training.tracking import RunFolder


@dataclass
class Checkpointer:
    """Writes the training state when it is due or a signal asks for it."""

    loop: LoopRecipe
    state: TrainState
    folder: RunFolder
    signals: Signals
    device: torch.device
    saved_at: tuple[int, int, int] | None = None

    def after_step(self, meter: LossMeter) -> None:
        """Saves if it is due or a signal arrived, and stops where one asks for it.

        Every process calls this after each step.
        """
        every = self.loop.checkpoint_steps
        request = self.signals.poll()
        if request or (every and self.state.step % every == 0):
            meter.settle()
            self.state.take_sums(meter)
            check_finite(self.state.model, self.state.step)
            self.save()
        self._stop_at(request)

    def before_validation(self) -> None:
        """Saves at the recipe's interval of epochs, so that a crash during validation does not lose the epoch."""
        check_finite(self.state.model, self.state.step)
        if (self.state.epoch + 1) % self.loop.checkpoint_interval == 0:
            self.save()

    def after_epoch(self) -> None:
        """Saves if a signal arrived, or the run is finished, so that it is not resumed; stops where one asks for it."""
        request = self.signals.poll()
        if request or self.state.is_finished(self.loop):
            self.save()
        if not self.state.is_finished(self.loop):
            self._stop_at(request)

    def save(self) -> None:
        """Writes the state, unless there was no progress since the last save."""
        progress = (self.state.epoch, self.state.step, self.state.images)
        if progress == self.saved_at:
            return
        self.folder.save_state(self.state, self.device)
        distributed.barrier()  # otherwise a slow write could run into the timeout of the device's next collective
        self.saved_at = progress

    def _stop_at(self, request: str | None) -> None:
        if request == "stop":
            done, number = f"epoch {self.state.epoch + 1}, step {self.state.step}", self.signals.stopped_by
            raise Stopped(
                f"stopped by {number.name} in {done}; the training state is written: --resume auto goes on", number
            )


def check_finite(model: nn.Module, step: int) -> None:
    """Checks that all parameters are finite, so that no broken model is saved.

    Raises:
        UserError: a parameter is not finite, in any process.
    """
    parts = (distributed.local_shard(parameter.detach()) for parameter in model.parameters())
    bad = torch.stack([part.isfinite().all().logical_not() for part in parts])
    if distributed.all_reduce_sum(bad.any().float()).item():
        raise UserError(f"the weights are not finite after step {step}: lower --lr or set --clip-grad-norm")
