"""Iterative pruning: several cuts, each planned for what the last one left, that are one plan for the dense model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from isomorphic.inputs import Inputs
from isomorphic.observe import eval_mode
from isomorphic.pruning.apply import Applied, Recovery, apply_plan
from isomorphic.pruning.blocks.residual import shortened
from isomorphic.pruning.composition import Composition
from isomorphic.pruning.planning import PlannedPruning

Between = Callable[[nn.Module, int], object]


def cut_in_steps(
    model: nn.Module,
    inputs: Inputs,
    steps: int,
    plan_of_step: Callable[[int, Composition | None], PlannedPruning],
    recovery: Recovery,
    between: Between | None,
    check: Mapping[str, Any],
) -> tuple[PlannedPruning, list[Applied]]:
    """Plans and cuts `model` step by step; returns the first plan with the units that all steps together keep.

    Args:
        model, inputs, steps, recovery, between: as for `prune`.
        plan_of_step: makes the plan of a step for the model as it stands, from its number and the steps before.
        check: further arguments of `apply_plan`.
    """
    composition: Composition | None = None
    first: PlannedPruning | None = None
    applied: list[Applied] = []
    for step in range(1, steps + 1):
        with eval_mode(model):
            planned = plan_of_step(step, composition)
            if steps > 1:
                with shortened(model, planned.kept_blocks):
                    composition = composition or Composition(model, planned.graph)
                    composition.add(model, planned.graph, planned)
            first = first or planned
            around = dataclasses.replace(recovery, importance=planned.scores)
            applied.append(apply_plan(model, planned.graph, planned, inputs, around, **check))
        if between is not None and step < steps:
            between(model, step)
    assert first is not None
    return dataclasses.replace(first, kept=composition.kept() if composition else first.kept), applied
