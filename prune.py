#!/usr/bin/env python3
"""Prunes a vision model: group → classify → score → rank → cut → save.

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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from isomorphic import cli, distributed
from isomorphic.checkpoint import is_checkpoint, save_model
from isomorphic.data import build_eval_loader, build_scoring_loader
from isomorphic.errors import UserError
from isomorphic.files import check_writable
from isomorphic.measure.accuracy import measure_accuracy
from isomorphic.measure.complexity import Complexity, count_complexity
from isomorphic.measure.results import accuracy_line, change_lines, complexity_results, write_results
from isomorphic.models import ModelSpec, example_inputs
from isomorphic.provenance import file_sha256, run_provenance
from isomorphic.pruning.budget import PlanCost, plan_for_budget, shared_ratios
from isomorphic.pruning.graph import TRACERS, trace_groups
from isomorphic.pruning.groups import CoupledGroup
from isomorphic.pruning.importance import CRITERIA, NORMALIZERS, accumulate, normalize, score_groups
from isomorphic.pruning.isomorphism import classify
from isomorphic.pruning.plan import PruningPlan, load_plan, save_plan
from isomorphic.pruning.ranking import RANKINGS, Ranker, RankingRules, Ratios
from isomorphic.pruning.report import ClassSummary, class_table, draw_scores, frozen_lines, summarize_classes
from isomorphic.pruning.self_check import PAPER_FAMILIES, check_cut
from isomorphic.pruning.surgery import cut


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser("Prune a vision model within isomorphic groups.")
    cli.add_model_arguments(parser)
    cli.add_data_arguments(parser, batch_size=64)
    add_scoring_arguments(parser)
    add_ranking_arguments(parser)
    add_output_arguments(parser)
    args = parser.parse_args()
    if args.no_isomorphic or args.global_pruning:
        if args.ranking == "local":
            parser.error("--ranking local contradicts --global-pruning and --no-isomorphic")
        args.ranking = "global" if args.no_isomorphic else args.ranking
    if args.report and args.from_plan:
        parser.error("--report draws scores, and --from-plan applies a plan without scoring")
    if args.dry_run and args.test_accuracy:
        parser.error("--test-accuracy evaluates the cut model, and --dry-run stops before the cut")
    if args.self_check is None:
        args.self_check = not args.model.startswith(PAPER_FAMILIES)
    args.save_as = args.save_as or f"output/pruned/{cli.output_stem(args.model)}.safetensors"
    return args


def add_scoring_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("scoring").add_argument
    add("--pruning-type", choices=tuple(CRITERIA), default="taylor", help="importance criterion")
    add("--taylor-batches", "--taylor-batchs", type=cli.positive_int, default=50, help="batches to score on")
    add("--normalizer", choices=tuple(NORMALIZERS), default="mean", help="of the scores inside a group")
    add("--score-bias", action="store_true", help="let biases count, too")
    add("--amp", action="store_true", help="score and evaluate under bfloat16 autocast")


def add_ranking_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("ranking")
    add = group.add_argument
    add("--graph", choices=tuple(TRACERS), default="exact", help="how coupled channels are found")
    add("--class-labels", choices=("paper", "detailed"), default="paper", help="what tells classes apart")
    add("--ranking", choices=RANKINGS, default="isomorphic", help="which units compete with each other")
    add("--global-pruning", action="store_true", help="upstream's spelling of the default ranking")
    add("--no-isomorphic", action="store_true", help="upstream's spelling of --ranking global")
    add("--pruning-ratio", type=cli.ratio, default=0.5, help="share of the width to remove")
    add("--head-pruning-ratio", type=cli.ratio, help="share of the heads (default: none, or the budget's)")
    add("--head-dim-pruning-ratio", type=cli.ratio, help="share of each head's dims (default: like any width)")
    add("--round-to", type=cli.positive_int, default=1, help="widths (a head's, in attention) become multiples")
    add("--max-pruning-ratio", type=cli.share, default=1.0, help="the most that any group may lose")
    add("--macs-counter", choices=("paper", "exact"), default="paper", help="of --target-macs and of the results")
    add = group.add_mutually_exclusive_group().add_argument
    add("--target-macs", type=cli.budget, metavar="4.2G|50%", help="budget; overrides --pruning-ratio")
    add("--target-params", type=cli.budget, metavar="20M|50%", help="budget; overrides --pruning-ratio")
    add("--from-plan", metavar="FILE", help="apply this plan instead of scoring and ranking")


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("output").add_argument
    add("--save-as", type=cli.checkpoint_file, metavar="FILE", help="default: output/pruned/MODEL.safetensors")
    add("--plan-file", metavar="FILE", help="write the plan as JSON")
    help_text = "hold the cut model against the masked dense one (default: on, but for the paper's families)"
    add("--self-check", action=argparse.BooleanOptionalAction, help=help_text)
    add("--dry-run", action="store_true", help="stop before the cut: show the plan, save no model")
    add("--report", type=cli.picture_file, metavar="FILE.png", help="draw the scores of each isomorphism class")
    add("--results-file", type=cli.results_file, metavar="FILE", help="write MACs and params as .json or .csv")
    add("--test-accuracy", action="store_true", help="evaluate before and after")


def main() -> None:
    args = parse_args()
    check_outputs(args)
    device = cli.start(args)
    model, spec = cli.open_model_from(args)
    model.to(device)
    inputs = example_inputs(spec, device)
    dense = count_complexity(model, inputs)

    graph = trace_groups(model, inputs, args.graph)
    cost = PlanCost(model, graph, inputs)
    if args.from_plan:
        plan = load_plan(args.from_plan)
    else:
        classes = classify(graph.groups, detailed=args.class_labels == "detailed")
        scores = score(args, model, spec, graph.groups, device)
        normalized = {name: normalize(values, args.normalizer) for name, values in scores.items()}
        rules = RankingRules(args.ranking, args.round_to, args.max_pruning_ratio)
        plan = make_plan(args, Ranker(graph, normalized, classes, rules), cost, dense)
        show(args, summarize_classes(graph.groups, classes, scores, plan), plan)
    predicted = cost(plan)
    for line in frozen_lines(graph, heads_wanted=bool(args.head_pruning_ratio)):
        cli.say(line)
    if args.plan_file and distributed.is_main():
        save_plan(args.plan_file, plan, graph.groups, {"model": args.model, **vars(predicted)})
        cli.say(f"Saving the plan to {args.plan_file}")

    accuracies = {}
    if not args.dry_run:
        accuracies |= test_accuracy(args, "dense_top1", model, spec, device)
        untouched = copy.deepcopy(model) if args.self_check else None
        cut(model, graph, plan)
        if untouched:
            error = check_cut(untouched, graph, plan, model, inputs)
            cli.say(f"Self-check passed: cut and masked model differ by {error:.0e} of the output's spread")
        accuracies |= test_accuracy(args, "top1", model, spec, device)
    pruned = predicted if args.dry_run else count_complexity(model, inputs)
    cli.say(change_lines(dense, pruned))
    if distributed.is_main():
        write(args, model, spec, {**complexity_results(pruned, args.macs_counter), **accuracies})


def score(
    args: argparse.Namespace, model: nn.Module, spec: ModelSpec, groups: tuple[CoupledGroup, ...], device: torch.device
) -> dict[str, Tensor]:
    """Raw scores by group name; criteria that need images see training images under the evaluation transform."""
    wanted, statistic = CRITERIA[args.pruning_type].statistic, None
    if wanted:
        images = cli.evaluation_images(args, "train", model, spec)
        options = (args.batch_size, args.taylor_batches, args.workers, device)
        loader = build_scoring_loader(images, *options, seed=args.seed)
        batches = tqdm(loader, "Scoring", unit="batch", disable=None if distributed.is_main() else True)
        statistic = accumulate(model, batches, wanted, device=device, amp_dtype=cli.amp_dtype(args))
    return score_groups(
        model, groups, args.pruning_type, statistic=statistic, score_bias=args.score_bias, seed=args.seed
    )


def make_plan(args: argparse.Namespace, ranker: Ranker, cost: PlanCost, dense: Complexity) -> PruningPlan:
    """The plan for a budget where there is one, else for the ratios."""
    heads, head_dims = args.head_pruning_ratio, args.head_dim_pruning_ratio
    budget = args.target_macs or args.target_params
    if not budget:
        return ranker.plan(Ratios(args.pruning_ratio, heads or 0.0, head_dims))
    unit = f"macs_{args.macs_counter}" if args.target_macs else "params"
    target = budget.amount(getattr(dense, unit))
    return plan_for_budget(ranker, lambda r: shared_ratios(r, heads, head_dims), cost, unit, target)


def show(args: argparse.Namespace, summaries: list[ClassSummary], plan: PruningPlan) -> None:
    """The table of isomorphism classes, and their picture if it was asked for."""
    cli.say(class_table(summaries, plan))
    if args.report and distributed.is_main():
        draw_scores(args.report, summaries, title=f"{args.model}: {args.pruning_type} scores by isomorphism class")
        cli.say(f"Saving the score distributions to {args.report}")


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
