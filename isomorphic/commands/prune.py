"""What prune.py does with its flags between opening a model and cutting it: images, scores, a plan, a recovery."""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from isomorphic.commands import entry, opening
from isomorphic.commands.prune_flags import Target
from isomorphic.data.loaders import build_scoring_loader
from isomorphic.errors import UserError
from isomorphic.measure.accuracy import measure_accuracy
from isomorphic.measure.complexity import Complexity
from isomorphic.measure.latency import Latency, format_seconds, measure_latency
from isomorphic.measure.sparsity import Sparsity, count_sparsity, sparsity_table
from isomorphic.models import ModelSpec
from isomorphic.processes import distributed
from isomorphic.pruning.apply import NEED_IMAGES, Recovery, apply_plan
from isomorphic.pruning.blocks.depth import check_spare, choose_blocks, remove_blocks, score_blocks
from isomorphic.pruning.blocks.residual import find_stages
from isomorphic.pruning.classify import classify
from isomorphic.pruning.gradients import Statistic, accumulate
from isomorphic.pruning.grouping.trace import trace_groups
from isomorphic.pruning.groups import ChannelGraph
from isomorphic.pruning.plan import PruningPlan, load_plan
from isomorphic.pruning.ranking.allocation import allocate
from isomorphic.pruning.ranking.budget import PlanCost, plan_for_budget, shared_ratios
from isomorphic.pruning.ranking.latency_budget import PlanLatency, plan_for_latency
from isomorphic.pruning.ranking.ranker import Ranker, RankingRules, Ratios
from isomorphic.pruning.recovery.fusion import FusionRules
from isomorphic.pruning.report import ClassSummary, class_table, draw_scores, summarize_classes
from isomorphic.pruning.scoring import CRITERIA, normalize, score_groups
from isomorphic.pruning.weights import dimap
from isomorphic.pruning.weights.layer_roles import assign_roles


@dataclass(frozen=True)
class Calibration:
    """This process's calibration images (N, 3, H, W) and labels (N,), on the model's device."""

    images: Tensor
    labels: Tensor

    def batches(self, size: int) -> Iterable[tuple[Tensor, Tensor]]:
        """They in batches, in order."""
        return list(zip(self.images.split(size), self.labels.split(size), strict=True))


@dataclass(frozen=True)
class Traced:
    """A model that has lost its blocks, with its graph and what plans would leave of it.

    Attributes:
        model, inputs: the model and an image that it runs on.
        graph: its groups.
        cost: MACs and params of what a plan leaves.
    """

    model: nn.Module
    inputs: Tensor
    graph: ChannelGraph
    cost: PlanCost

    @classmethod
    def of(cls, model: nn.Module, inputs: Tensor, tracer: str) -> Traced:
        graph = trace_groups(model, inputs, tracer)
        return cls(model, inputs, graph, PlanCost(model, graph, inputs))


@dataclass(frozen=True)
class Planned:
    """A plan, with the graph that it is for.

    Attributes:
        graph: of the model without its removed blocks.
        plan: for it.
        cost: MACs and params of what the plan leaves.
        latency: of what the plan leaves, where it is the budget.
        importance: the units' scores (n,) by group name, where they were scored.
    """

    graph: ChannelGraph
    plan: PruningPlan
    cost: Complexity
    latency: Latency | None = None
    importance: Mapping[str, Tensor] = field(default_factory=dict)


def open_calibration(
    args: argparse.Namespace, model: nn.Module, spec: ModelSpec, device: torch.device
) -> Calibration | None:
    """The images that recoveries and the search for an allocation look at; None where nothing does, or there are none.

    Raises:
        UserError: an allocation is to be searched for, and there are none; or fewer batches than processes.
    """
    searched = args.allocate == "calibrate"
    recovers = not args.dry_run and NEED_IMAGES & set(args.recover)
    if not searched and not recovers:
        return None
    try:
        images = opening.evaluation_images(args, "train", model, spec)
    except UserError as error:
        if searched:
            raise
        steps = " and no ".join(step for step in args.recover if step in NEED_IMAGES)
        entry.say(f"There will be no {steps}, for want of calibration images: {error}")
        return None
    batches = list(_batches(args, images, device, args.calibration_batches, "Calibrating"))
    counts = distributed.gather_objects(len(batches))
    if not all(counts):
        raise UserError(
            f"{sum(counts)} calibration batches are too few for {len(counts)} processes: "
            "lower --batch-size, or raise --calibration-batches"
        )
    return Calibration(*(torch.cat(parts).to(device) for parts in zip(*batches, strict=True)))


