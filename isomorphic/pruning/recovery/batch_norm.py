"""Batch norms around a recovery: folded into the layers before them, taken out again, and given new statistics.

A batch norm in eval mode scales and shifts each unit: y = γ (x − μ)/σ + β with σ = √(var + eps). A layer before it,
x = W a + b, takes that over as W_f = γ/σ · W and b_f = γ/σ · (b − μ) + β; the batch norm then does nothing. Merging
works on such folded layers (Intra-Fusion, ICLR 2024). An empty batch norm must not stay, though: its statistics would
not be those of what it reads, and to train on, or to recalibrate, would change the function at once. So `fold` returns
what the batch norm was (its `FoldedNorm`), a merge carries that along, and `unfold` makes a working batch norm of it
again, with W = σ/γ · W_f, for which μ follows from W a + b = σ/γ · (y − β) + μ.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isomorphic.inputs import Inputs, call, move_to
from isomorphic.observe import eval_mode, module_calls
from isomorphic.processes import distributed
from isomorphic.pruning.recovery.watching import BatchNorm, watch

LEAST_DEVIATION = 1e-8  # weights are divided by it: far below what counts, and what trained models come down to


@dataclass(frozen=True)
class FoldedNorm:
    """What a folded batch norm knew of its n units: float64, shape (n,), to be changed in place by a merge.

    Attributes:
        mean: β, the mean of what it gave on the data that it was trained on.
        deviation: γ; its absolute value is the standard deviation of what it gave.
        spread: σ, the standard deviation of what it read.
        bias: the layer's own bias before the fold, None where it had none.
    """

    mean: Tensor
    deviation: Tensor
    spread: Tensor
    bias: Tensor | None


def follow(model: nn.Module, inputs: Inputs) -> dict[str, str]:
    """The layers whose output goes to one batch norm and nowhere else, with that batch norm: names.

    The layers are linears and convolutions, grouped and depthwise ones too. Left out are layers that run twice or
    share weights, and batch norms without running statistics. timm's batch norms with an activation inside count.

    Args:
        model: run once, in eval mode; left as it is.
        inputs: what it runs on.
    """
    return dict(watch(model, inputs).pairs)


@torch.no_grad()
def fold(model: nn.Module, pairs: Mapping[str, str]) -> dict[str, FoldedNorm]:
    """Folds each batch norm of `pairs` into its layer, in place: Intra-Fusion's step 1, with eps counted on both sides.

    The batch norms become identities, the layers have biases, and the function in eval mode stays.

    Args:
        model: in any mode.
        pairs: from `follow`.

    Returns:
        What the batch norms were, by the layer's name.
    """
    folded = {}
    for layer_name, norm_name in pairs.items():
        layer, norm = _pair(model, layer_name, norm_name)
        folded[layer_name] = known = _before_fold(layer, norm)
        scale, ones = known.deviation / known.spread, torch.ones_like(known.spread)
        bias = 0.0 if known.bias is None else known.bias
        _set_layer(layer, _rows(scale, layer.weight) * layer.weight, scale * (bias - _running_mean(norm)) + known.mean)
        _set_norm(norm, weight=ones, bias=0 * ones, mean=0 * ones, spread=ones)
    return folded


@torch.no_grad()
def unfold(model: nn.Module, pairs: Mapping[str, str], folded: Mapping[str, FoldedNorm]) -> None:
    """Takes batch norms out of their layers again, in place; the function in eval mode stays.

    What nothing has changed since `fold` gets its old weights back, up to rounding; no layer keeps a bias that it did
    not have. A unit whose γ is nought gets `LEAST_DEVIATION` in its place, and weights of zero.

    Args:
        model: as `fold` left it, or with units merged.
        pairs: from `follow`.
        folded: from `fold`, of the units as they are now.
    """
    for layer_name, norm_name in pairs.items():
        layer, norm = _pair(model, layer_name, norm_name)
        known = folded[layer_name]
        spread = known.spread.clamp(min=math.sqrt(norm.eps))
        mean, deviation = known.mean, known.deviation
        deviation = torch.copysign(deviation.abs().clamp(min=LEAST_DEVIATION), deviation)
        if norm.weight is None:  # without an affine map it gives mean 0 and deviation 1, whatever it reads
            mean, deviation = torch.zeros_like(mean), torch.ones_like(deviation)
        scale = spread / deviation
        bias = torch.zeros_like(mean) if known.bias is None else known.bias
        _set_norm(norm, weight=deviation, bias=mean, mean=bias - scale * (_bias(layer) - mean), spread=spread)
        _set_layer(layer, _rows(scale, layer.weight) * layer.weight, known.bias)


@torch.no_grad()
def absorb_biases(model: nn.Module, pairs: Mapping[str, str], gained: Iterable[str]) -> list[str]:
    """Moves biases that layers gained into the batch norms that follow them: γ (x + b − μ)/σ reads b as part of μ.

    Args:
        model: changed in place; its function in eval mode stays.
        pairs: from `follow`, of this model or of the dense one.
        gained: layers that had no bias and now have one.

    Returns:
        The layers whose bias is gone; the others keep theirs.
    """
    absorbed = [name for name in gained if name in pairs and model.get_submodule(name).bias is not None]
    for name in absorbed:
        layer, norm = _pair(model, name, pairs[name])
        _write(norm.running_mean, _running_mean(norm) - _bias(layer))
        layer.bias = None
    return absorbed


def recalibrate(model: nn.Module, batches: Iterable[tuple[Inputs, Any]], device: torch.device) -> int:
    """Gives every batch norm the mean statistics of some batches, in place of its running ones.

    Batch norms run in train mode and see what the ones before them give in train mode; all else is in eval mode, so
    that nothing is dropped. Every batch counts alike, over all processes. A batch that leaves some batch norm only one
    value a channel has no variance, and is passed over. Modes and momenta are put back.

    Args:
        model: on `device`.
        batches: this process's share of (images, labels): images are what the model takes, labels are not looked at;
            may be empty in some processes.

    Returns:
        How many batch norms there are; 0, and nothing changes, where no batch could be used in any process.
    """
    norms = _with_statistics(model)
    if not norms:
        return 0
    before = [buffer.clone() for buffer in _statistics(norms)]
    sizes = [*map(len, before), 1]  # the last one counts batches
    sums = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
    for images, _ in batches:
        if _runs_as_batch(model, norms, move_to(images, device)):
            sums += torch.cat([*(buffer.double() for buffer in _statistics(norms)), sums.new_ones(1)])
    *totals, count = distributed.all_reduce_sum(sums).split(sizes)
    usable = count.item() > 0
    new = [total / count for total in totals] if usable else before
    for buffer, values in zip(_statistics(norms), new, strict=True):
        _write(buffer, values)
    for norm in norms if usable else ():
        norm.num_batches_tracked.fill_(count.item())
    return len(norms) if usable else 0


def statistics_of(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Returns copies of the running mean and variance (n,) of each batch norm that has them."""
    return [(norm.running_mean.clone(), norm.running_var.clone()) for norm in _with_statistics(model)]


