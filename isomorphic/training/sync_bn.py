"""Batch norms with statistics over the batches of all processes."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from isomorphic.errors import UserError
from isomorphic.processes import distributed


def convert_sync_bn(model: nn.Module) -> nn.Module:
    """Returns `model` with all its batch norms changed, in place, to use statistics over all processes in training.

    Modules, parameters, buffers and their names stay, so that checkpoints do not change. torch's SyncBatchNorm does not
    support CPU tensors; this one is the same code on every device.

    Raises:
        UserError: the model has a batch norm of another class.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, _Synced):
            if type(module) not in _KINDS:
                raise UserError(f"--sync-bn does not know the {type(module).__name__} of {name}: leave it out")
            module.__class__ = _KINDS[type(module)]
    return model


def needs_batches(model: nn.Module) -> bool:
    """Returns True if the model has batch norms whose statistics, in training, are those of this process's batch."""
    joint = distributed.world_size() > 1
    return any(
        isinstance(module, _BatchNorm) and not (joint and isinstance(module, _Synced)) for module in model.modules()
    )


class _Synced(_BatchNorm):
    """A batch norm with statistics over all processes; in eval mode and in a single process, a plain batch norm."""

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and distributed.is_distributed()):
            return super().forward(input)
        return self._normalise(input)

    def _normalise(self, x: Tensor) -> Tensor:
        """Normalises x (N, C, …), whose N may differ between processes, and updates the running statistics."""
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
    """Returns mean (C,), biased variance (C,) and number of values per channel, over the x (N, C, …) of all processes.

    It takes one collective operation: each process fills one row of a table that is zero elsewhere, and the sum over
    processes has all rows.
    """
    dims = [0, *range(2, x.ndim)]
    var, mean = torch.var_mean(x, dim=dims, correction=0)
    count = torch.full_like(mean[:1], x.numel() // x.shape[1])
    row = torch.cat([mean, var, count])  # (2 C + 1,)
    before, after = distributed.rank(), distributed.world_size() - 1 - distributed.rank()
    mine = nn.functional.pad(row[None], (0, 0, before, after))  # built on the device, so that the host need not wait
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
    """timm's batch norm, which includes dropout and activation."""

    def _normalise(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super()._normalise(x)))  # pyright: ignore[reportCallIssue]


_KINDS = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
    BatchNormAct2d: SyncBatchNormAct2d,
}