def recovery_of(
    args: argparse.Namespace, calibration: Calibration | None, importance: Mapping[str, Tensor]
) -> Recovery:
    """The recovery that the flags ask for."""
    images = calibration.images if calibration else None
    rules = FusionRules(args.fusion_normalization, args.fusion_masses)
    return Recovery(frozenset(args.recover), images, rules, importance)


def stored_plan(args: argparse.Namespace, model: nn.Module, inputs: Tensor) -> Planned:
    """The plan of --from-plan; the model loses its blocks here."""
    plan = load_plan(args.from_plan)
    remove_blocks(model, plan.kept_blocks, inputs)
    traced = Traced.of(model, inputs, args.graph)
    return Planned(traced.graph, plan, traced.cost(plan))


def make_plan(
    args: argparse.Namespace,
    model: nn.Module,
    spec: ModelSpec,
    inputs: Tensor,
    target: Target | None,
    calibration: Calibration | None,
) -> Planned:
    """A new plan; the model loses its blocks here."""
    stages = find_stages(model, inputs) if args.remove_blocks else []
    check_spare(stages, args.remove_blocks, args.remove_blocks_scope)  # before anything is scored
    statistic = gather_statistic(args, model, spec, inputs.device)
    block_scores = score_blocks(model, stages, args.pruning_type, statistic=statistic, seed=args.seed)
    kept_blocks = choose_blocks(stages, block_scores, args.remove_blocks, args.remove_blocks_scope)
    old_names = remove_blocks(model, kept_blocks, inputs)
    if statistic:
        statistic = {name: statistic[old] for name, old in old_names.items()}

    traced = Traced.of(model, inputs, args.graph)
    groups = traced.graph.groups
    classes = classify(groups, detailed=args.class_labels == "detailed")
    scores = score_groups(
        model, groups, args.pruning_type, statistic=statistic, score_bias=args.score_bias, seed=args.seed
    )
    normalized = {name: normalize(values, args.normalizer) for name, values in scores.items()}
    rules = RankingRules(args.ranking, args.round_to, args.max_pruning_ratio)
    ranker = Ranker(traced.graph, normalized, classes, rules)
    if args.allocate == "calibrate":
        assert calibration
        recovery = recovery_of(args, calibration, scores)
        plan, latency = allocated(args, ranker, traced, target, calibration, recovery), None
    else:
        plan, latency = ranked(args, ranker, traced, target)
    show(args, summarize_classes(groups, classes, scores, plan), plan)
    plan = dataclasses.replace(plan, kept_blocks=kept_blocks)
    return Planned(traced.graph, plan, traced.cost(plan), latency, scores)


def gather_statistic(
    args: argparse.Namespace, model: nn.Module, spec: ModelSpec, device: torch.device
) -> Statistic | None:
    """What the criterion needs of training images, which are seen under the evaluation transform."""
    wanted = CRITERIA[args.pruning_type].statistic
    if not wanted:
        return None
    images = opening.evaluation_images(args, "train", model, spec)
    batches = _batches(args, images, device, args.taylor_batches, "Scoring")
    return accumulate(model, batches, wanted, device=device, amp_dtype=opening.amp_dtype(args))


