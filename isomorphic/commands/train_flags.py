"""The flags of finetune.py and convnext_train.py, their defaults, and the combinations that are usage errors.

Both commands spell their flags as torchvision's reference trainer does. A flag that sets a field of the recipe has the
field's default (see `training/recipe.py`), which is the reference trainer's too. convnext_train.py replaces some of
them by ConvNeXt's recipe, and takes timm's spellings as well.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from isomorphic.commands import flags
from isomorphic.commands.user_paths import PathFlag
from isomorphic.pruning.sparsify.regularizers import ALPHA, DELTA, KINDS, STRENGTHS
from isomorphic.training.precision import AMP_DTYPES, TEACHER_DTYPES
from isomorphic.training.recipe import (
    AUTO_AUGMENTS,
    DISTILLATIONS,
    ERASE_MODES,
    OPTIMIZERS,
    SCHEDULES,
    LoaderRecipe,
    default_values,
)

# timm's spelling of a flag: this project's.
TIMM_SPELLINGS = {
    "--data-dir": "--data-path",
    "--pruned-model": "--model",
    "--sched": "--lr-scheduler",
    "--min-lr": "--lr-min",
    "--warmup-epochs": "--lr-warmup-epochs",
    "--smoothing": "--label-smoothing",
    "--aa": "--auto-augment",
    "--reprob": "--random-erase",
    "--remode": "--random-erase-mode",
    "--mixup": "--mixup-alpha",
    "--cutmix": "--cutmix-alpha",
    "--grad-accum-steps": "--accumulate",
    "--clip-grad": "--clip-grad-norm",
}
TIMM_SCHEDULES = {"cosine": "cosineannealinglr", "step": "steplr"}

# Flags of sparse training, with the kinds that they belong to: the parser leaves them at None, to see if one was given.
SPARSIFY_FLAGS = {"sparsify_reg": KINDS, "sparsify_alpha": ("group",), "sparsify_delta": ("growing",)}

# Defaults of flags whose recipe field has another default, because it is computed from several flags.
FLAG_DEFAULTS: dict[str, Any] = {
    "train_crop_size": None,  # the model's input size
    "ra_reps": 3,  # without effect unless --ra-sampler is given
    "distillation": None,  # hard with a teacher, else none
}
CONVNEXT_DEFAULTS: dict[str, Any] = {
    "seed": 42,
    "epochs": 300,
    "opt": "adamw",
    "lr": 2e-3,
    "weight_decay": 0.05,
    "vector_weight_decay": 0.0,
    "lr_scheduler": "cosineannealinglr",
    "lr_min": 1e-6,
    "label_smoothing": 0.1,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "random_erase": 0.25,
    "random_erase_mode": "pixel",
    "mixup_alpha": 0.2,
    "cutmix_alpha": 1.0,
    "model_ema_decay": 0.9999,
    "model_ema_steps": 1,
}


def parse_finetune_args(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the flags of finetune.py from `words`, or from the command line; contradictions are usage errors."""
    parser = _make_parser("Train a pruned or dense model, from a teacher or without.")
    return _parse(parser, sys.argv[1:] if words is None else words)


