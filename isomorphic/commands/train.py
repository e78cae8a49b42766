"""The steps of finetune.py and convnext_train.py: build, resume if asked to, train, report."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sized
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader

from isomorphic import progress
from isomorphic.checkpoints.save import check_savable
from isomorphic.checkpoints.sources import source_file
from isomorphic.commands import entry, opening
from isomorphic.commands.images import check_readable, evaluation_loader, substituted
from isomorphic.commands.train_flags import SPARSIFY_FLAGS
from isomorphic.data.classes import first_difference
from isomorphic.data.skipping import SkippedImages
from isomorphic.errors import UserError
from isomorphic.files import check_writable
from isomorphic.masks import Masks
from isomorphic.measure.accuracy import measure_accuracy
from isomorphic.measure.complexity import count_complexity
from isomorphic.measure.precision import keep_depthwise_in_fp32
from isomorphic.measure.results import accuracy_line, complexity_line, complexity_results
from isomorphic.measure.sparsity import count_sparsity, nonzero_line, sparsity_results
from isomorphic.models import ModelSpec, check_input_size, example_inputs, num_classes
from isomorphic.page.subjects import inherited_facts
from isomorphic.processes import distributed
from isomorphic.provenance import file_sha256, run_provenance
from isomorphic.pruning.grouping.trace import trace_groups
from isomorphic.pruning.groups import ChannelGraph
from isomorphic.pruning.sparsify.regularizers import sparsify
from isomorphic.training.augment import build_preparation, train_transform
from isomorphic.training.drop import with_drop_rates
from isomorphic.training.ema import adjusted_decay, build_ema
from isomorphic.training.engine import Job, Observers, fit
from isomorphic.training.extension import extension_line, growing_settings
from isomorphic.training.losses import build_objective
from isomorphic.training.optim import build_optimizer
from isomorphic.training.parallel import compiled, shard, wrap_ddp
from isomorphic.training.precision import build_scaler, choose_algorithms, pick_amp_dtype, pick_teacher_dtype
from isomorphic.training.recipe import Recipe
from isomorphic.training.resume import SavedState, TrainState, find_state, is_longer, load_state, seed_process
from isomorphic.training.run_lock import RunLock
from isomorphic.training.sampling import build_train_loader, images_left_out
from isomorphic.training.sync_bn import convert_sync_bn, needs_batches
from isomorphic.training.teacher import Teacher, open_teacher
from isomorphic.training.trackers import Trackers, open_trackers
from isomorphic.training.tracking import EpochRow, RunFolder, check_free, recorded_class_names

RESTART_PATIENCE = 60.0  # seconds in which a process that torchrun replaces must have ended


def train(args: argparse.Namespace, *, adjust_ema: bool = False) -> None:
    """Trains `--model`, or evaluates it under `--test-only`; writes `--output-dir` and prints the results.

    With `adjust_ema`, `--model-ema-decay` is that of torchvision's reference trainer (see `adjusted_decay`).
    """
    if not args.test_only:
        check_writable(Path(args.output_dir, "state.pt"))
    progress.stage(f"opening {args.model}")
    device = entry.start(args)
    choose_algorithms(args.use_deterministic_algorithms)
    if args.test_only:
        evaluate_only(args, device)
        return
    with run_lock(args) as lock:
        if not (args.overwrite or distributed.is_restart()):
            check_free(Path(args.output_dir), args.resume)
        train_in_folder(args, device, lock, adjust_ema=adjust_ema)


@contextlib.contextmanager
def run_lock(args: argparse.Namespace) -> Iterator[RunLock | None]:
    """Returns a context in which --output-dir belongs to this run; its first process holds the lock.

    A process that torchrun started again waits for the one before it to end.
    """
    patience = RESTART_PATIENCE if distributed.is_restart() else 0.0
    if not distributed.is_main():
        yield None
        return
    with RunLock(Path(args.output_dir), patience=patience) as lock:
        if lock.note:
            entry.say(lock.note, file=sys.stderr)
        yield lock


def evaluate_only(args: argparse.Namespace, device: torch.device) -> None:
    """Evaluates `--model` as training would, and prints the results."""
    model, spec, _ = open_student(args, device, adjust_ema=False)
    progress.stage("counting MACs")
    cost_lines, _ = measure_costs(model, spec, device)
    images = opening.evaluation_images(args, "val", model, spec)
    val_loader = evaluation_loader(args, images, device)
    progress.stage("evaluating")
    channels_last = args.channels_last
    model = model.to(memory_format=torch.channels_last if channels_last else torch.preserve_format)
    result = measure_accuracy(model, val_loader, device, channels_last=channels_last, progress="validation")
    check_readable(args, result)
    entry.say(f"{cost_lines}\n{accuracy_line(result.top1, result.loss)}")


def train_in_folder(args: argparse.Namespace, device: torch.device, lock: RunLock | None, *, adjust_ema: bool) -> None:
    """Trains `--model` in the folder that is locked, and prints the results."""
    model, spec, recipe = open_student(args, device, adjust_ema=adjust_ema)
    progress.stage("counting MACs")
    cost_lines, costs = measure_costs(model, spec, device)
    images = opening.evaluation_images(args, "val", model, spec)
    val_loader = evaluation_loader(args, images, device)
    graph = trace_for_sparsity(args, model, spec, device)
    progress.stage(f"opening {args.teacher_model or 'the training images'}")
    job, state = build_job(args, recipe, model, spec, val_loader)
    job = dataclasses.replace(job, val_skipped=SkippedImages(len(cast(Sized, images)), args.skip_unreadable))
    if graph is not None:
        job = with_sparsity(args, graph, job, state)
    if left_out := images_left_out(job.train_loader):
        entry.say(
            f"The last batch of an epoch would be one image, which batch norms cannot take: {left_out} of the "
            f"{len(cast(Sized, job.train_loader.dataset))} training images are left out of each epoch, others each time"
        )
    layout = {"processes": distributed.world_size(), "batch_size": args.batch_size, "accumulate": args.accumulate}
    origin, sources = run_provenance(vars(args)), checksums(args)
    provenance = origin | layout | sources | costs
    settings = (
        shared_settings(args, spec, recipe)
        | sources
        | {"train_images": len(cast(Sized, job.train_loader.dataset)), "val_images": len(cast(Sized, images))}
    )
    inherited = inherited_facts(args.model)
    folder = RunFolder(Path(args.output_dir), spec, settings, layout, provenance, args.checkpoint_hist, inherited, lock)
    seed_process(args.seed)
    resumed = resume(args, state, folder, job)
    if not state.is_finished(recipe.loop):
        with trackers_of(args, state, origin["arguments"]) as trackers:
            folder.prepare(state.epoch, anew=not resumed)
            distributed.mark_started()
            progress.stage("training")
            fit(job, state, folder, observers(args, state, trackers))
        entry.say(f"Saving the best model, of epoch {state.best_epoch}, to {folder.file('best')}")
    entry.say(f"{cost_lines}\n{accuracy_line(state.best_top1, state.best_loss)}")


def measure_costs(model: nn.Module, spec: ModelSpec, device: torch.device) -> tuple[str, dict[str, Any]]:
    """Returns MACs and params as lines and as results; with masks, also those that are not zero."""
    image = example_inputs(spec, device)
    complexity = count_complexity(model, image)
    line, results = complexity_line(complexity), complexity_results(complexity)
    if not spec.masked:
        return line, results
    sparsity = count_sparsity(model, image, spec.masked)
    return f"{line}\n{nonzero_line(sparsity)}", results | sparsity_results(sparsity)


def open_student(
    args: argparse.Namespace, device: torch.device, *, adjust_ema: bool
) -> tuple[nn.Module, ModelSpec, Recipe]:
    """Returns the model to train, its spec with the validation crop of the flags, and the flags as a recipe."""
    model, spec = opening.open_model_from(args)
    if args.ignore_class_names or not spec.class_names:  # what it is trained on is what its logits stand for
        spec = opening.named_by_data(args, spec, num_classes(model, spec))
    if not args.test_only:
        check_savable(args.model, model, spec)
    model, spec = with_drop_rates(model, spec, args.drop, args.drop_path)
    train_size = args.train_crop_size or spec.preprocessing.input_size
    val_size = args.val_crop_size or spec.preprocessing.input_size
    for size in filter(None, (args.train_crop_size, args.val_crop_size)):
        check_input_size(model, size, args.model)
    preprocessing = dataclasses.replace(spec.preprocessing, input_size=val_size)
    ema_decay = args.model_ema_decay
    if args.model_ema and adjust_ema:
        steps = args.model_ema_steps
        ema_decay = adjusted_decay(ema_decay, global_batch=global_batch(args), steps=steps, epochs=args.epochs)
    resolved = {
        "train_crop_size": train_size,
        "scale": tuple(args.scale),
        "ratio": tuple(args.ratio),
        "lr_milestones": tuple(args.lr_milestones),
        "ra_reps": args.ra_reps if args.ra_sampler else 1,
        "amp_dtype": pick_amp_dtype(args.amp_dtype, device) if args.amp else None,
        "model_ema_decay": ema_decay,
    }
    recipe = Recipe.from_values(vars(args) | resolved)
    return model.to(device), dataclasses.replace(spec, preprocessing=preprocessing), recipe


def build_job(
    args: argparse.Namespace, recipe: Recipe, model: nn.Module, spec: ModelSpec, val_loader: DataLoader
) -> tuple[Job, TrainState]:
    """Returns the training job and its initial state."""
    device = next(model.parameters()).device
    teacher = open_teacher_of(args, recipe, model, spec, device)
    classes, network = num_classes(model, spec), recipe.network
    transform = train_transform(recipe.augment, spec.preprocessing)
    sizes = {"num_classes": classes, "image_size": recipe.augment.train_crop_size}
    train_images, skipped = substituted(args, opening.labelled_images(args, "train", spec, transform, **sizes))
    prepare = build_preparation(
        recipe.augment, spec.preprocessing, classes, device, channels_last=network.channels_last
    )
    if network.channels_last:
        model = model.to(memory_format=torch.channels_last)
    keep_depthwise_in_fp32(model, recipe.loop.amp_dtype, device)
    if network.sync_bn:
        model = convert_sync_bn(model)
    ema = build_ema(model, recipe.ema, foreach=not network.fsdp)
    if ema:
        shard(ema.module, device, network)
    shard(model, device, network)
    wrapped = wrap_ddp(model, device, network)
    job = Job(
        network=compiled(wrapped) if network.compile else wrapped,
        objective=build_objective(recipe.loss),
        teacher=teacher,
        prepare=prepare,
        train_loader=build_train_loader(
            train_images, recipe.loader, recipe.augment, device, takes_single=not needs_batches(model)
        ),
        val_loader=val_loader,
        device=device,
        recipe=recipe,
        skipped=skipped,
    )
    optimizer = build_optimizer(model, recipe.optimizer)
    scaler, masks = build_scaler(recipe.loop.amp_dtype, device), Masks.of(model, spec.masked)
    return job, TrainState(model, optimizer, scaler, ema, epoch=args.start_epoch, masks=masks)


def trace_for_sparsity(
    args: argparse.Namespace, model: nn.Module, spec: ModelSpec, device: torch.device
) -> ChannelGraph | None:
    """Under `--sparsify`, returns the groups of the model as it was built, before anything wraps or converts it."""
    if args.sparsify == "none":
        return None
    progress.stage("tracing")
    return trace_groups(model, example_inputs(spec, device))


def with_sparsity(args: argparse.Namespace, graph: ChannelGraph, job: Job, state: TrainState) -> Job:
    """Returns the job with the regularizer of `--sparsify`, whose state goes into the training state."""
    regularizer = sparsify(
        state.model,
        graph,
        kind=args.sparsify,
        reg=args.sparsify_reg,
        alpha=args.sparsify_alpha,
        delta=args.sparsify_delta,
    )
    state.regularizer = regularizer
    return dataclasses.replace(job, regularize=regularizer, weak_half=regularizer.weak_half)


def open_teacher_of(
    args: argparse.Namespace, recipe: Recipe, student: nn.Module, spec: ModelSpec, device: torch.device
) -> Teacher | None:
    if recipe.loss.distillation == "none":
        return None
    teacher = open_teacher(
        args.teacher_model,
        spec.preprocessing,
        num_classes(student, spec),
        input_size=recipe.augment.train_crop_size,
        pretrained=not args.no_pretrained,
        weights=args.teacher_checkpoint,
        builder_file=args.teacher_builder_file or args.builder_file,
        trust=args.trust_checkpoint,
        dtype=pick_teacher_dtype(args.teacher_dtype, recipe.loop.amp_dtype),
        channels_last=recipe.network.channels_last,
        class_names=() if args.ignore_class_names else spec.class_names,
        tell=entry.say,
    )
    return teacher.to(device)


def resume(args: argparse.Namespace, state: TrainState, folder: RunFolder, job: Job) -> bool:
    """Loads the training state that `--resume` asks for into `state`, if there is one, and prints where it goes on.

    Returns True if that state is from the run's own folder. Processes that torchrun started again always resume from
    the states of the processes before them.
    """
    saved = find_state("auto", folder.path) if distributed.is_restart() else None
    saved = saved or find_state(args.resume, folder.path)
    if not saved:
        return False
    check_same_classes(args, saved, folder.spec)
    then = saved.content["settings"]
    may_grow = growing_settings(then, job.recipe.schedule, extend=args.extend)
    notes = load_state(saved, state, folder.settings, folder.layout, job.device, may_grow=may_grow)
    if is_longer(then, folder.settings):
        notes.append(extension_line(then, job.recipe.schedule, state.epoch))
    rest = "finished, nothing left to do" if state.is_finished(job.recipe.loop) else "going on"
    for note in saved.notes + tuple(notes):
        entry.say(note)
    entry.say(f"{saved.path}: {state.epoch} epochs and {state.step} steps done; {rest}")
    return saved.path.parent.resolve() == folder.path.resolve()


def check_same_classes(args: argparse.Namespace, saved: SavedState, spec: ModelSpec) -> None:
    """Raises a UserError if the run that a state is from had other classes, as far as its folder tells."""
    then = recorded_class_names(saved.path.parent)
    if not (then and spec.class_names) or args.ignore_class_names:
        return
    difference = first_difference(spec.class_names, then, "now", "then")
    if difference:
        raise UserError(
            f"{saved.path} belongs to a run with other classes: {difference}; use the classes of that run, choose "
            "another --output-dir, or go by their order alone with --ignore-class-names"
        )


def checksums(args: argparse.Namespace) -> dict[str, str | None]:
    """Returns the SHA-256 of the student's and the teacher's weights or code; None for a model name."""
    sources = {"parent": args.checkpoint or args.model, "teacher": args.teacher_checkpoint or args.teacher_model or ""}
    files = {role: source_file(source) for role, source in sources.items()}
    return {role: file_sha256(file) if file else None for role, file in files.items()}


def shared_settings(args: argparse.Namespace, spec: ModelSpec, recipe: Recipe) -> dict[str, Any]:
    """Returns the settings that a resumed run must share with the interrupted one; the data's folder may differ."""
    names = ("model", "is_torchvision", "model_kwargs", "no_pretrained", "drop", "drop_path", "dataset")
    names += ("synthetic_size", "teacher_model", "teacher_dtype", "start_epoch")
    names += ("checkpoint", "use_ema", "num_classes", "teacher_checkpoint")
    settings = {name: getattr(args, name) for name in names} | vars(spec.preprocessing) | recipe.settings()
    if args.sparsify != "none":  # without it, as states were before there was any
        used = [name for name, kinds in SPARSIFY_FLAGS.items() if args.sparsify in kinds]
        settings |= {name: getattr(args, name) for name in ("sparsify", *used)}
    return settings | {"global_batch": global_batch(args)}


def global_batch(args: argparse.Namespace) -> int:
    """Returns the number of images of one optimizer step, over all processes."""
    return args.batch_size * args.accumulate * distributed.world_size()


def trackers_of(
    args: argparse.Namespace, state: TrainState, config: dict[str, Any]
) -> AbstractContextManager[Trackers]:
    folder = Path(args.output_dir)
    options = {"tensorboard": args.tensorboard, "wandb_project": args.wandb_project, "resumed_step": state.step}
    return contextlib.closing(open_trackers(folder, folder.name, config, **options))


def observers(args: argparse.Namespace, state: TrainState, trackers: Trackers) -> Observers:
    """Returns callbacks that print a line after every epoch and log steps and epochs to the trackers."""

    def row(row: EpochRow) -> None:
        entry.say(f"epoch {row.epoch}/{args.epochs}: {row}")
        told = {name: value for name, value in vars(row).items() if name != "lr" and value is not None}
        trackers.log(state.step, told)

    def step(step: int, loss: float, lr: float) -> None:
        if not sys.stderr.isatty():  # a terminal has the progress bar instead
            entry.say(f"step {step}: loss {loss:.4f}")
        trackers.log(step, {"loss": loss, "lr": lr})

    return Observers(row, step, entry.say)