def ranked(
    args: argparse.Namespace, ranker: Ranker, traced: Traced, target: Target | None
) -> tuple[PruningPlan, Latency | None]:
    """The plan for the budget where there is one, else for the ratios; and its latency if that is the budget."""
    heads, head_dims = args.head_pruning_ratio, args.head_dim_pruning_ratio
    if target is None:
        return ranker.plan(ratios_without_budget(args)), None

    def ratios_at(ratio: float) -> Ratios:
        return shared_ratios(ratio, heads, head_dims)

    if target.unit == "latency":
        entry.say(f"Cutting and timing models for a latency of {format_seconds(target.amount)}...")
        latency_of = PlanLatency(traced.model, traced.graph, lambda cut_model: measure(args, cut_model, traced.inputs))
        return plan_for_latency(ranker, ratios_at, latency_of, target.amount)
    return plan_for_budget(ranker, ratios_at, traced.cost, target.unit, round(target.amount)), None


def ratios_without_budget(args: argparse.Namespace) -> Ratios:
    """The ratios as they were given: heads stay unless some were to go."""
    return Ratios(args.pruning_ratio, args.head_pruning_ratio or 0.0, args.head_dim_pruning_ratio)


def allocated(
    args: argparse.Namespace,
    ranker: Ranker,
    traced: Traced,
    target: Target | None,
    calibration: Calibration,
    recovery: Recovery,
) -> PruningPlan:
    """The plan of the best allocation that is found for the budget; without one, for the MACs that the ratios leave."""
    heads = args.head_pruning_ratio
    if target is None:
        heads = heads or 0.0
        unit = f"macs_{args.macs_counter}"
        target = Target(unit, getattr(traced.cost(ranker.plan(ratios_without_budget(args))), unit))
    evaluations = tqdm(total=args.allocation_evaluations, desc="Allocating", unit="model", disable=_hidden())

    def loss_of(plan: PruningPlan) -> float:
        candidate = copy.deepcopy(traced.model)
        apply_plan(candidate, traced.graph, plan, traced.inputs, recovery)
        evaluations.update()
        return measure_accuracy(candidate, calibration.batches(args.batch_size), traced.inputs.device).loss

    with evaluations:
        found = allocate(
            ranker,
            traced.cost,
            target.unit,
            round(target.amount),
            loss_of,
            heads=heads,
            head_dims=args.head_dim_pruning_ratio,
            evaluations=args.allocation_evaluations,
            seed=args.seed,
        )
    entry.say(found.line)
    return found.plan


def measure(args: argparse.Namespace, model: nn.Module, inputs: Tensor) -> Latency:
    return measure_latency(model, inputs, args.latency_batch_size, amp_dtype=opening.amp_dtype(args))


def show(args: argparse.Namespace, summaries: list[ClassSummary], plan: PruningPlan) -> None:
    """The table of isomorphism classes, and their picture if it was asked for."""
    entry.say(class_table(summaries, plan))
    if args.report and distributed.is_main():
        draw_scores(args.report, summaries, title=f"{args.model}: {args.pruning_type} scores by isomorphism class")
        entry.say(f"Saving the score distributions to {args.report}")


def mask_weights(
    args: argparse.Namespace, model: nn.Module, spec: ModelSpec, inputs: Tensor
) -> tuple[ModelSpec, Sparsity]:
    """Prunes single weights, in place, and shows what is left; the spec then names the masked parameters."""
    masking = dimap.mask(model, assign_roles(model, inputs), args.pruning_ratio)
    spec = spec.masking(masking.names)
    sparsity = count_sparsity(model, inputs, spec.masked)
    entry.say(f"{masking}\n{sparsity_table(sparsity)}")
    return spec, sparsity


def _batches(
    args: argparse.Namespace, images: Dataset[tuple[Tensor, int]], device: torch.device, count: int, title: str
) -> Iterable[tuple[Tensor, Tensor]]:
    loader = build_scoring_loader(images, args.batch_size, count, args.workers, device, seed=args.seed)
    return tqdm(loader, title, unit="batch", disable=_hidden())


def _hidden() -> bool | None:
    """Progress is shown where somebody watches, by the first process."""
    return None if distributed.is_main() else True
