"""Intra-Fusion: units that a plan removes are merged into those that it keeps, along an optimal transport map.

"Towards Meta-Pruning via Optimal Transport" (ICLR 2024). No data and no training. For one group of n units, of which
the plan keeps m, with batch norms folded into their layers first:

1. A unit's features are all weights that make it and read it: the out-slices W[i] with their biases and the in-slices
   W[:, i] of every layer of the group, as one row f_i, divided by its ℓ2 norm.
2. The cost of moving unit i onto kept unit j is C_ij = |f_i − f_j|₁.
3. Masses a ∈ ℝⁿ and b ∈ ℝᵐ are uniform, 1/n and 1/m, or the units' shares of the importance of all units and of
   the kept ones.
4. T ∈ ℝⁿˣᵐ is the exact solution of the transport problem: min ⟨T, C⟩ with T 1 = a and Tᵀ 1 = b.
5. M = Tᵀ diag(1/a), whose columns sum to 1, says which kept units take up each unit; R = diag(1/b) Tᵀ, whose rows sum
   to 1, of which units each kept one is the mean.
6. Layers that make the units: W' = A W and b' = A b. Layers that read them: W'[o] = M W[o], and their own biases stay.
   A is M as published ("source"), which scales what goes through by about n/m, or R ("mass"), which is exact for
   units that are copies of each other. Depthwise filters are averaged, R w, and their biases follow the units, A b.

Several groups are merged one by one, from the output towards the input, each on weights that are merged already. All
this happens in the dense model: the merged weights stand where the kept units are, zeros where the removed ones were,
and the ordinary cut takes these away. Batch norms are taken out of their layers again before, with statistics that were
merged alike: β' = A β, γ' = A |γ|, and means of the rest. The structure stays, so no layer gains a bias.

A merge means something where units are summed over, or go through element-wise functions one by one. Groups where
another layer mixes them, divides them by each other's moments or multiplies them with each other lose their units
plainly, as `Fusion.plain` says, and these count as no feature of the units that are merged.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from isomorphic.inputs import Inputs
from isomorphic.progress import steps
from isomorphic.pruning.groups import ChannelGraph, CoupledGroup, Member
from isomorphic.pruning.plan import PruningPlan
from isomorphic.pruning.recovery.batch_norm import FoldedNorm, fold, unfold
from isomorphic.pruning.recovery.watching import Watched, is_plain_layer, tied_parameters, watch

NORMALIZATIONS = ("source", "mass")
MASSES = ("uniform", "importance")
# Pivots of the simplex algorithm: it needs far fewer, and POT stops with a warning where it has too few.
PIVOTS = 10**8
_Hidden = Mapping[tuple[str, int], Tensor]


@dataclass(frozen=True)
class FusionRules:
    """How units are merged.

    Attributes:
        normalization: of the layers that make the units: "source" (A = M, the paper) or "mass" (A = R).
        masses: "uniform" or "importance".
    """

    normalization: str = "source"
    masses: str = "uniform"


@dataclass(frozen=True)
class Transport:
    """The solution of one transport problem, float64.

    Attributes:
        plan: T, how much of each unit goes to each kept one, shape (n, m).
        source: a, the masses of all units, shape (n,), which sum to 1.
        target: b, those of the kept units, shape (m,), which sum to 1.
    """

    plan: Tensor
    source: Tensor
    target: Tensor

    @property
    def by_source(self) -> Tensor:
        """M, shape (m, n): columns sum to 1; those of units without mass are zero."""
        return _divided(self.plan, self.source[:, None]).T

    @property
    def by_target(self) -> Tensor:
        """R, shape (m, n): rows sum to 1; those of kept units without mass are zero."""
        return _divided(self.plan, self.target).T


@dataclass(frozen=True)
class Fusion:
    """What became of the groups that lose units.

    Attributes:
        merged: A of each group that was merged, shape (m, n), float64 on the CPU: what its units are made of.
        plain: why the other groups were not, in a few words.
        pairs: the layers whose batch norms were folded and taken out again.
    """

    merged: Mapping[str, Tensor]
    plain: Mapping[str, str]
    pairs: Mapping[str, str]

    def undone(self) -> Fusion:
        """The same where the model went on without it."""
        return Fusion({}, {**dict.fromkeys(self.merged, "undone, as held-out images want it"), **self.plain}, {})


@torch.no_grad()
def fuse(
    model: nn.Module,
    graph: ChannelGraph,
    plan: PruningPlan,
    inputs: Inputs,
    *,
    rules: FusionRules = FusionRules(),
    importance: Mapping[str, Tensor] | None = None,
) -> Fusion:
    """Merges what `plan` removes into what it keeps, in place: `cut` then gives the fused model.

    Args:
        model: the dense model that was traced, with its data.
        graph: its groups.
        plan: the units to keep; groups that it leaves whole stay as they are.
        inputs: what the model runs on; only the order of its layers is taken from there.
        rules: see `FusionRules`.
        importance: non-negative scores by group name, shape (n,), for `masses="importance"`.

    Raises:
        UserError: the plan belongs to another model.
        ValueError: unknown rules, or masses by an importance that is missing.
    """
    _check(rules, importance)
    plan.check(graph)
    watched = watch(model, inputs)
    reasons = unmergeable(model, graph, watched)
    plain = [group for group in graph.groups if plan.removed(group) and group.name in reasons]
    why_plain = {group.name: reasons[group.name] for group in plain}
    merging = [group for group in from_output(graph, watched) if plan.removed(group) and group.name not in reasons]
    if not merging:
        return Fusion({}, why_plain, watched.pairs)
    makers = {member.module for group in merging for member in group.members if makes_units(member)}
    others = {layer: norm for layer, norm in watched.pairs.items() if layer not in makers}
    before = {name: copy.deepcopy(model.get_submodule(name)) for pair in others.items() for name in pair}
    folded = fold(model, watched.pairs)
    hidden = _positions_lost(plain, plan)
    read: list[tuple[Member, Tensor, Tensor]] = []  # merges of what the other layers read
    merged = {}
    with steps("merging", len(merging), unit="group") as bar:
        for group in merging:
            kept = torch.tensor(plan.kept[group.name])
            members = layer_members(group, watched.pairs)
            scores = importance[group.name] if importance and rules.masses == "importance" else None
            transport = solve(unit_features(model, members, hidden), kept, scores)
            merged[group.name] = _merge(model, members, kept, transport, rules, folded)
            read += [(m, kept, transport.by_source) for m in members if m.dim == 1 and m.module in others]
            bar.update()
    unfold(model, {layer: norm for layer, norm in watched.pairs.items() if layer in makers}, folded)
    restore_modules(model, before)
    for member, kept, factor in read:
        merge_positions(tensor_of(model, member), member.dim, member.index, kept, factor)
    return Fusion(merged, why_plain, watched.pairs)


def restore_modules(model: nn.Module, before: Mapping[str, nn.Module]) -> None:
    """Puts back layers and batch norms whose units stay what they are: folding loses weights where γ is nought."""
    for name, module in before.items():
        now = model.get_submodule(name)
        now._parameters.update({key: None for key in now._parameters if module._parameters[key] is None})
        for key, tensor in module.state_dict().items():
            now.state_dict()[key].copy_(tensor)


def from_output(graph: ChannelGraph, watched: Watched) -> list[CoupledGroup]:
    """The groups in the order of the paper: the one that the last layer to run makes comes first."""

    def last_producer(group: CoupledGroup) -> int:
        return max((watched.last_call.get(node.module, 0) for node in group.nodes if node.side == "out"), default=0)

    return sorted(graph.groups, key=last_producer, reverse=True)


def unmergeable(model: nn.Module, graph: ChannelGraph, watched: Watched) -> dict[str, str]:
    """Why a group can only lose its units plainly, by the name of each such group."""
    tied = tied_parameters(model)
    reasons = {group.name: _reason(model, group, watched, tied) for group in graph.groups}
    return {name: reason for name, reason in reasons.items() if reason}


def layer_members(group: CoupledGroup, pairs: Mapping[str, str]) -> list[Member]:
    """The members that are merged: weights and biases of layers, those that folded batch norms bring included."""
    folded = set(pairs.values())
    members = [member for member in group.members if member.module not in folded]
    known = {member.name for member in members}
    new = [replace(member, tensor="bias") for member in members if makes_units(member) and member.module in pairs]
    return members + [member for member in new if member.name not in known]


def unit_features(model: nn.Module, members: Sequence[Member], hidden: _Hidden | None = None) -> Tensor:
    """The features of a group's units, float64, shape (n, f): rows of ℓ2 norm 1, or all zeros.

    Args:
        members: from `layer_members`, of the folded model.
        hidden: positions that count as zeros, by tensor name and dim.
    """
    slices = []
    for member in members:
        tensor = tensor_of(model, member).detach().double()
        for dim in set(range(tensor.dim())) - {member.dim}:
            if hidden and (member.name, dim) in hidden:
                tensor = tensor.index_fill(dim, hidden[member.name, dim].to(tensor.device), 0)
        slices.append(tensor.movedim(member.dim, 0)[member.index].flatten(1))  # (n, k, …) → (n, …)
    return nn.functional.normalize(torch.cat(slices, dim=1), eps=torch.finfo(torch.float64).tiny)


def solve(features: Tensor, kept: Tensor, importance: Tensor | None = None) -> Transport:
    """Moves all units onto the kept ones at the least cost, exactly.

    Args:
        features: shape (n, f), float64.
        kept: int64, ascending, shape (m,).
        importance: non-negative, shape (n,), for masses; None gives uniform ones, and so do zeros alone.

    Returns:
        On the CPU.
    """
    from ot.lp import emd  # here, since it takes seconds to import, for scipy's sake

    weights = torch.ones(len(features)) if importance is None else importance.cpu()
    source, target = _masses(weights.double()), _masses(weights.double()[kept])
    cost = torch.cdist(features, features[kept.to(features.device)], p=1).cpu()  # most of the time
    plan = emd(source.numpy(), target.numpy(), cost.numpy(), numItermax=PIVOTS)
    return Transport(torch.as_tensor(plan), source, target)


def merge_positions(tensor: Tensor, dim: int, index: Tensor, kept: Tensor, factor: Tensor) -> None:
    """Puts `factor` times the units where the kept ones are, in place, and zeros where the others were.

    Args:
        tensor: the units lie along `dim`.
        index: the k positions of each unit, shape (n, k).
        kept: units, shape (m,).
        factor: shape (m, n).
    """
    along = tensor.detach().movedim(dim, 0)
    index = index.to(tensor.device)
    units = along[index].double()  # (n, k, …)
    new = torch.tensordot(factor.to(units), units, dims=1)  # (m, k, …)
    along[index] = torch.zeros_like(units, dtype=tensor.dtype)
    along[index[kept.to(tensor.device)]] = new.to(tensor.dtype)


def _check(rules: FusionRules, importance: Mapping[str, Tensor] | None) -> None:
    if rules.normalization not in NORMALIZATIONS or rules.masses not in MASSES:
        raise ValueError(f"{rules}: normalization is of {NORMALIZATIONS}, masses are of {MASSES}")
    if rules.masses == "importance" and importance is None:
        raise ValueError("masses by importance need the importance")


def _merge(
    model: nn.Module,
    members: Sequence[Member],
    kept: Tensor,
    transport: Transport,
    rules: FusionRules,
    folded: Mapping[str, FoldedNorm],
) -> Tensor:
    """Step 6 of the module's docstring for one group, and the statistics of its batch norms; gives A."""
    by_source, mean = transport.by_source, transport.by_target
    make = by_source if rules.normalization == "source" else mean
    for member in members:
        factor = make if member.dim == 0 else by_source
        if _is_depthwise(model, member):
            factor = mean
        merge_positions(tensor_of(model, member), member.dim, member.index, kept, factor)
        if makes_units(member) and member.module in folded:
            _merge_folded(folded[member.module], member.index, kept, make, mean)
    return make


