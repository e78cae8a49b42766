"""The flags of prune.py, the combinations that are usage errors, and the options and budget that they give."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from isomorphic.checkpoints.open import is_checkpoint
from isomorphic.commands import flags, opening
from isomorphic.pruning.apply import AUTO, RECOVERIES, looks_at_images
from isomorphic.pruning.blocks.depth import SCOPES
from isomorphic.pruning.cutting.self_check import PAPER_FAMILIES
from isomorphic.pruning.gradients import Loss
from isomorphic.pruning.grouping.trace import TRACERS
from isomorphic.pruning.options import ALLOCATIONS, CLASS_LABELS, MACS_COUNTERS, PlanOptions
from isomorphic.pruning.ranking.ranker import RANKINGS
from isomorphic.pruning.recovery.distillation import DistillationRules
from isomorphic.pruning.recovery.fusion import MASSES, NORMALIZATIONS, FusionRules
from isomorphic.pruning.scoring import CRITERIA, NORMALIZERS

RATIO = 0.5  # of the width, where nothing says how much is to go
# Flags that are errors without the flag that they belong to: the parser leaves them at None, to see if one was given.
RECOVERY_DEFAULTS = {
    "calibration_batches": 8,
    "mirror_calibration": False,
    "allocation_evaluations": PlanOptions.allocation_evaluations,
    "fusion_normalization": FusionRules.normalization,
    "fusion_masses": FusionRules.masses,
    "distill_steps": DistillationRules.steps,
    "distill_lr": DistillationRules.lr,
}


def parse_args(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the flags of prune.py from `words`, or from the command line; contradictions are usage errors."""
    parser = flags.make_parser("Prune a vision model within isomorphic groups.")
    flags.add_model_arguments(parser)
    flags.add_data_arguments(parser, batch_size=64)
    _add_scoring_arguments(parser)
    _add_ranking_arguments(parser)
    _add_budget_arguments(parser)
    _add_recovery_arguments(parser)
    _add_output_arguments(parser)
    flags.add_results_arguments(parser)
    parser.set_defaults(macs_counter=None)  # to see if one was given: `commands.prune.choose_counter` chooses else
    args = parser.parse_args(words)
    flags.check_model_arguments(parser, args)
    _check(parser, args)
    args.pruning_ratio = RATIO if args.pruning_ratio is None else args.pruning_ratio
    args.ranking = "global" if args.no_isomorphic else args.ranking
    for flag, default in RECOVERY_DEFAULTS.items():
        setattr(args, flag, default if getattr(args, flag) is None else getattr(args, flag))
    if args.self_check is None:
        args.self_check = is_checkpoint(args.model) or not args.model.startswith(PAPER_FAMILIES)
    args.save_as = args.save_as or f"output/pruned/{opening.output_stem(args.model)}.safetensors"
    return args


def needs_images(args: argparse.Namespace) -> bool:
    """Returns True if the run fails without images; a recovery that finds none is skipped instead."""
    scores_on_images = not args.from_plan and CRITERIA[args.pruning_type].statistic
    return bool(scores_on_images or args.test_accuracy or args.allocate == "calibrate")


