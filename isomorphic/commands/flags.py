"""The flags that several commands have, and the argparse types of their values."""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import numpy as np

from isomorphic.checkpoints.sources import is_checkpoint
from isomorphic.commands.entry import command_name, fail
from isomorphic.commands.user_paths import PathFlag, absolute_words, user_elsewhere
from isomorphic.errors import UserError
from isomorphic.measure.execution import ExecutionMode, parse_mode
from isomorphic.pruning.ranking.amounts import Amount, parse_amount, parse_duration
from isomorphic.training.recipe import LoaderRecipe

T = TypeVar("T")

# The largest share of unreadable images that `--skip-unreadable` leaves out without a value.
SKIP_SHARE = 0.1


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except those that tell a user nothing, such as None or False."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default in (None, False, "") or action.default == []
        return action.help if silent else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """A parser that reports a usage error as one line, and knows where relative paths start."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        words = sys.argv[1:] if args is None else args
        if user_elsewhere():
            for action in self._actions:
                if isinstance(action.type, PathFlag) and isinstance(action.default, str):
                    action.default = action.type.absolute(action.default, os.getcwd())
        types = {flag: action.type for flag, action in self._option_string_actions.items()}
        found = absolute_words(words, types)
        if len(found) == len(sys.argv) - 1:  # the command as a result's provenance tells it
            sys.argv[1:] = [
                new if new != old else mine for new, old, mine in zip(found, words, sys.argv[1:], strict=True)
            ]
        return super().parse_args(found, namespace)

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (--help lists all flags)", 2, command=self.prog)


def make_parser(description: str) -> argparse.ArgumentParser:
    """Returns a parser that accepts no abbreviated flags."""
    return _Parser(prog=command_name(), description=description, allow_abbrev=False, formatter_class=_HelpFormatter)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that choose the model, its seed and its device."""
    group = parser.add_argument_group("model")
    help_text = "model name, checkpoint, hf-hub:USER/NAME, or your own path/to/file.py:factory"
    group.add_argument("--model", type=source, required=True, help=help_text)
    _add_builder_arguments(group)
    checkpoint_help = "load all of these weights into what --model names; of whichever trainer, see docs/weights.md"
    group.add_argument("--checkpoint", type=PathFlag(may_be_empty=False), metavar="FILE", help=checkpoint_help)
    ema_help = "a file's averaged weights (default: if it has any)"
    group.add_argument("--use-ema", action=argparse.BooleanOptionalAction, help=ema_help)
    classes_help = "a new head where the weights have another; auto: for as many classes as the data have"
    group.add_argument("--num-classes", type=auto_or_count, metavar="auto|N", help=classes_help)
    seed_help = "seed of weights, data order and augmentation"
    group.add_argument("--seed", type=seed, default=LoaderRecipe.seed, help=seed_help)
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 …; auto takes a GPU where there is one")


def add_builder_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say how a model is built, for a command whose model is no flag."""
    _add_builder_arguments(parser.add_argument_group("model"))


def _add_builder_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    model_kwargs = {"nargs": "*", "action": "extend", "type": key_value, "default": [], "metavar": "KEY=VALUE"}
    add("--model-kwargs", **model_kwargs, help="for the model's builder")
    add(
        "--builder-file",
        type=path,
        metavar="FILE.py",
        help="your own model's code, where the model is a checkpoint of it",
    )
    add("--is-torchvision", action="store_true", help="the name is torchvision's, not timm's")
    add("--trust-checkpoint", action="store_true", help="let a .pth file run the code that it names")
    add("--no-pretrained", action="store_true", help="random weights instead of the builder's")


def check_model_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Makes contradictions among the flags of `add_model_arguments` usage errors."""
    if args.use_ema is not None and not (args.checkpoint or is_checkpoint(args.model)):
        parser.error("--use-ema and --no-use-ema choose among a checkpoint's weights, and there is no checkpoint")
    if args.num_classes is not None and "num_classes" in dict(args.model_kwargs):
        parser.error("--num-classes and --model-kwargs num_classes= say the same: leave one of them out")


