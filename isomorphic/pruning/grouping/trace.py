"""Step 1, group: from a model and example inputs to its coupled groups.

Two tracers give the same kind of graph: `exact` follows every element through one forward pass, `depgraph` adapts
`torch_pruning.DependencyGraph` (DepGraph, CVPR 2023). Nothing outside this file knows which one found a group.
"""

from __future__ import annotations

from torch import nn

from isomorphic.errors import UserError
from isomorphic.inputs import Inputs
from isomorphic.pruning.grouping import exact
from isomorphic.pruning.groups import ChannelGraph

TRACERS = ("exact", "depgraph")


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
        reasons = "; ".join(
            f"{name}: {frozen}" + (f", {frozen.where}" if frozen.where else "") for name, frozen in graph.frozen.items()
        )
        raise UserError(f"nothing in this model can be pruned ({reasons or 'no layers found'})")
    return graph
