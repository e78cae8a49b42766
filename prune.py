#!/usr/bin/env python3
"""Prunes a vision model: (remove blocks) → group → classify → score → rank → cut, and recover → save.

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
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from isomorphic.checkpoints.open import is_checkpoint
from isomorphic.checkpoints.save import check_savable, save_model
from isomorphic.commands import entry, opening
from isomorphic.commands.prune import (
    Planned,
    make_plan,
    mask_weights,
    measure,
    open_calibration,
    recovery_of,
    stored_plan,
)
from isomorphic.commands.prune_flags import budget_of, needs_images, parse_args
from isomorphic.data.loaders import build_eval_loader
from isomorphic.errors import UserError
from isomorphic.files import check_writable
from isomorphic.measure.accuracy import measure_accuracy
from isomorphic.measure.complexity import Complexity, count_complexity
from isomorphic.measure.results import accuracy_line, change_lines, complexity_results, latency_results, write_results
from isomorphic.measure.sparsity import nonzero_change_lines, sparsity_results
from isomorphic.models import ModelSpec, example_inputs
from isomorphic.processes import distributed
from isomorphic.provenance import file_sha256, run_provenance
from isomorphic.pruning.apply import Applied, applied_lines, apply_plan
from isomorphic.pruning.plan import save_plan
from isomorphic.pruning.report import plan_lines


def main() -> None:
    args = parse_args()
    check_outputs(args)
    device = entry.start(args)
    model, spec = opening.open_model_from(args, needs_images=needs_images(args))
    if not args.dry_run:
        check_savable(args.model, model, spec)
    check_recoverable(args, spec)
    model.to(device)
    inputs = example_inputs(spec, device)
    dense = count_complexity(model, inputs)
    prune = prune_weights if args.unstructured else prune_structure
    prune(args, model, spec, inputs, dense)


def prune_structure(
    args: argparse.Namespace, model: nn.Module, spec: ModelSpec, inputs: Tensor, dense: Complexity
) -> None:
    """Plans which units go, cuts them and recovers what can be."""
    dense_latency = measure(args, model, inputs) if args.target_latency else None
    target = budget_of(args, dense, dense_latency)
    results: dict[str, Any] = test_accuracy(args, "dense_top1", model, spec)
    calibration = open_calibration(args, model, spec, inputs.device)
    planned = (
        stored_plan(args, model, inputs)
        if args.from_plan
        else make_plan(args, model, spec, inputs, target, calibration)
    )
    spec = spec.keeping(planned.plan.kept_blocks)
    tell_plan(args, planned)
    if planned.latency:
        entry.say(f"Latency: {dense_latency}\n      => {planned.latency}")
        results |= latency_results(planned.latency)

    recovered = Applied()
    if not args.dry_run:
        recovery = recovery_of(args, calibration, planned.importance)
        recovered = apply_plan(model, planned.graph, planned.plan, inputs, recovery, self_check=args.self_check)
        for line in applied_lines(recovered):
            entry.say(line)
        results |= test_accuracy(args, "top1", model, spec)
    pruned = planned.cost if args.dry_run else count_complexity(model, inputs)
    entry.say(change_lines(dense, pruned))
    results = {**complexity_results(pruned, args.macs_counter), **results}
    write(args, model, spec, results, {"reconstruction_errors": recovered.errors} if recovered.errors else {})


def prune_weights(
    args: argparse.Namespace, model: nn.Module, spec: ModelSpec, inputs: Tensor, dense: Complexity
) -> None:
    """Sets single weights to zero, whose parameters the checkpoint names."""
    results: dict[str, Any] = test_accuracy(args, "dense_top1", model, spec)
    spec, sparsity = mask_weights(args, model, spec, inputs)
    results |= test_accuracy(args, "top1", model, spec)
    entry.say(nonzero_change_lines(sparsity))
    costs = complexity_results(dense, args.macs_counter) | sparsity_results(sparsity, args.macs_counter)
    write(args, model, spec, costs | results)


def tell_plan(args: argparse.Namespace, planned: Planned) -> None:
    """Prints what the table of classes leaves open, and writes the plan if it was asked for."""
    for line in plan_lines(planned.graph, planned.plan, heads_wanted=bool(args.head_pruning_ratio)):
        entry.say(line)
    if args.plan_file and distributed.is_main():
        save_plan(args.plan_file, planned.plan, planned.graph.groups, {"model": args.model, **vars(planned.cost)})
        entry.say(f"Saving the plan to {args.plan_file}")


def test_accuracy(args: argparse.Namespace, key: str, model: nn.Module, spec: ModelSpec) -> dict[str, float]:
    """Top-1 in percent under `key`, printed, if it was asked for."""
    if not args.test_accuracy:
        return {}
    device = next(model.parameters()).device
    loader = build_eval_loader(
        opening.evaluation_images(args, "val", model, spec), args.batch_size, args.workers, device
    )
    accuracy = measure_accuracy(model, loader, device, amp_dtype=opening.amp_dtype(args), progress="Evaluating")
    entry.say(f"{'Before' if key == 'dense_top1' else 'After'}: {accuracy_line(accuracy.top1, accuracy.loss)}")
    return {key: round(100 * accuracy.top1, 4)}


def write(
    args: argparse.Namespace,
    model: nn.Module,
    spec: ModelSpec,
    measured: dict[str, Any],
    details: dict[str, Any] | None = None,
) -> None:
    """The results file and, unless the run is dry, the checkpoint, whose provenance has the details, too."""
    if not distributed.is_main():
        return
    results = {"model": args.model, **measured}
    if args.results_file:
        write_results(args.results_file, results)
    if not args.dry_run:
        entry.say(f"Saving the pruned model to {args.save_as}")
        parent = file_sha256(args.model) if is_checkpoint(args.model) else None
        save_model(
            args.save_as,
            model,
            spec,
            provenance={**run_provenance(vars(args)), "parent": parent, **results, **(details or {})},
        )


def check_recoverable(args: argparse.Namespace, spec: ModelSpec) -> None:
    if spec.masked and {"fusion", "compensate"} & set(args.recover):
        raise UserError(f"{args.model} has masked weights, which --recover would fill: only bn leaves them alone")


def check_outputs(args: argparse.Namespace) -> None:
    """Finds out before the work that its results can be written, and will not replace what it starts from."""
    if is_checkpoint(args.model) and Path(args.save_as).resolve() == Path(args.model).resolve():
        raise UserError(f"--save-as {args.save_as} is the model to prune: choose another name")
    for path in filter(None, (args.save_as, args.plan_file, args.report, args.results_file)):
        check_writable(path)


if __name__ == "__main__":
    entry.run(main)
