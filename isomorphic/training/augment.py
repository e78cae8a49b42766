"""Augmentation of training images, in two steps.

In the loader, each image: crop, flip, policy or colour jitter; the image stays uint8. On the device, each batch:
conversion to float, normalisation, erasing, mixup and cutmix.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from PIL import Image
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, posterize, rand_augment_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_modes_mapping

from isomorphic.data.transforms import Preprocessing, Transform, interpolation_mode
from isomorphic.training.recipe import AUTO_AUGMENTS, AugmentRecipe
from isomorphic.training.sampling import RawBatch

# a batch on the device → training inputs and targets: images float32 (B, 3, H, W), labels (B,) or soft labels (B, C)
Preparation = Callable[[RawBatch], tuple[Tensor, Tensor]]
# (images (B, 3, H, W), labels (B,)) → (images, labels (B,) or soft labels (B, C))
Mixer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def train_transform(recipe: AugmentRecipe, preprocessing: Preprocessing) -> Transform:
    """Returns the transform of a PIL image to a uint8 tensor 3×S×S: random crop, flip, policy or colour jitter.

    It uses the global generators of torch, numpy and `random`.

    Raises:
        UserError: unknown interpolation.
    """
    steps: list[Callable] = [_crop(recipe, preprocessing)]
    if recipe.hflip:
        steps.append(v2.RandomHorizontalFlip(recipe.hflip))
    if recipe.auto_augment in AUTO_AUGMENTS:
        steps.append(_torchvision_policy(recipe, preprocessing))
    elif recipe.auto_augment:
        steps.append(_timm_policy(recipe.auto_augment, recipe, preprocessing))
    if recipe.color_jitter and (not recipe.auto_augment or "3a" in recipe.auto_augment):
        strength = recipe.color_jitter
        steps.append(v2.ColorJitter(brightness=strength, contrast=strength, saturation=strength))
    return v2.Compose([*steps, v2.PILToTensor()])


def build_preparation(
    recipe: AugmentRecipe,
    preprocessing: Preprocessing,
    num_classes: int,
    device: torch.device | str,
    *,
    channels_last: bool = False,
) -> Preparation:
    """Returns the function that prepares a `RawBatch` on its device.

    It converts to float, normalises, erases, applies mixup or cutmix, and sets the memory format. It never makes the
    host wait for the device. It uses torch's global generators, the device's for the noise of erased pixels and the
    CPU's for everything else. Labels become soft labels (B, C) only if images are mixed.
    """
    mixer = build_mixer(recipe, num_classes)
    std = torch.tensor(preprocessing.std, dtype=torch.float64)[:, None, None]
    mean = torch.tensor(preprocessing.mean, dtype=torch.float64)[:, None, None]
    # (x / 255 − mean) / std = x · scale + shift, with one number for each channel: (3, 1, 1)
    scale, shift = (constant.to(device, torch.float32) for constant in (1 / (255 * std), -mean / std))
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def prepare(batch: RawBatch) -> tuple[Tensor, Tensor]:
        images = torch.addcmul(shift, batch.images.float(), scale)
        if recipe.random_erase:
            images = erase(images, batch.boxes, noise=recipe.random_erase_mode == "pixel")
        images, labels = mixer(images, batch.labels)
        return images.contiguous(memory_format=memory_format), labels  # last: mixing would undo it

    return prepare


def erase(images: Tensor, boxes: Tensor, *, noise: bool) -> Tensor:
    """Returns normalised images (B, 3, H, W) with one rectangle of each set to zero, the mean colour, or to noise.

    The noise is N(0, 1); `boxes` (B, 4) are those of a `RawBatch`.
    """
    top, left, height, width = boxes[:, :, None].unbind(1)  # (B, 1) each
    rows = torch.arange(images.shape[2], device=images.device)
    columns = torch.arange(images.shape[3], device=images.device)
    in_rows = (rows >= top) & (rows < top + height)  # (B, H)
    in_columns = (columns >= left) & (columns < left + width)  # (B, W)
    inside = in_rows[:, None, :, None] & in_columns[:, None, None, :]  # (B, 1, H, W)
    return torch.where(inside, torch.randn_like(images), images) if noise else images.masked_fill(inside, 0)


def build_mixer(recipe: AugmentRecipe, num_classes: int) -> Mixer:
    """Returns mixup, cutmix, or a random choice between the two for each batch; labels become soft labels (B, C).

    Every batch is mixed, with random numbers of torch's global CPU generator. Without either, batches stay as they are.
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


def _crop(recipe: AugmentRecipe, preprocessing: Preprocessing) -> Callable:
    """Returns a random resized crop, or with `crop_padding` a crop of the image padded with zeros."""
    size, scale, ratio = recipe.train_crop_size, recipe.scale, recipe.ratio
    if recipe.train_interpolation == "random":
        return RandomResizedCropAndInterpolation(size, scale, ratio, interpolation="random")
    mode = interpolation_mode(recipe.train_interpolation or preprocessing.interpolation)
    if recipe.crop_padding is not None:
        # The shorter side becomes S (an image of S×S stays as it is), and S×S out of S + 2·padding are taken.
        resized = v2.Resize(size, interpolation=mode, antialias=True)
        return v2.Compose([resized, v2.RandomCrop(size, padding=recipe.crop_padding)])
    return v2.RandomResizedCrop(size, scale, ratio, interpolation=mode, antialias=True)


def _torchvision_policy(recipe: AugmentRecipe, preprocessing: Preprocessing) -> v2.Transform:
    """Returns a policy of `AUTO_AUGMENTS`; if the crop's interpolation is random, it uses the evaluation's."""
    fixed = None if recipe.train_interpolation == "random" else recipe.train_interpolation
    mode = interpolation_mode(fixed or preprocessing.interpolation)
    if recipe.auto_augment == "ra":
        return v2.RandAugment(num_ops=2, magnitude=recipe.ra_magnitude, interpolation=mode)
    if recipe.auto_augment == "ta_wide":
        return v2.TrivialAugmentWide(interpolation=mode)
    if recipe.auto_augment == "augmix":
        return v2.AugMix(severity=recipe.augmix_severity, interpolation=mode)
    return v2.AutoAugment(v2.AutoAugmentPolicy(recipe.auto_augment), interpolation=mode)


def _timm_policy(text: str, recipe: AugmentRecipe, preprocessing: Preprocessing) -> Callable:
    """Returns timm's policy of that string, with the settings of timm's own training transform.

    For a random interpolation it draws bilinear or bicubic for each warp; uncovered pixels get the mean colour.
    """
    settings: dict[str, Any] = {
        "translate_const": int(recipe.train_crop_size * 0.45),
        "img_mean": tuple(min(255, round(255 * channel)) for channel in preprocessing.mean),
    }
    if recipe.train_interpolation != "random":
        mode = interpolation_mode(recipe.train_interpolation or preprocessing.interpolation)
        settings["interpolation"] = pil_modes_mapping[mode]
    if text.startswith("rand"):
        policy: Any = rand_augment_transform(text, settings)
    elif text.startswith("augmix"):
        policy = augment_and_mix_transform(text, settings | {"translate_pct": 0.3})
    else:
        policy = auto_augment_transform(text, settings)
    for operation in policy.ops if hasattr(policy, "ops") else chain(*policy.policy):
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize
    return policy


def _posterize(image: Image.Image, bits: int, **unused: Any) -> Image.Image:
    """Applies timm's posterize. At full magnitude it asks for 0 bits: black, but an error in newer Pillow versions."""
    return posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)
