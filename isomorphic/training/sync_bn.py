"""Batch norms that see the batch of all processes."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from isomorphic.errors import UserError
from isomorphic.processes import distributed


def convert_sync_bn(model: nn.Module) -> nn.Module:
    """Lets all batch norms of `model` see the batch of all processes while they train; in place, and returned.

    Modules, parameters, buffers and their names stay, so that a checkpoint of the model is what it would have been.
    torch's SyncBatchNorm takes no CPU tensors; this one is the same code everywhere.

    Raises:
        UserError: a batch norm of a kind of its own.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, _Synced):
            if type(module) not in _KINDS:
                raise UserError(f"--sync-bn does not know the {type(module).__name__} of {name}: leave it out")
            module.__class__ = _KINDS[type(module)]
    return model


class _Synced(_BatchNorm):
    """What a batch norm does with statistics of all processes; in eval mode and in one process, what it did before."""

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and distributed.is_distributed()):
            return super().forward(input)
        return self._normalise(input)

    def _normalise(self, x: Tensor) -> Tensor:
        """x: (N, C, …) with an N of its own in each process."""
        mean, var, count = joint_statistics(x.float())  # (C,), (C,), scalar
        self._track(mean.detach(), var.detach(), count)
        scale = (var + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        shift = -mean * scale
        if self.bias is not None:
            shift = shift + self.bias
        shape = (1, -1, *[1] * (x.ndim - 2))
        return (x * scale.view(shape) + shift.view(shape)).to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum: Any = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        unbiased = var * (count / (count - 1))
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)


def joint_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (C,), biased variance (C,) and count of the values per channel, over the x of all processes: (N, C, …).

    In one collective: each process fills a row of its own, and the sum of all has every row.
    """
    dims = [0, *range(2, x.ndim)]
    var, mean = torch.var_mean(x, dim=dims, correction=0)
    count = torch.full_like(mean[:1], x.numel() // x.shape[1])
    row = torch.cat([mean, var, count])  # (2 C + 1,)
    before, after = distributed.rank(), distributed.world_size() - 1 - distributed.rank()
    mine = nn.functional.pad(row[None], (0, 0, before, after))  # built without the host: it would wait for the device
    rows = distributed.differentiable_sum(mine)  # (processes, 2 C + 1)
    means, variances, counts = rows[:, : len(mean)], rows[:, len(mean) : -1], rows[:, -1:]
    total = counts.sum()
    mean = (means * counts).sum(0) / total
    var = ((variances + (means - mean).square()) * counts).sum(0) / total
    return mean, var, total


class SyncBatchNorm1d(_Synced, nn.BatchNorm1d): ...


class SyncBatchNorm2d(_Synced, nn.BatchNorm2d): ...


class SyncBatchNorm3d(_Synced, nn.BatchNorm3d): ...


class SyncBatchNormAct2d(_Synced, BatchNormAct2d):
    """timm's, with dropout and activation in the layer."""

    def _normalise(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super()._normalise(x)))  # pyright: ignore[reportCallIssue]


_KINDS = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
    BatchNormAct2d: SyncBatchNormAct2d,
}
