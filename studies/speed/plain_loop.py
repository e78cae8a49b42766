"""A plain training loop of the published style, as torchvision's reference trainer has it.

A worker makes the floats, normalises and erases; mixup and cutmix belong to the collate function; the teacher computes
in the student's precision; torch's default optimizer; loss and accuracies are read after every step; the moving average
is an `AveragedModel`. Crop, flip and policy are this project's, so that both loops see the same images.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data.random_erasing import RandomErasing as NoiseErasing
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, default_collate
from torchvision import transforms

from isomorphic.commands.train import open_teacher_of
from isomorphic.data.sources import LabelledImages
from isomorphic.data.transforms import Preprocessing, Transform
from isomorphic.data.workers import loader_options
from isomorphic.errors import UserError
from isomorphic.models import ModelSpec, num_classes
from isomorphic.training.augment import build_mixer, train_transform
from isomorphic.training.losses import separate_heads
from isomorphic.training.optim import learning_rate, parameter_groups
from isomorphic.training.precision import build_scaler
from isomorphic.training.recipe import AugmentRecipe, OptimizerRecipe, Recipe


class Setting(NamedTuple):
    """What a loop is built from: flags, model and images."""

    args: argparse.Namespace
    device: torch.device
    model: nn.Module
    spec: ModelSpec
    recipe: Recipe
    images: Callable[[Transform], LabelledImages]


def plain_transform(recipe: AugmentRecipe, preprocessing: Preprocessing) -> Transform:
    """PIL image → float tensor 3×S×S: the same crop, flip and policy as ours, and the rest of the work."""
    steps: list[Callable] = [
        train_transform(recipe, preprocessing),
        transforms.ConvertImageDtype(torch.float),
        transforms.Normalize(preprocessing.mean, preprocessing.std),
    ]
    if recipe.random_erase and recipe.random_erase_mode == "pixel":
        steps.append(NoiseErasing(recipe.random_erase, mode="pixel", max_count=1, device="cpu"))
    elif recipe.random_erase:
        steps.append(transforms.RandomErasing(recipe.random_erase))
    return transforms.Compose(steps)


class PlainCollate:
    """Stacks a batch, and mixes it where the recipe does."""

    def __init__(self, recipe: AugmentRecipe, classes: int) -> None:
        self.mix = build_mixer(recipe, classes)

    def __call__(self, items: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        return self.mix(*default_collate(items))


def plain_loader(setting: Setting) -> DataLoader:
    """Shuffled batches; its workers outlive an epoch, as ours do, since starting them is not what is measured."""
    recipe, spec, loader = setting.recipe, setting.spec, setting.recipe.loader
    return DataLoader(
        setting.images(plain_transform(recipe.augment, spec.preprocessing)),
        batch_size=loader.batch_size,
        shuffle=True,
        collate_fn=PlainCollate(recipe.augment, num_classes(setting.model, spec)),
        persistent_workers=loader.workers > 0,
        **loader_options(loader.workers, setting.device, seed=loader.seed),
    )


def plain_optimizer(model: nn.Module, recipe: OptimizerRecipe, lr: float) -> torch.optim.Optimizer:
    """With torch's own choice among its implementations."""
    groups = parameter_groups(model, recipe)
    if recipe.opt == "adamw":
        return torch.optim.AdamW(groups, lr=lr)
    if recipe.opt == "rmsprop":
        return torch.optim.RMSprop(groups, lr=lr, momentum=recipe.momentum, alpha=0.9, eps=0.0316)
    return torch.optim.SGD(groups, lr=lr, momentum=recipe.momentum, nesterov=recipe.opt == "sgd_nesterov")


def plain_ema(model: nn.Module, decay: float) -> AveragedModel:
    """As in torchvision's reference trainer, one tensor after the other."""
    return AveragedModel(model, avg_fn=lambda average, new, _: decay * average + (1 - decay) * new, use_buffers=True)


def plain_loss(recipe: Recipe, outputs: Any, labels: Tensor, taught: Tensor | None) -> Tensor:
    """Cross-entropy, and under hard distillation the mean with that of the teacher's choice."""
    smoothing, alpha = recipe.loss.label_smoothing, recipe.loss.distillation_alpha
    if taught is None:
        return F.cross_entropy(outputs, labels, label_smoothing=smoothing)
    first, second = outputs if isinstance(outputs, tuple) else (outputs, outputs)
    learned = F.cross_entropy(first, labels, label_smoothing=smoothing)
    return (1 - alpha) * learned + alpha * F.cross_entropy(second, taught.argmax(dim=1), label_smoothing=smoothing)


@torch.no_grad()
def plain_accuracies(outputs: Any, labels: Tensor) -> list[Tensor]:
    """Top-1 and top-5 in percent, as torchvision's reference trainer counts them: soft labels by their largest."""
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    labels = labels.argmax(dim=1) if labels.ndim == 2 else labels
    correct = logits.topk(5, dim=1).indices == labels[:, None]  # (B, 5)
    return [100 * correct[:, :k].any(dim=1).sum() / len(labels) for k in (1, 5)]


class PlainLoop:
    """A training loop as torchvision's reference trainer has it."""

    def __init__(self, setting: Setting) -> None:
        recipe = self.recipe = setting.recipe
        if recipe.loss.distillation == "soft" or recipe.loop.accumulate > 1 or recipe.loop.clip_grad_norm:
            raise UserError("the plain loop has no soft distillation, --accumulate or --clip-grad-norm: leave them out")
        self.device, self.model = setting.device, setting.model
        opened = open_teacher_of(setting.args, recipe, self.model, setting.spec, self.device)
        self.teacher = opened.model if opened else None  # the model alone: in fp32, under the student's autocast
        self.loader = plain_loader(setting)
        self.optimizer = plain_optimizer(self.model, recipe.optimizer, learning_rate(recipe.schedule, 0))
        self.scaler = build_scaler(recipe.loop.amp_dtype, self.device)
        self.ema = plain_ema(self.model, recipe.ema.model_ema_decay) if recipe.ema.model_ema else None

    def epoch(self) -> int:
        """Trains for an epoch; on how many images that was."""
        self.model.train()
        sums, images_seen = np.zeros(3), 0  # loss, top-1, top-5
        with separate_heads(self.model, self.recipe.loss.distillation != "none"):
            for step, (images, labels) in enumerate(self.loader):
                images = images.to(self.device, non_blocking=True)
                labels = labels.to(self.device, non_blocking=True)
                loss, outputs = self.update(images, labels)
                if self.ema and step % self.recipe.ema.model_ema_steps == 0:
                    self.ema.update_parameters(self.model)
                numbers = (loss, *plain_accuracies(outputs, labels))
                sums += [number.item() * len(labels) for number in numbers]
                images_seen += len(labels)
        return images_seen

    def update(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Any]:
        """One step; the loss and the model's outputs."""
        amp_dtype = self.recipe.loop.amp_dtype
        with torch.autocast(self.device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
            outputs = self.model(images)
            taught = None
            if self.teacher is not None:
                with torch.no_grad():
                    taught = self.teacher(images)
            loss = plain_loss(self.recipe, outputs, labels, taught)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss, outputs


def plain_way(setting: Setting) -> Callable[[], int]:
    """The plain loop's epoch: trains, and says on how many images."""
    return PlainLoop(setting).epoch
