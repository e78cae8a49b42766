"""The flags of finetune.py, spelled and defaulting as in torchvision's reference trainer, and what they rule out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from isomorphic import cli
from isomorphic.training.precision import AMP_DTYPES
from isomorphic.training.recipe import AUTO_AUGMENTS, DISTILLATIONS, OPTIMIZERS, SCHEDULES


def parse_args(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of finetune.py, of the command line unless `words` are given; contradictions are usage errors."""
    parser = cli.make_parser("Train a pruned or dense model, from a teacher or without.")
    cli.add_model_arguments(parser)
    cli.add_data_arguments(parser, batch_size=32)
    _add_optimizer_arguments(parser)
    _add_augment_arguments(parser)
    _add_loss_arguments(parser)
    _add_run_arguments(parser)
    args = parser.parse_args(words)
    args.distillation = args.distillation or ("hard" if args.teacher_model else "none")
    if args.distillation != "none" and not args.teacher_model:
        parser.error(f"--distillation {args.distillation} needs --teacher-model")
    if args.amp_dtype and not args.amp:
        parser.error("--amp-dtype needs --amp")
    return args


def _add_optimizer_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("optimizer and schedule").add_argument
    add("--epochs", type=cli.positive_int, default=90, help="passes over the training images")
    add("--max-steps", type=cli.positive_int, help="stop after so many optimizer steps in all")
    add("--opt", choices=OPTIMIZERS, default="sgd", help="optimizer")
    add("--lr", type=float, default=0.1, help="initial learning rate")
    add("--momentum", type=float, default=0.9, help="of SGD and RMSprop")
    add("--weight-decay", "--wd", type=float, default=1e-4, help="of all parameters but these three:")
    add("--norm-weight-decay", type=float, help="of norms (default: as all)")
    add("--bias-weight-decay", type=float, help="of biases (default: as all)")
    add("--transformer-embedding-decay", type=float, help="of tokens and position tables (default: as all)")
    add("--lr-scheduler", choices=SCHEDULES, default="steplr", help="stepped once an epoch")
    add("--lr-warmup-epochs", type=cli.non_negative_int, default=0, help="epochs before the schedule")
    add("--lr-warmup-method", choices=("constant", "linear"), default="constant", help="shape of the warm-up")
    add("--lr-warmup-decay", type=float, default=0.01, help="share of --lr that the warm-up starts at")
    add("--lr-step-size", type=cli.positive_int, default=30, help="epochs between two drops of steplr")
    add("--lr-gamma", type=float, default=0.1, help="factor of a drop")
    add("--lr-min", type=float, default=0.0, help="where the cosine ends")
    add("--clip-grad-norm", type=float, metavar="NORM", help="the gradient's largest norm (default: any)")


def _add_augment_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("augmentation").add_argument
    two: dict[str, Any] = {"type": float, "nargs": 2, "metavar": ("LOW", "HIGH")}
    add("--train-crop-size", type=cli.positive_int, help="side of training images (default: the model's)")
    add("--val-crop-size", type=cli.positive_int, help="side of validation images (default: the model's)")
    add("--scale", **two, default=(0.08, 1.0), help="share of the area that a random crop takes")
    add("--ratio", **two, default=(3 / 4, 4 / 3), help="width over height of a random crop")
    add("--hflip", type=float, default=0.5, help="probability of a mirror image; 0 for digits and letters")
    add("--auto-augment", choices=AUTO_AUGMENTS, help="RandAugment, TrivialAugment, AugMix or a policy")
    add("--ra-magnitude", type=cli.non_negative_int, default=9, help="strength of RandAugment")
    add("--augmix-severity", type=cli.positive_int, default=3, help="strength of AugMix")
    add("--random-erase", type=float, default=0.0, help="probability of erasing a rectangle")
    add("--mixup-alpha", type=float, default=0.0, help="0 is off; with cutmix, one of the two for each batch")
    add("--cutmix-alpha", type=float, default=0.0, help="0 is off")
    add("--ra-sampler", action="store_true", help="repeated augmentation: fewer images, several times each")
    add("--ra-reps", type=cli.positive_int, default=3, help="times each, under --ra-sampler")


def _add_loss_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("loss and teacher").add_argument
    add("--label-smoothing", type=float, default=0.0, help="of labels, the teacher's hard ones too")
    add("--teacher-model", metavar="NAME|FILE", help="name (random if --no-pretrained), checkpoint or file.py:factory")
    add("--teacher-builder-file", metavar="FILE.py", help="its code, if it is its own (default: --builder-file)")
    add("--distillation", choices=DISTILLATIONS, help="from the teacher (default: hard if there is one)")
    add("--distillation-alpha", type=float, default=0.5, help="weight of the teacher's part of the loss")
    add("--distillation-tau", type=float, default=1.0, help="temperature of soft distillation")


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("run").add_argument
    add("--output-dir", "--output", default="output", metavar="DIR", help="where the results go")
    add("--resume", metavar="auto|FILE", help="go on from DIR/state.pt if it is there, or from FILE")
    add("--test-only", action="store_true", help="evaluate, do not train")
    add("--amp", action="store_true", help="train in mixed precision (validation stays in fp32)")
    add("--amp-dtype", choices=tuple(AMP_DTYPES), help="default: fp16 with a scaler on CUDA, else bf16")
    add("--log-every", "--print-freq", type=cli.positive_int, default=50, help="steps between checks")
    add("--use-deterministic-algorithms", action="store_true", help="on a GPU: repeatable, slower")
