"""The training loss of an epoch, summed on the device, because reading it makes the host wait."""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor

from isomorphic.errors import UserError
from isomorphic.processes import distributed


class LossMeter:
    """Sums the losses of an epoch's images over all processes; `settle` brings the sums up to date.

    All processes must `settle` at the same steps.

    Attributes:
        images: number of images in the sum; images that a sampler repeats to fill a batch count again.
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
        """Adds the mean loss of the `size` images of optimizer step `step`, a scalar on the device."""
        self._losses.append(loss)
        self._sizes.append(size)
        self._last_step = step

    def settle(self) -> None:
        """Sums, over all processes, the losses added since the last call.

        Raises:
            UserError: one of the losses is not finite; the message names the first such step.
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
        """Settles and returns the mean loss of the images since the last call; there must be at least one."""
        self.settle()
        images, loss_sum = self._reported
        self._reported = self.images, self.loss_sum
        return (self.loss_sum - loss_sum) / (self.images - images)

    def _stop(self, losses: Tensor) -> None:
        """Raises in all processes, since they share the sum; a process may have no bad loss of its own."""
        finite = losses.isfinite().tolist()
        first_here = self._last_step - len(finite) + 1 + (finite.index(False) if False in finite else len(finite))
        raise UserError(
            f"the loss is not finite at epoch {self.epoch + 1}, step {min(distributed.gather_objects(first_here))}: "
            "lower --lr or set --clip-grad-norm (nothing was saved since the last checkpoint)"
        )
