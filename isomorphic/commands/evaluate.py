"""What evaluate.py does: open a model, count what it costs, measure its accuracy, and its latency if asked for."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from isomorphic import progress
from isomorphic.commands import entry, flags, opening
from isomorphic.commands.images import check_readable, evaluation_loader
from isomorphic.commands.replacing import check_outputs
from isomorphic.errors import UserError
from isomorphic.files import check_writable
from isomorphic.measure.accuracy import Accuracy, measure_accuracy
from isomorphic.measure.compilation import compile_model
from isomorphic.measure.complexity import Complexity, count_complexity
from isomorphic.measure.fvcore_counter import FvcoreCount, count_fvcore
from isomorphic.measure.latency import measure_latency
from isomorphic.measure.results import (
    accuracy_line,
    accuracy_results,
    complexity_line,
    complexity_results,
    fvcore_line,
    latency_results,
    write_results,
)
from isomorphic.measure.sparsity import count_sparsity, nonzero_line, sparsity_results
from isomorphic.models import ModelSpec, example_inputs
from isomorphic.processes import distributed
from isomorphic.training.precision import AMP_DTYPES, pick_amp_dtype


def parse_args() -> argparse.Namespace:
    parser = flags.make_parser("Measure MACs, params and accuracy of a model.")
    flags.add_model_arguments(parser)
    flags.add_data_arguments(parser, batch_size=64, skip_share=1.0)  # all that are left out are named and counted
    add_evaluation_arguments(parser)
    flags.add_results_arguments(parser)
    flags.add_overwrite_argument(parser.add_argument)
    args = parser.parse_args()
    if args.amp_dtype and not args.amp:
        parser.error("--amp-dtype needs --amp")
    flags.check_model_arguments(parser, args)
    if args.amp and not args.amp_dtype:
        args.amp_dtype = "bf16"
    return args


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("evaluation").add_argument
    add("--amp", action="store_true", help="evaluate under autocast")
    add("--amp-dtype", choices=tuple(AMP_DTYPES), help="of --amp (default: bf16)")
    add("--channels-last", action="store_true", help="model and images in that memory format")
    add("--compile", action="store_true", help="evaluate the model as torch.compile makes it")
    add("--latency", action="store_true", help="time a batch, too")


def main() -> None:
    args = parse_args()
    if args.results_file:
        check_writable(args.results_file)
        check_outputs({"--results-file": args.results_file}, overwrite=args.overwrite)
    progress.stage(f"opening {args.checkpoint or args.model}")
    device = entry.start(args)
    amp_dtype = pick_amp_dtype(args.amp_dtype, device) if args.amp else None
    model, spec = opening.open_model_from(args)
    if spec.masked and args.macs_counter == "fvcore":
        raise UserError(f"{args.model} has masked weights, whose zeros fvcore counts: --macs-counter paper or exact")
    model.to(device)
    loader = evaluation_loader(args, opening.evaluation_images(args, "val", model, spec), device)

    image = example_inputs(spec, device)
    progress.stage("counting MACs")
    complexity = count_complexity(model, image)
    entry.say(complexity_line(complexity))
    fvcore = count_fvcore(model, image) if args.macs_counter == "fvcore" else None
    if fvcore:
        entry.say(fvcore_line(fvcore))
    extra: dict[str, object] = {}
    if spec.masked:
        sparsity = count_sparsity(model, image, spec.masked)
        entry.say(nonzero_line(sparsity))
        extra |= sparsity_results(sparsity, args.macs_counter)
    network, image = prepare_network(args, model, image, loader, amp_dtype)
    if args.latency:
        progress.stage("timing", said=True)
        entry.say(f"Timing batches of {args.latency_batch_size}...")
        latency = measure_latency(network, image, args.latency_batch_size, amp_dtype=amp_dtype)
        entry.say(f"Latency: {latency}")
        extra |= latency_results(latency)
    entry.say(f"Evaluating {args.checkpoint or args.model}...")
    accuracy = measure_accuracy(
        network, loader, device, amp_dtype=amp_dtype, channels_last=args.channels_last, progress="Evaluating"
    )
    check_readable(args, accuracy)
    entry.say(accuracy_line(accuracy.top1, accuracy.loss))
    if args.results_file and distributed.is_main():
        write_results(args.results_file, results_row(args, spec, complexity, fvcore, accuracy) | extra)


def prepare_network(
    args: argparse.Namespace, model: nn.Module, image: Tensor, loader: DataLoader, amp_dtype: torch.dtype | None
) -> tuple[nn.Module, Tensor]:
    """Model and image in the memory format that was asked for, the model compiled for all batches if that was."""
    if args.channels_last:
        model, image = model.to(memory_format=torch.channels_last), image.to(memory_format=torch.channels_last)
    if not args.compile:
        return model, image
    progress.stage("compiling", said=True)
    entry.say("Compiling...")
    sizes = {len(indices) for indices in loader.batch_sampler or ()}
    if args.latency:
        sizes.add(args.latency_batch_size)
    return compile_model(model, image, sizes, amp_dtype=amp_dtype), image


def results_row(
    args: argparse.Namespace, spec: ModelSpec, complexity: Complexity, fvcore: FvcoreCount | None, accuracy: Accuracy
) -> dict[str, object]:
    """One row with the keys and units of timm's validate.py: accuracies in percent, params in millions."""
    preprocessing = spec.preprocessing
    return {
        "model": args.model,
        "checkpoint": args.checkpoint,
        **accuracy_results(accuracy),
        **complexity_results(complexity, args.macs_counter, fvcore),
        "img_size": preprocessing.input_size,
        "crop_pct": round(preprocessing.input_size / preprocessing.resize_size, 4),
        "interpolation": preprocessing.interpolation,
        "batch_size": args.batch_size,
        "amp_dtype": args.amp_dtype,
        "channels_last": args.channels_last,
        "compiled": args.compile,
        "samples_per_sec": round(accuracy.images_per_second, 2),
    }
