"""The flags of prune.py, what they rule out, and the budget that they ask for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

from isomorphic import cli
from isomorphic.checkpoint import is_checkpoint
from isomorphic.errors import UserError
from isomorphic.measure.complexity import Complexity, format_amount
from isomorphic.measure.latency import Latency, format_seconds
from isomorphic.pruning.depth import SCOPES
from isomorphic.pruning.graph import TRACERS
from isomorphic.pruning.importance import CRITERIA, NORMALIZERS
from isomorphic.pruning.ranking import RANKINGS
from isomorphic.pruning.self_check import PAPER_FAMILIES


class Target(NamedTuple):
    """A budget: "macs_paper", "macs_exact", "params" or "latency", and how much of it may be taken (seconds)."""

    unit: str
    amount: float


def parse_args(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of prune.py, of the command line unless `words` are given; contradictions are usage errors."""
    parser = cli.make_parser("Prune a vision model within isomorphic groups.")
    cli.add_model_arguments(parser)
    cli.add_data_arguments(parser, batch_size=64)
    _add_scoring_arguments(parser)
    _add_ranking_arguments(parser)
    _add_budget_arguments(parser)
    _add_output_arguments(parser)
    cli.add_results_arguments(parser)
    args = parser.parse_args(words)
    _check(parser, args)
    args.ranking = "global" if args.no_isomorphic else args.ranking
    if args.self_check is None:
        args.self_check = is_checkpoint(args.model) or not args.model.startswith(PAPER_FAMILIES)
    args.save_as = args.save_as or f"output/pruned/{cli.output_stem(args.model)}.safetensors"
    return args


def budget_of(args: argparse.Namespace, dense: Complexity, latency: Latency | None) -> Target | None:
    """The budget that was asked for, if one was: what it is of, a field of `Complexity` or "latency", and how much.

    Raises:
        UserError: the dense model, which takes `dense` and `latency`, meets it already.
    """
    macs = f"macs_{args.macs_counter}"
    asked = {macs: args.target_macs, "params": args.target_params, "latency": args.target_latency}
    for unit, budget in asked.items():
        if budget:
            takes = latency.median if unit == "latency" and latency else getattr(dense, unit)
            amount = budget.amount(takes)
            if amount > takes:
                raise UserError(
                    f"a budget of {_shown(amount, unit)} is met already: the model takes {_shown(takes, unit)}"
                )
            return Target(unit, amount)
    return None


def _shown(amount: float, unit: str) -> str:
    return format_seconds(amount) if unit == "latency" else format_amount(amount, unit)


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.ranking == "local" and (args.no_isomorphic or args.global_pruning):
        parser.error("--ranking local contradicts --global-pruning and --no-isomorphic")
    if args.report and args.from_plan:
        parser.error("--report draws scores, and --from-plan applies a plan without scoring")
    if args.remove_blocks and args.from_plan:
        parser.error("--remove-blocks chooses blocks, and --from-plan brings its own choice")
    if args.dry_run and args.test_accuracy:
        parser.error("--test-accuracy evaluates the cut model, and --dry-run stops before the cut")


def _add_scoring_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("scoring").add_argument
    add("--pruning-type", choices=tuple(CRITERIA), default="taylor", help="importance criterion")
    add("--taylor-batches", "--taylor-batchs", type=cli.positive_int, default=50, help="batches to score on")
    add("--normalizer", choices=tuple(NORMALIZERS), default="mean", help="of the scores inside a group")
    add("--score-bias", action="store_true", help="let biases count, too")
    add("--amp", action="store_true", help="score, evaluate and measure latency under bfloat16 autocast")


def _add_ranking_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("ranking").add_argument
    add("--graph", choices=tuple(TRACERS), default="exact", help="how coupled channels are found")
    add("--class-labels", choices=("paper", "detailed"), default="paper", help="what tells classes apart")
    add("--ranking", choices=RANKINGS, default="isomorphic", help="which units compete with each other")
    add("--global-pruning", action="store_true", help="upstream's spelling of the default ranking")
    add("--no-isomorphic", action="store_true", help="upstream's spelling of --ranking global")
    add("--pruning-ratio", type=cli.ratio, default=0.5, help="share of the width to remove")
    add("--head-pruning-ratio", type=cli.ratio, help="share of the heads (default: none, or the budget's)")
    add("--head-dim-pruning-ratio", type=cli.ratio, help="share of each head's dims (default: like any width)")
    blocks_help = "residual blocks to remove first, the least important ones"
    add("--remove-blocks", "--remove-layers", type=cli.non_negative_int, default=0, metavar="N", help=blocks_help)
    scope_help = "from the stage with most blocks, or from all"
    add("--remove-blocks-scope", choices=SCOPES, default="stage", help=scope_help)
    add("--round-to", type=cli.positive_int, default=1, help="widths (a head's, in attention) become multiples")
    add("--max-pruning-ratio", type=cli.share, default=1.0, help="the most that any group may lose")


def _add_budget_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("budget", "One of these overrides --pruning-ratio; % is of the dense model's.")
    add = group.add_mutually_exclusive_group().add_argument
    add("--target-macs", type=cli.budget, metavar="4.2G|50%", help="multiply-accumulates")
    add("--target-params", type=cli.budget, metavar="20M|50%", help="parameters")
    add("--target-latency", type=cli.duration, metavar="5ms|50%", help="of a batch, measured on this device")
    add("--from-plan", metavar="FILE", help="apply this plan instead of scoring and ranking")


def _add_output_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("output").add_argument
    add("--save-as", type=cli.checkpoint_file, metavar="FILE", help="default: output/pruned/MODEL.safetensors")
    add("--plan-file", metavar="FILE", help="write the plan as JSON")
    help_text = "hold the cut model against the masked dense one (default: on, but for the paper's families)"
    add("--self-check", action=argparse.BooleanOptionalAction, help=help_text)
    add("--dry-run", action="store_true", help="stop before the cut: show the plan, save no model")
    add("--report", type=cli.picture_file, metavar="FILE.png", help="draw the scores of each isomorphism class")
    add("--test-accuracy", action="store_true", help="evaluate before and after")
