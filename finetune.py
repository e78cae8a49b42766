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
from isomorphic.checkpoint import source_file
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
from isomorphic.training.precision import AMP_DTYPES, build_scaler, choose_algorithms, pick_amp_dtype
from isomorphic.training.recipe import AUTO_AUGMENTS, DISTILLATIONS, OPTIMIZERS, SCHEDULES, Recipe
from isomorphic.training.resume import TrainState, find_state, load_state, seed_process
from isomorphic.training.sampling import build_train_loader
from isomorphic.training.teacher import Teacher, open_teacher
from isomorphic.training.tracking import RunFolder


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser("Train a pruned or dense model, from a teacher or without.")
    cli.add_model_arguments(parser)
    cli.add_data_arguments(parser, batch_size=32)
    add_optimizer_arguments(parser)
    add_augment_arguments(parser)
    add_loss_arguments(parser)
    add_run_arguments(parser)
    args = parser.parse_args()
    args.distillation = args.distillation or ("hard" if args.teacher_model else "none")
    if args.distillation != "none" and not args.teacher_model:
        parser.error(f"--distillation {args.distillation} needs --teacher-model")
    if args.amp_dtype and not args.amp:
        parser.error("--amp-dtype needs --amp")
    return args


def add_optimizer_arguments(parser: argparse.ArgumentParser) -> None:
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


def add_augment_arguments(parser: argparse.ArgumentParser) -> None:
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


def add_loss_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("loss and teacher").add_argument
    add("--label-smoothing", type=float, default=0.0, help="of labels, the teacher's hard ones too")
    add("--teacher-model", metavar="NAME|FILE", help="name (random if --no-pretrained), checkpoint or file.py:factory")
    add("--teacher-builder-file", metavar="FILE.py", help="its code, if it is its own (default: --builder-file)")
    add("--distillation", choices=DISTILLATIONS, help="from the teacher (default: hard if there is one)")
    add("--distillation-alpha", type=float, default=0.5, help="weight of the teacher's part of the loss")
    add("--distillation-tau", type=float, default=1.0, help="temperature of soft distillation")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("run").add_argument
    add("--output-dir", "--output", default="output", metavar="DIR", help="where the results go")
    add("--resume", metavar="auto|FILE", help="go on from DIR/state.pt if it is there, or from FILE")
    add("--test-only", action="store_true", help="evaluate, do not train")
    add("--amp", action="store_true", help="train in mixed precision (validation stays in fp32)")
    add("--amp-dtype", choices=tuple(AMP_DTYPES), help="default: fp16 with a scaler on CUDA, else bf16")
    add("--log-every", "--print-freq", type=cli.positive_int, default=50, help="steps between checks")
    add("--use-deterministic-algorithms", action="store_true", help="on a GPU: repeatable, slower")


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
