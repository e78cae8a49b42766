"""The loss of an epoch, added up where the model runs: looking at it makes the device wait."""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor

from isomorphic.errors import UserError
from isomorphic.processes import distributed


class LossMeter:
    """Sum of the losses of an epoch's images over all processes, brought up to date by `settle`.

    All processes must `settle` at the same steps.

    Attributes:
        images: how many images are in the sum; one that a sampler repeats to fill a batch counts again.
        loss_sum: sum of their losses.
    """

    def __init__(self, epoch: int, device: torch.device, *, images: int = 0, loss_sum: float = 0.0) -> None:
        self.epoch = epoch
        self.device = device
        self.images = images
        self.loss_sum = loss_sum
        self._losses: list[Tensor] = []
        self._sizes: list[int] = []
        self._last_step = 0
        self._reported = images, loss_sum

    def add(self, loss: Tensor, size: int, step: int) -> None:
        """Takes the mean loss of `size` images at optimizer step `step`, a scalar on the device."""
        self._losses.append(loss)
        self._sizes.append(size)
        self._last_step = step

    def settle(self) -> None:
        """Adds up over processes what came since the last call.

        Raises:
            UserError: one of the losses is not finite; names the first such step.
        """
        if not self._losses:
            return
        losses = torch.stack(self._losses).double()
        sizes = torch.tensor(self._sizes, dtype=torch.float64, device=self.device)
        sums = torch.stack([(losses * sizes).sum(), sizes.sum()])
        loss_sum, images = distributed.all_reduce_sum(sums).tolist()
        if not isfinite(loss_sum):
            self._stop(losses)
        self.loss_sum, self.images = self.loss_sum + loss_sum, self.images + int(images)
        self._losses, self._sizes = [], []

    def recent_mean(self) -> float:
        """Settles, and gives the mean over the images since the last time; at least one must have come."""
        self.settle()
        images, loss_sum = self._reported
        self._reported = self.images, self.loss_sum
        return (self.loss_sum - loss_sum) / (self.images - images)

    def _stop(self, losses: Tensor) -> None:
        """All processes come here together, since they share the sum; not all need have a bad loss."""
        finite = losses.isfinite().tolist()
        first_here = self._last_step - len(finite) + 1 + (finite.index(False) if False in finite else len(finite))
        raise UserError(
            f"the loss is not finite at epoch {self.epoch + 1}, step {min(distributed.gather_objects(first_here))}: "
            "lower --lr or set --clip-grad-norm (nothing was saved since the last checkpoint)"
        )
