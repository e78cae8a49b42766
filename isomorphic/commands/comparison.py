"""What `--against` opens for evaluate.py: the dense model, and the images that both models see."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from isomorphic import progress
from isomorphic.commands import opening
from isomorphic.commands.images import evaluation_loader, tell
from isomorphic.data.sources import unlabelled_images
from isomorphic.data.transforms import PairTransform
from isomorphic.models import ModelSpec


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
    progress.stage(f"opening {args.against}")
    dense, dense_spec = opening.open_dense_from(args, model, spec)
    if args.unlabelled:
        images = unlabelled_images(args.unlabelled, PairTransform(spec.preprocessing, dense_spec.preprocessing))
        for note in images.notes:
            tell(note)
    else:
        images = opening.evaluation_images(args, "val", model, spec, dense_spec=dense_spec)
    return Comparison(dense.to(device), dense_spec, evaluation_loader(args, images, device))
