"""What is found in a small model, and half of it cut: held against the masked model, run in both modes, trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import isomorphic as iso
from isomorphic.inputs import Inputs, call, tensors_in
from isomorphic.pruning.grouping.trace import trace_groups
from isomorphic.pruning.groups import ChannelGraph

FOLLOWS = "a size in the forward code depends on it and cannot follow"
OUTPUT = "it reaches the model's output"
UNUSED = "the forward code does not use it on these inputs"


def found(model: nn.Module, inputs: Inputs) -> dict[str, int]:
    """The units of each group."""
    return units(trace_groups(model.eval(), inputs))


def units(graph: ChannelGraph) -> dict[str, int]:
    """The units of each group."""
    return {group.name: group.num_units for group in graph.groups}


def stays(model: nn.Module, inputs: Inputs, *besides: str) -> dict[str, str]:
    """Why dims stay, but for those of the modules `besides`, which make the outputs, and of what is not used."""
    frozen = {name: str(why) for name, why in trace_groups(model.eval(), inputs).frozen.items()}
    return {name: why for name, why in frozen.items() if name.partition(".")[0] not in besides and why != UNUSED}


def half(model: nn.Module, inputs: Inputs, **options: Any) -> Any:
    """`model` without half of each group's units: checked, with outputs of the same shapes, ready for training."""
    options = {"ratio": 0.5, "ranking": "local", "criterion": "l2", **options}
    done = iso.prune(model.eval(), inputs, self_check=True, **options)
    assert "Self-check passed" in str(done)
    assert sum(units(trace_groups(done.model, inputs)).values()) == sum(len(kept) for kept in done.plan.kept.values())
    for mode in (False, True):
        outputs = [[*tensors_in(call(one.train(mode), inputs))] for one in (model, done.model)]
        shapes = [[tensor.shape for tensor in one] for one in outputs]
        assert shapes[0] == shapes[1] and all(tensor.isfinite().all() for tensor in outputs[1])
    losses = [tensor.square().mean() for tensor in tensors_in(call(done.model, inputs)) if tensor.requires_grad]
    torch.stack(losses).sum().backward()
    gradients = [p.grad for p in done.model.parameters() if p.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)
    assert all(p.grad is None or p.grad.shape == p.shape for p in done.model.parameters())
    model.eval()
    return done.model.eval()
