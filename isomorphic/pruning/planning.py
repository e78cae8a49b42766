"""From a model to a plan: (choose blocks →) group → classify → score → rank. Nothing is changed.

`score_model` spells steps 1 to 3 out, `make_plan` adds step 4: the Python face, prune.py and the studies call them.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from isomorphic.errors import UserError
from isomorphic.inputs import Inputs, device_of
from isomorphic.measure.accuracy import measure_accuracy
from isomorphic.measure.complexity import Complexity, count_complexity
from isomorphic.measure.latency import Latency, format_seconds, measure_latency
from isomorphic.measure.precision import Auto
from isomorphic.measure.results import change_lines
from isomorphic.progress import Bar
from isomorphic.pruning.apply import Recovery, apply_plan
from isomorphic.pruning.blocks.depth import check_spare, choose_blocks, score_blocks
from isomorphic.pruning.blocks.residual import find_stages, shortened
from isomorphic.pruning.composition import Composition
from isomorphic.pruning.gradients import Statistic, accumulate
from isomorphic.pruning.grouping.trace import trace_groups
from isomorphic.pruning.groups import ChannelGraph, short_name
from isomorphic.pruning.options import PlanOptions, Target, find_target
from isomorphic.pruning.plan import PruningPlan, save_plan
from isomorphic.pruning.ranking.allocation import Allocation, allocate
from isomorphic.pruning.ranking.budget import PlanCost, plan_for_budget
from isomorphic.pruning.ranking.latency_budget import PlanLatency, plan_for_latency
from isomorphic.pruning.ranking.ranker import Ranker, RankingRules
from isomorphic.pruning.recovery.calibration import check_calibration
from isomorphic.pruning.recovery.held_out import Judge, held_out_mask
from isomorphic.pruning.report import (
    ClassSummary,
    TracedGraph,
    class_table,
    classified,
    listed,
    plan_lines,
    summarize_classes,
)
from isomorphic.pruning.scoring import CRITERIA, groups_beyond, normalize, score_groups, statistic_of
from isomorphic.pruning.selection import ratios_by_group, spared_groups, with_partners
from isomorphic.pruning.widths import width_shares

QUICK = 4  # of so many calibration images, a search for an allocation looks at one


@dataclass(frozen=True)
class Calibration:
    """This process's calibration images and their labels (N,), on the model's device.

    Images are a tensor (N, …), or whatever else the model takes, N items of it.
    """

    images: Inputs
    labels: Tensor | None = None

    def batches(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """Returns them in batches, in order."""
        assert self.labels is not None and isinstance(self.images, Tensor)
        return list(zip(self.images.split(size), self.labels.split(size), strict=True))


@dataclass(frozen=True, eq=False)
class PlannedPruning(PruningPlan):
    """A plan, with what it was made from and what it costs. It prints as a person would want to read it.

    Attributes:
        graph: the groups of the model, without its removed blocks.
        classes: isomorphism class by group name.
        scores: the units' scores (n,), before normalisation, by group name; empty where nothing was scored.
        normalized: the same as they were ranked.
        before, after: MACs and params of the dense model, and of what the plan leaves.
        latency_before, latency_after: the same of latencies, where that was the budget.
        spared: names of the groups that stay because their modules were to be ignored.
        heads_wanted: heads were to go: a line says so if none can.
        notes: what a person should know of how the plan was found.
    """

    graph: ChannelGraph = field(default_factory=lambda: ChannelGraph((), {}))
    classes: Mapping[str, int] = field(default_factory=dict)
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    normalized: Mapping[str, Tensor] = field(default_factory=dict)
    before: Complexity = field(default_factory=lambda: Complexity(0, 0, 0))
    after: Complexity = field(default_factory=lambda: Complexity(0, 0, 0))
    latency_before: Latency | None = None
    latency_after: Latency | None = None
    spared: frozenset[str] = frozenset()
    heads_wanted: bool = False
    notes: tuple[str, ...] = ()

    def summaries(self) -> list[ClassSummary]:
        """Returns the isomorphism classes with their scores; none where nothing was scored."""
        return summarize_classes(self.graph.groups, self.classes, self.scores, self) if self.scores else []

    def table(self) -> list[str]:
        """Returns how the plan was found and the table of isomorphism classes."""
        return [*self.notes, *([class_table(self.summaries(), self)] if self.scores else [])]

    def details(self) -> list[str]:
        """Returns what the table leaves open: what stays and why, removed blocks, heads, and if no unit goes at all."""
        lines = plan_lines(self.graph, self, heads_wanted=self.heads_wanted, spared=self.spared)
        whole = all(len(self.kept.get(group.name, ())) == group.num_units for group in self.graph.groups)
        if whole and not self.kept_blocks:
            lines.append("Nothing goes: names to ignore, rounding, limits or a small ratio keep every unit")
        return lines

    def save(self, path: str | Path, about: dict[str, Any] | None = None) -> None:
        """Writes the plan as JSON, for `plan=` and `prune.py --from-plan`.

        Args:
            path: the file.
            about: further JSON values to store.

        Raises:
            UserError: the file cannot be written.
        """
        save_plan(path, self, self.graph.groups, {**(about or {}), **self.after.figures()})

    def __str__(self) -> str:
        return "\n".join([*self.table(), *self.details(), change_lines(self.before, self.after)])


@dataclass(frozen=True)
class ScoredModel:
    """A model after steps 1 to 3: groups, their classes and scores. As many plans as one likes can be made from it.

    Attributes:
        model, inputs: what was traced; it is left as it was.
        options: what is to go, and by which measure.
        graph: the coupled groups, with their isomorphism classes.
        scores: the units' scores (n,), before normalisation, by group name.
        normalized: the same as they are ranked.
        ranker: ranks them under the options' rules.
        spared: names of the groups that stay because their modules were to be ignored.
        beyond: names of those that stay because the criterion says nothing about them.
    """

    model: nn.Module
    inputs: Inputs
    options: PlanOptions
    graph: TracedGraph
    scores: Mapping[str, Tensor]
    normalized: Mapping[str, Tensor]
    ranker: Ranker
    spared: frozenset[str] = frozenset()
    beyond: frozenset[str] = frozenset()

    @functools.cached_property
    def cost(self) -> PlanCost:
        """Predicts MACs and params of a plan."""
        return PlanCost(self.model, self.graph, self.inputs)

    def plan(self, target: Target | None) -> PruningPlan:
        """Returns step 4: the plan that meets a budget of MACs or params, or else the options' ratios.

        Raises:
            UserError: the budget is out of reach.
        """
        if target is None:
            return self.ranker.plan(self.options.plain_ratios())
        return plan_for_budget(self.ranker, self.options.ratios_at, self.cost, target.unit, target.whole)

    def plan_for_latency(self, target: Target) -> tuple[PruningPlan, Latency]:
        """Returns the plan that meets a latency, for which every candidate is cut and timed, and what was measured."""
        latency_of = PlanLatency(self.model, self.graph, lambda cut: _latency(cut, self.inputs, self.options))
        return plan_for_latency(self.ranker, self.options.ratios_at, latency_of, target.amount)

    def plan_by_calibration(
        self,
        target: Target | None,
        calibration: Calibration | None,
        recovery: Recovery,
        batch_size: int,
        *,
        progress: bool,
    ) -> Allocation:
        """Returns the allocation with the least loss on calibration images, every candidate cut and recovered.

        Args:
            target: a budget of MACs or params; None: the MACs that the options' ratios leave.
            calibration: images and their labels.
            recovery: what the final cut gets, too.
            batch_size: images at once.
            progress: shows a bar where somebody watches.

        Every fifth image is held out from the search; if what it finds is no better there than the paper's allocation,
        that one is taken.

        Raises:
            UserError: there are no labelled images, or the budget is out of reach.
        """
        options = self.options
        if calibration is None or calibration.labels is None:
            raise UserError('allocate="calibrate" needs calibration=, a pair of images and labels')
        if not isinstance(calibration.images, Tensor):
            raise UserError('allocate="calibrate" measures classifiers of one tensor: calibration=(images, labels)')
        check_calibration(self.model, calibration.images)
        heads = options.head_ratio
        if target is None:
            heads = heads or 0.0
            unit = f"macs_{options.macs_counter}"
            target = Target(unit, getattr(self.cost(self.plan(None)), unit))
        mask = held_out_mask(calibration.images)
        images, labels = calibration.images[~mask], calibration.labels[~mask.to(calibration.labels.device)]
        fitted, few = Calibration(images, labels), Calibration(images[::QUICK], labels[::QUICK])
        judge = Judge(self.model, calibration.images[mask])
        on_held_out: dict[tuple[tuple[int, ...], ...], float] = {}  # by the kept units of all groups
        bar = Bar(total=options.allocation_evaluations, desc="Allocating", unit="model", shown=progress)

        def cut_copy(plan: PruningPlan, on: Calibration) -> nn.Module:
            candidate = copy.deepcopy(self.model)
            apply_plan(candidate, self.graph, plan, self.inputs, recovery.for_search(on.images))
            return candidate

        def quick_loss_of(plan: PruningPlan) -> float:
            bar.update()
            return measure_accuracy(cut_copy(plan, few), few.batches(batch_size), device_of(self.inputs)).loss

        def loss_of(plan: PruningPlan) -> float:
            candidate = cut_copy(plan, fitted)
            on_held_out[tuple(plan.kept.values())] = judge.loss_of(candidate) if judge.works else 0.0
            return measure_accuracy(candidate, fitted.batches(batch_size), device_of(self.inputs)).loss

        with bar:
            found = allocate(
                self.ranker,
                self.cost,
                target.unit,
                target.whole,
                loss_of,
                heads=heads,
                head_dims=options.head_dim_ratio,
                evaluations=options.allocation_evaluations,
                seed=options.seed,
                quick_loss_of=quick_loss_of,
            )
        return found.judged(lambda plan: on_held_out[tuple(plan.kept.values())]) if judge.works else found


def group_and_classify(model: nn.Module, inputs: Inputs, options: PlanOptions) -> TracedGraph:
    """Returns steps 1 and 2: the coupled groups of a model, and their isomorphism classes."""
    graph = trace_groups(model, inputs, options.tracer)
    return classified(graph, detailed=options.class_labels == "detailed")


def score_model(
    model: nn.Module,
    inputs: Inputs,
    options: PlanOptions,
    *,
    graph: TracedGraph | None = None,
    statistic: Statistic | None = None,
    composition: Composition | None = None,
) -> ScoredModel:
    """Groups, classifies and scores: all that plans are made from.

    Args:
        model, inputs: as for `make_plan`.
        options: rules and criterion.
        graph: of `group_and_classify`, where that was called before.
        statistic: what the criterion needs of the data, where that was gathered before.
        composition: what earlier cuts have taken.

    Raises:
        UserError: nothing can be pruned, names match nothing, or what is wrong with the data or the loss.
    """
    graph = graph or group_and_classify(model, inputs, options)
    if statistic is None:
        statistic = gather_statistic(model, inputs, options)
    scores = score_groups(
        model, graph.groups, options.criterion, statistic=statistic, score_bias=options.score_bias, seed=options.seed
    )
    normalized = {name: normalize(values, options.normalizer) for name, values in scores.items()}
    spared = spared_groups(model, graph, options.ignore)
    strangers = composition.strangers(graph) if composition else frozenset()
    beyond = frozenset(with_partners(graph, groups_beyond(model, graph.groups, options.criterion)))
    by_name = ratios_by_group(model, graph, options.ratios, spared)
    if asked := [short_name(name) for name in by_name if name in beyond]:
        raise UserError(f"ratios names {listed(asked)}, about which {options.criterion} says nothing: leave it out")
    rules = RankingRules(
        options.ranking, options.round_to, options.max_ratio, whole=spared | strangers | beyond, by_name=by_name
    )
    dense = composition.dense_sizes(graph) if composition else {}
    ranker = Ranker(graph, normalized, graph.classes, rules, dense)
    return ScoredModel(model, inputs, options, graph, scores, normalized, ranker, spared, beyond)


def make_plan(
    model: nn.Module,
    inputs: Inputs,
    options: PlanOptions,
    *,
    before: Complexity | None = None,
    latency_before: Latency | None = None,
    calibration: Calibration | None = None,
    recovery: Recovery | None = None,
    batch_size: int = 64,
    composition: Composition | None = None,
    tell: Callable[[str], None] = lambda line: None,
    stage: Callable[[str], None] = lambda doing: None,
    progress: bool = False,
) -> PlannedPruning:
    """Plans what goes: units are scored, ranked inside their classes, and taken until the ratio or budget is met.

    Args:
        model: on the device of `inputs`; it is left as it was.
        inputs: what its forward takes, see `trace_groups`.
        options: what is to go, and by which measure.
        before, latency_before: costs of the model, where they are known already.
        calibration: images and labels that a search for an allocation measures its models on.
        recovery: how the models of that search are recovered.
        batch_size: images at once where it does.
        composition: what earlier cuts have taken; ratios are shares of the dense model then.
        tell: is called with a line about what takes longer.
        stage: is called with the name of each step before it begins.
        progress: shows bars where somebody watches.

    Raises:
        UserError: nothing can be pruned, the budget is met already or out of reach, names that match nothing, and
            whatever is wrong with the data or the loss.
    """
    before = before or count_complexity(model, inputs)
    latency_before = latency_before or measure_dense_latency(model, inputs, options)
    target = find_target(options, before, latency_before, may_be_met=composition is not None)
    stage("scoring")
    kept_blocks, statistic = _choose_kept_blocks(model, inputs, options, before)
    stage("tracing")
    latency_after, notes = None, ()
    with shortened(model, kept_blocks):
        scored = score_model(model, inputs, options, statistic=statistic, composition=composition)
        stage("ranking")
        if options.allocate == "calibrate":
            recovery = dataclasses.replace(recovery or Recovery(), importance=scored.scores)
            found = scored.plan_by_calibration(target, calibration, recovery, batch_size, progress=progress)
            plan, notes = found.plan, found.lines
        elif target and target.unit == "latency":
            tell(f"Cutting and timing models for a latency of {format_seconds(target.amount)}...")
            plan, latency_after = scored.plan_for_latency(target)
        else:
            plan = scored.plan(target)
        if scored.beyond:
            stay = listed([short_name(group.name) for group in scored.graph.groups if group.name in scored.beyond])
            notes = (*notes, f"Beyond {options.criterion}, and left whole: {stay}")
        after = scored.cost(plan)
        graph = dataclasses.replace(scored.graph, widths=width_shares(model, scored.graph))
    return PlannedPruning(
        plan.kept,
        kept_blocks,
        sizes={group.name: (group.num_units, group.num_sections) for group in graph.groups},
        ratios=plan.ratios,
        graph=graph,
        classes=graph.classes,
        scores=scored.scores,
        normalized=scored.normalized,
        before=before,
        after=after,
        latency_before=latency_before,
        latency_after=latency_after,
        spared=scored.spared,
        heads_wanted=bool(options.head_ratio),
        notes=notes,
    )


def check_plan(
    model: nn.Module, inputs: Inputs, plan: PruningPlan, tracer: str = "exact", *, before: Complexity | None = None
) -> PlannedPruning:
    """Holds a plan that exists against `model`, which is left as it was, and finds out what it costs.

    Args:
        model, inputs: as for `make_plan`.
        plan: the plan.
        tracer: finds the groups.
        before: costs of the model, where they are known already.

    Raises:
        UserError: the plan belongs to another model.
    """
    before = before or count_complexity(model, inputs)
    try:
        with shortened(model, plan.kept_blocks):
            graph = trace_groups(model, inputs, tracer)
            plan.check(graph)
            after = PlanCost(model, graph, inputs)(plan)
    except (AttributeError, TypeError, IndexError) as error:  # of `shortened`
        raise UserError(f"the plan belongs to another model: {error}") from error
    if isinstance(plan, PlannedPruning):  # it keeps its scores and classes
        return dataclasses.replace(plan, graph=graph, before=before, after=after)
    stored = {key: getattr(plan, key) for key in ("kept", "kept_blocks", "sizes", "ratios")}
    return PlannedPruning(**stored, graph=graph, before=before, after=after)


def gather_statistic(
    model: nn.Module, inputs: Inputs, options: PlanOptions, *, before: Complexity | None = None
) -> Statistic | None:
    """Returns what the criterion needs of the data, by parameter name; None where it needs nothing.

    `before` are costs of the model, where they are known already.

    Raises:
        UserError: there are no data, or as `accumulate`.
    """
    wanted = statistic_of(options.criterion, has_data=options.data is not None)
    if not wanted:
        return None
    if options.data is None:
        free = ", ".join(name for name, rule in CRITERIA.items() if rule.statistic is None)
        raise UserError(f"criterion {options.criterion!r} needs data=, batches to compute gradients on ({free} do not)")
    device = device_of(inputs)
    precision = options.amp_dtype
    if isinstance(precision, str):
        precision = Auto((before or count_complexity(model, inputs)).macs_paper)
    return accumulate(model, options.data, wanted, loss=options.loss, device=device, amp_dtype=precision)


def _choose_kept_blocks(
    model: nn.Module, inputs: Inputs, options: PlanOptions, before: Complexity
) -> tuple[dict[str, tuple[int, ...]], Statistic | None]:
    """Returns the residual blocks that stay, where any go, and the criterion's statistic by the names left then."""
    stages = find_stages(model, inputs) if options.remove_blocks else []
    check_spare(stages, options.remove_blocks, options.remove_blocks_scope)  # before anything is scored
    statistic = gather_statistic(model, inputs, options, before=before)
    if not options.remove_blocks:
        return {}, statistic
    block_scores = score_blocks(model, stages, options.criterion, statistic=statistic, seed=options.seed)
    kept_blocks = choose_blocks(stages, block_scores, options.remove_blocks, options.remove_blocks_scope)
    old_names = {parameter: name for name, parameter in model.named_parameters()}
    with shortened(model, kept_blocks):
        if statistic:
            statistic = {name: statistic[old_names[parameter]] for name, parameter in model.named_parameters()}
    return kept_blocks, statistic


def measure_dense_latency(model: nn.Module, inputs: Inputs, options: PlanOptions) -> Latency | None:
    """Returns the latency of the model as it stands, where a latency is the budget."""
    return _latency(model, inputs, options) if options.latency is not None else None


def _latency(model: nn.Module, inputs: Inputs, options: PlanOptions) -> Latency:
    amp_dtype = None if isinstance(options.amp_dtype, str) else options.amp_dtype
    return measure_latency(model, inputs, options.latency_batch_size, amp_dtype=amp_dtype)
