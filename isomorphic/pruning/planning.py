"""From a model to a plan: (choose blocks →) group → classify → score → rank. Nothing is changed.

`make_plan` is the one place that spells these steps out: the Python face, prune.py and the studies call it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from isomorphic.errors import UserError
from isomorphic.inputs import Inputs, device_of
from isomorphic.measure.accuracy import measure_accuracy
from isomorphic.measure.complexity import Complexity, count_complexity, format_amount
from isomorphic.measure.latency import Latency, format_seconds, measure_latency
from isomorphic.measure.results import change_lines
from isomorphic.processes import distributed
from isomorphic.pruning.apply import Recovery, apply_plan
from isomorphic.pruning.blocks.depth import SCOPES, check_spare, choose_blocks, score_blocks
from isomorphic.pruning.blocks.residual import find_stages, shortened
from isomorphic.pruning.classify import classify
from isomorphic.pruning.composition import Composition
from isomorphic.pruning.gradients import Loss, Statistic, accumulate
from isomorphic.pruning.grouping.trace import TRACERS, trace_groups
from isomorphic.pruning.groups import ChannelGraph
from isomorphic.pruning.plan import PruningPlan, save_plan
from isomorphic.pruning.ranking.allocation import allocate
from isomorphic.pruning.ranking.amounts import Amount, parse_amount, parse_duration
from isomorphic.pruning.ranking.budget import PlanCost, plan_for_budget, shared_ratios
from isomorphic.pruning.ranking.latency_budget import PlanLatency, plan_for_latency
from isomorphic.pruning.ranking.ranker import RANKINGS, Ranker, RankingRules, Ratios
from isomorphic.pruning.report import ClassSummary, class_table, plan_lines, summarize_classes
from isomorphic.pruning.scoring import CRITERIA, NORMALIZERS, CustomCriterion, normalize, score_groups, statistic_of
from isomorphic.pruning.selection import check_share, ratios_by_group, spared_groups

CLASS_LABELS = ("paper", "detailed")
ALLOCATIONS = ("uniform", "calibrate")
MACS_COUNTERS = ("paper", "exact")


@dataclass(frozen=True)
class PlanOptions:
    """What is to go, and by which measure. Each default stands here, and only here.

    How much: one of the first four; what stays open is 0 where heads, blocks or layers by name say what goes.

    Attributes:
        ratio: share of the width to remove, in [0, 1), in each isomorphism class.
        macs: budget in multiply-accumulates: "4.2G", "50%" of the dense model's, or a number.
        params: budget in parameters: "20M", "50%", or a number.
        latency: budget in time of one batch: "5ms", "50%", or a number of seconds; measured on this device.
        head_ratio: share of the attention heads, as wholes; None: none of them, or what a budget asks for.
        head_dim_ratio: share of the dims of each head; None: like any width, or what a budget asks for.
        ignore: modules that keep the width of their outputs, by name, with * and ?.
        ratios: shares for modules of their own, by name, with * and ?, whatever the others lose.
        ranking: "isomorphic" ranks inside a class, "global" over all groups, "local" inside a group.
        round_to: widths become multiples of this (a head's, in attention).
        max_ratio: the largest share that any group may lose.
        class_labels: "paper", or "detailed": kernel sizes and groups of convolutions tell classes apart, too.
        criterion: a key of `CRITERIA`, or a function (group, weights, gradients) -> scores (n,).
        data: batches that a criterion with gradients is computed on.
        loss: (model, batch) -> scalar; None: cross entropy of model(batch[0]) and batch[1].
        normalizer: of the scores inside a group, a key of `NORMALIZERS`.
        score_bias: biases count, too.
        amp_dtype: autocast dtype of scoring and of measured latency; None: the model's own precision.
        remove_blocks: residual blocks to remove first, the least important ones.
        remove_blocks_scope: "stage": from the stage with most blocks, "all": from all.
        allocate: "uniform": one ratio for all classes; "calibrate": ratios searched for on calibration images.
        allocation_evaluations: models that this search may cut and try.
        macs_counter: which MACs a budget is in: "paper" or "exact".
        latency_batch_size: items of a batch where latency is measured.
        tracer: "exact" or "depgraph".
        seed: of the random criterion and of the search.
    """

    ratio: float | None = None
    macs: str | float | Amount | None = None
    params: str | float | Amount | None = None
    latency: str | float | Amount | None = None
    head_ratio: float | None = None
    head_dim_ratio: float | None = None
    ignore: Sequence[str] = ()
    ratios: Mapping[str, float] = field(default_factory=dict)
    ranking: str = "isomorphic"
    round_to: int = 1
    max_ratio: float = 1.0
    class_labels: str = "paper"
    criterion: str | CustomCriterion = "taylor"
    data: Iterable[Any] | None = None
    loss: Loss | None = None
    normalizer: str = "mean"
    score_bias: bool = False
    amp_dtype: torch.dtype | None = None
    remove_blocks: int = 0
    remove_blocks_scope: str = "stage"
    allocate: str = "uniform"
    allocation_evaluations: int = 40
    macs_counter: str = "paper"
    latency_batch_size: int = 1
    tracer: str = "exact"
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises a UserError for what no model could be planned with."""
        given = [name for name in ("ratio", "macs", "params", "latency") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} are two answers to how much is to go: give one of them")
        says_what = self.ratios or self.head_ratio or self.head_dim_ratio or self.remove_blocks
        if not given and not says_what:
            raise UserError('say how much is to go: ratio=0.5, macs="50%", params="20M", latency="5ms", or plan=')
        for name in ("ratio", "head_ratio", "head_dim_ratio"):
            if getattr(self, name) is not None:
                check_share(getattr(self, name), name)
        if not 0 <= self.max_ratio <= 1:
            raise UserError(f"max_ratio = {self.max_ratio!r} is not a share in [0, 1]")
        for name in ("round_to", "latency_batch_size", "allocation_evaluations"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)!r} is not at least 1")
        choices = {
            "ranking": RANKINGS,
            "class_labels": CLASS_LABELS,
            "normalizer": tuple(NORMALIZERS),
            "remove_blocks_scope": SCOPES,
            "allocate": ALLOCATIONS,
            "macs_counter": MACS_COUNTERS,
            "tracer": TRACERS,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(f"{name} = {getattr(self, name)!r} is none of {', '.join(known)}")

    def with_data(self, data: Iterable[Any] | None) -> PlanOptions:
        """Returns the same with batches to score on."""
        return dataclasses.replace(self, data=data)

    @property
    def budget(self) -> tuple[str, Amount] | None:
        """What is budgeted ("macs_paper", "macs_exact", "params" or "latency") and the amount; None for ratios."""
        if self.macs is not None:
            return f"macs_{self.macs_counter}", _amount(self.macs, parse_amount)
        if self.params is not None:
            return "params", _amount(self.params, parse_amount)
        if self.latency is not None:
            return "latency", _amount(self.latency, parse_duration)
        return None

    def plain_ratios(self) -> Ratios:
        """Returns the ratios as they were given: heads stay unless some were to go."""
        return Ratios(self.ratio or 0.0, self.head_ratio or 0.0, self.head_dim_ratio)

    def ratios_at(self, ratio: float) -> Ratios:
        """Returns all ratios of a budget search at one ratio in [0, 1]."""
        return shared_ratios(ratio, self.head_ratio, self.head_dim_ratio)

    def part(self, step: int, steps: int, dense: Complexity, latency: Latency | None) -> PlanOptions:
        """Returns what is asked for up to one of several steps of equal size; blocks go in the first.

        Of ratio=0.5 in four steps: 0.125, 0.25, 0.375, 0.5, all of the dense model. Of a budget of 4 G MACs under a
        dense model of 16 G: 13, 10, 7, 4 G.

        Args:
            step: from 1 to `steps`.
            dense: costs of the dense model.
            latency: its latency, where that is the budget.
        """
        share = step / steps
        parts: dict[str, Any] = {"ratios": {name: ratio * share for name, ratio in self.ratios.items()}}
        for name in ("ratio", "head_ratio", "head_dim_ratio"):
            ratio = getattr(self, name)
            parts[name] = None if ratio is None else ratio * share
        if self.budget is not None:
            unit, wanted = self.budget
            takes = latency.median if latency else getattr(dense, unit)
            amount = Amount(takes - (takes - wanted.of(takes)) * share)
            parts["macs" if unit.startswith("macs") else unit] = amount
        if step > 1:
            parts["remove_blocks"] = 0
            if self.ratio is None and self.budget is None:
                parts["ratio"] = 0.0  # blocks, heads or names alone say what goes
        return dataclasses.replace(self, **parts)


@dataclass(frozen=True)
class Target:
    """A budget for this model: what it is of, and how much of it may be taken (seconds, for a latency)."""

    unit: str
    amount: float


@dataclass(frozen=True)
class Calibration:
    """This process's calibration images (N, …) and their labels (N,), on the model's device."""

    images: Tensor
    labels: Tensor | None = None

    def batches(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """Returns them in batches, in order."""
        assert self.labels is not None
        return list(zip(self.images.split(size), self.labels.split(size), strict=True))


@dataclass(frozen=True, eq=False)
class PlannedPruning(PruningPlan):
    """A plan, with what it was made from and what it costs. It prints as a person would want to read it.

    Attributes:
        graph: the groups of the model, without its removed blocks.
        classes: isomorphism class by group name.
        scores: the units' scores (n,), before normalisation, by group name; empty where nothing was scored.
        before, after: MACs and params of the dense model, and of what the plan leaves.
        latency_before, latency_after: the same of latencies, where that was the budget.
        spared: names of the groups that stay because their modules were to be ignored.
        heads_wanted: heads were to go: a line says so if none can.
        notes: what a person should know of how the plan was found.
    """

    graph: ChannelGraph = field(default_factory=lambda: ChannelGraph((), {}))
    classes: Mapping[str, int] = field(default_factory=dict)
    scores: Mapping[str, Tensor] = field(default_factory=dict)
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
        """Returns what the table leaves open: what stays and why, removed blocks, heads."""
        return plan_lines(self.graph, self, heads_wanted=self.heads_wanted, spared=self.spared)

    def save(self, path: str | Path, about: dict[str, Any] | None = None) -> None:
        """Writes the plan as JSON, for `plan=` and `prune.py --from-plan`.

        Args:
            path: the file.
            about: further JSON values to store.

        Raises:
            UserError: the file cannot be written.
        """
        save_plan(path, self, self.graph.groups, {**(about or {}), **vars(self.after)})

    def __str__(self) -> str:
        return "\n".join([*self.table(), *self.details(), change_lines(self.before, self.after)])


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
        tell: hears of what takes longer.
        progress: shows bars where somebody watches.

    Raises:
        UserError: nothing can be pruned, the budget is met already or out of reach, names that match nothing, and
            whatever is wrong with the data or the loss.
    """
    before = before or count_complexity(model, inputs)
    latency_before = latency_before or measure_dense_latency(model, inputs, options)
    target = find_target(options, before, latency_before, may_be_met=composition is not None)
    wanted = statistic_of(options.criterion, has_data=options.data is not None)
    kept_blocks, statistic = _kept_blocks(model, inputs, options, wanted)
    with shortened(model, kept_blocks):
        graph = trace_groups(model, inputs, options.tracer)
        classes = classify(graph.groups, detailed=options.class_labels == "detailed")
        scores = score_groups(
            model,
            graph.groups,
            options.criterion,
            statistic=statistic,
            score_bias=options.score_bias,
            seed=options.seed,
        )
        normalized = {name: normalize(values, options.normalizer) for name, values in scores.items()}
        spared = spared_groups(model, graph, options.ignore)
        strangers = composition.strangers(graph) if composition else frozenset()
        rules = RankingRules(
            options.ranking,
            options.round_to,
            options.max_ratio,
            whole=spared | strangers,
            by_name=ratios_by_group(model, graph, options.ratios, spared),
        )
        dense = composition.dense_sizes(graph) if composition else {}
        ranker = Ranker(graph, normalized, classes, rules, dense)
        search = _Search(model, inputs, graph, ranker, options, PlanCost(model, graph, inputs))
        latency_after, notes = None, ()
        if options.allocate == "calibrate":
            recovery = dataclasses.replace(recovery or Recovery(), importance=scores)
            plan, line = search.allocated(target, calibration, recovery, batch_size, progress=progress)
            notes = (line,)
        else:
            plan, latency_after = search.ranked(target, tell)
        after = search.cost(plan)
    return PlannedPruning(
        plan.kept,
        kept_blocks,
        sizes={group.name: (group.num_units, group.num_sections) for group in graph.groups},
        ratios=plan.ratios,
        graph=graph,
        classes=classes,
        scores=scores,
        before=before,
        after=after,
        latency_before=latency_before,
        latency_after=latency_after,
        spared=spared,
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


def _gather_statistic(model: nn.Module, inputs: Inputs, options: PlanOptions, wanted: str) -> Statistic:
    """What the criterion needs of the data.

    Raises:
        UserError: there are no data, or as `accumulate`.
    """
    if options.data is None:
        free = ", ".join(name for name, rule in CRITERIA.items() if rule.statistic is None)
        raise UserError(f"criterion {options.criterion!r} needs data=, batches to compute gradients on ({free} do not)")
    device = device_of(inputs)
    return accumulate(model, options.data, wanted, loss=options.loss, device=device, amp_dtype=options.amp_dtype)


def _kept_blocks(
    model: nn.Module, inputs: Inputs, options: PlanOptions, wanted: str | None
) -> tuple[dict[str, tuple[int, ...]], Statistic | None]:
    """The residual blocks that stay, where any go, and the criterion's statistic by the names that are left then."""
    stages = find_stages(model, inputs) if options.remove_blocks else []
    check_spare(stages, options.remove_blocks, options.remove_blocks_scope)  # before anything is scored
    statistic = _gather_statistic(model, inputs, options, wanted) if wanted else None
    if not options.remove_blocks:
        return {}, statistic
    block_scores = score_blocks(model, stages, options.criterion, statistic=statistic, seed=options.seed)
    kept_blocks = choose_blocks(stages, block_scores, options.remove_blocks, options.remove_blocks_scope)
    old_names = {parameter: name for name, parameter in model.named_parameters()}
    with shortened(model, kept_blocks):
        if statistic:
            statistic = {name: statistic[old_names[parameter]] for name, parameter in model.named_parameters()}
    return kept_blocks, statistic


def find_target(
    options: PlanOptions, before: Complexity, latency: Latency | None, *, may_be_met: bool = False
) -> Target | None:
    """Returns the budget in absolute numbers, if there is one.

    Raises:
        UserError: the model meets it already, unless that may be.
    """
    if options.budget is None:
        return None
    unit, wanted = options.budget
    takes = latency.median if latency else getattr(before, unit)
    amount = wanted.of(takes)
    if amount > takes and not may_be_met:
        raise UserError(f"a budget of {_shown(amount, unit)} is met already: the model takes {_shown(takes, unit)}")
    return Target(unit, amount)


def _shown(amount: float, unit: str) -> str:
    return format_seconds(amount) if unit == "latency" else format_amount(amount, unit)


def _amount(value: str | float | Amount, parse: Callable[[str | float], Amount]) -> Amount:
    return value if isinstance(value, Amount) else parse(value)


def measure_dense_latency(model: nn.Module, inputs: Inputs, options: PlanOptions) -> Latency | None:
    """Returns the latency of the model as it stands, where a latency is the budget."""
    return _latency(model, inputs, options) if options.latency is not None else None


def _latency(model: nn.Module, inputs: Inputs, options: PlanOptions) -> Latency:
    return measure_latency(model, inputs, options.latency_batch_size, amp_dtype=options.amp_dtype)


@dataclass(frozen=True)
class _Search:
    """A model without its removed blocks, ready to be searched for a plan."""

    model: nn.Module
    inputs: Inputs
    graph: ChannelGraph
    ranker: Ranker
    options: PlanOptions
    cost: PlanCost

    def ranked(self, target: Target | None, tell: Callable[[str], None]) -> tuple[PruningPlan, Latency | None]:
        """Returns the plan for the budget, or else for the ratios; and its latency where that is the budget."""
        options = self.options
        if target is None:
            return self.ranker.plan(options.plain_ratios()), None
        if target.unit == "latency":
            tell(f"Cutting and timing models for a latency of {format_seconds(target.amount)}...")
            latency_of = PlanLatency(self.model, self.graph, lambda cut: _latency(cut, self.inputs, options))
            return plan_for_latency(self.ranker, options.ratios_at, latency_of, target.amount)
        found = plan_for_budget(self.ranker, options.ratios_at, self.cost, target.unit, round(target.amount))
        return found, None

    def allocated(
        self,
        target: Target | None,
        calibration: Calibration | None,
        recovery: Recovery,
        batch_size: int,
        *,
        progress: bool,
    ) -> tuple[PruningPlan, str]:
        """Returns the best allocation of the budget, or of the MACs that the ratios leave, and a line about it."""
        options = self.options
        if calibration is None or calibration.labels is None:
            raise UserError('allocate="calibrate" needs calibration=, a pair of images and labels')
        heads = options.head_ratio
        if target is None:
            heads = heads or 0.0
            unit = f"macs_{options.macs_counter}"
            target = Target(unit, getattr(self.cost(self.ranker.plan(options.plain_ratios())), unit))
        hidden = None if progress and distributed.is_main() else True  # None: where somebody watches
        bar = tqdm(total=options.allocation_evaluations, desc="Allocating", unit="model", disable=hidden)

        def loss_of(plan: PruningPlan) -> float:
            candidate = copy.deepcopy(self.model)
            apply_plan(candidate, self.graph, plan, self.inputs, recovery)
            bar.update()
            return measure_accuracy(candidate, calibration.batches(batch_size), device_of(self.inputs)).loss

        with bar:
            found = allocate(
                self.ranker,
                self.cost,
                target.unit,
                round(target.amount),
                loss_of,
                heads=heads,
                head_dims=options.head_dim_ratio,
                evaluations=options.allocation_evaluations,
                seed=options.seed,
            )
        return found.plan, found.line
