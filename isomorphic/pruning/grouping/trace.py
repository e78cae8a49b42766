"""Step 1, group: from a model and example inputs to its coupled groups.

Two tracers give the same kind of graph: `exact` follows every element through one forward pass, `depgraph` adapts
`torch_pruning.DependencyGraph` (DepGraph, CVPR 2023). Nothing outside this file knows which one found a group.
"""

from __future__ import annotations

import torch.fx
from torch import nn

from isomorphic.errors import UserError
from isomorphic.inputs import Inputs
from isomorphic.pruning.grouping import exact
from isomorphic.pruning.groups import FIXED_SIZE, ChannelGraph
from isomorphic.pruning.report import listed

TRACERS = ("exact", "depgraph")
_SHOWN = 4  # reasons of an error, at most


def trace_groups(model: nn.Module, inputs: Inputs, tracer: str = "exact") -> ChannelGraph:
    """Finds the coupled groups of `model`.

    Args:
        model: dense or already cut, in any mode; it is left as it was.
        inputs: what the model can run on, on its device: a tensor, a tuple of positional arguments, or a mapping of
            keyword arguments.
        tracer: one of `TRACERS`.

    Returns:
        The groups in a fixed order, with indices in the coordinates of `model` as it stands.

    Raises:
        UserError: nothing in the model can be pruned, or its attention adds keys (`add_bias_kv`, `add_zero_attn`).
    """
    if tracer == "depgraph":
        from isomorphic.pruning.grouping import depgraph  # torch-pruning is needed by this tracer alone

        graph = depgraph.trace(model, inputs)
    else:
        graph = exact.trace(model, inputs)
    if not graph.groups:
        raise UserError(
            f"nothing in this model can be pruned ({_reasons(graph) or 'no layers found'}){_advice(model, graph)}"
        )
    return graph


def _reasons(graph: ChannelGraph) -> str:
    """Each reason once, with the line behind it and the channels that stay for it, the most channels first."""
    names: dict[tuple[str, str], list[str]] = {}
    counts: dict[tuple[str, str], int] = {}
    for name, frozen in graph.frozen.items():
        reason = frozen.reason, frozen.where
        names.setdefault(reason, []).append(name)
        counts[reason] = counts.get(reason, 0) + frozen.count
    ranked = sorted(names, key=lambda reason: -counts[reason])
    parts = [
        f"{listed(names[reason, where], 2)}: {reason}" + (f", {where}" if where else "") for reason, where in ranked
    ]
    return "; ".join([*parts[:_SHOWN], *([f"{len(parts) - _SHOWN} more reasons"] if len(parts) > _SHOWN else [])])


def _advice(model: nn.Module, graph: ChannelGraph) -> str:
    """What to do instead, where the model is a copy that was made for something else, or spells its sizes out."""
    kinds = [type(module) for module in model.modules()]
    if any(kind.__module__.startswith("torch.ao.quantization") for kind in kinds):
        return ": it is prepared for quantization. Prune the model first, then prepare what is left"
    if any(issubclass(kind, torch.fx.GraphModule) for kind in kinds):
        return (
            ": it is a converted graph, in which sizes are plain numbers. Prune the model that it was made from and "
            "convert what is left, or convert it with dynamic shapes"
        )
    if any(frozen.reason == FIXED_SIZE for frozen in graph.frozen.values()):
        return (
            ": where such a line has a plain number for a size, write -1, x.shape or an attribute of the module instead"
        )
    return ""
