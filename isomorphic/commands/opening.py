"""From the flags that the commands share to a model, its images and what they are seen with."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from isomorphic.checkpoints.open import is_checkpoint, load_weights, open_model
from isomorphic.data.sources import DataSource, Split, build_dataset, check_classes, class_count
from isomorphic.data.transforms import eval_transform
from isomorphic.errors import UserError
from isomorphic.models import RESIZE_OVER_CROP, ModelSpec, check_input_size, check_logits, num_classes
from isomorphic.user_file import is_user_file


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
