"""Step 1, group: from a model and an example input to its coupled groups.

The tracer behind `trace_groups` is `torch_pruning.DependencyGraph` (DepGraph, CVPR 2023), adapted in `depgraph.py`.
Nothing outside this file knows that.
"""

from __future__ import annotations

from torch import Tensor, nn

from isomorphic.errors import UserError
from isomorphic.pruning import depgraph
from isomorphic.pruning.groups import ChannelGraph


def trace_groups(model: nn.Module, example_inputs: Tensor) -> ChannelGraph:
    """Finds the coupled groups of `model`.

    Args:
        model: in eval mode, dense or already cut; it is left as it was.
        example_inputs: a batch that the model can run on, on the model's device.

    Returns:
        The groups in a fixed order, with indices in the coordinates of `model` as it stands.

    Raises:
        UserError: nothing in the model can be pruned.
    """
    graph = depgraph.trace(model, example_inputs)
    if not graph.groups:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in graph.frozen.items()) or "no layers found"
        raise UserError(f"nothing in this model can be pruned ({reasons})")
    return graph
