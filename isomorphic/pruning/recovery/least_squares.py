"""Weights with which a pruned model's layer makes, of what it sees, what the dense layer made.

A dense layer makes y = W x + b; after pruning the same layer sees x̃ ∈ ℝᵐ: of a convolution, the patches that its kernel
covers. With C_ab the covariance of a and b over all positions of the calibration images, the weights that minimise

    E |y − (W' x̃ + b')|² + λ |W' − W₀|²

are W' = W₀ + (C_yx̃ − W₀ C_x̃x̃)(C_x̃x̃ + λI)⁻¹, with b' = E[y − W' x̃]. The prior W₀ is what plain selection leaves. Where
nothing else has changed, x̃ is the kept part K of x, and this is the optimal brain surgeon's prediction of the removed
part R from the kept one: W' = W_K + W_R C_RK (C_KK + λI)⁻¹. Since x̃ is what the pruned model really computes, it makes
up for what the layers and norms before have lost, too.

λ is relative to the mean variance of x̃. Either half of the images tests what the other one was fitted on, and the λ
that does best there is used on both; λ = ∞, which is W' = W₀ and the mean shift alone, is among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from isomorphic import distributed

T = TypeVar("T")

# What λ may be, in mean variances of x̃, if not infinity.
RIDGES = (1e-6, 1e-4, 1e-2, 1.0)
# Samples for each channel, and in all, beyond which more of them hardly change a covariance.
SAMPLES_PER_CHANNEL, SAMPLES = 32, 2**15
# The least λ, as a share of the largest variance: a covariance of fewer samples than channels is singular.
SMALLEST_RIDGE = 1e-10


@dataclass(frozen=True)
class Moments:
    """Sums over samples, float64: x̃x̃ᵀ (m, m) and yx̃ᵀ (out, m), centred."""

    own: Tensor
    cross: Tensor

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.own + other.own, self.cross + other.cross)


def moments(target: Tensor, own: Tensor) -> tuple[Moments, Moments]:
    """Those of the first and the second half of the images, over all processes.

    Args:
        target: y, shape (images, positions, out).
        own: x̃, shape (images, positions, m).
    """
    target, own = target - _mean(target), own - _mean(own)
    first, second = (
        Moments(*(distributed.all_reduce_sum((left.T @ x).double()) for left in (x, y)))
        for y, x in zip(_halves(target), _halves(own), strict=True)
    )
    return first, second


def fit_weights(prior: Tensor, halves: tuple[Moments, Moments], ridges: Sequence[float]) -> Tensor:
    """W' of the module's docstring, float64, shape (out, m).

    Args:
        prior: W₀, shape (out, m).
        halves: from `moments`.
        ridges: what λ may be beside infinity.
    """
    prior = prior.double()
    first, second = (Moments(half.own, half.cross - prior @ half.own) for half in halves)  # of y − W₀ x̃ from now on
    return prior + _solve(first + second, choose_ridge((first, second), _solve, _error, ridges))


def _solve(statistics: Moments, ridge: float) -> Tensor:
    """D = W' − W₀, where the target is y − W₀ x̃."""
    if ridge == math.inf:
        return torch.zeros_like(statistics.cross)
    factor, failed = torch.linalg.cholesky_ex(damped(statistics.own, ridge))
    if failed:  # rounding of what is nearly singular
        return torch.zeros_like(statistics.cross)
    return torch.cholesky_solve(statistics.cross.T, factor).T


def _error(statistics: Moments, change: Tensor) -> float:
    """E |y − W₀ x̃ − D x̃|² but for what no D changes: tr(D C_x̃x̃ Dᵀ) − 2 tr(D C_yx̃ᵀ), y standing for y − W₀ x̃."""
    return float((change * (change @ statistics.own - 2 * statistics.cross)).sum())


def draw_positions(images: int, positions: int, channels: int) -> Tensor:
    """The positions of each image that are looked at, (images, wanted): all, or some at random where these will do."""
    wanted = min(-(-max(SAMPLES_PER_CHANNEL * channels, SAMPLES) // images), positions)
    if wanted == positions:
        return torch.arange(positions).expand(images, positions)
    order = torch.rand(images, positions, generator=torch.Generator().manual_seed(0))
    return order.topk(wanted, dim=1).indices


def choose_ridge(
    halves: tuple[T, T],
    solve: Callable[[T, float], Tensor],
    error: Callable[[T, Tensor], float],
    ridges: Sequence[float],
) -> float:
    """The λ, infinity or one of `ridges`, whose solutions do best on the half that they were not fitted on."""

    def held_out(ridge: float) -> float:
        return sum(error(test, solve(fit, ridge)) for fit, test in (halves, halves[::-1]))

    return min((math.inf, *sorted(ridges, reverse=True)), key=held_out)


def damped(covariance: Tensor, ridge: float) -> Tensor:
    """C + λI, shape (…, m, m), with λ = `ridge` times the mean of the diagonal; never singular."""
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    least = (SMALLEST_RIDGE * diagonal.amax(-1)).clamp_min(torch.finfo(covariance.dtype).tiny)
    strength = (ridge * diagonal.mean(-1)).maximum(least)
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    return covariance + strength[..., None, None] * identity


def _halves(samples: Tensor) -> tuple[Tensor, Tensor]:
    """(samples, channels) of the first images and of the others."""
    first, second = samples.tensor_split(2)
    return first.flatten(0, 1), second.flatten(0, 1)


def _mean(samples: Tensor) -> Tensor:
    """Over images and positions, of all processes, shape (channels,)."""
    sums = torch.cat([samples.sum((0, 1), dtype=torch.float64), samples.new_tensor([samples.shape[:2].numel()])])
    distributed.all_reduce_sum(sums)
    return (sums[:-1] / sums[-1]).to(samples.dtype)
