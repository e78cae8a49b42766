"""What evaluate.py does: open a model, count what it costs, measure its accuracy, and whatever else is asked for."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from isomorphic import progress
from isomorphic.commands import entry, flags, opening
from isomorphic.commands.comparison import Comparison, open_comparison
from isomorphic.commands.images import check_readable, evaluation_loader
from isomorphic.commands.replacing import check_outputs
from isomorphic.commands.subjects import Subject, subject_of
from isomorphic.commands.timing import time_models
from isomorphic.errors import UserError
from isomorphic.files import check_writable
from isomorphic.measure.accuracy import Accuracy, measure_accuracy
from isomorphic.measure.compilation import compile_model
from isomorphic.measure.complexity import count_complexity
from isomorphic.measure.fidelity import measure_fidelity
from isomorphic.measure.fvcore_counter import count_fvcore
from isomorphic.measure.precision import Auto, Precision
from isomorphic.measure.results import (
    accuracy_line,
    accuracy_results,
    complexity_line,
    complexity_results,
    fidelity_line,
    fidelity_results,
    fvcore_line,
    write_results,
)
from isomorphic.measure.sparsity import count_sparsity, nonzero_line, sparsity_results
from isomorphic.models import ModelSpec, example_inputs
from isomorphic.processes import distributed
from isomorphic.training.precision import AMP_DTYPES, amp_name, pick_amp_dtype


def parse_args() -> argparse.Namespace:
    parser = flags.make_parser("Measure MACs, params and accuracy of a model.")
    flags.add_model_arguments(parser)
    flags.add_data_arguments(parser, batch_size=64, skip_share=1.0)  # all that are left out are named and counted
    add_evaluation_arguments(parser)
    flags.add_results_arguments(parser, several_batch_sizes=True)
    flags.add_overwrite_argument(parser.add_argument)
    args = parser.parse_args()
    check_usage(parser, args)
    flags.check_model_arguments(parser, args)
    if args.amp and not args.amp_dtype:
        args.amp_dtype = "bf16"
    return args


def check_usage(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Rejects flags without what they belong to."""
    needs = {
        "--amp-dtype": (args.amp_dtype, "--amp", args.amp),
        "--latency-modes": (args.latency_modes, "--latency", args.latency),
        "--round-to": (args.round_to, "--latency", args.latency),
        "--target-macs": (args.target_macs, "--round-to", args.round_to),
        "--unlabelled": (args.unlabelled, "--against", args.against),
    }
    for flag, (given, other, there) in needs.items():
        if given and not there:
            parser.error(f"{flag} needs {other}")
    if args.unlabelled and args.dataset:
        parser.error("--unlabelled brings its own images: leave out --dataset")


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("evaluation").add_argument
    amp_help = "evaluate, compare and time under autocast (default: evaluate so where it pays and agrees)"
    add("--amp", action=argparse.BooleanOptionalAction, help=amp_help)
    add("--amp-dtype", choices=tuple(AMP_DTYPES), help="of --amp (default: bf16)")
    add("--channels-last", action="store_true", help="model and images in that memory format")
    add("--compile", action="store_true", help="evaluate the model as torch.compile makes it")
    against_help = "the dense model: how far --model agrees with it and, with --latency, how much faster it is"
    add("--against", type=flags.source, metavar="NAME|FILE", help=against_help)
    unlabelled_help = "compare the two on all images in this folder, whatever they show, and measure no accuracy"
    add("--unlabelled", type=flags.path, metavar="DIR", help=unlabelled_help)
    add_latency_arguments(parser)


def add_latency_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("latency").add_argument
    add("--latency", action="store_true", help="time a batch, too")
    modes_help = "ways to run it, such as fp32,bf16+channels_last,compile,cuda_graph (default: as it is evaluated)"
    add("--latency-modes", type=flags.execution_modes, default=[], metavar="MODE,…", help=modes_help)
    round_help = "time copies whose widths are multiples of each of these, too, pruned at random to the same MACs"
    add("--round-to", type=flags.positive_ints, default=[], metavar="N,…", help=round_help)
    target_help = "MACs of these copies (default: those of --model beside --against, else 50%%)"
    add("--target-macs", type=flags.budget, metavar="4.2G|50%", help=target_help)


