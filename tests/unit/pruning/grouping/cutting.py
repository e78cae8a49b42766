"""Small models of a few lines, and cuts of them by some plan, held against the masked model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import nn

from isomorphic.inputs import Inputs
from isomorphic.pruning.cutting.cut import cut
from isomorphic.pruning.cutting.self_check import cut_error, masked_copy
from isomorphic.pruning.groups import ChannelGraph
from isomorphic.pruning.plan import PruningPlan


class Net(nn.Module):
    """Modules, parameters and numbers by name, and a function of this module and its inputs as the forward."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.register_buffer(name, part) if type(part) is torch.Tensor else setattr(self, name, part)

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in eval mode with generic parameters and statistics, nothing at zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.copy_(values.abs() + 0.5 if name.endswith("running_var") else values)
    return model.eval()


def why_frozen(graph: ChannelGraph) -> dict[str, str]:
    """Why channels stay, as a person reads it, by the dim that makes them."""
    return {name: str(frozen) for name, frozen in graph.frozen.items()}


def random_plan(graph: ChannelGraph, seed: int) -> PruningPlan:
    """Any units that the graph allows to be kept, and any heads; at least one of each."""
    random, kept = Random(seed), {}
    may_lose_heads = {group.name for group in graph.attention}
    shared: dict[str, list[int]] = {}  # the heads of each head set
    alone = [(g.name,) for g in graph.groups if not any(g.name in names for names in graph.shrink_together)]
    groups = {group.name: group for group in graph.groups}
    for names in (*alone, *graph.shrink_together):
        common = math.gcd(*(groups[name].section_size for name in names))
        share = random.randint(1, max(common - 1, 1))
        for group in (groups[name] for name in names):
            width = group.section_size // common * share
            count = random.randint(1, group.num_sections) if group.name in may_lose_heads else group.num_sections
            blocks = sorted(random.sample(range(group.num_sections), count))
            if group.name in may_lose_heads:
                blocks = shared.setdefault(group.head_set, blocks)
            units = (random.sample(range(group.section_size), width) for _ in blocks)
            kept[group.name] = tuple(
                block * group.section_size + unit
                for block, own in zip(blocks, units, strict=True)
                for unit in sorted(own)
            )
    return PruningPlan(kept)


def cut_copy(model: nn.Module, graph: ChannelGraph, plan: PruningPlan) -> nn.Module:
    """The model that `plan` leaves."""
    plan.check(graph)
    pruned = copy.deepcopy(model)
    cut(pruned, graph, plan)
    return pruned


def error_of_random_cut(model: nn.Module, graph: ChannelGraph, inputs: Inputs, seed: int = 0) -> float:
    """How much a model that is cut at random differs from the masked one, as a share of the output's spread."""
    plan = random_plan(graph, seed)
    return cut_error(masked_copy(model, graph, plan), cut_copy(model, graph, plan), inputs)
