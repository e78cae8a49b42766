"""Cutting a model so that it keeps what it can: recoveries around the cut, in one order.

1. fusion, before the cut: removed units are merged into kept ones (`fusion.py`), without data.
2. compensate, after it: layers learn in closed form to make what the dense ones made (`compensation.py`).
3. bn, last: batch norms get the statistics of what they now read (`batch_norm.py`).

None of them trains. The last two look at calibration images: training images under the evaluation transform.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from isomorphic.errors import UserError
from isomorphic.inputs import Inputs, device_of, items_of, num_items
from isomorphic.progress import Bar, steps
from isomorphic.pruning.blocks.depth import remove_blocks
from isomorphic.pruning.branches import Batches, check_branches
from isomorphic.pruning.cutting.cut import cut
from isomorphic.pruning.cutting.optimizer import OptimizerCut, forget
from isomorphic.pruning.cutting.self_check import check_cut
from isomorphic.pruning.groups import ChannelGraph, CoupledGroup, short_name
from isomorphic.pruning.plan import PruningPlan
from isomorphic.pruning.recovery.attention import find_query_keys
from isomorphic.pruning.recovery.batch_norm import recalibrate
from isomorphic.pruning.recovery.calibration import check_calibration, not_finite
from isomorphic.pruning.recovery.compensation import CutLayers, OutputMap, Reconstruction, compensate
from isomorphic.pruning.recovery.fusion import Fusion, FusionRules, fuse
from isomorphic.pruning.report import listed

RECOVERIES = ("fusion", "compensate", "bn")  # in this order, however they are asked for
NEED_IMAGES = frozenset({"compensate", "bn"})
BATCH = 64  # images that a batch norm is recalibrated on at once


@dataclass(frozen=True)
class Recovery:
    """What is to be done around a cut.

    Attributes:
        steps: some of `RECOVERIES`.
        images: this process's calibration images on the model's device, a tensor (N, …) or what else the model takes,
            N items of it; None where no step looks at any.
        fusion: how units are merged.
        importance: of the units (n,) by group name, for masses by importance.
    """

    steps: frozenset[str] = frozenset()
    images: Inputs | None = None
    fusion: FusionRules = field(default_factory=FusionRules)
    importance: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Applied:
    """What a cut and its recoveries did.

    Attributes:
        check_error: of the self-check, if it was asked for; see `check_cut`.
        fusion: which groups were merged, and why others were not; None without fusion.
        reconstructions: of the layers that were compensated.
        errors: relative reconstruction error before and after, the mean over its layers, by group name.
        plain: groups that lost units which none of the steps made up for.
        batch_norms: how many were recalibrated; None if none were to be.
    """

    check_error: float | None = None
    fusion: Fusion | None = None
    reconstructions: Sequence[Reconstruction] = ()
    errors: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    plain: Sequence[str] = ()
    batch_norms: int | None = None


def apply_plan(
    model: nn.Module,
    graph: ChannelGraph,
    plan: PruningPlan,
    inputs: Inputs,
    recovery: Recovery = Recovery(),
    *,
    self_check: bool = False,
    optimizer: Optimizer | None = None,
    batches: Batches | None = None,
    stage: Callable[[str], None] = lambda doing: None,
) -> Applied:
    """Cuts `model` by `plan`, in place, with what `recovery` asks for around it.

    Args:
        model: the dense model; blocks that the plan does not keep go first.
        graph, plan: the groups that it has without them, and what they keep.
        inputs: what it was traced on.
        recovery: see there.
        self_check: hold the cut model against the masked dense one, before anything is compensated.
        optimizer: of the model: it goes on with the cut parameters.
        batches: what the model is meant for: a cut copy tries the first, where the trace has left parameters out.
        stage: is called with the name of each step before it begins.

    Raises:
        UserError: as `cut`, `remove_blocks` and `check_branches`; the self-check finds a difference; a state that
            cannot be cut; calibration images that the model does not take, or that leave it with numbers that are not
            finite.
    """
    plan.check(graph)
    check_branches(model, graph, plan, inputs, batches)
    images = recovery.images if NEED_IMAGES & recovery.steps else None
    if images is not None:
        check_calibration(model, images)
        check_branches(model, graph, plan, inputs, Batches([(items_of(images, slice(BATCH)),)]))
    if plan.kept_blocks:
        dense_parameters = set(model.parameters())
        remove_blocks(model, plan.kept_blocks, inputs)
        if optimizer is not None:
            forget(optimizer, dense_parameters - set(model.parameters()))
    optimizer_cut = OptimizerCut(optimizer, model, graph, plan) if optimizer is not None else None
    dense = copy.deepcopy(model) if "compensate" in recovery.steps and images is not None else None
    fusion = None
    stage("cutting")
    if "fusion" in recovery.steps:
        fusion = fuse(model, graph, plan, inputs, rules=recovery.fusion, importance=recovery.importance or None)
    uncut = copy.deepcopy(model) if self_check else None
    layers = CutLayers.of(model, graph, plan)
    if dense and fusion:
        layers = replace(layers, outputs={**layers.outputs, **_merged_outputs(dense, model, graph, plan, fusion)})
    cut(model, graph, plan)
    if uncut:
        stage("checking the cut model")
    check_error = check_cut(uncut, graph, plan, model, inputs) if uncut else None
    reconstructions: list[Reconstruction] = []
    infinite = not_finite(model) if images is not None else set()
    if dense and images is not None:
        stage("compensating")
        layers = replace(layers, query_keys=find_query_keys(dense, graph, plan, items_of(images, slice(1))))
        reconstructions = compensate(dense, model, images, layers)
    batch_norms = None
    if "bn" in recovery.steps and images is not None:
        stage("recalibrating batch norms")
        parts = _equal_parts(images)
        with steps("recalibrating batch norms", len(parts), unit="batch") as bar:
            batch_norms = recalibrate(model, _pairs(parts, bar), device_of(images))
    if images is not None and (spoilt := sorted(not_finite(model) - infinite)):
        raise UserError(
            f"after the recovery {listed(spoilt)} hold numbers that are not finite: check the calibration images, or "
            f"leave out {' and '.join(sorted(NEED_IMAGES & recovery.steps))}"
        )
    if optimizer_cut is not None:
        optimizer_cut.apply(model)
    errors = _errors_by_group(graph.groups, reconstructions)
    merged = fusion.merged if fusion else {}
    losing = [group.name for group in graph.groups if len(plan.kept[group.name]) < group.num_units]
    plain = [name for name in losing if name not in errors and name not in merged]
    return Applied(check_error, fusion, reconstructions, errors, plain if recovery.steps else (), batch_norms)


def _equal_parts(images: Inputs) -> list[Inputs]:
    """Returns batches of at most `BATCH` items and nearly equal lengths: each counts alike."""
    count = num_items(images)
    parts = torch.arange(count).tensor_split(-(-count // BATCH))
    return [items_of(images, slice(int(part[0]), int(part[-1]) + 1)) for part in parts]


def applied_lines(recovered: Applied) -> Iterator[str]:
    """What a person reads of it, line by line.

    Self-check passed: cut and masked model differ by 1e-07 of the output's spread
    Fusion: 8 groups merged
    Not merged: blocks.0.attn.qkv and 11 more (its units lie in blocks that stay equally wide)
    Compensated, with the relative reconstruction error before and after:
      blocks.0.mlp.fc1  0.4127 => 0.0213
    Cut plainly: stem.0
    Recalibrated: 20 batch norms
    """
    if recovered.check_error is not None:
        error = f"{recovered.check_error:.0e}"
        yield f"Self-check passed: cut and masked model differ by {error} of the output's spread"
    if recovered.fusion:
        yield f"Fusion: {len(recovered.fusion.merged)} groups merged"
        yield from (f"Not merged: {line}" for line in _by_reason(recovered.fusion.plain))
    if recovered.errors:
        yield "Compensated, with the relative reconstruction error before and after:"
        names = {name: short_name(name) for name in recovered.errors}
        width = max(map(len, names.values()))
        for name, (before, after) in recovered.errors.items():
            yield f"  {names[name].ljust(width)}  {before:.4f} => {after:.4f}"
    if recovered.plain:
        yield f"Cut plainly: {', '.join(map(short_name, recovered.plain))}"
    if recovered.batch_norms is not None:
        yield f"Recalibrated: {recovered.batch_norms or 'no'} batch norms"


def _merged_outputs(
    dense: nn.Module, fused: nn.Module, graph: ChannelGraph, plan: PruningPlan, fusion: Fusion
) -> dict[str, OutputMap]:
    """What the layers that make merged units make of the dense layer's outputs y.

    Without a batch norm that is A y. With one, σ and γ before the merge and σ' and γ' after it, batch norms give
    ŷ' = A ŷ with ŷ = γ (y − μ)/σ + β, so that the layer makes y' = σ'/γ' (ŷ' − β') + μ'.
    """
    found = {}
    for group in graph.groups:
        if group.name in fusion.merged:
            for member in group.members:
                is_maker = member.tensor == "weight" and member.dim == 0
                if is_maker and group.nodes[member.node].kind in ("conv", "linear"):
                    norm = fusion.pairs.get(member.module)
                    norms = (dense.get_submodule(norm), fused.get_submodule(norm)) if norm else None
                    rows = member.index[:, 0]
                    found[member.module] = _merged(fusion.merged[group.name], rows, plan.kept[group.name], norms)
    return found


def _merged(factor: Tensor, rows: Tensor, kept: Sequence[int], norms: tuple[nn.Module, nn.Module] | None) -> OutputMap:
    """One layer's map: `factor` is A (m, n), `rows` are the units' rows of the layer (n,), `norms` before and after."""
    offset = torch.zeros(len(factor), dtype=torch.float64)
    if norms:
        scale, shift = (values[rows] for values in _affine(norms[0]))
        new_scale, new_shift = (values[rows[list(kept)]] for values in _affine(norms[1]))
        offset = (factor @ shift - new_shift) / new_scale
        factor = factor * scale / new_scale[:, None]
    by_row = torch.argsort(rows[list(kept)])  # as the cut leaves them
    return OutputMap(factor[by_row][:, torch.argsort(rows)], offset[by_row])


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """A batch norm in eval mode as y ↦ scale · y + shift, float64 on the CPU."""
    scale = 1 / (norm.running_var.double() + norm.eps).sqrt()
    scale = scale if norm.weight is None else scale * norm.weight.detach().double()
    shift = -scale * norm.running_mean.double()
    return scale.cpu(), (shift if norm.bias is None else shift + norm.bias.detach().double()).cpu()


def _pairs(parts: Sequence[Inputs], bar: Bar) -> Iterator[tuple[Inputs, None]]:
    """Yields images as `recalibrate` takes them, without labels."""
    for part in parts:
        yield part, None
        bar.update()


def _errors_by_group(
    groups: Sequence[CoupledGroup], reconstructions: Sequence[Reconstruction]
) -> dict[str, tuple[float, float]]:
    """The mean over the layers that read a group, before and after, where any of them was compensated."""
    by_layer = {found.layer: found for found in reconstructions}
    errors = {}
    for group in groups:
        readers = {member.module for member in group.members if member.tensor == "weight" and member.dim == 1}
        found = [by_layer[name] for name in readers if name in by_layer]
        if found:
            errors[group.name] = (fmean(one.before for one in found), fmean(one.after for one in found))
    return errors


def _by_reason(reasons: Mapping[str, str]) -> Iterator[str]:
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(short_name(name))
    yield from (f"{listed(found)} ({reason})" for reason, found in names.items())
