"""How much of a model's width can go, and why the rest stays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from isomorphic.pruning.groups import ChannelGraph

Producers = dict[str, tuple[Tensor, int]]


@dataclass(frozen=True)
class WidthShares:
    """A model's channels, each counted where it is made.

    Attributes:
        channels: how many a weight makes, by its name.
        prunable: the share of them that is in a group, in [0, 1].
        frozen: the share of the rest by reason, the largest first.
    """

    channels: Mapping[str, int]
    prunable: float
    frozen: Mapping[str, float]

    @property
    def width(self) -> int:
        """All channels."""
        return sum(self.channels.values())


def width_shares(model: nn.Module, graph: ChannelGraph, num_outputs: int | None = None) -> WidthShares:
    """Returns what of the model's width `graph` can prune.

    Args:
        model: the traced model.
        graph: its coupled groups.
        num_outputs: classes, if they are not to count: a weight with as many rows, none of them in a group, makes the
            model's output and is left out.
    """
    covered = _covered(model, graph)
    reasons = _reasons(model, graph)
    channels: dict[str, int] = {}
    frozen = Counter[str]()
    for name, (weight, dim) in all_producers(model, graph).items():
        rows = weight.shape[dim]
        mask = covered.get((id(weight), dim), torch.zeros(rows, dtype=torch.bool))
        if rows == num_outputs and not mask.any():
            continue
        channels[name] = rows
        if not mask.all():
            reason = reasons.get((id(weight), dim), "it is a single channel" if rows == 1 else "no reason given")
            frozen[reason] += int((~mask).sum())
    width = sum(channels.values())
    shares = {reason: count / width for reason, count in frozen.most_common()}
    return WidthShares(channels, 1 - frozen.total() / max(width, 1), shares)


def all_producers(model: nn.Module, graph: ChannelGraph) -> Producers:
    """Returns (weight, dim of its output channels) by parameter name: of all layers, and of what else the graph names.

    That is a parameter which forward code uses as a weight on its own.
    """
    found = producers(model)
    known = {id(weight) for weight, _ in found.values()}
    tensors = dict(model.named_parameters())
    for name in (*graph.frozen, *(group.name for group in graph.groups)):
        parameter, *dims = name.split(":")
        tensor = tensors.get(parameter)
        if tensor is not None and tensor.dim() > 1 and id(tensor) not in known:
            known.add(id(tensor))
            found[parameter] = tensor, int(dims[0])
    return found


def producers(model: nn.Module) -> Producers:
    """Returns (weight, dim of its output channels) of convolutions and linears, by parameter name; shared ones once.

    Depthwise convolutions pass on the channels of another layer and are left out. The weights inside attention and
    recurrent layers of torch count as linears. A weight that is computed from parameters (`weight_norm`,
    `spectral_norm`) stands for the largest of these.
    """
    found: dict[int, tuple[str, Tensor, int]] = {}
    for prefix, module in model.named_modules():
        names, dim = [], 0
        if isinstance(module, nn.modules.conv._ConvNd) and not 1 < module.groups == module.in_channels:
            names, dim = ["weight"], int(module.transposed)
        elif isinstance(module, nn.Linear):
            names = ["weight"]
        elif isinstance(module, nn.MultiheadAttention):
            names = ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"]
        elif isinstance(module, nn.RNNBase):
            names = [name for names in module._all_weights for name in names if name.startswith("weight_")]
        for weight_name in names:
            name, weight = _parameter_of(module, weight_name)
            if weight is not None:
                found.setdefault(id(weight), (f"{prefix}.{name}" if prefix else name, weight, dim))
    return {name: (weight, dim) for name, weight, dim in found.values()}


def _parameter_of(module: nn.Module, name: str) -> tuple[str, Tensor | None]:
    """Returns a module's weight by its name; where that is computed, the largest parameter that it is computed from.

    "weight" is "parametrizations.weight.original1" (C, …) of a weight norm, beside its lengths "…original0" (C, 1).
    """
    own = module._parameters.get(name)
    if own is not None or name in module._parameters:
        return name, own
    prefixes = (f"parametrizations.{name}.", f"{name}_")  # weight_v beside weight_g; weight_orig; weight_hh_l0_raw
    behind = [pair for pair in module.named_parameters() if pair[0].startswith(prefixes)]
    return max(behind, key=lambda pair: pair[1].numel(), default=(name, None))


def _covered(model: nn.Module, graph: ChannelGraph) -> dict[tuple[int, int], Tensor]:
    """Which positions are in a group, as units or as whole heads: a mask by the tensor's identity and dim."""
    covered: dict[tuple[int, int], Tensor] = {}
    for group in graph.groups:
        for member in (*group.members, *(group.sections.members if group.sections else ())):
            tensor = getattr(model.get_submodule(member.module), member.tensor)
            empty = torch.zeros(tensor.shape[member.dim], dtype=torch.bool)
            covered.setdefault((id(tensor), member.dim), empty)[member.index.flatten()] = True
    return covered


def _reasons(model: nn.Module, graph: ChannelGraph) -> dict[tuple[int, int], str]:
    """Why rows that are in no group stay, by the tensor's identity and dim: a tied weight has several names."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    places = {name: name.rpartition(":") for name in graph.frozen}
    return {
        (id(tensors[parameter]), int(dim)): graph.frozen[name].reason
        for name, (parameter, _, dim) in places.items()
        if parameter in tensors
    }
