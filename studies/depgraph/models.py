"""The four small models of studies.depgraph and studies' hard digits: dense ones, and what trains them.

A CIFAR-style ResNet-20 and VGG-19 of narrow layers (examples/cifar_models.py), and a DeiT and a ConvNeXt of timm.
Training is SGD with momentum for the convolutional ones with batch norms and AdamW for the others, each under a cosine
that begins anew with every phase.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn

from studies import hard_digits

BATCH = 50
INPUTS = torch.zeros(1, 3, hard_digits.SIDE, hard_digits.SIDE)


@dataclass(frozen=True)
class Family:
    """How the models of a family are made and trained.

    Attributes:
        build: makes the dense model with random weights.
        optimizer: "sgd" or "adamw".
        lr: of the dense phase, at its beginning; later phases begin at a fifth of it.
        reg: strength of group sparse training.
        has_batch_norm: whether scales of batch norms can be shrunk.
        dense_epochs: of the dense phase.
    """

    build: Callable[[], nn.Module]
    optimizer: str
    lr: float
    reg: float
    has_batch_norm: bool
    dense_epochs: int


def _cifar_models() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "examples" / "cifar_models.py"
    spec = importlib.util.spec_from_file_location("cifar_models", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _resnet() -> nn.Module:
    return _cifar_models().ThinResNet(num_classes=10, width=8, blocks_per_stage=3)


def _vgg() -> nn.Module:
    return _cifar_models().vgg19_bn(num_classes=10, width=8)


def _deit() -> nn.Module:
    sizes: dict[str, Any] = {"img_size": hard_digits.SIDE, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4}
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, **sizes)


def _convnext() -> nn.Module:
    sizes: dict[str, Any] = {"depths": [1, 1, 3, 1], "dims": [16, 32, 64, 96], "patch_size": 1}
    return timm.create_model("convnext_atto", num_classes=10, **sizes)


FAMILIES = {
    "resnet": Family(_resnet, "sgd", 0.1, 1e-2, has_batch_norm=True, dense_epochs=30),
    "vgg": Family(_vgg, "sgd", 0.1, 1e-2, has_batch_norm=True, dense_epochs=30),
    "deit": Family(_deit, "adamw", 2e-3, 3e-3, has_batch_norm=False, dense_epochs=150),
    "convnext": Family(_convnext, "adamw", 4e-3, 3e-3, has_batch_norm=False, dense_epochs=40),
}


def train(
    model: nn.Module,
    family: Family,
    epochs: int,
    *,
    seed: int,
    first_phase: bool = False,
    regularize: Callable[[int], object] | None = None,
    after_epoch: Callable[[int], object] = lambda epoch: None,
) -> None:
    """Trains in place, on images that `seed` draws.

    Args:
        model: to train.
        family: optimizer and learning rate.
        epochs: over the training images.
        seed: of the images' order and distortions.
        first_phase: begin at the whole learning rate.
        regularize: adds to the gradients.
        after_epoch: is called with the number of the epoch, from 0.
    """
    generator = torch.Generator().manual_seed(seed)
    lr = family.lr if first_phase else family.lr / 5
    steps = epochs * (hard_digits.TRAINING_IMAGES // BATCH)
    if family.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=0.1)
    for epoch in range(epochs):
        model.train()
        for images, labels in hard_digits.epoch(generator, BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            if regularize:
                regularize(epoch)
            optimizer.step()
            schedule.step()
        after_epoch(epoch)
    model.eval()


@torch.no_grad()
def top1(model: nn.Module) -> float:
    """Top-1 in percent on the validation images."""
    images, labels = hard_digits.validation()
    model.eval()
    return 100 * (model(images).argmax(1) == labels).float().mean().item()