def plan_options(args: argparse.Namespace, loss: Loss | None) -> PlanOptions:
    """Returns the flags as typed options; the data are added later."""
    has_budget = args.target_macs or args.target_params or args.target_latency
    counter = args.macs_counter  # None where none was named; fvcore's figures are no budget
    return PlanOptions(
        ratio=None if has_budget else args.pruning_ratio,
        macs=args.target_macs,
        params=args.target_params,
        latency=args.target_latency,
        head_ratio=args.head_pruning_ratio,
        head_dim_ratio=args.head_dim_pruning_ratio,
        ignore=tuple(args.ignore),
        ratios=dict(args.ratios),
        ranking=args.ranking,
        round_to=args.round_to,
        max_ratio=args.max_pruning_ratio,
        class_labels=args.class_labels,
        criterion=args.pruning_type,
        loss=loss,
        normalizer=args.normalizer,
        score_bias=args.score_bias,
        amp_dtype=PlanOptions.amp_dtype if args.amp is None else opening.amp_dtype(args),
        remove_blocks=args.remove_blocks,
        remove_blocks_scope=args.remove_blocks_scope,
        allocate=args.allocate,
        allocation_evaluations=args.allocation_evaluations,
        macs_counter=counter if counter in MACS_COUNTERS else PlanOptions.macs_counter,
        latency_batch_size=args.latency_batch_size,
        tracer=args.graph,
        seed=args.seed,
    )


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.ranking == "local" and (args.no_isomorphic or args.global_pruning):
        parser.error("--ranking local contradicts --global-pruning and --no-isomorphic")
    if args.from_plan and args.pruning_ratio is not None:
        parser.error("--pruning-ratio says how much is to go, and --from-plan brings its own choice")
    if args.from_plan and (args.ignore or args.ratios):
        parser.error("--ignore and --ratios choose what goes, and --from-plan brings its own choice")
    if (args.report or "").endswith(".png") and args.from_plan:
        parser.error("--report FILE.png draws scores, and --from-plan applies a plan without scoring")
    if (args.report or "").endswith(".html") and args.dry_run:
        parser.error("--report FILE.html compares the cut model with the dense one, and --dry-run cuts nothing")
    if args.remove_blocks and args.from_plan:
        parser.error("--remove-blocks chooses blocks, and --from-plan brings its own choice")
    if args.allocate == "calibrate" and (args.ranking != "isomorphic" or args.no_isomorphic):
        parser.error("--allocate calibrate searches the ratios of isomorphism classes, and this ranking has none")
    if args.allocate == "calibrate" and (args.from_plan or args.target_latency):
        parser.error("--allocate calibrate wants a budget in MACs or params, or ratios: no plan, no latency")
    if args.fusion_masses == "importance" and args.from_plan:
        parser.error("--fusion-masses importance needs scores, and --from-plan applies a plan without scoring")
    if args.score_bias and CRITERIA[args.pruning_type].members is not None:
        parser.error(f"--pruning-type {args.pruning_type} says itself what counts: leave out --score-bias")
    if AUTO in args.recover and len(args.recover) > 1:
        parser.error("--recover auto chooses the steps: leave out the others")
    if args.unlabelled and (args.dataset or args.test_accuracy):
        other = "dataset" if args.dataset else "test-accuracy"
        parser.error(f"--unlabelled brings images without labels: leave out --{other}")
    if args.unstructured:
        _check_unstructured(parser, args)
    if args.steps > 1:
        _check_steps(parser, args)
    if args.macs_counter == "fvcore":
        _check_fvcore(parser, args)
    for flag, what in _without_effect(args).items():
        parser.error(f"--{flag.replace('_', '-')} belongs to {what}")
    if args.dry_run and args.test_accuracy:
        parser.error("--test-accuracy evaluates the cut model, and --dry-run stops before the cut")


def _without_effect(args: argparse.Namespace) -> dict[str, str]:
    """Returns the flags that were given without the flag that they belong to, and what that is."""
    calibrated = looks_at_images(args.recover) or args.allocate == "calibrate"
    distills = "distill" in args.recover or AUTO in args.recover
    owners = {
        "fusion_normalization": ("--recover fusion", "fusion" in args.recover),
        "fusion_masses": ("--recover fusion", "fusion" in args.recover),
        "calibration_batches": ("--recover compensate, bn, distill or auto and --allocate calibrate", calibrated),
        "mirror_calibration": ("--recover compensate, bn, distill or auto", looks_at_images(args.recover)),
        "distill_steps": ("--recover distill and --recover auto", distills),
        "distill_lr": ("--recover distill and --recover auto", distills),
        "allocation_evaluations": ("--allocate calibrate", args.allocate == "calibrate"),
    }
    return {flag: what for flag, (what, there) in owners.items() if getattr(args, flag) is not None and not there}


