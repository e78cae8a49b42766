"""What the commands share: flags with one spelling each, and the way from flags to typed values.

`argparse.Namespace` ends here and in the entry points; below, everything takes plain typed parameters.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import json
import random
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TextIO

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from isomorphic.checkpoints.open import is_checkpoint, load_weights, open_model
from isomorphic.data.sources import (
    DataSource,
    DeadWorker,
    Split,
    build_dataset,
    check_classes,
    class_count,
    eval_transform,
)
from isomorphic.errors import Stopped, UserError, first_line
from isomorphic.models import RESIZE_OVER_CROP, ModelSpec, check_input_size, check_logits, num_classes
from isomorphic.processes import distributed
from isomorphic.processes.failing import PATIENCE, LostContact, OthersFailed
from isomorphic.user_file import is_user_file

_AMOUNTS = {"G": 1e9, "M": 1e6, "K": 1e3, "%": 0.01}
_SECONDS = {"ms": 1e-3, "us": 1e-6, "s": 1.0, "%": 0.01}


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something: not None, not the absence of a switch."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default in (None, False, "") or action.default == []
        return action.help if silent else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the flags."""

    def error(self, message: str) -> NoReturn:
        _fail(f"{message} (--help lists all flags)", 2, command=self.prog)


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser that takes no abbreviations: a flag has one spelling, and an unknown one stops the run."""
    return _Parser(prog=_command(), description=description, allow_abbrev=False, formatter_class=_HelpFormatter)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, and where it runs."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=True, help="model name, checkpoint, or your own path/to/file.py:factory")
    group.add_argument(
        "--model-kwargs",
        nargs="*",
        action="extend",
        type=key_value,
        default=[],
        metavar="KEY=VALUE",
        help="for the model's builder",
    )
    group.add_argument(
        "--builder-file", metavar="FILE.py", help="your own model's code, where --model is a checkpoint of it"
    )
    group.add_argument("--is-torchvision", action="store_true", help="the name is torchvision's, not timm's")
    group.add_argument("--trust-checkpoint", action="store_true", help="let a .pth file run the code that it names")
    group.add_argument("--no-pretrained", action="store_true", help="random weights instead of the builder's")
    group.add_argument("--seed", type=seed, default=0, help="seed of weights, data order and augmentation")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 …; auto takes a GPU where there is one")


def add_data_arguments(parser: argparse.ArgumentParser, *, batch_size: int) -> None:
    """Which images, and how the evaluation transform sees them."""
    group = parser.add_argument_group("data")
    group.add_argument("--data-path", default="data/imagenet", metavar="DIR", help="folder with train/ and val/")
    group.add_argument(
        "--dataset", default="", metavar="NAME", help="'' = image folder, digits, synthetic, or a name timm knows"
    )
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
    group.add_argument("--workers", "-j", type=non_negative_int, default=8, help="loader processes, per process")
    group.add_argument(
        "--batch-size", "--train-batch-size", "-b", type=positive_int, default=batch_size, help="images, per process"
    )


def add_results_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the figures go, and which ones."""
    add = parser.add_argument_group("results").add_argument
    help_text = "write the results as .json or .csv, with the keys of timm's validate.py"
    add("--results-file", type=results_file, metavar="FILE", help=help_text)
    help_text = "which MACs a budget and the results speak of"
    add("--macs-counter", choices=("paper", "exact"), default="paper", help=help_text)
    add("--latency-batch-size", type=positive_int, default=1, help="images a batch where latency is measured")


def data_source(args: argparse.Namespace) -> DataSource:
    """The flags of `add_data_arguments` as a `DataSource`."""
    return DataSource(args.dataset, args.data_path, args.synthetic_size, args.seed)