def main() -> None:
    args = parse_args()
    if args.results_file:
        check_writable(args.results_file)
        check_outputs({"--results-file": args.results_file}, overwrite=args.overwrite)
    progress.stage(f"opening {args.checkpoint or args.model}")
    device = entry.start(args)
    amp_dtype = pick_amp_dtype(args.amp_dtype, device) if args.amp else None
    for mode in args.latency_modes:
        mode.check(device)
    labelled = not args.unlabelled
    model, spec = opening.open_model_from(args, labelled=labelled)
    if spec.masked and args.macs_counter == "fvcore":
        raise UserError(f"{args.model} has masked weights, whose zeros fvcore counts: --macs-counter paper or exact")
    model.to(device)
    loader = None
    if labelled:
        loader = evaluation_loader(args, opening.evaluation_images(args, "val", model, spec), device)
    comparison = open_comparison(args, model, spec, device) if args.against else None

    costs, extra = tell_costs(args, model, spec, device)
    if args.latency:
        subject = Subject(model, example_inputs(spec, device), costs["macs"])
        dense = subject_of(args, comparison.dense, comparison.spec, device) if comparison else None
        extra |= time_models(args, subject, dense, amp_dtype)
    accuracy, network = None, model
    if loader:
        network = prepare_network(args, model, spec, loader, device, amp_dtype)
        wanted = Auto(costs["macs"]) if args.amp is None and not args.compile else amp_dtype
        accuracy = tell_accuracy(args, network, loader, device, wanted)
    if comparison:
        extra |= tell_fidelity(args, network, comparison, device, amp_dtype)
    if args.results_file and distributed.is_main():
        write_results(args.results_file, results_row(args, spec, costs, accuracy) | extra)


def tell_costs(
    args: argparse.Namespace, model: nn.Module, spec: ModelSpec, device: torch.device
) -> tuple[dict[str, Any], dict[str, object]]:
    """Prints MACs and params; returns what the results file says of them, and of a masked model's weights."""
    image = example_inputs(spec, device)
    progress.stage("counting MACs")
    complexity = count_complexity(model, image)
    entry.say(complexity_line(complexity))
    fvcore = count_fvcore(model, image) if args.macs_counter == "fvcore" else None
    if fvcore:
        entry.say(fvcore_line(fvcore))
    costs = complexity_results(complexity, args.macs_counter, fvcore)
    if not spec.masked:
        return costs, {}
    sparsity = count_sparsity(model, image, spec.masked)
    entry.say(nonzero_line(sparsity))
    return costs, sparsity_results(sparsity, args.macs_counter)


def prepare_network(
    args: argparse.Namespace,
    model: nn.Module,
    spec: ModelSpec,
    loader: DataLoader,
    device: torch.device,
    amp_dtype: torch.dtype | None,
) -> nn.Module:
    """Returns the model in the memory format that was asked for, compiled for all batches of the loader if that was."""
    image = example_inputs(spec, device)
    if args.channels_last:
        model, image = model.to(memory_format=torch.channels_last), image.to(memory_format=torch.channels_last)
    if not args.compile:
        return model
    progress.stage("compiling", said=True)
    entry.say("Compiling...")
    sizes = {len(indices) for indices in loader.batch_sampler or ()}
    return compile_model(model, image, sizes, amp_dtype=amp_dtype)


def tell_accuracy(
    args: argparse.Namespace, network: nn.Module, loader: DataLoader, device: torch.device, amp_dtype: Precision
) -> Accuracy:
    """Evaluates the model on labelled images, and prints accuracy and loss."""
    entry.say(f"Evaluating {args.checkpoint or args.model}...")
    accuracy = measure_accuracy(
        network, loader, device, amp_dtype=amp_dtype, channels_last=args.channels_last, progress="Evaluating"
    )
    check_readable(args, accuracy)
    entry.say(accuracy_line(accuracy.top1, accuracy.loss))
    return accuracy


def tell_fidelity(
    args: argparse.Namespace,
    network: nn.Module,
    comparison: Comparison,
    device: torch.device,
    amp_dtype: torch.dtype | None,
) -> dict[str, object]:
    """Prints how far the model agrees with the dense one, and returns what the results file says of it."""
    dense = prepare_network(args, comparison.dense, comparison.spec, comparison.loader, device, amp_dtype)
    entry.say(f"Comparing {args.checkpoint or args.model} with {args.against}...")
    fidelity = measure_fidelity(
        network,
        dense,
        comparison.loader,
        device,
        amp_dtype=amp_dtype,
        channels_last=args.channels_last,
        progress="Comparing",
    )
    if args.unlabelled:  # of labelled images it was said already
        check_readable(args, fidelity)
    entry.say(fidelity_line(fidelity, args.against))
    return {"against": args.against, "unlabelled": args.unlabelled, **fidelity_results(fidelity)}


def results_row(
    args: argparse.Namespace, spec: ModelSpec, costs: Mapping[str, object], accuracy: Accuracy | None
) -> dict[str, object]:
    """One row with the keys and units of timm's validate.py: accuracies in percent, params in millions."""
    preprocessing = spec.preprocessing
    return {
        "model": args.model,
        "checkpoint": args.checkpoint,
        **(accuracy_results(accuracy) if accuracy else {}),
        **costs,
        "img_size": preprocessing.input_size,
        "crop_pct": round(preprocessing.input_size / preprocessing.resize_size, 4),
        "interpolation": preprocessing.interpolation,
        "batch_size": args.batch_size,
        "amp_dtype": amp_name(accuracy.amp_dtype) if accuracy else args.amp_dtype,
        "channels_last": accuracy.channels_last if accuracy else args.channels_last,
        "compiled": args.compile,
        **({"samples_per_sec": round(accuracy.images_per_second, 2)} if accuracy else {}),
    }
