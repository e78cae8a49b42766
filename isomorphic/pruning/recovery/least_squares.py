"""Weights with which a pruned model's layer makes, of what it sees, what the dense layer made.

A dense layer makes y = W x + b; after pruning the same layer sees x̃ ∈ ℝᵐ: of a convolution, the patches that its kernel
covers. With C_ab the covariance of a and b over all positions of the calibration images, the weights that minimise

    E |y − (W' x̃ + b')|² + λ |W' − W₀|²

are W' = W₀ + (C_yx̃ − W₀ C_x̃x̃)(C_x̃x̃ + λI)⁻¹, with b' = E[y − W' x̃]. The prior W₀ is what plain selection leaves. Where
nothing else has changed, x̃ is the kept part K of x, and this is the optimal brain surgeon's prediction of the removed
part R from the kept one: W' = W_K + W_R C_RK (C_KK + λI)⁻¹. Since x̃ is what the pruned model really computes, it makes
up for what the layers and norms before have lost, too.

λ is relative to the mean variance of x̃. Either half of the images tests what the other one was fitted on, and the λ
that does best there, on some random mixtures of the outputs, is used for both; λ = ∞, which is W' = W₀ and the mean
shift alone, is among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from isomorphic.processes import distributed

T = TypeVar("T")

# What λ may be, in mean variances of x̃, if not infinity.
RIDGES = (1e-6, 1e-4, 1e-2, 1.0)
# Samples for each channel, and in all, beyond which more of them hardly change a covariance.
SAMPLES_PER_CHANNEL, SAMPLES = 32, 2**15
# And numbers of x̃ of all groups together: a depthwise convolution has few channels a group, and many groups.
NUMBERS = 2**25
# Mixtures of the outputs that the choice of λ looks at, where there are more outputs.
MIXTURES = 64
# The least λ, as a share of the largest variance: a covariance of fewer samples than channels is singular.
SMALLEST_RIDGE = 1e-10


@dataclass(frozen=True)
class Moments:
    """Sums over samples, float64 and centred, of x̃ (m,) and r (out,): x̃x̃ᵀ (m, m), rx̃ᵀ (out, m) and |r|² ().

    Those of the groups of a grouped convolution, each with inputs and outputs of its own, are stacked: (groups, m, m),
    (groups, out, m), and |r|² of all of them together.
    """

    own: Tensor
    cross: Tensor
    square: Tensor

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(one + another for one, another in zip(vars(self).values(), vars(other).values(), strict=True)))

    def left_by(self, change: Tensor) -> Tensor:
        """Σ |r − D x̃|², shape ()."""
        return self.square + (change * (change @ self.own - 2 * self.cross)).sum()

    def mixed(self, outputs: int) -> Moments:
        """With fewer, random mixtures of the components of r; what `left_by` gives is, on the average, the same."""
        signs = torch.randint(2, (outputs, len(self.cross)), generator=torch.Generator().manual_seed(0))
        mixture = (signs.to(self.cross) * 2 - 1) / math.sqrt(outputs)
        return replace(self, cross=mixture @ self.cross)


def moments(residual: Tensor, own: Tensor) -> tuple[Moments, Moments]:
    """Those of the first and the second half of the images, over all processes.

    Args:
        residual: r, shape (images, positions, out), or (images, positions, groups, out).
        own: x̃, shape (images, positions, m), or (images, positions, groups, m).
    """
    residual, own = (samples - mean_of([samples]).to(_precise(samples)) for samples in (residual, own))

    def summed(r: Tensor, x: Tensor) -> Moments:
        square = r.square().sum(0).double().sum()
        x, r = x.movedim(0, -2), r.movedim(0, -2)  # (samples, groups, m) -> (groups, samples, m)
        sums = (x.mT @ x, r.mT @ x, square)
        return Moments(*(distributed.all_reduce_sum(one.double()) for one in sums))

    first, second = map(summed, _halves(residual), _halves(own))
    return first, second


class Fit(NamedTuple):
    """W' of the module's docstring, float64, of the prior's shape, and E |y − W x̃|², centred, with W₀ and with W'.

    From float32 samples, `after` is known to about 1e-7 of `before`.
    """

    weights: Tensor
    before: float
    after: float


def fit_weights(prior: Tensor, target: Tensor, own: Tensor, ridges: Sequence[float]) -> Fit:
    """Solves for the weights: W' = W₀ + D, where D predicts what W₀ leaves, r = y − W₀ x̃.

    Args:
        prior: W₀, shape (out, m), or (groups, out, m) where each group of outputs has inputs of its own.
        target: y, shape (images, positions, out), or (images, positions, groups, out).
        own: x̃, shape (images, positions, m), or (images, positions, groups, m).
        ridges: what λ may be beside infinity; with none of them the weights stay as they are.
    """
    made = own @ prior.to(own).T if prior.dim() == 2 else torch.einsum("npgm,gom->npgo", own, prior.to(own))
    halves = moments(target - made, own)
    total = halves[0] + halves[1]
    is_small = prior.dim() == 3 or len(prior) <= MIXTURES
    trial = halves if is_small else (halves[0].mixed(MIXTURES), halves[1].mixed(MIXTURES))
    change = _solve(total, choose_ridge(trial, _solve, _left, ridges))
    count = float(distributed.all_reduce_sum(total.square.new_tensor(own.shape[:2].numel())))
    before, after = float(total.square) / count, max(float(total.left_by(change)), 0.0) / count
    return Fit(prior.double() + change, before, after)


def _solve(statistics: Moments, ridge: float) -> Tensor:
    """D = W' − W₀."""
    if ridge == math.inf:
        return torch.zeros_like(statistics.cross)
    factor, failed = torch.linalg.cholesky_ex(damped(statistics.own, ridge))
    found = torch.cholesky_solve(statistics.cross.mT, factor).mT
    is_lost = failed.bool()[..., None, None]  # rounding of what is nearly singular
    return found.masked_fill(is_lost, 0.0)


