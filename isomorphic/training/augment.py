"""From a training image to a training batch: crops, flips, policies, erasing, mixup and cutmix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms import v2

from isomorphic.data import Preprocessing, Transform, interpolation_mode
from isomorphic.training.recipe import AugmentRecipe

# (images (N, 3, H, W), labels (N,)) → (images, labels (N,) or soft labels (N, C))
Mixer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def train_transform(recipe: AugmentRecipe, preprocessing: Preprocessing) -> Transform:
    """PIL image → float tensor 3×S×S, in the order of torchvision's reference trainer.

    Random resized crop, flip, policy, normalise, erase. Erasing comes last and writes zeros: the mean colour.
    The interpolation and the normalisation are those of the evaluation.
    """
    interpolation = interpolation_mode(preprocessing.interpolation)
    steps: list[Callable] = [
        v2.RandomResizedCrop(
            recipe.train_crop_size, recipe.scale, recipe.ratio, interpolation=interpolation, antialias=True
        )
    ]
    if recipe.hflip:
        steps.append(v2.RandomHorizontalFlip(recipe.hflip))
    if recipe.auto_augment:
        steps.append(_policy(recipe, preprocessing.interpolation))
    steps += [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean=list(preprocessing.mean), std=list(preprocessing.std)),
    ]
    if recipe.random_erase:
        steps.append(v2.RandomErasing(recipe.random_erase))
    return v2.Compose(steps)


def build_mixer(recipe: AugmentRecipe, num_classes: int) -> Mixer:
    """Mixup, cutmix, or for each batch one of the two at random; labels become soft labels (N, C).

    Every batch is mixed. The draws come from torch's global generator. Without either, batches pass as they are.
    """
    mixers: list[Callable] = []
    if recipe.mixup_alpha:
        mixers.append(v2.MixUp(alpha=recipe.mixup_alpha, num_classes=num_classes))
    if recipe.cutmix_alpha:
        mixers.append(v2.CutMix(alpha=recipe.cutmix_alpha, num_classes=num_classes))
    if not mixers:
        return _leave
    return mixers[0] if len(mixers) == 1 else v2.RandomChoice(mixers)


def _leave(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return images, labels


def _policy(recipe: AugmentRecipe, interpolation: str) -> v2.Transform:
    mode = interpolation_mode(interpolation)
    if recipe.auto_augment == "ra":
        return v2.RandAugment(num_ops=2, magnitude=recipe.ra_magnitude, interpolation=mode)
    if recipe.auto_augment == "ta_wide":
        return v2.TrivialAugmentWide(interpolation=mode)
    if recipe.auto_augment == "augmix":
        return v2.AugMix(severity=recipe.augmix_severity, interpolation=mode)
    return v2.AutoAugment(v2.AutoAugmentPolicy(recipe.auto_augment), interpolation=mode)
