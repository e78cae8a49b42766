"""Linear streams, which linear layers alone write and read, lose their weakest directions instead of channels.

The stream between the blocks of a MobileNet or an EfficientNet goes through no activation: projections write it, sums
pass it on, expansions read it. Any invertible mixture of its channels serves as well, so that what is kept need not be
channels. With x ∈ ℝⁿ the stream, W_r the weights of reader r, and S_r = E[x xᵀ] over what it reads, m directions

    z = A x,    x̂ = B z,    A ∈ ℝᵐˣⁿ,  B ∈ ℝⁿˣᵐ

lose the least of what the readers make, Σ_r E|W_r (x − x̂)|² / E|W_r x|², up to one S for all of them, where

    L² = Σ_r W_rᵀ W_r / E|W_r x|²,   L S L = U Λ Uᵀ,   A = U_mᵀ L,   B = L⁻¹ U_m

with U_m the m leading eigenvectors: principal components, as SliceGPT (ICLR 2024) slices a transformer, but weighed by
what reads them. Writers get A W and A b, readers W B. On EfficientNet-Lite0's photographs a fifth fewer directions lose
6% of a stream's variance where a fifth fewer channels lose 13%, predicted from the others as well as can be.

Second moments are not centred: nothing constant is left over, which zero padding could not carry. Whether nothing but
linear layers lies between is tried, not known: the model has to give the same outputs with all of its directions mixed
at random. All this happens in the dense model, where the kept units are, and the ordinary cut takes the others away.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from isomorphic.inputs import Inputs, call, floats_in
from isomorphic.observe import eval_mode
from isomorphic.progress import steps
from isomorphic.pruning.groups import ChannelGraph, CoupledGroup, Member
from isomorphic.pruning.plan import PruningPlan
from isomorphic.pruning.recovery.batch_norm import FoldedNorm, fold, unfold
from isomorphic.pruning.recovery.fusion import (
    Fusion,
    layer_members,
    makes_units,
    restore_modules,
    tensor_of,
    unmergeable,
)
from isomorphic.pruning.recovery.mixing import UnitMoments, mix_units, observe_all
from isomorphic.pruning.recovery.principal import are_alike, as_large, principal_directions, put_back, random_turn
from isomorphic.pruning.recovery.watching import watch


def turn_linear_streams(
    model: nn.Module, graph: ChannelGraph, plan: PruningPlan, inputs: Inputs, images: Inputs, *, beside: Collection[str]
) -> Fusion:
    """Turns the streams that nothing but linear layers write and read; `beside` are turned already."""
    watched = watch(model, inputs)
    losing = [group for group in graph.groups if plan.removed(group) and group.name not in beside]
    reasons = unmergeable(model, graph, watched)
    plain = {group.name: reasons.get(group.name) or _mixing_reason(group) for group in losing}
    candidates = [group for group in losing if not plain[group.name]]
    if not candidates:
        return Fusion({}, plain, watched.pairs)
    makers = {member.module for group in candidates for member in group.members if makes_units(member)}
    pairs = {layer: norm for layer, norm in watched.pairs.items() if layer in makers}
    before = {name: copy.deepcopy(model.get_submodule(name)) for pair in pairs.items() for name in pair}
    folded = fold(model, pairs)
    rotated: dict[str, Tensor] = {}
    with eval_mode(model), steps("rotating", len(candidates), unit="stream") as bar:
        members = {group.name: layer_members(group, pairs) for group in candidates}
        linear = [group for group in candidates if _is_linear(model, group, members[group.name], inputs)]
        weights = [m for group in linear for m in members[group.name] if m.tensor == "weight"]
        moments = UnitMoments(weights)
        observe_all(model, images, [moments] if linear else [])
        for group in linear:
            kept = torch.tensor(plan.kept[group.name])
            own = members[group.name]
            to_directions, back = _directions(model, own, len(kept), moments)
            mix_units(model, group, own, kept, to_directions, back)
            rotated[group.name] = to_directions.cpu()
            _tell_norms(own, kept, to_directions, moments, folded)
            bar.update()
    touched = {m.module for name in rotated for m in members[name] if makes_units(m)}
    unfold(model, {layer: norm for layer, norm in pairs.items() if layer in touched}, folded)
    whole = {layer: norm for layer, norm in pairs.items() if layer not in touched}
    restore_modules(model, {name: before[name] for pair in whole.items() for name in pair})
    not_linear = {group.name: "more than linear layers lie on it" for group in candidates if group not in linear}
    return Fusion(rotated, {name: reason for name, reason in (plain | not_linear).items() if reason}, watched.pairs)


def _mixing_reason(group: CoupledGroup) -> str:
    """Why the units of a group cannot be mixed, or ""."""
    if any(group.nodes[member.node].kind == "depthwise_conv" for member in group.members):
        return "a depthwise convolution takes its channels one by one"
    makers = [member for member in group.members if makes_units(member)]
    readers = [member for member in group.members if member.dim == 1]
    return "" if makers and readers else "no layer writes it, or none reads it"


def _is_linear(model: nn.Module, group: CoupledGroup, members: Sequence[Member], inputs: Inputs) -> bool:
    """Tries a random orthogonal mixture of all units: True if the outputs stay."""
    touched = [tensor_of(model, member) for member in members]
    before = [tensor.detach().clone() for tensor in touched]
    mixture = random_turn(group.num_units, keeps_ones=False)
    expected = floats_in(call(model, inputs))
    mix_units(model, group, members, torch.arange(group.num_units), mixture, mixture.T)
    found = floats_in(call(model, inputs))
    put_back(touched, before)
    return are_alike(found, expected)


def _directions(model: nn.Module, members: Sequence[Member], count: int, moments: UnitMoments) -> tuple[Tensor, Tensor]:
    """A (m, n) and B (n, m) of the docstring above, float64, scaled so that directions are as large as units were."""
    asked, seen = [], []
    for member in members:
        if member.tensor == "weight" and member.dim == 1:
            weight = tensor_of(model, member).double().movedim(1, 0)[member.index]  # (n, k, out, …)
            gram = torch.tensordot(weight.flatten(1), weight.flatten(1).T, dims=1)  # W_rᵀ W_r
            moment = moments.read(member)
            asked.append(gram / (gram * moment).sum().clamp_min(torch.finfo(gram.dtype).tiny))
            seen.append(moment / moment.trace().clamp_min(torch.finfo(gram.dtype).tiny))
    forth, back = principal_directions(torch.stack(asked).sum(0), torch.stack(seen).mean(0), count)
    own = torch.stack([moments.read(m) for m in members if m.tensor == "weight" and m.dim == 1]).mean(0)
    return as_large(forth, back, own)


def _tell_norms(
    members: Sequence[Member], kept: Tensor, forth: Tensor, moments: UnitMoments, folded: Mapping[str, FoldedNorm]
) -> None:
    """Gives folded batch norms the moments of the directions that now go through them."""
    for member in members:
        if makes_units(member) and member.module in folded:
            mean, square = moments.written(member)
            new = forth @ mean
            deviation = ((forth @ square * forth).sum(1) - new.square()).clamp_min(0).sqrt()
            norm, places = folded[member.module], member.index[kept, 0].to(new.device)
            norm.mean[places] = new
            norm.deviation[places] = deviation
            norm.spread[places] = deviation
