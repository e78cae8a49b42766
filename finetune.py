#!/usr/bin/env python3
"""Trains a pruned model back to its accuracy, from a teacher or without; dense models train alike.

    torchrun --nproc_per_node=8 finetune.py --model output/pruned/deit_4.2G.safetensors \
        --teacher-model regnety_160.deit_in1k --epochs 300 --batch-size 256 --opt adamw --lr 5e-4 --wd 0.05 \
        --lr-scheduler cosineannealinglr --label-smoothing 0.1 --mixup-alpha 0.8 --cutmix-alpha 1.0 \
        --auto-augment ra --random-erase 0.25 --ra-sampler --amp --output-dir output/finetuned/deit_4.2G

fills the output folder (best.safetensors, last.safetensors, state.pt, metrics.csv, run.json) and ends with

    MACs: 4.1626 G, Params: 20.6943 M (paper counter; exact MACs: …)
    Accuracy: 0.8241, Loss: 0.8036

One process or many, CPU or GPU take the same path; `--batch-size` is per process. `--resume auto` goes on with
an interrupted run. Optimizer, schedule and augmentation flags are spelled, and default, as
in torchvision's reference trainer.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from isomorphic import cli, distributed
from isomorphic.checkpoint import check_savable, source_file
from isomorphic.cli_training import parse_args
from isomorphic.data import build_dataset, build_eval_loader
from isomorphic.files import check_writable
from isomorphic.measure.accuracy import measure_accuracy
from isomorphic.measure.complexity import count_complexity
from isomorphic.measure.results import accuracy_line, complexity_line, complexity_results
from isomorphic.models import ModelSpec, check_input_size, example_inputs, num_classes
from isomorphic.provenance import file_sha256, run_provenance
from isomorphic.training.augment import build_mixer, train_transform
from isomorphic.training.engine import Job, fit, over_processes
from isomorphic.training.losses import build_objective
from isomorphic.training.optim import build_optimizer
from isomorphic.training.precision import build_scaler, choose_algorithms, pick_amp_dtype
from isomorphic.training.recipe import Recipe
from isomorphic.training.resume import TrainState, find_state, load_state, seed_process
from isomorphic.training.sampling import build_train_loader
from isomorphic.training.teacher import Teacher, open_teacher
from isomorphic.training.tracking import RunFolder


def main() -> None:
    args = parse_args()
    if not args.test_only:
        check_writable(Path(args.output_dir, "state.pt"))
    device = cli.start(args)
    choose_algorithms(args.use_deterministic_algorithms)
    model, spec, recipe = open_student(args, device)
    complexity = count_complexity(model, example_inputs(spec, device))
    images = cli.evaluation_images(args, "val", model, spec)
    val_loader = build_eval_loader(images, args.batch_size, args.workers, device)
    if args.test_only:
        result = measure_accuracy(model, val_loader, device, progress="validation")
        cli.say(f"{complexity_line(complexity)}\n{accuracy_line(result.top1, result.loss)}")
        return

    teacher = open_teacher_of(args, recipe, model, spec)
    state = TrainState(model, build_optimizer(model, recipe.optimizer), build_scaler(recipe.loop.amp_dtype, device))
    provenance = run_provenance(vars(args)) | checksums(args) | complexity_results(complexity)
    run = RunFolder(Path(args.output_dir), spec, shared_settings(args, spec, recipe), provenance)
    seed_process(args.seed)
    if path := find_state(args.resume, run.path):
        load_state(path, state, run.settings, device)
        rest = "finished, nothing left to do" if state.is_finished(recipe.loop) else "going on"
        cli.say(f"{path}: {state.epoch} epochs and {state.step} steps done; {rest}")
    job = Job(
        network=over_processes(model, device),
        objective=build_objective(recipe.loss, teacher.to(device) if teacher else None),
        mixer=build_mixer(recipe.augment, num_classes(model, spec)),
        train_loader=build_train_loader(training_images(args, recipe, model, spec), recipe.loader, device),
        val_loader=val_loader,
        device=device,
        recipe=recipe,
    )
    if not state.is_finished(recipe.loop):
        fit(job, state, run, report=lambda row: cli.say(f"epoch {row.epoch}/{args.epochs}: {row}"))
        cli.say(f"Saving the best model, of epoch {state.best_epoch}, to {run.file('best')}")
    cli.say(f"{complexity_line(complexity)}\n{accuracy_line(state.best_top1, state.best_loss)}")


def open_student(args: argparse.Namespace, device: torch.device) -> tuple[nn.Module, ModelSpec, Recipe]:
    """The model to train, its spec with the validation crop that was asked for, and the flags as a recipe."""
    model, spec = cli.open_model_from(args)
    if not args.test_only:
        check_savable(args.model, model, spec)
    train_size = args.train_crop_size or spec.preprocessing.input_size
    val_size = args.val_crop_size or spec.preprocessing.input_size
    for size in filter(None, (args.train_crop_size, args.val_crop_size)):
        check_input_size(model, size, args.model)
    preprocessing = dataclasses.replace(spec.preprocessing, input_size=val_size)
    resolved = {
        "train_crop_size": train_size,
        "scale": tuple(args.scale),
        "ratio": tuple(args.ratio),
        "ra_reps": args.ra_reps if args.ra_sampler else 1,
        "amp_dtype": pick_amp_dtype(args.amp_dtype, device) if args.amp else None,
    }
    recipe = Recipe.from_values(vars(args) | resolved)
    return model.to(device), dataclasses.replace(spec, preprocessing=preprocessing), recipe


def training_images(args: argparse.Namespace, recipe: Recipe, model: nn.Module, spec: ModelSpec) -> Any:
    transform = train_transform(recipe.augment, spec.preprocessing)
    classes, size = num_classes(model, spec), recipe.augment.train_crop_size
    return build_dataset(cli.data_source(args), "train", transform, num_classes=classes, image_size=size)


def open_teacher_of(args: argparse.Namespace, recipe: Recipe, student: nn.Module, spec: ModelSpec) -> Teacher | None:
    if recipe.loss.distillation == "none":
        return None
    return open_teacher(
        args.teacher_model,
        spec.preprocessing,
        num_classes(student, spec),
        input_size=recipe.augment.train_crop_size,
        pretrained=not args.no_pretrained,
        builder_file=args.teacher_builder_file or args.builder_file,
        trust=args.trust_checkpoint,
    )


def checksums(args: argparse.Namespace) -> dict[str, str | None]:
    """SHA-256 of the checkpoints or code that this run starts and learns from; None for names."""
    files = {"parent": source_file(args.model), "teacher": source_file(args.teacher_model or "")}
    return {role: file_sha256(file) if file else None for role, file in files.items()}


def shared_settings(args: argparse.Namespace, spec: ModelSpec, recipe: Recipe) -> dict[str, Any]:
    """All that an interrupted run and its continuation must have in common."""
    names = ("model", "model_kwargs", "no_pretrained", "teacher_model", "dataset", "synthetic_size")
    settings = {name: getattr(args, name) for name in names} | vars(spec.preprocessing) | recipe.settings()
    return settings | checksums(args) | {"processes": distributed.world_size()}


if __name__ == "__main__":
    cli.run(main)