@torch.no_grad()
def blend(model: nn.Module, old: list[tuple[Tensor, Tensor]], new: list[tuple[Tensor, Tensor]], share: float) -> None:
    """Gives batch norms the statistics of a mixture: a `share` of values like the `new` ones, the rest like the `old`.

    Its mean is (1 − s) μ₀ + s μ₁, and its variance (1 − s) σ₀² + s σ₁² + s (1 − s) (μ₁ − μ₀)².

    Args:
        old, new: as `statistics_of` returns them.
    """
    for norm, (mean, variance), (new_mean, new_variance) in zip(_with_statistics(model), old, new, strict=True):
        between = share * (1 - share) * (new_mean - mean).square()
        _write(norm.running_mean, (1 - share) * mean + share * new_mean)
        _write(norm.running_var, (1 - share) * variance + share * new_variance + between)


class _TooFewValues(Exception):
    """A batch norm would read one value a channel."""


@torch.no_grad()
def _runs_as_batch(model: nn.Module, norms: list[Any], images: Inputs) -> bool:
    """Whether a batch could be run; each batch norm's running statistics are then those of this batch alone."""
    numbered = {str(number): norm for number, norm in enumerate(norms)}
    try:
        with eval_mode(model), _learning_at_once(norms), module_calls(numbered, before=_refuse_single_values):
            call(model, images)
    except _TooFewValues:
        return False
    return True


def _refuse_single_values(norm: str, positional: tuple[Any, ...], keyword: dict[str, Any]) -> None:
    if positional[0].numel() <= positional[0].shape[1]:
        raise _TooFewValues


@contextlib.contextmanager
def _learning_at_once(norms: list[Any]) -> Iterator[None]:
    """Inside, these batch norms are in train mode, and each batch's statistics replace the running ones."""
    momenta, tracked = [norm.momentum for norm in norms], [norm.num_batches_tracked.clone() for norm in norms]
    for norm in norms:
        norm.training = True  # of what it holds, such as a dropout, nothing
        norm.momentum = 1.0
    try:
        yield
    finally:
        for norm, momentum, count in zip(norms, momenta, tracked, strict=True):
            norm.eval()
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)


def _with_statistics(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, BatchNorm) and m.running_mean is not None]


def _statistics(norms: Iterable[Any]) -> list[Tensor]:
    return [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var) if buffer is not None]


def _pair(model: nn.Module, layer_name: str, norm_name: str) -> tuple[Any, Any]:
    return model.get_submodule(layer_name), model.get_submodule(norm_name)


def _before_fold(layer: Any, norm: Any) -> FoldedNorm:
    spread = (norm.running_var.double() + norm.eps).sqrt()
    return FoldedNorm(
        mean=torch.zeros_like(spread) if norm.bias is None else _copied(norm.bias),
        deviation=torch.ones_like(spread) if norm.weight is None else _copied(norm.weight),
        spread=spread,
        bias=None if layer.bias is None else _copied(layer.bias),
    )


def _copied(values: Tensor) -> Tensor:
    return values.detach().to(torch.float64, copy=True)


def _running_mean(norm: Any) -> Tensor:
    return norm.running_mean.double()


def _bias(layer: Any) -> Tensor:
    return layer.bias.double()


def _rows(values: Tensor, weight: Tensor) -> Tensor:
    """Values of a weight's rows, shape (n,) → (n, 1, …)."""
    return values.view(-1, *[1] * (weight.dim() - 1))


def _set_layer(layer: Any, weight: Tensor, bias: Tensor | None) -> None:
    _write(layer.weight, weight)
    if bias is not None and layer.bias is None:
        layer.bias = nn.Parameter(layer.weight.new_empty(len(bias)), layer.weight.requires_grad)
    if bias is None:
        layer.bias = None
    else:
        _write(layer.bias, bias)


def _set_norm(norm: Any, *, weight: Tensor, bias: Tensor, mean: Tensor, spread: Tensor) -> None:
    _write(norm.running_mean, mean)
    _write(norm.running_var, (spread.square() - norm.eps).clamp(min=0))
    if norm.weight is not None:
        _write(norm.weight, weight)
        _write(norm.bias, bias)


def _write(place: Tensor | None, values: Tensor) -> None:
    if place is not None:
        place.copy_(values)
