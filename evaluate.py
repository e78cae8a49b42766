#!/usr/bin/env python3
"""Measures a model by name or a checkpoint: MACs, params, top-1, top-5 and loss on the validation images.

    python evaluate.py --model output/pruned/deit_4.2G.safetensors --data-path data/imagenet

prints

    MACs: 4.1626 G, Params: 20.6943 M (paper counter; exact MACs: …)
    Accuracy: 0.8241, Loss: 0.8036

Under torchrun every process evaluates its share, and each image counts exactly once.
"""

from __future__ import annotations

import argparse

from isomorphic import cli, distributed
from isomorphic.data import build_eval_loader
from isomorphic.files import check_writable
from isomorphic.measure.accuracy import Accuracy, measure_accuracy
from isomorphic.measure.complexity import Complexity, count_complexity
from isomorphic.measure.results import accuracy_line, complexity_line, complexity_results, write_results
from isomorphic.models import ModelSpec, example_inputs


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser("Measure MACs, params and accuracy of a model.")
    cli.add_model_arguments(parser)
    cli.add_data_arguments(parser, batch_size=64)
    add = parser.add_argument_group("evaluation").add_argument
    add("--amp", action="store_true", help="evaluate under bfloat16 autocast")
    add("--macs-counter", choices=("paper", "exact"), default="paper", help="which MACs `gmacs` reports")
    add(
        "--results-file",
        type=cli.results_file,
        metavar="FILE",
        help="write the results as .json or .csv, with the keys of timm's validate.py",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.results_file:
        check_writable(args.results_file)
    device = cli.start(args)
    model, spec = cli.open_model_from(args)
    model.to(device)
    images = cli.evaluation_images(args, "val", model, spec)
    loader = build_eval_loader(images, args.batch_size, args.workers, device)

    complexity = count_complexity(model, example_inputs(spec, device))
    cli.say(complexity_line(complexity))
    cli.say(f"Evaluating {args.model}...")
    accuracy = measure_accuracy(model, loader, device, amp_dtype=cli.amp_dtype(args), progress="Evaluating")
    cli.say(accuracy_line(accuracy.top1, accuracy.loss))
    if args.results_file and distributed.is_main():
        write_results(args.results_file, results_row(args, spec, complexity, accuracy))


def results_row(
    args: argparse.Namespace, spec: ModelSpec, complexity: Complexity, accuracy: Accuracy
) -> dict[str, object]:
    """One row with the keys and units of timm's validate.py: accuracies in percent, params in millions."""
    preprocessing = spec.preprocessing
    return {
        "model": args.model,
        "top1": round(100 * accuracy.top1, 4),
        "top5": round(100 * accuracy.top5, 4),
        "loss": accuracy.loss,
        "num_images": accuracy.num_images,
        **complexity_results(complexity, args.macs_counter),
        "img_size": preprocessing.input_size,
        "crop_pct": round(preprocessing.input_size / preprocessing.resize_size, 4),
        "interpolation": preprocessing.interpolation,
        "samples_per_sec": round(accuracy.images_per_second, 2),
    }


if __name__ == "__main__":
    cli.run(main)