def add_data_arguments(parser: argparse.ArgumentParser, *, batch_size: int, skip_share: float = SKIP_SHARE) -> None:
    """Adds the flags that choose the images, the evaluation transform and the loader.

    `skip_share` is what `--skip-unreadable` without a value stands for.
    """
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data-path", type=path, default="data/imagenet", metavar="DIR", help="folder with train/ and val/"
    )
    group.add_argument(
        "--dataset", default="", metavar="NAME", help="'' = image folder, digits, synthetic, or a name timm knows"
    )
    map_help = "which class folder has which label: a name a line, as timm's"
    group.add_argument("--class-map", type=PathFlag(may_be_empty=False), metavar="FILE", help=map_help)
    names_help = "go on where the data's classes have other names than the model's"
    group.add_argument("--ignore-class-names", action="store_true", help=names_help)
    skip_help = f"leave out images that cannot be read, up to this share of all ({skip_share} if none is given)"
    skip: dict[str, Any] = {"nargs": "?", "type": share, "const": skip_share, "default": 0.0, "metavar": "SHARE"}
    group.add_argument("--skip-unreadable", **skip, help=skip_help)
    group.add_argument("--synthetic-size", type=positive_int, default=64, help="images a split of --dataset synthetic")
    group.add_argument("--input-size", type=positive_int, help="side of the model's input in pixels (default: its own)")
    group.add_argument(
        "--val-resize-size",
        "--val-resize",
        type=positive_int,
        help="shorter side before the crop (default: the model's)",
    )
    group.add_argument(
        "--interpolation", choices=("bilinear", "bicubic", "nearest"), help="of the resize (default: the model's)"
    )
    group.add_argument("--no-imagenet-mean-std", action="store_true", help="normalise with mean and std 0.5")
    workers_help = "loader processes, per process"
    group.add_argument("--workers", "-j", type=non_negative_int, default=LoaderRecipe.workers, help=workers_help)
    group.add_argument(
        "--batch-size", "--train-batch-size", "-b", type=positive_int, default=batch_size, help="images, per process"
    )


def add_results_arguments(parser: argparse.ArgumentParser, *, several_batch_sizes: bool = False) -> None:
    """Adds the flags of the results file and of the measurements in it; latency may be of several sizes of batches."""
    add = parser.add_argument_group("results").add_argument
    help_text = "write the results as .json or .csv, with the keys of timm's validate.py"
    add("--results-file", type=results_file, metavar="FILE", help=help_text)
    help_text = "which MACs a budget and the results speak of; fvcore is a second opinion on the results alone"
    add("--macs-counter", choices=("paper", "exact", "fvcore"), default="paper", help=help_text)
    sizes: dict[str, Any] = {"type": positive_int, "default": 1}
    if several_batch_sizes:
        sizes = {"type": positive_ints, "default": [1], "metavar": "N,…"}
    add("--latency-batch-size", **sizes, help="images a batch where latency is measured")


def add_overwrite_argument(add: Callable[..., object]) -> None:
    """Adds the flag that lets a command replace results that are there already."""
    add("--overwrite", action="store_true", help="replace results that are there already, whatever they are")


def budget(text: str) -> Amount:
    """An argparse type for a budget: `4.2G`, `600M`, `1.5e9`, or `50%` of the dense model's."""
    return _as_flag(parse_amount, text)


def duration(text: str) -> Amount:
    """An argparse type for a duration in seconds: `5ms`, `0.5s`, `800us`, or `50%` of the dense model's."""
    return _as_flag(parse_duration, text)


def execution_modes(text: str) -> list[ExecutionMode]:
    """An argparse type for ways to run a model, joined by commas: `fp32,bf16+channels_last`."""
    return [_as_flag(parse_mode, word) for word in text.split(",")]


def _as_flag(parse: Callable[[str], T], text: str) -> T:
    try:
        return parse(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def key_value(text: str) -> tuple[str, Any]:
    """An argparse type for `key=value`: the value is parsed as JSON or Python (`false`, `[3, 9]`), else a string."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    for parse in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            return key, parse(value)
    return key, value


def file_name(*suffixes: str) -> PathFlag:
    """Returns an argparse type for a path that ends in one of `suffixes`."""
    return PathFlag(suffixes)


path, source = PathFlag(), PathFlag(may_be_name=True)
checkpoint_file, picture_file, results_file = file_name(".safetensors"), file_name(".png"), file_name(".json", ".csv")
page_file, report_file = file_name(".html"), file_name(".png", ".html")


def not_empty(text: str) -> str:
    """An argparse type for a name that is not empty, as it would be from an unset shell variable."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text


def auto_or_count(text: str) -> int | str:
    """An argparse type for an integer of at least 1, or "auto"."""
    return text if text == "auto" else positive_int(text)


def positive_int(text: str) -> int:
    """An argparse type for an integer of at least 1."""
    return _int_from(1, text)


def positive_ints(text: str) -> list[int]:
    """An argparse type for different integers of at least 1, joined by commas: `1,32`."""
    values = [positive_int(word) for word in text.split(",")]
    if len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"{text} repeats itself")
    return values


def non_negative_int(text: str) -> int:
    """An argparse type for an integer of at least 0."""
    return _int_from(0, text)


def seed(text: str) -> int:
    """An argparse type for a seed that torch accepts."""
    value = non_negative_int(text)
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"{text} is more than 2⁶³ - 1")
    return value


def ratio(text: str) -> float:
    """An argparse type for a fraction in [0, 1)."""
    value = _number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def share(text: str) -> float:
    """An argparse type for a fraction in [0, 1]."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1]")
    return value


def non_negative(text: str) -> float:
    """An argparse type for a number of at least 0."""
    value = _number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return value


def positive(text: str) -> float:
    """An argparse type for a number above 0."""
    value = _number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from error
    if not np.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not finite")
    return value


def _int_from(least: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from error
    if value < least:
        raise argparse.ArgumentTypeError(f"{text} is less than {least}")
    return value
