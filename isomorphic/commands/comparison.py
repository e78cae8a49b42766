"""What `--against` opens for evaluate.py: the dense model, and the images that both models see."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from isomorphic.commands import entry, opening
from isomorphic.data.loaders import build_eval_loader
from isomorphic.data.sources import unlabelled_images
from isomorphic.data.transforms import PairTransform
from isomorphic.models import ModelSpec

NAMED_FILES = 3  # of those that are no images


@dataclass(frozen=True)
class Comparison:
    """The dense model, its spec, and pairs of images: as `--model` takes them, and as the dense model does."""

    dense: nn.Module
    spec: ModelSpec
    loader: DataLoader[Any]


def open_comparison(args: argparse.Namespace, model: nn.Module, spec: ModelSpec, device: torch.device) -> Comparison:
    """Returns what `--against` asks for; the images are those of `--unlabelled`, or else of `--dataset`.

    Raises:
        UserError: as `opening.open_dense_from`; there are no images.
    """
    dense, dense_spec = opening.open_dense_from(args, model, spec)
    if args.unlabelled:
        images = open_unlabelled(args.unlabelled, PairTransform(spec.preprocessing, dense_spec.preprocessing))
    else:
        images = opening.evaluation_images(args, "val", model, spec, dense_spec=dense_spec)
    return Comparison(dense.to(device), dense_spec, open_loader(args, images, device))


def open_unlabelled(folder: str, transform: PairTransform) -> Dataset[Any]:
    """Returns the images in a folder, and says what else is in it."""
    images, others = unlabelled_images(folder, transform)
    if others:
        names = [os.path.basename(name) for name in others[:NAMED_FILES]] + ["…"] * (len(others) > NAMED_FILES)
        entry.say(f"Left out of {folder}, as no images by their names: {len(others)} ({', '.join(names)})")
    return images


def open_loader(args: argparse.Namespace, images: Dataset[Any], device: torch.device) -> DataLoader[Any]:
    """Returns this process's share of the images in batches, without those that cannot be read, which it names."""
    return build_eval_loader(images, args.batch_size, args.workers, device, collect_unreadable=True)