def _check_unstructured(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.pruning_type != "dimap":
        parser.error("--unstructured takes --pruning-type dimap")
    names = ("target_macs", "target_params", "target_latency", "from_plan", "plan_file", "report", "remove_blocks")
    names += ("head_pruning_ratio", "head_dim_pruning_ratio", "recover", "self_check", "ignore", "ratios")
    asked = [name for name in (*names, *(["allocate"] if args.allocate != "uniform" else [])) if getattr(args, name)]
    others = ("ranking", "no_isomorphic", "global_pruning", "normalizer", "score_bias", "class_labels", "graph")
    others += ("remove_blocks_scope", "round_to", "max_pruning_ratio", "steps")
    asked += [name for name in others if getattr(args, name) != parser.get_default(name)]
    if asked:
        parser.error(f"--{asked[0].replace('_', '-')} is about whole units, and --unstructured prunes single weights")


def _check_steps(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.from_plan:
        parser.error("--steps chooses anew after each cut, and --from-plan brings its own choice")
    if args.dry_run:
        parser.error("--steps scores what each cut leaves, and --dry-run cuts nothing")
    if args.allocate == "calibrate":
        parser.error("--allocate calibrate searches the ratios of one cut: leave out --steps")


def named_ratio(text: str) -> tuple[str, float]:
    """An argparse type for a name and a ratio: `blocks.*.mlp.fc1=0.7`."""
    name, equals, value = text.rpartition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=RATIO")
    return name, flags.ratio(value)


def _check_fvcore(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Rejects uses of fvcore before the cut: it counts whole models, only the other two counters know plans' costs."""
    if args.target_macs or args.allocate == "calibrate":
        parser.error("a budget in MACs is in the paper's or the exact counter: --macs-counter paper or exact")
    if args.unstructured:
        parser.error("--unstructured leaves zeros, which fvcore counts: --macs-counter paper or exact")
    if args.dry_run:
        parser.error("--macs-counter fvcore counts the cut model, and --dry-run stops before the cut")


def _add_scoring_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("scoring").add_argument
    add("--pruning-type", choices=tuple(CRITERIA), default=PlanOptions.criterion, help="importance criterion")
    add("--taylor-batches", "--taylor-batchs", type=flags.positive_int, default=50, help="batches to score on")
    unstructured_help = "prune single weights, --pruning-ratio of each kind of layer (DIMAP), instead of whole units"
    add("--unstructured", action="store_true", help=unstructured_help)
    unlabelled_help = "images to score and to recover on, whatever they show: the dense model's answers are the labels"
    add("--unlabelled", type=flags.path, metavar="DIR", help=unlabelled_help)
    add("--normalizer", choices=tuple(NORMALIZERS), default=PlanOptions.normalizer, help="of the scores inside a group")
    add("--score-bias", action="store_true", help="let biases count, too")
    amp_help = "score, evaluate and measure latency in bf16 (default: score and evaluate so where it pays and agrees)"
    add("--amp", action=argparse.BooleanOptionalAction, help=amp_help)


def _add_ranking_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("ranking").add_argument
    add("--graph", choices=TRACERS, default=PlanOptions.tracer, help="how coupled channels are found")
    add("--class-labels", choices=CLASS_LABELS, default=PlanOptions.class_labels, help="what tells classes apart")
    add("--ranking", choices=RANKINGS, default=PlanOptions.ranking, help="which units compete with each other")
    add("--global-pruning", action="store_true", help="upstream's spelling of the default ranking")
    add("--no-isomorphic", action="store_true", help="upstream's spelling of --ranking global")
    add("--pruning-ratio", type=flags.ratio, help=f"share of the width to remove (default: {RATIO})")
    add("--head-pruning-ratio", type=flags.ratio, help="share of the heads (default: none, or the budget's)")
    add("--head-dim-pruning-ratio", type=flags.ratio, help="share of each head's dims (default: like any width)")
    ignore_help = "layers that keep the width of their outputs, by module name, with * and ?"
    add("--ignore", nargs="+", action="extend", default=[], metavar="NAME", help=ignore_help)
    ratios_help = "shares for layers of their own, by module name, with * and ?"
    add("--ratios", nargs="+", action="extend", type=named_ratio, default=[], metavar="NAME=RATIO", help=ratios_help)
    steps_help = "cut in so many steps of equal size, each traced and scored anew (default: 1)"
    add("--steps", type=flags.positive_int, default=1, metavar="N", help=steps_help)
    blocks_help = "residual blocks to remove first, the least important ones"
    add("--remove-blocks", "--remove-layers", type=flags.non_negative_int, default=0, metavar="N", help=blocks_help)
    scope_help = "from the stage with most blocks, or from all"
    add("--remove-blocks-scope", choices=SCOPES, default=PlanOptions.remove_blocks_scope, help=scope_help)
    add(
        "--round-to",
        type=flags.positive_int,
        default=PlanOptions.round_to,
        help="widths (a head's, in attention) become multiples",
    )
    add("--max-pruning-ratio", type=flags.share, default=PlanOptions.max_ratio, help="the most that any group may lose")


def _add_recovery_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("recovery", "Accuracy before finetuning, without labels.")
    add = group.add_argument
    steps_help = (
        "merge removed units, solve layers for what the dense ones made, recalibrate batch norms, take some hundred "
        "steps towards the dense model: in this order; auto: compensate, then distill while it pays"
    )
    add("--recover", nargs="+", choices=(*RECOVERIES, AUTO), default=[], help=steps_help)
    distill_help = f"steps towards the dense model (default: {DistillationRules.steps}; auto: up to three times)"
    add("--distill-steps", type=flags.positive_int, metavar="N", help=distill_help)
    add("--distill-lr", type=flags.positive, help=f"their learning rate (default: {DistillationRules.lr})")
    allocate_help = "the ratios of isomorphism classes: all the same, or searched for on calibration images"
    add("--allocate", choices=ALLOCATIONS, default=PlanOptions.allocate, help=allocate_help)
    calibration_batches = RECOVERY_DEFAULTS["calibration_batches"]
    calibration_help = f"training batches that recoveries and calibrate look at (default: {calibration_batches})"
    add("--calibration-batches", type=flags.positive_int, help=calibration_help)
    mirror_help = "recover on each image's mirror image, too: where left and right are alike; twice the time and memory"
    add("--mirror-calibration", action="store_true", default=None, help=mirror_help)
    evaluations_help = f"models that the search may cut and try (default: {PlanOptions.allocation_evaluations})"
    add("--allocation-evaluations", type=flags.positive_int, help=evaluations_help)
    normalization_help = "what scales merged units: as published (source, the default), or without loss for copies"
    add("--fusion-normalization", choices=NORMALIZATIONS, help=normalization_help)
    add("--fusion-masses", choices=MASSES, help="of the units that fusion transports (default: uniform)")


def _add_budget_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("budget", "One of these overrides --pruning-ratio; % is of the dense model's.")
    add = group.add_mutually_exclusive_group().add_argument
    add("--target-macs", type=flags.budget, metavar="4.2G|50%", help="multiply-accumulates")
    add("--target-params", type=flags.budget, metavar="20M|50%", help="parameters")
    add("--target-latency", type=flags.duration, metavar="5ms|50%", help="of a batch, measured on this device")
    add("--from-plan", type=flags.path, metavar="FILE", help="apply this plan instead of scoring and ranking")


def _add_output_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("output").add_argument
    add("--save-as", type=flags.checkpoint_file, metavar="FILE", help="default: output/pruned/MODEL.safetensors")
    add("--plan-file", type=flags.path, metavar="FILE", help="write the plan as JSON")
    help_text = "hold the cut model against the masked dense one (default: on, but for the paper's families)"
    add("--self-check", action=argparse.BooleanOptionalAction, help=help_text)
    add("--dry-run", action="store_true", help="stop before the cut: show the plan, save no model")
    add(
        "--report",
        type=flags.report_file,
        metavar="FILE",
        help=".html: a page about the cut; .png: the scores of each isomorphism class",
    )
    add("--test-accuracy", action="store_true", help="evaluate before and after")
    flags.add_overwrite_argument(add)