def _merge_folded(folded: FoldedNorm, index: Tensor, kept: Tensor, make: Tensor, mean: Tensor) -> None:
    """Units that are merged resemble each other: deviations add up as those of copies do."""
    folded.deviation[index] = folded.deviation[index].abs()
    transported = [(folded.mean, make), (folded.deviation, make), (folded.spread, mean)]
    if folded.bias is not None:
        transported.append((folded.bias, mean))
    for values, factor in transported:
        merge_positions(values, 0, index, kept, factor)


def _positions_lost(groups: Sequence[CoupledGroup], plan: PruningPlan) -> _Hidden:
    """What `groups` lose, by tensor name and dim."""
    lost: dict[tuple[str, int], list[Tensor]] = {}
    for group in groups:
        removed = torch.tensor(plan.removed(group))
        for member in group.members:
            lost.setdefault((member.name, member.dim), []).append(member.index[removed].flatten())
    return {key: torch.cat(positions) for key, positions in lost.items()}


def _reason(model: nn.Module, group: CoupledGroup, watched: Watched, tied: set[int]) -> str:
    """Why `group` cannot be merged, or ""."""
    if group.sections:
        return "its units lie in blocks that stay equally wide"
    if group.split_dim:
        return "it shares a dim with other groups"
    for member in group.members:
        if reason := _member_reason(model, member, group.nodes[member.node].kind, watched, tied):
            return reason
    makers = {member.module for member in group.members if member.dim == 0}
    if any(one & makers and other & makers for one, other in watched.products):
        return "its units are multiplied with each other"
    return ""


