"""Step 1, group: from a model and an example input to its coupled groups.

The tracer behind `trace_groups` is `torch_pruning.DependencyGraph` (DepGraph, CVPR 2023), adapted in `depgraph.py`.
Nothing outside this file knows that. DepGraph guesses how channels travel through some operations, so every group is
tried before it is handed out: a copy of the model that has shapes but no data is cut and run, and what breaks it is
frozen. A permutation of channels (roll, flip, shuffle) keeps shapes and goes unnoticed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from isomorphic.errors import UserError
from isomorphic.pruning import depgraph
from isomorphic.pruning.groups import ChannelGraph, CoupledGroup
from isomorphic.pruning.plan import PruningPlan
from isomorphic.pruning.surgery import cut, shape_copy

_BREAKS = "the model does not run without some of it"


def trace_groups(model: nn.Module, example_inputs: Tensor) -> ChannelGraph:
    """Finds the coupled groups of `model`.

    Args:
        model: dense or already cut, in any mode; it is left as it was.
        example_inputs: a batch that the model can run on, on the model's device.

    Returns:
        The groups in a fixed order, with indices in the coordinates of `model` as it stands.

    Raises:
        UserError: nothing in the model can be pruned.
    """
    graph = depgraph.trace(model, example_inputs)
    groups = _groups_that_run(model, graph.groups, example_inputs)
    broken = {group.name: _BREAKS for group in graph.groups if group not in groups}
    if not groups:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in (graph.frozen | broken).items())
        raise UserError(f"nothing in this model can be pruned ({reasons or 'no layers found'})")
    return ChannelGraph(tuple(groups), graph.frozen | broken)


def _groups_that_run(model: nn.Module, groups: Sequence[CoupledGroup], example_inputs: Tensor) -> list[CoupledGroup]:
    """All groups where the model runs with all of them halved, else those that it runs without half of."""
    skeleton = shape_copy(model).eval()
    inputs = torch.empty_like(example_inputs, device="meta")
    expected = _shapes(skeleton(inputs))
    if _runs_halved(skeleton, groups, groups, inputs, expected):
        return list(groups)
    alone = [group for group in groups if _runs_halved(skeleton, groups, [group], inputs, expected)]
    return alone if _runs_halved(skeleton, groups, alone, inputs, expected) else []


def _runs_halved(
    skeleton: nn.Module,
    groups: Sequence[CoupledGroup],
    halved: Sequence[CoupledGroup],
    inputs: Tensor,
    expected: list[torch.Size],
) -> bool:
    """Whether the model still gives its outputs' shapes without the upper half of some groups' (heads') units."""
    names = {group.name for group in halved}
    kept = {
        group.name: tuple(
            unit
            for unit in range(group.num_units)
            if group.name not in names or unit % group.head_dim < max(group.head_dim // 2, 1)
        )
        for group in groups
    }
    pruned = copy.deepcopy(skeleton)
    try:
        cut(pruned, groups, PruningPlan(kept))
        with torch.no_grad():
            return _shapes(pruned(inputs)) == expected
    except (RuntimeError, AssertionError, ValueError, IndexError):
        return False


def _shapes(outputs: Any) -> list[torch.Size]:
    tensors = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    return [tensor.shape for tensor in tensors if isinstance(tensor, Tensor)]