def open_model_from(
    args: argparse.Namespace, *, checkpoint: str | None = None, use_ema: bool | None = None, needs_images: bool = True
) -> tuple[nn.Module, ModelSpec]:
    """Opens `--model` for `--dataset`: its classes checked, the flags of the transform applied to its spec.

    The weights of `checkpoint`, where there is one, take the place of the builder's. `use_ema` chooses among those of
    a file that has averaged ones as well. Without `needs_images` the folder of images may be missing, and then has no
    say in the classes.

    Raises:
        UserError: as `open_model`; a classifier that does not match the data; an input size that the model refuses.
    """
    source = data_source(args)
    pretrained = not (args.no_pretrained or checkpoint)
    fresh = not pretrained and not is_checkpoint(args.model)
    model, spec = open_model(
        args.model,
        builder="torchvision" if args.is_torchvision else "timm",
        kwargs=dict(args.model_kwargs),
        pretrained=pretrained,
        input_size=args.input_size,
        num_classes=class_count(source) if fresh else None,
        builder_file=args.builder_file,
        use_ema=None if checkpoint else use_ema,
        trust=args.trust_checkpoint,
    )
    if checkpoint:
        spec = spec.masking(load_weights(model, checkpoint, use_ema=use_ema, trust=args.trust_checkpoint))
    answer = None
    if args.input_size or args.model_kwargs or spec.builder == "file" or is_checkpoint(args.model):
        hint = " (without --input-size)" if spec.builder == "file" and not args.input_size else ""
        answer = check_input_size(model, args.input_size or spec.preprocessing.input_size, args.model + hint)
    classes = num_classes(model, spec)
    if classes < 1:
        raise UserError(f"{args.model} has no classifier with num_classes={classes}: give at least 1")
    if answer is not None:
        check_logits(answer, classes, args.model)
    if needs_images or source.name or Path(source.root).is_dir():
        check_classes(classes, source)
    return model, _with_transform_of(args, spec)


