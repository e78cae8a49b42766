"""Training transforms and mixing, by what comes out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from isomorphic.data import Preprocessing
from isomorphic.errors import UserError
from isomorphic.training.augment import build_mixer, train_transform
from isomorphic.training.recipe import AUTO_AUGMENTS, AugmentRecipe

PLAIN = Preprocessing(8, 8, "bilinear", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
WHOLE = {"train_crop_size": 8, "scale": (1.0, 1.0), "ratio": (1.0, 1.0)}


@pytest.fixture
def gradient() -> Image.Image:
    """8×8, growing from left to right: 0, 32, 64, ..."""
    return Image.fromarray(np.tile(np.arange(0, 256, 32, dtype=np.uint8), (8, 1))).convert("RGB")


def test_whole_crop_without_flip_is_the_image(gradient: Image.Image):
    image = train_transform(AugmentRecipe(**WHOLE, hflip=0.0), PLAIN)(gradient)
    assert image.shape == (3, 8, 8) and image.dtype == torch.float32
    assert torch.allclose(image[0, 0] * 255, torch.arange(0.0, 256, 32))


def test_normalisation_is_the_evaluations(gradient: Image.Image):
    p = Preprocessing(8, 8, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    image = train_transform(AugmentRecipe(**WHOLE, hflip=0.0), p)(gradient)
    plain = train_transform(AugmentRecipe(**WHOLE, hflip=0.0), PLAIN)(gradient)
    for channel in range(3):
        assert torch.allclose(image[channel], (plain[channel] - p.mean[channel]) / p.std[channel], atol=1e-6)


@pytest.mark.parametrize(("hflip", "flips"), [(0.0, {False}), (1.0, {True}), (0.5, {False, True})])
def test_hflip_is_a_probability(gradient: Image.Image, hflip: float, flips: set[bool]):
    torch.manual_seed(0)
    transform = train_transform(AugmentRecipe(**WHOLE, hflip=hflip), PLAIN)
    assert {bool(image[0, 0, 0] > image[0, 0, -1]) for image in (transform(gradient) for _ in range(20))} == flips


def test_scale_bounds_the_crops_area():
    rows = np.arange(64, dtype=np.uint8)
    image = Image.fromarray(np.tile(rows[:, None] * 4, (1, 64))).convert("RGB")
    transform = train_transform(AugmentRecipe(16, scale=(0.25, 0.25), ratio=(1.0, 1.0), hflip=0.0), PLAIN)
    torch.manual_seed(0)
    for _ in range(10):
        crop = transform(image)[0] * 255 / 4  # in rows of the image
        assert crop.shape == (16, 16)
        assert crop[-1, 0] - crop[0, 0] == pytest.approx(30, abs=1)  # 16 samples, 2 rows apart


def test_random_erasing_writes_the_mean_colour():
    image = Image.new("RGB", (32, 32), (255, 255, 255))
    p = Preprocessing(32, 32)
    erased = train_transform(AugmentRecipe(32, random_erase=1.0), p)(image)
    white = train_transform(AugmentRecipe(32), p)(image)
    zeros = (erased == 0).all(dim=0)
    assert 0.02 * 0.9 <= zeros.float().mean() <= 0.34
    assert torch.equal(erased[:, ~zeros], white[:, ~zeros])


@pytest.mark.parametrize("policy", AUTO_AUGMENTS)
def test_policies_change_the_image_and_keep_its_form(gradient: Image.Image, policy: str):
    torch.manual_seed(0)
    plain = train_transform(AugmentRecipe(**WHOLE, hflip=0.0), PLAIN)(gradient)
    transform = train_transform(AugmentRecipe(**WHOLE, hflip=0.0, auto_augment=policy), PLAIN)
    images = [transform(gradient) for _ in range(10)]
    assert all(image.shape == (3, 8, 8) for image in images)
    assert any(not torch.equal(image, plain) for image in images)


def batch(size: int = 8) -> tuple[Tensor, Tensor]:
    """Image i is filled with i, label i mod 4."""
    images = torch.arange(float(size))[:, None, None, None].expand(-1, 3, 4, 4).clone()
    return images, torch.arange(size) % 4


def share_of_own_label(labels: Tensor, mixed: Tensor) -> Tensor:
    """λ of each image: its soft label is λ at its own class and 1 − λ at its predecessor's."""
    own = mixed.gather(1, labels[:, None])[:, 0]
    previous = mixed.gather(1, labels.roll(1)[:, None])[:, 0]
    assert torch.allclose(own + previous, torch.ones(len(labels)))
    return own


def test_nothing_is_mixed_by_default():
    images, labels = batch()
    mixed, same = build_mixer(AugmentRecipe(), 4)(images, labels)
    assert mixed is images and same is labels


def test_mixup_mixes_each_image_and_label_with_its_predecessor():
    torch.manual_seed(0)
    images, labels = batch()
    mixed, soft = build_mixer(AugmentRecipe(mixup_alpha=0.8), 4)(images, labels)
    share = share_of_own_label(labels, soft)
    assert torch.allclose(share, share[0].expand(8))  # one λ for the batch
    expected = share[0] * images + (1 - share[0]) * images.roll(1, 0)
    assert torch.allclose(mixed, expected, atol=1e-6)


def test_cutmix_pastes_a_rectangle_whose_area_is_the_labels_share():
    torch.manual_seed(1)
    images, labels = batch()
    mixed, soft = build_mixer(AugmentRecipe(cutmix_alpha=1.0), 4)(images, labels)
    share = share_of_own_label(labels, soft)
    assert 0 < share[0] < 1
    kept = (mixed == images).float().mean(dim=(1, 2, 3))
    assert torch.allclose(kept, share)
    assert ((mixed == images) | (mixed == images.roll(1, 0))).all()


def test_with_both_each_batch_gets_one_of_them_at_random():
    torch.manual_seed(0)
    mixer = build_mixer(AugmentRecipe(mixup_alpha=0.8, cutmix_alpha=1.0), 4)
    images, labels = batch()
    mixed = [mixer(images, labels)[0] for _ in range(40)]
    pasted = sum(bool(((m == images) | (m == images.roll(1, 0))).all()) for m in mixed)
    assert 8 <= pasted <= 32


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"hflip": 1.5}, "--hflip 1.5"),
        ({"random_erase": -0.1}, "--random-erase"),
        ({"mixup_alpha": float("nan")}, "--mixup-alpha"),
        ({"scale": (0.9, 0.5)}, "--scale 0.9 0.5"),
        ({"scale": (0.0, 0.5)}, "--scale"),
        ({"ratio": (2.0, 1.0)}, "--ratio"),
    ],
)
def test_values_out_of_range_are_user_errors_that_name_the_flag(changes: dict, flag: str):
    with pytest.raises(UserError, match=flag):
        AugmentRecipe(**changes)