def _member_reason(model: nn.Module, member: Member, kind: str, watched: Watched, tied: set[int]) -> str:
    module, tensor = model.get_submodule(member.module), tensor_of(model, member)
    if member.module in set(watched.pairs.values()):
        return ""
    if kind == "norm":
        return f"{member.module} normalises it, and does not fold into a layer"
    if kind == "parameter":
        return f"the parameter {member.name} acts on it"
    if not is_plain_layer(module) or getattr(module, "transposed", False):
        return f"{member.module} is not a plain linear or convolution"
    if id(tensor) in tied:
        return f"the weight of {member.module} is shared"
    if kind != "depthwise_conv" and getattr(module, "groups", 1) > 1:
        return f"{member.module} is a grouped convolution"
    if member.dim == 0 and member.index.shape[1] > 1:
        return f"a unit has several outputs of {member.module}"
    return ""


def makes_units(member: Member) -> bool:
    """Returns True for the rows of a layer's weight."""
    return member.tensor == "weight" and member.dim == 0


def _is_depthwise(model: nn.Module, member: Member) -> bool:
    groups = getattr(model.get_submodule(member.module), "groups", 1)
    return groups > 1 and member.tensor == "weight"


def tensor_of(model: nn.Module, member: Member) -> Tensor:
    """Returns the parameter that a member is part of."""
    return getattr(model.get_submodule(member.module), member.tensor)


def _masses(weights: Tensor) -> Tensor:
    """Shares that sum to 1: uniform ones where there is no weight at all."""
    weights = weights.clamp(min=0)
    weights = weights if weights.any() else torch.ones_like(weights)
    return weights / weights.sum()


def _divided(plan: Tensor, masses: Tensor) -> Tensor:
    """`plan / masses`, and zeros where there is no mass."""
    return torch.where(masses > 0, plan / masses, 0.0)
