"""The steps of prune.py, in order: open a model, plan what to remove, cut and recover, measure, save."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from isomorphic import progress
from isomorphic.checkpoints.save import check_savable, save_model
from isomorphic.checkpoints.sources import is_checkpoint, weights_file
from isomorphic.commands import entry, opening, replacing
from isomorphic.commands.images import Images, Passes, check_readable, evaluation_loader, scoring_batches, tell
from isomorphic.commands.opening import Task
from isomorphic.commands.prune_flags import needs_images, parse_args, plan_options
from isomorphic.data.sources import unlabelled_images
from isomorphic.data.transforms import eval_transform
from isomorphic.errors import UserError
from isomorphic.files import check_writable
from isomorphic.measure.accuracy import measure_accuracy, top1_of
from isomorphic.measure.complexity import Complexity
from isomorphic.measure.fvcore_counter import count_fvcore
from isomorphic.measure.latency import Latency
from isomorphic.measure.results import (
    accuracy_line,
    change_lines,
    complexity_results,
    fvcore_line,
    latency_results,
    write_results,
)
from isomorphic.measure.sparsity import count_sparsity, nonzero_change_lines, sparsity_results, sparsity_table
from isomorphic.models import ModelSpec
from isomorphic.page.facts import CUT, CutFacts, gather_facts
from isomorphic.page.inventory import Inventory, take_inventory
from isomorphic.page.page import Subject, write_page
from isomorphic.processes import distributed
from isomorphic.provenance import file_sha256, run_provenance
from isomorphic.pruning.apply import Applied, Recovery, applied_lines, apply_plan, looks_at_images
from isomorphic.pruning.branches import Batches
from isomorphic.pruning.iterative import in_short, prune_in_steps
from isomorphic.pruning.options import PlanOptions, check_counter, find_target
from isomorphic.pruning.plan import load_plan
from isomorphic.pruning.planning import Calibration, PlannedPruning, check_plan, make_plan, measure_dense_latency
from isomorphic.pruning.recovery.distillation import DistillationRules
from isomorphic.pruning.recovery.fusion import FusionRules
from isomorphic.pruning.report import draw_scores
from isomorphic.pruning.scoring import CRITERIA
from isomorphic.pruning.weights import dimap
from isomorphic.pruning.weights.layer_roles import assign_roles


def main() -> None:
    args = parse_args()
    check_outputs(args)
    progress.stage(f"opening {args.model}")
    device = entry.start(args)
    model, spec, task = opening.open_any_model_from(args, device, needs_images=needs_images(args))
    if not args.dry_run:
        check_savable(args.model, model, spec)
    is_of_data = needs_images(args) or (args.no_pretrained and not is_checkpoint(args.model))
    if task.classes and is_of_data and not args.unlabelled and not spec.class_names:
        spec = opening.named_by_data(args, spec, task.classes)
    check_possible(args, spec, task)
    model.to(device)
    progress.stage("counting MACs")
    dense = take_inventory(model, task.inputs, timed=wants_page(args))
    args.macs_counter = choose_counter(args, model, dense.complexity)
    if args.macs_counter == "fvcore":
        count_fvcore(model, task.inputs)  # fails early for a model that fvcore cannot trace
    if args.unstructured:
        prune_weights(args, model, spec, task, dense.complexity)
    else:
        prune_structure(args, model, spec, task, dense)


def wants_page(args: argparse.Namespace) -> bool:
    return bool(args.report) and args.report.endswith(".html")


def choose_counter(args: argparse.Namespace, model: nn.Module, dense: Complexity) -> str:
    """Returns which MACs a budget and the results speak of: the paper's, unless the user has named others.

    Raises:
        UserError: a budget is in the paper's, for want of another name, and they say little about this model.
    """
    if args.macs_counter is None:
        check_counter(plan_options(args, None), model, dense, "--macs-counter {}")
    return args.macs_counter or PlanOptions.macs_counter


def prune_structure(args: argparse.Namespace, model: nn.Module, spec: ModelSpec, task: Task, before: Inventory) -> None:
    """Plans which units to remove, cuts them, recovers accuracy, and writes the results."""
    inputs, device, dense = task.inputs, next(model.parameters()).device, before.complexity
    options = None if args.from_plan else plan_options(args, task.loss)
    latency = measure_dense_latency(model, inputs, options) if options else None
    if options:
        find_target(options, dense, latency)  # raises if the dense model already meets the budget
    results: dict[str, Any] = test_accuracy(args, "dense_top1", model, spec)
    calibration = open_calibration(args, model, spec, task, device)
    batches = own_data(args, model, spec, task)
    applied = Applied()
    if args.steps > 1:
        assert options is not None
        options = options.with_data(batches)
        planned, applied = prune_stepwise(args, options, model, task, dense, latency, calibration, batches)
    elif options is None:
        progress.stage("tracing")
        planned = check_plan(model, inputs, load_plan(args.from_plan), args.graph, before=dense)
    else:
        planned = make_new_plan(args, options.with_data(batches), model, task, dense, latency, calibration)
    spec = spec.keeping(planned.kept_blocks)
    tell_plan(args, planned)
    if planned.latency_after:
        entry.say(f"Latency: {planned.latency_before}\n      => {planned.latency_after}")
        results |= latency_results(planned.latency_after)

    if args.steps == 1 and not args.dry_run:
        recovery, check = recovery_of(args, calibration, planned), {"self_check": args.self_check, "batches": batches}
        applied = apply_plan(model, planned.graph, planned, inputs, recovery, **check, stage=progress.stage)
    if not args.dry_run:
        tell_cuts(args, applied)
        results |= test_accuracy(args, "top1", model, spec)
    progress.stage("counting MACs")
    after = None if args.dry_run else take_inventory(model, inputs, timed=wants_page(args))
    pruned = after.complexity if after else planned.after
    entry.say(change_lines(dense, pruned))
    fvcore = count_fvcore(model, inputs) if args.macs_counter == "fvcore" else None
    if fvcore:
        entry.say(fvcore_line(fvcore))
    results = {**complexity_results(pruned, args.macs_counter, fvcore), **results}
    if after is None:
        write(args, model, spec, results)
        return
    asked = options.told() if options else {"plan": args.from_plan}
    asked |= {"steps": args.steps} if args.steps > 1 else {}
    errors = applied.errors if args.steps == 1 else {}  # of one small step they would say nothing of the whole
    write_cut(args, model, spec, results, gather_facts(before, after, planned, errors=errors, asked=asked))


def write_cut(
    args: argparse.Namespace, model: nn.Module, spec: ModelSpec, results: dict[str, Any], cut: CutFacts
) -> None:
    """Writes the results and the checkpoint of a cut model, and the page about it where one is asked for."""
    details = {"reconstruction_errors": cut.errors} if cut.errors else {}
    provenance = write(args, model, spec, results, {**details, CUT: cut.to_dict()})
    if wants_page(args) and distributed.is_main():
        entry.say(f"Saving the page about the cut to {args.report}")
        write_page(args.report, [Subject(Path(args.save_as).name, spec.name, cut, provenance)])


def prune_weights(args: argparse.Namespace, model: nn.Module, spec: ModelSpec, task: Task, dense: Complexity) -> None:
    """Sets single weights to zero and writes the results; the checkpoint names the masked parameters."""
    results: dict[str, Any] = test_accuracy(args, "dense_top1", model, spec)
    progress.stage("masking")
    masking = dimap.mask(model, assign_roles(model, task.inputs), args.pruning_ratio)
    spec = spec.masking(masking.names)
    sparsity = count_sparsity(model, task.inputs, spec.masked)
    entry.say(f"{masking}\n{sparsity_table(sparsity)}")
    results |= test_accuracy(args, "top1", model, spec)
    entry.say(nonzero_change_lines(sparsity))
    costs = complexity_results(dense, args.macs_counter) | sparsity_results(sparsity, args.macs_counter)
    write(args, model, spec, costs | results)


def make_new_plan(
    args: argparse.Namespace,
    options: PlanOptions,
    model: nn.Module,
    task: Task,
    dense: Complexity,
    latency: Latency | None,
    calibration: Calibration | None,
) -> PlannedPruning:
    """Returns a new plan, scored on training images and ranked."""
    return make_plan(
        model,
        task.inputs,
        options,
        before=dense,
        latency_before=latency,
        calibration=calibration,
        recovery=recovery_of(args, calibration, None),
        batch_size=args.batch_size,
        tell=entry.say,
        stage=progress.stage,
        progress=True,
    )


def prune_stepwise(
    args: argparse.Namespace,
    options: PlanOptions,
    model: nn.Module,
    task: Task,
    dense: Complexity,
    latency: Latency | None,
    calibration: Calibration | None,
    batches: Batches | None,
) -> tuple[PlannedPruning, Applied]:
    """Cuts the model in `--steps` steps; returns their plan for the dense model, and what was done around the last."""
    doing = f"pruning in {args.steps} steps"
    progress.stage(doing)
    with progress.steps(doing, args.steps, unit="step") as bar:
        planned, applied = prune_in_steps(
            model,
            task.inputs,
            options,
            args.steps,
            before=dense,
            recovery=recovery_of(args, calibration, None),
            latency=latency,
            batches=batches,
            between=lambda model, step: bar.update(),
            self_check=args.self_check,
        )
        bar.update()
    return planned, in_short(applied)


def own_data(args: argparse.Namespace, model: nn.Module, spec: ModelSpec, task: Task) -> Batches | None:
    """Returns the user's own batches, or else training images under the evaluation transform.

    Returns None for images that no criterion needs.
    """
    if task.batches is not None:
        share = -(-args.taylor_batches // distributed.world_size())

        def begin() -> Iterator[Any]:
            batches = opening.own_batches(task, "train", args.taylor_batches)
            return iter(progress.Bar(batches, desc="Scoring", unit="batch", total=share, leave=args.steps == 1))

        return Batches(Passes(begin), task.loss)
    if args.from_plan or not CRITERIA[args.pruning_type].statistic:
        return None
    images = training_images(args, model, spec, task)
    device = next(model.parameters()).device
    batches = scoring_batches(args, images, device, args.taylor_batches, "Scoring", leave=args.steps == 1)
    return Batches(batches, task.loss)


def training_images(args: argparse.Namespace, model: nn.Module, spec: ModelSpec, task: Task) -> Images:
    """Returns the training images, or those of `--unlabelled`, under the evaluation transform."""
    if not args.unlabelled:
        return opening.evaluation_images(args, "train", model, spec, classifier=task.classes is not None)
    images = unlabelled_images(args.unlabelled, eval_transform(spec.preprocessing))
    for note in images.notes:
        tell(note)
    return images


def open_calibration(
    args: argparse.Namespace, model: nn.Module, spec: ModelSpec, task: Task, device: torch.device
) -> Calibration | None:
    """Returns the images for recoveries and the search for an allocation; None if they are not needed or missing.

    Raises:
        UserError: the search for an allocation finds no images; or there are fewer batches than processes.
    """
    searched = args.allocate == "calibrate"
    recovers = not args.dry_run and looks_at_images(args.recover)
    if not searched and not recovers:
        return None
    try:
        images = training_images(args, model, spec, task)
    except UserError as error:
        if searched or args.unlabelled:
            raise
        steps = " and no ".join(step for step in args.recover if looks_at_images([step]))
        entry.say(f"There will be no {steps}, for want of calibration images: {error}")
        return None
    progress.stage("loading calibration images")
    batches = list(scoring_batches(args, images, device, args.calibration_batches, "Calibrating"))
    counts = distributed.gather_objects(len(batches))
    if not all(counts):
        raise UserError(
            f"{sum(counts)} calibration batches are too few for {len(counts)} processes: "
            "lower --batch-size, or raise --calibration-batches"
        )
    images, labels = (torch.cat(parts).to(device) for parts in zip(*batches, strict=True))
    return Calibration(images, top1_of(model, images) if args.unlabelled else labels)


def recovery_of(args: argparse.Namespace, calibration: Calibration | None, planned: PlannedPruning | None) -> Recovery:
    """Returns the recovery that the flags ask for."""
    images = calibration.images if calibration else None
    rules = FusionRules(args.fusion_normalization, args.fusion_masses)
    distillation = DistillationRules(args.distill_steps, lr=args.distill_lr, seed=args.seed)
    recovery = Recovery.asked(args.recover, images, rules, distillation, mirrored=args.mirror_calibration)
    return dataclasses.replace(recovery, importance=planned.scores if planned else {})


def tell_plan(args: argparse.Namespace, planned: PlannedPruning) -> None:
    """Prints the plan, and writes it to `--plan-file` and its scores to `--report`."""
    for line in planned.table():
        entry.say(line)
    if args.report and args.report.endswith(".png") and distributed.is_main():
        title = f"{args.model}: {args.pruning_type} scores by isomorphism class"
        draw_scores(args.report, planned.summaries(), title=title)
        entry.say(f"Saving the score distributions to {args.report}")
    for line in planned.details():
        entry.say(line)
    if args.plan_file and distributed.is_main():
        planned.save(args.plan_file, {"model": args.model})
        entry.say(f"Saving the plan to {args.plan_file}")


def tell_cuts(args: argparse.Namespace, applied: Applied) -> None:
    """Prints what recoveries and the self-check found."""
    lines = list(applied_lines(applied))
    if args.steps > 1 and args.recover:  # the self-check's line is of all cuts, the others are of the last one
        lines.insert(0 if applied.check_error is None else 1, f"Around the last of {args.steps} cuts:")
    for line in lines:
        entry.say(line)


def test_accuracy(args: argparse.Namespace, key: str, model: nn.Module, spec: ModelSpec) -> dict[str, float]:
    """Under `--test-accuracy`, prints the accuracy and returns top-1 in percent as `{key: top-1}`."""
    if not args.test_accuracy:
        return {}
    progress.stage("evaluating")
    device = next(model.parameters()).device
    loader = evaluation_loader(args, opening.evaluation_images(args, "val", model, spec), device)
    precision = opening.precision(args, model, spec)
    accuracy = measure_accuracy(model, loader, device, amp_dtype=precision, progress="Evaluating")
    check_readable(args, accuracy)
    entry.say(f"{'Before' if key == 'dense_top1' else 'After'}: {accuracy_line(accuracy.top1, accuracy.loss)}")
    return {key: round(100 * accuracy.top1, 4)}


def write(
    args: argparse.Namespace,
    model: nn.Module,
    spec: ModelSpec,
    measured: dict[str, Any],
    details: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes the results file and, unless the run is dry, the checkpoint; `details` go into its provenance only.

    Returns the provenance; of the first process only, and empty where nothing was cut.
    """
    if not distributed.is_main():
        return {}
    results = {"model": args.model, **measured}
    if args.results_file:
        write_results(args.results_file, results)
    if args.dry_run:
        return {}
    entry.say(f"Saving the pruned model to {args.save_as}")
    progress.stage(f"saving {args.save_as}")
    parent = file_sha256(weights_file(source)) if (source := opening.weights_source(args)) else None
    provenance = {**run_provenance(vars(args)), "parent": parent, **results, **(details or {})}
    save_model(args.save_as, model, spec, provenance=provenance)
    return provenance