def parse_convnext_args(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the flags of convnext_train.py from `words`, or from the command line."""
    parser = _make_parser("Train a pruned or dense ConvNeXt by its own recipe.")
    parser.epilog = "timm's spellings do as well: " + ", ".join(TIMM_SPELLINGS)
    parser.set_defaults(**CONVNEXT_DEFAULTS)
    return _parse(parser, from_timm(sys.argv[1:] if words is None else words))


def from_timm(words: Sequence[str]) -> list[str]:
    """Returns the words of a timm command in this project's spelling."""
    ours: list[str] = []
    for word in words:
        flag, equals, value = word.partition("=")
        flag = TIMM_SPELLINGS.get(flag, flag)
        if flag == "--lr-scheduler":
            value = TIMM_SCHEDULES.get(value, value)
        elif ours and ours[-1] == "--lr-scheduler":
            flag = TIMM_SCHEDULES.get(flag, flag)
        ours.append(flag + equals + value)
    return ours


def _make_parser(description: str) -> argparse.ArgumentParser:
    parser = flags.make_parser(description)
    flags.add_model_arguments(parser)
    flags.add_data_arguments(parser, batch_size=LoaderRecipe.batch_size)
    _add_optimizer_arguments(parser)
    _add_augment_arguments(parser)
    _add_loss_arguments(parser)
    _add_sparsify_arguments(parser)
    _add_ema_arguments(parser)
    _add_network_arguments(parser)
    _add_run_arguments(parser)
    parser.set_defaults(**default_values() | FLAG_DEFAULTS)
    return parser


def _parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    args = parser.parse_args(words)
    flags.check_model_arguments(parser, args)
    args.distillation = args.distillation or ("hard" if args.teacher_model else "none")
    if args.distillation != "none" and not args.teacher_model:
        parser.error(f"--distillation {args.distillation} needs --teacher-model")
    if args.teacher_checkpoint and not args.teacher_model:
        parser.error("--teacher-checkpoint needs --teacher-model, which says what its weights are of")
    if args.amp_dtype and not args.amp:
        parser.error("--amp-dtype needs --amp")
    if args.extend and not args.resume:
        parser.error("--extend lets a run go on for more epochs: it needs --resume auto")
    _check_sparsify(parser, args)
    if args.start_epoch >= args.epochs:
        parser.error(f"--start-epoch {args.start_epoch} leaves nothing of --epochs {args.epochs}")
    return args


def _check_sparsify(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Makes flags of another kind of sparse training usage errors, and fills in the defaults of those not given."""
    for name, kinds in SPARSIFY_FLAGS.items():
        if getattr(args, name) is not None and args.sparsify not in kinds:
            parser.error(f"--{name.replace('_', '-')} belongs to --sparsify {' or '.join(kinds)}")
    if args.sparsify != "none" and args.fsdp:
        parser.error("--sparsify needs whole parameters in each process, and --fsdp shards them: leave one of them out")
    defaults = {"sparsify_reg": STRENGTHS.get(args.sparsify), "sparsify_alpha": ALPHA, "sparsify_delta": DELTA}
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)


def _add_optimizer_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("optimizer and schedule").add_argument
    add("--epochs", type=flags.positive_int, help="passes over the training images")
    add("--start-epoch", type=flags.non_negative_int, default=0, help="epochs that count as done from the start")
    add("--max-steps", type=flags.positive_int, help="stop after so many optimizer steps in all")
    add("--accumulate", type=flags.positive_int, help="batches whose gradients make one step")
    add("--opt", choices=OPTIMIZERS, help="optimizer")
    add("--lr", type=float, help="initial learning rate")
    add("--momentum", type=float, help="of SGD and RMSprop")
    add("--weight-decay", "--wd", type=float, help="of all parameters but those of the next four")
    add("--norm-weight-decay", type=float, help="of norms (default: as all)")
    add("--bias-weight-decay", type=float, help="of biases (default: as all)")
    add("--transformer-embedding-decay", type=float, help="of tokens and position tables (default: as all)")
    add("--vector-weight-decay", type=float, help="of other parameters of one dim")
    add("--layer-decay", type=float, help="factor of the learning rate for each layer away from the head")
    add("--lr-scheduler", choices=SCHEDULES, help="stepped once an epoch")
    add("--lr-warmup-epochs", type=flags.non_negative_int, help="epochs before the schedule")
    add("--lr-warmup-method", choices=("constant", "linear"), help="shape of the warm-up")
    add("--lr-warmup-decay", type=float, help="share of --lr that the warm-up starts at")
    add("--lr-step-size", type=flags.positive_int, help="epochs between two drops of steplr")
    milestones_help = "epochs at which multisteplr drops"
    add("--lr-milestones", type=flags.positive_int, nargs="+", metavar="EPOCH", help=milestones_help)
    add("--lr-gamma", type=float, help="factor of a drop")
    add("--lr-min", type=float, help="where the cosine ends")
    add("--clip-grad-norm", type=float, metavar="NORM", help="the gradient's largest norm (default: any)")


def _add_augment_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("augmentation").add_argument
    two: dict[str, Any] = {"type": float, "nargs": 2, "metavar": ("LOW", "HIGH")}
    add("--train-crop-size", type=flags.positive_int, help="side of training images (default: the model's)")
    add("--val-crop-size", type=flags.positive_int, help="side of validation images (default: the model's)")
    modes = ("bilinear", "bicubic", "nearest", "random")
    add("--train-interpolation", choices=modes, help="of training images (default: --interpolation)")
    add("--scale", **two, help="share of the area that a random crop takes")
    add("--ratio", **two, help="width over height of a random crop")
    padding_help = "no resized crops, but full-sized ones out of the image and so many black pixels around it"
    add("--crop-padding", type=flags.non_negative_int, metavar="PIXELS", help=padding_help)
    add("--hflip", type=float, help="probability of a mirror image; 0 for digits and letters")
    policies = f"{', '.join(AUTO_AUGMENTS)}, or a string of timm's such as rand-m9-mstd0.5-inc1"
    add("--auto-augment", metavar="POLICY", help=policies)
    add("--ra-magnitude", type=flags.non_negative_int, help="strength of RandAugment (ra)")
    add("--augmix-severity", type=flags.positive_int, help="strength of AugMix (augmix)")
    add("--color-jitter", type=float, help="of brightness, contrast, saturation; off beside a policy")
    add("--random-erase", type=float, help="probability of erasing a rectangle")
    add("--random-erase-mode", choices=ERASE_MODES, help="to the mean colour, or to noise")
    add("--mixup-alpha", type=float, help="0 is off; with cutmix, one of the two for each batch")
    add("--cutmix-alpha", type=float, help="0 is off")
    add("--ra-sampler", action="store_true", help="repeated augmentation: fewer images, several times each")
    add("--ra-reps", type=flags.positive_int, help="times each, under --ra-sampler")


def _add_loss_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("loss and teacher").add_argument
    add("--label-smoothing", type=float, help="of labels, the teacher's hard ones too")
    add("--drop", type=flags.ratio, help="dropout, where the builder has it (default: as the model was built)")
    add("--drop-path", type=flags.ratio, help="stochastic depth, from 0 to this at the last block (default: as built)")
    teacher_help = "name (random if --no-pretrained), checkpoint or file.py:factory"
    add("--teacher-model", type=flags.source, metavar="NAME|FILE", help=teacher_help)
    weights_help = "load all of these weights into the teacher"
    add("--teacher-checkpoint", type=PathFlag(may_be_empty=False), metavar="FILE", help=weights_help)
    code_help = "its code, if it is its own (default: --builder-file)"
    add("--teacher-builder-file", type=flags.path, metavar="FILE.py", help=code_help)
    help_text = "what the teacher computes in (auto: as the student under --amp, else bf16)"
    add("--teacher-dtype", choices=TEACHER_DTYPES, default="auto", help=help_text)
    add("--distillation", choices=DISTILLATIONS, help="from the teacher (default: hard if there is one)")
    add("--distillation-alpha", type=float, help="weight of the teacher's part of the loss")
    add("--distillation-tau", type=float, help="temperature of soft distillation")


def _add_sparsify_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sparse training", "Weak units shrink as wholes, before they are pruned.")
    add = group.add_argument
    kind_help = "over whole groups (DepGraph), scales of batch norms (network slimming), or growing (GReg)"
    add("--sparsify", choices=("none", *KINDS), default="none", help=kind_help)
    strengths = ", ".join(f"{kind} {strength:g}" for kind, strength in STRENGTHS.items())
    add("--sparsify-reg", type=flags.non_negative, metavar="REG", help=f"strength (default: {strengths})")
    alpha_help = f"group: the weakest unit is shrunk 2^ALPHA times as hard as the strongest (default: {ALPHA:g})"
    add("--sparsify-alpha", type=flags.non_negative, metavar="ALPHA", help=alpha_help)
    delta_help = f"growing: what the weakest unit's strength grows by an epoch (default: {DELTA:g})"
    add("--sparsify-delta", type=flags.non_negative, metavar="DELTA", help=delta_help)


def _add_ema_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("moving average of the weights").add_argument
    add("--model-ema", action="store_true", help="keep one, validate it, and save it as the result")
    add("--model-ema-decay", type=float, help="what an update keeps of it")
    add("--model-ema-steps", type=flags.positive_int, help="steps between updates")


def _add_network_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("speed and processes").add_argument
    amp_help = "train in mixed precision (default: not; validation stays in fp32)"
    add("--amp", action=argparse.BooleanOptionalAction, default=False, help=amp_help)
    add("--amp-dtype", choices=tuple(AMP_DTYPES), help="default: fp16 with a scaler on CUDA, else bf16")
    add("--channels-last", action="store_true", help="model and images in that memory format")
    add("--compile", action="store_true", help="train the model as torch.compile makes it")
    add("--sync-bn", action="store_true", help="batch norms see the batch of all processes")
    add("--fsdp", action="store_true", help="shard parameters and optimizer over the processes")
    add("--static-graph", action="store_true", help="every step uses the same parameters, maybe not all of them")
    help_text = "on a GPU: repeatable, slower"
    add("--use-deterministic-algorithms", action="store_true", help=help_text)


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("run").add_argument
    add("--output-dir", "--output", type=flags.path, default="output", metavar="DIR", help="where the results go")
    resume_help = "go on from the newest whole state in DIR if there is one, or from FILE"
    add("--resume", type=PathFlag(other="auto"), metavar="auto|FILE", help=resume_help)
    extend_help = "with --resume: go on for more epochs than planned, though the schedule would have been another"
    add("--extend", action="store_true", help=extend_help)
    flags.add_overwrite_argument(add)
    add("--checkpoint-interval", type=flags.positive_int, metavar="EPOCHS", help="between training states")
    add("--checkpoint-steps", type=flags.positive_int, metavar="STEPS", help="between training states within an epoch")
    add("--checkpoint-hist", type=flags.positive_int, metavar="N", help="training states that are kept")
    add("--test-only", action="store_true", help="evaluate, do not train")
    add("--log-every", "--print-freq", type=flags.positive_int, help="steps between checks")
    add("--tensorboard", action="store_true", help="write curves for TensorBoard, too")
    add("--wandb-project", type=flags.not_empty, metavar="NAME", help="send curves to Weights & Biases, too")