def _left(statistics: Moments, change: Tensor) -> float:
    return float(statistics.left_by(change))


def draw_positions(images: int, positions: int, channels: int, groups: int = 1) -> Tensor:
    """The positions of each image that are looked at, (images, wanted): all, or some at random where these will do.

    Args:
        images, positions: how many there are.
        channels: of a sample of x̃.
        groups: samples of so many are taken at each position.
    """
    samples = max(SAMPLES_PER_CHANNEL * channels, min(SAMPLES, NUMBERS // (groups * channels)))
    wanted = min(-(-samples // images), positions)
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
    result = covariance.clone()
    result.diagonal(dim1=-2, dim2=-1).add_(strength[..., None])
    return result


def _halves(samples: Tensor) -> tuple[Tensor, Tensor]:
    """(samples, channels) of the first images and of the others."""
    first, second = samples.tensor_split(2)
    return first.flatten(0, 1), second.flatten(0, 1)


def mean_of(parts: Iterable[Tensor]) -> Tensor:
    """The mean vector of all processes, float64, shape (channels,), or (groups, channels).

    Args:
        parts: some images' vectors each, shape (images, positions, channels), or (images, positions, groups, channels).
    """
    total, count = torch.zeros((), dtype=torch.float64), 0
    for part in parts:
        total = total.to(part.device) + part.sum((0, 1), dtype=_precise(part)).double()
        count += part.shape[:2].numel()
    return mean_of_sums(total, count)


def mean_of_sums(total: Tensor, count: int) -> Tensor:
    """The mean of all processes, float64, of the shape of `total`, this process's sum over `count` samples."""
    sums = distributed.all_reduce_sum(torch.hstack([total.flatten(), total.new_tensor(count)]))
    return (sums[:-1] / sums[-1]).view(total.shape)


def _precise(samples: Tensor) -> torch.dtype:
    """At least float32: there sums of squares neither overflow nor are they rounded away."""
    return torch.promote_types(samples.dtype, torch.float32)
