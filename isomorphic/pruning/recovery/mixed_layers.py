"""Layers of units that were merged or rotated: what they make and read, as mixtures of what the dense ones did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from isomorphic.pruning.groups import ChannelGraph
from isomorphic.pruning.plan import PruningPlan
from isomorphic.pruning.recovery.channel_maps import ChannelMap, map_of_units
from isomorphic.pruning.recovery.fusion import Fusion


@dataclass(frozen=True)
class MixedLayers:
    """By a layer's name, of those that make or read merged units.

    Attributes:
        outputs: what it makes of the dense layer's outputs.
        inputs: what it reads of the dense layer's inputs.
    """

    outputs: Mapping[str, ChannelMap]
    inputs: Mapping[str, ChannelMap]


def mixed_layers(
    dense: nn.Module, merged: nn.Module, graph: ChannelGraph, plan: PruningPlan, fusion: Fusion
) -> MixedLayers:
    """Returns what the layers of merged groups make and read, of what the dense ones make and read.

    Without a batch norm a layer makes A y. With one, σ and γ before the merge and σ' and γ' after it, batch norms give
    ŷ' = A ŷ with ŷ = γ (y − μ)/σ + β, so that the layer makes y' = σ'/γ' (ŷ' − β') + μ'.

    Args:
        dense: the model before its units were merged.
        merged: the same with merged units, not cut yet.
        graph, plan: its groups, and what they keep.
        fusion: which were merged, and how.
    """
    outputs: dict[str, ChannelMap] = {}
    inputs: dict[str, ChannelMap] = {}
    for group in graph.groups:
        if group.name in fusion.merged:
            factor, kept = fusion.merged[group.name], plan.kept[group.name]
            for member in group.members:
                is_layer = member.tensor == "weight" and group.nodes[member.node].kind in ("conv", "linear")
                if is_layer and member.dim == 0:
                    norm = fusion.pairs.get(member.module)
                    norms = (dense.get_submodule(norm), merged.get_submodule(norm)) if norm else None
                    outputs[member.module] = _merged(factor, member.index[:, 0], kept, norms)
                if is_layer and member.dim == 1 and member.index.shape[1] == 1:
                    inputs[member.module] = map_of_units(factor, member.index[:, 0], kept)
    return MixedLayers(outputs, inputs)


def _merged(factor: Tensor, rows: Tensor, kept: Sequence[int], norms: tuple[nn.Module, nn.Module] | None) -> ChannelMap:
    """One layer's map: `factor` is A (m, n), `rows` are the units' rows of the layer (n,), `norms` before and after."""
    if not norms:
        return map_of_units(factor, rows, kept)
    scale, shift = (values[rows] for values in _affine(norms[0]))
    new_scale, new_shift = (values[rows[list(kept)]] for values in _affine(norms[1]))
    offset = (factor @ shift - new_shift) / new_scale
    return map_of_units(factor * scale / new_scale[:, None], rows, kept, offset)


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """A batch norm in eval mode as y ↦ scale · y + shift, float64 on the CPU."""
    scale = 1 / (norm.running_var.double() + norm.eps).sqrt()
    scale = scale if norm.weight is None else scale * norm.weight.detach().double()
    shift = -scale * norm.running_mean.double()
    return scale.cpu(), (shift if norm.bias is None else shift + norm.bias.detach().double()).cpu()