def check_possible(args: argparse.Namespace, spec: ModelSpec, task: Task) -> None:
    """Raises a UserError for flags that cannot be used with this model."""
    if spec.masked and set(args.recover) - {"bn"}:
        raise UserError(f"{args.model} has masked weights, which --recover would fill: only bn leaves them alone")
    if task.classes is None:
        needing = {"--test-accuracy": args.test_accuracy, "--allocate calibrate": args.allocate == "calibrate"}
        needing["--recover"] = looks_at_images(args.recover) and task.batches is not None
        for flag, asked in needing.items():
            if asked:
                raise UserError(f"{flag} needs a classifier of images in folders, and {args.model} is none")


def check_outputs(args: argparse.Namespace) -> None:
    """Raises a UserError if an output cannot be written, or would replace the model to prune."""
    for source in filter(is_checkpoint, (args.model, args.checkpoint or "")):
        if Path(args.save_as).resolve() == weights_file(source).resolve():
            raise UserError(f"--save-as {args.save_as} is the model to prune: choose another name")
    outputs = {"--plan-file": args.plan_file, "--report": args.report, "--results-file": args.results_file}
    for path in filter(None, (args.save_as, *outputs.values())):
        check_writable(path)
    outputs["--save-as"] = None if args.dry_run else args.save_as
    replacing.check_outputs(outputs, overwrite=args.overwrite)
