"""Training transforms and mixing, by what comes out."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data.transforms_factory import transforms_imagenet_train
from torch import Tensor
from torchvision.transforms import ColorJitter, v2

from isomorphic.data.transforms import Preprocessing, Transform
from isomorphic.errors import UserError
from isomorphic.training.augment import build_mixer, build_preparation, train_transform
from isomorphic.training.recipe import AUTO_AUGMENTS, ERASE_MODES, AugmentRecipe
from isomorphic.training.sampling import RawBatch, drawing_from

PLAIN_RECIPE = AugmentRecipe()
PLAIN = Preprocessing(8, 8, "bilinear", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
WHOLE = {"train_crop_size": 8, "scale": (1.0, 1.0), "ratio": (1.0, 1.0)}


@pytest.fixture
def gradient() -> Image.Image:
    """8×8, growing from left to right: 0, 32, 64, ..."""
    return Image.fromarray(np.tile(np.arange(0, 256, 32, dtype=np.uint8), (8, 1))).convert("RGB")


@pytest.fixture
def photo() -> Image.Image:
    """48×64 pixels of coloured noise."""
    return Image.fromarray(np.random.default_rng(0).integers(256, size=(64, 48, 3), dtype=np.uint8))


def test_whole_crop_without_flip_is_the_image(gradient: Image.Image):
    image = train_transform(AugmentRecipe(**WHOLE, hflip=0.0), PLAIN)(gradient)
    assert type(image) is Tensor and image.dtype == torch.uint8 and image.shape == (3, 8, 8)
    assert image[0, 0].tolist() == list(range(0, 256, 32))


def test_a_padded_crop_is_the_image_shifted_by_at_most_the_padding():
    """Of an image without zeros: what is shifted in is black, and nothing is resized."""
    pixels = np.arange(1, 65, dtype=np.uint8).reshape(8, 8)
    image = Image.fromarray(pixels).convert("RGB")
    transform = train_transform(AugmentRecipe(train_crop_size=8, crop_padding=2, hflip=0.0), PLAIN)
    padded = np.pad(pixels, 2)
    shifts = {padded[y : y + 8, x : x + 8].tobytes() for y in range(5) for x in range(5)}
    torch.manual_seed(0)
    seen = {transform(image)[0].numpy().tobytes() for _ in range(300)}
    assert seen == shifts and len(shifts) == 25
    same = train_transform(AugmentRecipe(train_crop_size=8, crop_padding=0, hflip=0.0), PLAIN)
    assert np.array_equal(same(image)[0].numpy(), pixels)


def test_a_padded_crop_of_a_larger_image_takes_its_shorter_side(photo: Image.Image):
    transform = train_transform(AugmentRecipe(train_crop_size=24, crop_padding=0, hflip=0.0), PLAIN)
    resized = np.asarray(photo.resize((24, 32), Image.Resampling.BILINEAR))[..., 0]
    windows = {np.ascontiguousarray(resized[y : y + 24]).tobytes() for y in range(9)}
    torch.manual_seed(0)
    assert {transform(photo)[0].numpy().tobytes() for _ in range(100)} == windows


@pytest.mark.parametrize(("hflip", "flips"), [(0.0, {False}), (1.0, {True}), (0.5, {False, True})])
def test_hflip_is_a_probability(gradient: Image.Image, hflip: float, flips: set[bool]):
    torch.manual_seed(0)
    transform = train_transform(AugmentRecipe(**WHOLE, hflip=hflip), PLAIN)
    assert {bool(image[0, 0, 0] > image[0, 0, -1]) for image in (transform(gradient) for _ in range(20))} == flips


@pytest.mark.parametrize("interpolation", [None, "random"])
def test_scale_bounds_the_crops_area(interpolation: str | None):
    rows = np.arange(64, dtype=np.uint8)
    image = Image.fromarray(np.tile(rows[:, None] * 4, (1, 64))).convert("RGB")
    recipe = AugmentRecipe(16, interpolation, scale=(0.25, 0.25), ratio=(1.0, 1.0), hflip=0.0)
    transform = train_transform(recipe, PLAIN)
    with drawing_from(0):
        for _ in range(10):
            crop = transform(image)[0] / 4  # in rows of the image
            assert crop.shape == (16, 16)
            assert crop[-1, 0] - crop[0, 0] == pytest.approx(30, abs=1)  # 16 samples, 2 rows apart


def test_interpolation_is_the_evaluations_the_trainings_or_random(photo: Image.Image):
    whole = {"train_crop_size": 16, "scale": (1.0, 1.0), "ratio": (0.75, 0.75), "hflip": 0.0}

    def crops(name: str | None, evaluation: str) -> set[bytes]:
        transform = train_transform(AugmentRecipe(**whole, train_interpolation=name), Preprocessing(16, 16, evaluation))
        with drawing_from(0):
            return {transform(photo).numpy().tobytes() for _ in range(12)}

    def resized(mode: Image.Resampling) -> bytes:
        return np.asarray(photo.resize((16, 16), mode)).transpose(2, 0, 1).tobytes()

    bilinear, bicubic = resized(Image.Resampling.BILINEAR), resized(Image.Resampling.BICUBIC)
    assert crops(None, "bilinear") == {bilinear} and crops(None, "bicubic") == {bicubic}
    assert crops("bilinear", "bicubic") == {bilinear}
    assert crops("random", "lanczos") == {bilinear, bicubic}
    with pytest.raises(UserError, match="unknown interpolation 'cubic'"):
        crops("cubic", "bicubic")


def keep_bits(image: Image.Image, bits: int) -> Image.Image:
    return Image.fromarray(np.asarray(image) & np.uint8(0xFF << (8 - bits) & 0xFF))


TIMM_STRINGS = (
    *(
        "rand",
        "rand-m9-mstd0.5-inc1",
        "rand-m15-mmax30-n3-p0.7",
        "rand-m9-tweights-n14",
        "rand-m6-t3a",
        "rand-n14-t3aw",
    ),
    *("augmix-m5-w4-d2", "augmix-m3-w3-b1-a0.5-mstd0", "v0", "v0r-mstd0.5", "original", "originalr-mstd1", "3a"),
)


@pytest.mark.parametrize("interpolation", ["random", "bilinear"])
@pytest.mark.parametrize("policy", [*AUTO_AUGMENTS, *TIMM_STRINGS])
def test_policies_change_the_image_and_keep_its_form(photo: Image.Image, policy: str, interpolation: str):
    recipe = AugmentRecipe(16, interpolation, scale=(1.0, 1.0), hflip=0.0)
    plain, transform = (
        train_transform(dataclasses.replace(recipe, auto_augment=name), PLAIN) for name in (None, policy)
    )

    def images(transform: Transform) -> list[Tensor]:
        with drawing_from(1):
            return [transform(photo) for _ in range(10)]

    changed = images(transform)
    assert all(image.shape == (3, 16, 16) and image.dtype == torch.uint8 for image in changed)
    known = [image.tolist() for image in images(plain)]
    assert any(image.tolist() not in known for image in changed)


@pytest.mark.parametrize("interpolation", ["random", "bicubic", "bilinear"])
@pytest.mark.parametrize("policy", [None, *TIMM_STRINGS])
@pytest.mark.parametrize("jitter", [0.0, 0.4])
def test_transforms_are_timms(
    monkeypatch: pytest.MonkeyPatch, photo: Image.Image, policy: str | None, interpolation: str, jitter: float
):
    """Pixel for pixel, from the same seeds: timm's whole training transform, which draws in the same order.

    Colour jitter takes its draws in another order in torchvision v2, so that only its presence is compared.
    """
    monkeypatch.setattr(ImageOps, "posterize", keep_bits)  # Pillow's refuses 0 bits, which timm asks for
    p = Preprocessing(16, 18, "bilinear", (0.2, 0.5, 0.9), (0.2, 0.2, 0.2))
    recipe = AugmentRecipe(16, interpolation, hflip=0.0, auto_augment=policy, color_jitter=jitter)
    theirs: Any = transforms_imagenet_train(
        16,
        hflip=0.0,
        color_jitter=cast(Any, jitter or None),
        auto_augment=policy,
        interpolation=interpolation,
        mean=p.mean,
        std=p.std,
        use_prefetcher=True,
    )
    ours: Any = train_transform(recipe, p)
    if interpolation != "random":  # our crop is torchvision's then
        ours.transforms[0], theirs.transforms[0] = v2.CenterCrop(16), v2.CenterCrop(16)
    jitters = [isinstance(step, v2.ColorJitter) for step in ours.transforms].count(True)
    assert jitters == [isinstance(step, ColorJitter) for step in theirs.transforms].count(True)
    assert jitters == bool(jitter and (policy is None or "3a" in policy))
    for seed in range(0 if jitters else 6):
        with drawing_from(seed):
            mine = ours(photo)
        with drawing_from(seed):
            assert torch.equal(mine, theirs(photo))


@pytest.mark.parametrize("policy", [None, "ra", "rand-m9"])
def test_colour_jitter_is_off_beside_a_policy(policy: str | None):
    """On one grey a policy other than this one leaves grey, while brightness changes it by up to 40 %."""
    grey = Image.new("RGB", (8, 8), (100, 100, 100))
    plain, jittered = (
        train_transform(AugmentRecipe(8, auto_augment=policy, color_jitter=strength), PLAIN) for strength in (0.0, 0.4)
    )
    for seed in range(5):
        with drawing_from(seed):
            expected = plain(grey)
        with drawing_from(seed):
            image = jittered(grey)
        assert torch.equal(image, expected) == (policy is not None)
        if policy is None:
            assert image.unique().numel() == 1 and 59 <= int(image[0, 0, 0]) <= 141


@pytest.mark.parametrize(
    "text",
    [
        *("", "foo", "randm9", "rand-", "rand-m", "rand-m9.5", "rand-foo", "rand-w0", "rand-m-9", "rand-tx", "rand-n0"),
        *(
            "rand-n15-tweights",
            "rand-mstdinf",
            "augmix-w0",
            "augmix-a0.0",
            "augmix-n3",
            "v0-m9",
            "original-0.5",
            "ra-m9",
        ),
    ],
)
def test_malformed_policies_are_refused_when_the_recipe_is_made(text: str):
    with pytest.raises(UserError) as caught:
        AugmentRecipe(auto_augment=text)
    assert str(caught.value).startswith(f"--auto-augment {text}: ") and "\n" not in str(caught.value)


# --- on the device ---


def raw(images: Tensor, boxes: list[list[int]] | None = None) -> RawBatch:
    size = len(images)
    return RawBatch(images, torch.arange(size) % 4, torch.tensor(boxes or [[0, 0, 0, 0]] * size))


def random_bytes(*shape: int) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("p", [Preprocessing(), Preprocessing(mean=(0.1, 0.5, 0.9), std=(0.5, 0.25, 2.0))])
def test_normalisation_is_the_evaluations(p: Preprocessing):
    """Every byte in every channel: (x / 255 − mean) / std."""
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    normalised, labels = build_preparation(PLAIN_RECIPE, p, 4, "cpu")(raw(images))
    theirs = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(p.mean), list(p.std))])(images)
    exact = (images.double() / 255 - torch.tensor(p.mean)[:, None, None]) / torch.tensor(p.std)[:, None, None]
    assert normalised.dtype == torch.float32 and labels.tolist() == [0]
    assert (normalised - theirs).abs().max() <= 1e-6
    assert (normalised - exact).abs().max() <= 1e-6


@pytest.mark.parametrize("changes", [{}, {"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0}, {"random_erase": 1.0}])
def test_channels_last_changes_the_layout_alone(changes: dict[str, Any]):
    batch = raw(random_bytes(4, 3, 6, 5), [[1, 1, 2, 3]] * 4)
    prepared = []
    for channels_last in (False, True):
        torch.manual_seed(0)
        prepare = build_preparation(AugmentRecipe(**changes), PLAIN, 4, "cpu", channels_last=channels_last)
        prepared.append(prepare(batch))
    (images, labels), (same, same_labels) = prepared
    assert torch.equal(images, same) and torch.equal(labels, same_labels)
    assert images.is_contiguous() and same.is_contiguous(memory_format=torch.channels_last)


BOXES = [[0, 0, 0, 0], [0, 0, 3, 9], [2, 5, 6, 4], [5, 8, 1, 1], [0, 0, 6, 0], [1, 0, 5, 9]]


@pytest.mark.parametrize("mode", ERASE_MODES)
def test_boxes_are_erased_and_nothing_else(mode: str):
    images = random_bytes(6, 3, 8, 9)
    plain, _ = build_preparation(PLAIN_RECIPE, PLAIN, 4, "cpu")(raw(images))
    recipe = AugmentRecipe(random_erase=0.25, random_erase_mode=mode)
    erased, _ = build_preparation(recipe, PLAIN, 4, "cpu")(raw(images, BOXES))
    for image, before, (top, left, height, width) in zip(erased, plain, BOXES, strict=True):
        box = image[:, top : top + height, left : left + width].clone()
        assert (box == 0).all() if mode == "const" else (box != 0).all()
        image[:, top : top + height, left : left + width] = before[:, top : top + height, left : left + width]
        assert torch.equal(image, before)


def test_noise_is_standard_normal_for_each_pixel_and_drawn_when_the_batch_is_used():
    prepare = build_preparation(AugmentRecipe(random_erase=1.0, random_erase_mode="pixel"), PLAIN, 4, "cpu")
    batch = raw(random_bytes(16, 3, 32, 32), [[0, 0, 32, 32]] * 16)
    torch.manual_seed(0)
    first, second = prepare(batch)[0], prepare(batch)[0]
    torch.manual_seed(0)
    assert torch.equal(prepare(batch)[0], first) and not torch.equal(first, second)
    assert abs(first.mean()) < 0.02 and first.std() == pytest.approx(1, abs=0.02)
    assert first.unique().numel() > 0.99 * first.numel()


def test_nothing_is_drawn_where_nothing_is_random():
    before = torch.get_rng_state()
    build_preparation(AugmentRecipe(random_erase=1.0), PLAIN, 4, "cpu")(raw(random_bytes(2, 3, 4, 4)))
    assert torch.equal(torch.get_rng_state(), before)


def test_images_are_mixed_after_they_were_normalised_and_erased():
    p = Preprocessing(4, 4, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    batch = raw(random_bytes(4, 3, 4, 4), [[0, 0, 2, 2], [0, 0, 0, 0], [1, 1, 3, 3], [2, 0, 1, 4]])
    erased, labels = build_preparation(AugmentRecipe(random_erase=1.0), p, 4, "cpu")(batch)
    recipe = AugmentRecipe(random_erase=1.0, mixup_alpha=0.8)
    torch.manual_seed(0)
    mixed, soft = build_preparation(recipe, p, 4, "cpu")(batch)
    torch.manual_seed(0)
    expected, expected_soft = build_mixer(recipe, 4)(erased, labels)
    assert torch.equal(mixed, expected) and torch.equal(soft, expected_soft)


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