def _with_transform_of(args: argparse.Namespace, spec: ModelSpec) -> ModelSpec:
    """The spec with what the flags say of the evaluation transform."""
    changes: dict[str, Any] = {
        "input_size": args.input_size,
        "resize_size": args.val_resize_size,
        "interpolation": args.interpolation,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    if args.input_size and not args.val_resize_size:
        changes["resize_size"] = round(args.input_size * RESIZE_OVER_CROP)
    if args.no_imagenet_mean_std:
        changes |= {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    return dataclasses.replace(spec, preprocessing=dataclasses.replace(spec.preprocessing, **changes))


def output_stem(model: str) -> str:
    """What a file made from `--model` is called unless a flag says otherwise: `net.py:build` gives net_build."""
    if is_checkpoint(model):
        return Path(model).stem
    return Path(model).name.replace(".py:", "_") if is_user_file(model) else model


def evaluation_images(
    args: argparse.Namespace, split: Split, model: nn.Module, spec: ModelSpec
) -> Dataset[tuple[Tensor, int]]:
    """One split of `--dataset` as `model` sees it: under the evaluation transform of its spec."""
    return build_dataset(
        data_source(args),
        split,
        eval_transform(spec.preprocessing),
        num_classes=num_classes(model, spec),
        image_size=spec.preprocessing.input_size,
    )


def amp_dtype(args: argparse.Namespace) -> torch.dtype | None:
    """What `--amp` stands for where there is no `--amp-dtype`: bfloat16 autocast."""
    return torch.bfloat16 if args.amp else None


def start(args: argparse.Namespace) -> torch.device:
    """Joins torchrun's processes where there are any, seeds everything, and picks this process's device.

    Raises:
        UserError: the device is not to be had.
    """
    device = pick_device(args.device)
    distributed.init(device)
    random.seed(args.seed)
    np.random.seed(args.seed % 2**32)
    torch.manual_seed(args.seed)
    return device


def pick_device(name: str) -> torch.device:
    """`auto` is this process's GPU, or the CPU; any other name is torch's."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", distributed.local_rank())
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not to be had here ({first_line(error)})") from error
    return device


def say(text: str, *, file: TextIO | None = None) -> None:
    """Prints in one process, to stdout or another file."""
    if distributed.is_main():
        print(text, file=file, flush=True)


def run(main: Callable[[], None]) -> None:
    """Calls an entry point. What its user can put right becomes one line on stderr and exit status 1.

    Of several processes, all end as soon as one fails, and the first one to fail is the only one to say why.
    """
    try:
        main()
    except Stopped as stop:  # all processes come here together, and none is to end before the first one has saved
        say(f"{_command()}: {stop}", file=sys.stderr)
        distributed.barrier()
        distributed.shutdown()
        sys.exit(stop.status)
    except KeyboardInterrupt:
        _fail("interrupted", status=130)
    except OthersFailed:
        distributed.leave(1)
    except SystemExit:
        distributed.shutdown()
        raise
    except Exception as error:
        if distributed.whoami() and distributed.is_lost_contact(error):
            _fail(_about_contact(error), patience=PATIENCE)
        if isinstance(error, UserError):
            _fail(str(error), at_once=isinstance(error, DeadWorker))
        if not distributed.whoami():
            raise
        if distributed.claim_report():
            traceback.print_exc()
        distributed.leave(1)
    distributed.shutdown()


@dataclasses.dataclass(frozen=True)
class Budget:
    """MACs, params or seconds: an absolute value, or a share of the dense model's."""

    value: float
    relative: bool = False

    def amount(self, dense: float) -> float:
        """The budget for a dense model that takes `dense`."""
        return self.value * dense if self.relative else self.value


def budget(text: str) -> Budget:
    """`4.2G`, `600M`, `1.5e9`, or `50%` of the dense model's, as an argparse type."""
    return _budget(text, text[-1:].upper(), _AMOUNTS)


def duration(text: str) -> Budget:
    """`5ms`, `0.5s`, `800us`, or `50%` of the dense model's, in seconds, as an argparse type."""
    unit = next((unit for unit in _SECONDS if text.endswith(unit)), None)
    if unit is None:
        raise argparse.ArgumentTypeError(f"{text!r} has no unit: write 5ms, 0.5s, 800us or 50%")
    return _budget(text, unit, _SECONDS)


def _budget(text: str, unit: str, scales: dict[str, float]) -> Budget:
    scale = scales.get(unit)
    value = _number(text if scale is None else text[: -len(unit)]) * (1.0 if scale is None else scale)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not positive and finite")
    if unit == "%" and value > 1:
        raise argparse.ArgumentTypeError(f"{text} is more than the dense model takes")
    return Budget(value, relative=unit == "%")


def key_value(text: str) -> tuple[str, Any]:
    """`key=value` as an argparse type: a value of JSON or Python (`false`, `False`, `[3, 9]`), else a string."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    for parse in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            return key, parse(value)
    return key, value


def file_name(*suffixes: str) -> Callable[[str], str]:
    """A path that ends in one of `suffixes`, as an argparse type."""

    def checked(text: str) -> str:
        if not text.endswith(suffixes):
            raise argparse.ArgumentTypeError(f"{text} must end in {' or '.join(suffixes)}")
        return text

    return checked


checkpoint_file, picture_file, results_file = file_name(".safetensors"), file_name(".png"), file_name(".json", ".csv")


def not_empty(text: str) -> str:
    """A path or name, as an argparse type: not the nothing that an unset shell variable leaves."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text


def positive_int(text: str) -> int:
    """An integer of at least 1, as an argparse type."""
    return _int_from(1, text)


def non_negative_int(text: str) -> int:
    """An integer of at least 0, as an argparse type."""
    return _int_from(0, text)


def seed(text: str) -> int:
    """A seed that torch takes, as an argparse type."""
    value = non_negative_int(text)
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"{text} is more than 2⁶³ - 1")
    return value


def ratio(text: str) -> float:
    """A fraction in [0, 1), as an argparse type."""
    value = _number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def share(text: str) -> float:
    """A fraction in [0, 1], as an argparse type."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1]")
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


def _fail(
    message: str, status: int = 1, *, command: str = "", patience: float = 0.0, at_once: bool = False
) -> NoReturn:
    """Ends this process, with one line from the first of all processes that come here."""
    if distributed.claim_report(patience=patience):
        print(f"{command or _command()}: {distributed.whoami()}{message}", file=sys.stderr, flush=True)
    distributed.leave(status, at_once=at_once)


def _about_contact(error: Exception) -> str:
    return str(error if isinstance(error, LostContact) else LostContact.because(error))


def _command() -> str:
    """ "prune.py", and "studies.speed" for `python -m studies.speed`."""
    path = Path(sys.argv[0])
    return f"{path.parent.parent.name}.{path.parent.name}" if path.name == "__main__.py" else path.name
