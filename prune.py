#!/usr/bin/env python3
"""Prunes a vision model: (remove blocks) → group → classify → score → rank → cut → save.

    python prune.py --model deit_base_distilled_patch16_224.fb_in1k --pruning-ratio 0.5 \
        --head-pruning-ratio 0.5 --head-dim-pruning-ratio 0.25 --taylor-batches 50 --batch-size 64 \
        --data-path data/imagenet --save-as output/pruned/deit_4.2G.safetensors

prints the isomorphism classes with their scores, then

    MACs: 17.69 G => 4.17 G (paper counter; exact: …)
    Params: 87.34 M => 20.72 M
    Saving the pruned model to output/pruned/deit_4.2G.safetensors
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from isomorphic import cli, distributed
from isomorphic.checkpoint import check_savable, is_checkpoint, save_model
from isomorphic.cli_pruning import Target, budget_of, parse_args
from isomorphic.data import build_eval_loader, build_scoring_loader
from isomorphic.errors import UserError
from isomorphic.files import check_writable
from isomorphic.measure.accuracy import measure_accuracy
from isomorphic.measure.complexity import count_complexity
from isomorphic.measure.latency import Latency, format_seconds, measure_latency
from isomorphic.measure.results import accuracy_line, change_lines, complexity_results, latency_results, write_results
from isomorphic.models import ModelSpec, example_inputs
from isomorphic.provenance import file_sha256, run_provenance
from isomorphic.pruning.budget import PlanCost, plan_for_budget, shared_ratios
from isomorphic.pruning.depth import check_spare, choose_blocks, remove_blocks, score_blocks
from isomorphic.pruning.graph import trace_groups
from isomorphic.pruning.groups import ChannelGraph
from isomorphic.pruning.importance import CRITERIA, Statistic, accumulate, normalize, score_groups
from isomorphic.pruning.isomorphism import classify
from isomorphic.pruning.latency_budget import PlanLatency, plan_for_latency
from isomorphic.pruning.plan import PruningPlan, load_plan, save_plan
from isomorphic.pruning.ranking import Ranker, RankingRules, Ratios
from isomorphic.pruning.report import ClassSummary, class_table, draw_scores, plan_lines, summarize_classes
from isomorphic.pruning.residual import find_stages
from isomorphic.pruning.self_check import check_cut
from isomorphic.pruning.surgery import cut


def main() -> None:
    args = parse_args()
    check_outputs(args)
    device = cli.start(args)
    model, spec = cli.open_model_from(args)
    if not args.dry_run:
        check_savable(args.model, model, spec)
    model.to(device)
    inputs = example_inputs(spec, device)
    dense = count_complexity(model, inputs)
    dense_latency = measure(args, model, inputs) if args.target_latency else None
    target = budget_of(args, dense, dense_latency)
    results: dict[str, Any] = test_accuracy(args, "dense_top1", model, spec, device)

    graph, plan, latency = (
        stored_plan(args, model, inputs) if args.from_plan else make_plan(args, model, spec, inputs, target)
    )
    spec = spec.keeping(plan.kept_blocks)
    for line in plan_lines(graph, plan, heads_wanted=bool(args.head_pruning_ratio)):
        cli.say(line)
    predicted = PlanCost(model, graph, inputs)(plan)
    if args.plan_file and distributed.is_main():
        save_plan(args.plan_file, plan, graph.groups, {"model": args.model, **vars(predicted)})
        cli.say(f"Saving the plan to {args.plan_file}")
    if latency:
        cli.say(f"Latency: {dense_latency}\n      => {latency}")
        results |= latency_results(latency)

    if not args.dry_run:
        cut_and_check(args, model, graph, plan, inputs)
        results |= test_accuracy(args, "top1", model, spec, device)
    pruned = predicted if args.dry_run else count_complexity(model, inputs)
    cli.say(change_lines(dense, pruned))
    if distributed.is_main():
        write(args, model, spec, {**complexity_results(pruned, args.macs_counter), **results})


def stored_plan(args: argparse.Namespace, model: nn.Module, inputs: Tensor) -> tuple[ChannelGraph, PruningPlan, None]:
    """The plan of --from-plan, with the graph of the model, which loses its blocks here."""
    plan = load_plan(args.from_plan)
    remove_blocks(model, plan.kept_blocks, inputs)
    return trace_groups(model, inputs, args.graph), plan, None


def make_plan(
    args: argparse.Namespace, model: nn.Module, spec: ModelSpec, inputs: Tensor, target: Target | None
) -> tuple[ChannelGraph, PruningPlan, Latency | None]:
    """A new plan, with the graph of the model, which loses its blocks here, and its latency if that is budgeted."""
    stages = find_stages(model, inputs) if args.remove_blocks else []
    check_spare(stages, args.remove_blocks, args.remove_blocks_scope)  # before anything is scored
    statistic = gather_statistic(args, model, spec, inputs.device)
    block_scores = score_blocks(model, stages, args.pruning_type, statistic=statistic, seed=args.seed)
    kept_blocks = choose_blocks(stages, block_scores, args.remove_blocks, args.remove_blocks_scope)
    old_names = remove_blocks(model, kept_blocks, inputs)
    if statistic:
        statistic = {name: statistic[old] for name, old in old_names.items()}

    graph = trace_groups(model, inputs, args.graph)
    classes = classify(graph.groups, detailed=args.class_labels == "detailed")
    scores = score_groups(
        model, graph.groups, args.pruning_type, statistic=statistic, score_bias=args.score_bias, seed=args.seed
    )
    normalized = {name: normalize(values, args.normalizer) for name, values in scores.items()}
    ranker = Ranker(graph, normalized, classes, RankingRules(args.ranking, args.round_to, args.max_pruning_ratio))
    plan, latency = rank(args, ranker, model, graph, inputs, target)
    show(args, summarize_classes(graph.groups, classes, scores, plan), plan)
    return graph, dataclasses.replace(plan, kept_blocks=kept_blocks), latency


def gather_statistic(
    args: argparse.Namespace, model: nn.Module, spec: ModelSpec, device: torch.device
) -> Statistic | None:
    """What the criterion needs of training images, which are seen under the evaluation transform."""
    wanted = CRITERIA[args.pruning_type].statistic
    if not wanted:
        return None
    images = cli.evaluation_images(args, "train", model, spec)
    options = (args.batch_size, args.taylor_batches, args.workers, device)
    loader = build_scoring_loader(images, *options, seed=args.seed)
    batches = tqdm(loader, "Scoring", unit="batch", disable=None if distributed.is_main() else True)
    return accumulate(model, batches, wanted, device=device, amp_dtype=cli.amp_dtype(args))


def rank(
    args: argparse.Namespace,
    ranker: Ranker,
    model: nn.Module,
    graph: ChannelGraph,
    inputs: Tensor,
    target: Target | None,
) -> tuple[PruningPlan, Latency | None]:
    """The plan for the budget where there is one, else for the ratios; and its latency if that is the budget."""
    heads, head_dims = args.head_pruning_ratio, args.head_dim_pruning_ratio
    if target is None:
        return ranker.plan(Ratios(args.pruning_ratio, heads or 0.0, head_dims)), None

    def ratios_at(ratio: float) -> Ratios:
        return shared_ratios(ratio, heads, head_dims)

    if target.unit == "latency":
        cli.say(f"Cutting and timing models for a latency of {format_seconds(target.amount)}...")
        latency_of = PlanLatency(model, graph, lambda cut_model: measure(args, cut_model, inputs))
        return plan_for_latency(ranker, ratios_at, latency_of, target.amount)
    cost = PlanCost(model, graph, inputs)
    return plan_for_budget(ranker, ratios_at, cost, target.unit, round(target.amount)), None


def measure(args: argparse.Namespace, model: nn.Module, inputs: Tensor) -> Latency:
    return measure_latency(model, inputs, args.latency_batch_size, amp_dtype=cli.amp_dtype(args))


def show(args: argparse.Namespace, summaries: list[ClassSummary], plan: PruningPlan) -> None:
    """The table of isomorphism classes, and their picture if it was asked for."""
    cli.say(class_table(summaries, plan))
    if args.report and distributed.is_main():
        draw_scores(args.report, summaries, title=f"{args.model}: {args.pruning_type} scores by isomorphism class")
        cli.say(f"Saving the score distributions to {args.report}")


def cut_and_check(
    args: argparse.Namespace, model: nn.Module, graph: ChannelGraph, plan: PruningPlan, inputs: Tensor
) -> None:
    untouched = copy.deepcopy(model) if args.self_check else None
    cut(model, graph, plan)
    if untouched:
        error = check_cut(untouched, graph, plan, model, inputs)
        cli.say(f"Self-check passed: cut and masked model differ by {error:.0e} of the output's spread")


def test_accuracy(
    args: argparse.Namespace, key: str, model: nn.Module, spec: ModelSpec, device: torch.device
) -> dict[str, float]:
    """Top-1 in percent under `key`, printed, if it was asked for."""
    if not args.test_accuracy:
        return {}
    loader = build_eval_loader(cli.evaluation_images(args, "val", model, spec), args.batch_size, args.workers, device)
    accuracy = measure_accuracy(model, loader, device, amp_dtype=cli.amp_dtype(args), progress="Evaluating")
    cli.say(f"{'Before' if key == 'dense_top1' else 'After'}: {accuracy_line(accuracy.top1, accuracy.loss)}")
    return {key: round(100 * accuracy.top1, 4)}


def write(args: argparse.Namespace, model: nn.Module, spec: ModelSpec, measured: dict[str, Any]) -> None:
    """The results file and, unless the run is dry, the checkpoint."""
    results = {"model": args.model, **measured}
    if args.results_file:
        write_results(args.results_file, results)
    if not args.dry_run:
        cli.say(f"Saving the pruned model to {args.save_as}")
        parent = file_sha256(args.model) if is_checkpoint(args.model) else None
        save_model(args.save_as, model, spec, provenance={**run_provenance(vars(args)), "parent": parent, **results})


def check_outputs(args: argparse.Namespace) -> None:
    """Finds out before the work that its results can be written, and will not replace what it starts from."""
    if is_checkpoint(args.model) and Path(args.save_as).resolve() == Path(args.model).resolve():
        raise UserError(f"--save-as {args.save_as} is the model to prune: choose another name")
    for path in filter(None, (args.save_as, args.plan_file, args.report, args.results_file)):
        check_writable(path)


if __name__ == "__main__":
    cli.run(main)
