"""Iterative pruning: several cuts, each planned for what the last one left, that are one plan for the dense model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from torch import nn
from torch.optim import Optimizer

from isomorphic.inputs import Inputs
from isomorphic.measure.complexity import Complexity
from isomorphic.measure.latency import Latency
from isomorphic.observe import eval_mode
from isomorphic.pruning.apply import Applied, Recovery, apply_plan
from isomorphic.pruning.blocks.residual import shortened
from isomorphic.pruning.branches import Batches, check_branches
from isomorphic.pruning.composition import Composition
from isomorphic.pruning.options import PlanOptions
from isomorphic.pruning.planning import Calibration, PlannedPruning, make_plan

Between = Callable[[nn.Module, int], object]


def prune_in_steps(
    model: nn.Module,
    inputs: Inputs,
    options: PlanOptions,
    steps: int,
    *,
    before: Complexity,
    recovery: Recovery,
    latency: Latency | None = None,
    calibration: Calibration | None = None,
    batches: Batches | None = None,
    between: Between | None = None,
    self_check: bool = False,
    optimizer: Optimizer | None = None,
) -> tuple[PlannedPruning, list[Applied]]:
    """Plans and cuts `model` step by step; returns the first plan with the units that all steps together keep.

    Args:
        model: cut in place.
        inputs: what it takes.
        options: what is to go in all; each step goes an equal part of the way.
        steps: how many cuts.
        before: costs of the dense model.
        recovery: what is done around each cut.
        latency: of the dense model, where that is the budget.
        calibration: images and labels for a search for an allocation, of one step.
        batches: what the model is meant for; a criterion goes over them in each step.
        between: (model, step) is called between two steps, from step 1 on.
        self_check, optimizer: as for `apply_plan`, of each cut.

    Raises:
        UserError: as `make_plan` and `apply_plan`.
    """
    composition: Composition | None = None
    first: PlannedPruning | None = None
    planned: PlannedPruning | None = None
    applied: list[Applied] = []
    for step in range(1, steps + 1):
        with eval_mode(model):
            planned = make_plan(
                model,
                inputs,
                options if steps == 1 else options.part(step, steps, before, latency),
                before=planned.after if planned else before,
                latency_before=latency,  # the budget of a step is absolute: what is left needs no timing
                calibration=calibration,
                recovery=recovery,
                composition=composition,
            )
            if step == 1 < steps:
                _check_all_steps(model, inputs, options, planned, batches, before=before, latency=latency)
            if steps > 1:
                with shortened(model, planned.kept_blocks):
                    composition = composition or Composition(model, planned.graph)
                    composition.add(model, planned.graph, planned)
            first = first or planned
            around = dataclasses.replace(recovery, importance=planned.scores)
            check = {"self_check": self_check, "optimizer": optimizer, "batches": batches}
            applied.append(apply_plan(model, planned.graph, planned, inputs, around, **check))
        if between is not None and step < steps:
            between(model, step)
    assert first is not None and planned is not None
    kept = composition.kept() if composition else first.kept
    last = {"after": planned.after, "latency_after": planned.latency_after}
    return dataclasses.replace(first, kept=kept, **last), applied


def in_short(applied: Sequence[Applied]) -> Applied:
    """Returns what the last of several cuts did, with the largest error that any of their self-checks found."""
    errors = [cut.check_error for cut in applied if cut.check_error is not None]
    return dataclasses.replace(applied[-1], check_error=max(errors, default=None))


def _check_all_steps(
    model: nn.Module,
    inputs: Inputs,
    options: PlanOptions,
    first: PlannedPruning,
    batches: Batches | None,
    *,
    before: Complexity,
    latency: Latency | None,
) -> None:
    """Raises a UserError before the first of several cuts where the data take branches that `inputs` do not."""
    if first.graph.unused and batches is not None:
        at_random = dataclasses.replace(options, criterion="random", data=None)  # which units go is all the same
        whole = make_plan(model, inputs, at_random, before=before, latency_before=latency)
        check_branches(model, whole.graph, whole, inputs, batches)
