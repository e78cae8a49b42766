"""Calibration images that cannot be used are refused before the cut; models of several inputs are recovered, too."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import isomorphic as iso
from isomorphic.errors import UserError
from isomorphic.inputs import items_of, num_items
from isomorphic.pruning.recovery.calibration import with_mirror_images

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(24, 3, 8, 8, generator=GENERATOR)
VECTORS = torch.randn(24, 5, generator=GENERATOR)


def cnn() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


BAD: list[tuple[Tensor, str]] = [
    (torch.full((8, 3, 8, 8), float("nan")), "hold numbers that are not finite"),
    (torch.full((8, 3, 8, 8), float("inf")), "hold numbers that are not finite"),
    (IMAGES[:, :1], r"does not take the calibration images, float32 \(24, 1, 8, 8\), as they are"),
    (IMAGES.double(), r"does not take the calibration images, float64"),
    (IMAGES.to(torch.uint8), r"does not take the calibration images, uint8"),
    (IMAGES[:0], "there are no calibration images"),
    (IMAGES[0], r"does not take the calibration images, float32 \(3, 8, 8\)"),
    (torch.tensor(1.0), "there are no calibration images"),
]


@pytest.mark.parametrize("how", [{"recover": ["compensate"]}, {"recover": ["bn"], "steps": 2}])
@pytest.mark.parametrize(("images", "message"), BAD)
def test_what_the_model_does_not_take_is_refused_before_the_cut(images: Tensor, message: str, how: dict[str, Any]):
    model = cnn()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=message):
        iso.prune(model, IMAGES[:1], ratio=0.5, criterion="l2", calibration=images, inplace=True, **how)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_search_refuses_them_too():
    labels = torch.arange(24) % 4
    for images, message in ((IMAGES[:, :1], "does not take the calibration images"), (IMAGES / 0, "not finite")):
        with pytest.raises(UserError, match=message):
            iso.prune(cnn(), IMAGES[:1], ratio=0.5, criterion="l2", allocate="calibrate", calibration=(images, labels))
    with pytest.raises(UserError, match="measures classifiers of one tensor"):
        pair: Any = ({"input": IMAGES}, labels)
        iso.prune(cnn(), IMAGES[:1], ratio=0.5, criterion="l2", allocate="calibrate", calibration=pair)


@pytest.mark.parametrize("step", ["compensate", "bn"])
def test_what_a_recovery_spoils_is_an_error(step: str):
    model = cnn()
    model.register_buffer("mask", torch.full((2,), float("-inf")))  # which is how it should be
    huge = 3e38 * IMAGES.sign()  # finite, but not what is made of it
    with pytest.raises(UserError, match=f"hold numbers that are not finite: .* or leave out {step}"):
        iso.prune(model, IMAGES[:1], ratio=0.5, criterion="l2", recover=[step], calibration=huge)
    assert iso.prune(model, IMAGES[:1], ratio=0.5, criterion="l2", recover=[step], calibration=IMAGES)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.other = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(5, 8)
        self.mix, self.head = nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, images: Tensor, numbers: Tensor, scale: float = 1.0) -> Tensor:
        x = self.norm(self.conv(images)).relu().mean((2, 3))
        return self.head(self.mix(x + scale * self.other(numbers)).relu())


KEYWORDS = {"images": IMAGES, "numbers": VECTORS, "scale": 2.0}


@pytest.mark.parametrize("calibration", [KEYWORDS, ((IMAGES, VECTORS, 2.0), torch.zeros(24))])
def test_models_of_several_inputs(calibration: Any):
    model = TwoInputs().eval()
    inputs = {**KEYWORDS, "images": IMAGES[:1], "numbers": VECTORS[:1]}
    wanted = model(**KEYWORDS)
    options: dict[str, Any] = {"ratio": 0.25, "criterion": "l2", "calibration": calibration}
    plain = iso.prune(model, inputs, ratio=0.25, criterion="l2").model
    recovered = iso.prune(model, inputs, recover=["compensate", "bn"], **options)
    assert "Recalibrated: 1 batch norms" in str(recovered) and len(recovered.applied[0].errors) == 2
    errors = [(one(**KEYWORDS) - wanted).square().mean().item() for one in (recovered.model, plain)]
    assert errors[0] < 0.5 * errors[1]


def test_two_tensors_are_images_and_labels():
    with pytest.raises(UserError, match="several inputs are a mapping of keyword arguments"):
        iso.prune(TwoInputs(), {"images": IMAGES[:1], "numbers": VECTORS[:1]}, ratio=0.5, criterion="l2",
                  recover=["compensate"], calibration=(IMAGES, VECTORS))  # fmt: skip


def test_items_of_a_batch():
    cut: Any = items_of({"x": IMAGES, "n": VECTORS, "w": torch.ones(5), "flag": True}, slice(2, 4))
    assert torch.equal(cut["x"], IMAGES[2:4]) and torch.equal(cut["n"], VECTORS[2:4])
    assert (len(cut["w"]), cut["flag"], num_items(cut)) == (5, True, 2)


def test_dense_weights_that_are_not_finite_are_named_and_nothing_is_cut():
    model = cnn()
    with torch.no_grad():
        model[7].weight[1, 2] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match="gives numbers that are not finite, and 7.weight hold some"):
        iso.prune(model, IMAGES[:1], ratio=0.5, criterion="random", recover=["auto"], calibration=IMAGES, inplace=True)
    assert all(torch.equal(t, before[name]) or name == "7.weight" for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    "images",
    [
        pytest.param(torch.ones(24, 3, 8, 8), id="alike"),
        pytest.param(torch.zeros(24, 3, 8, 8), id="black"),
        pytest.param(torch.nn.functional.interpolate(IMAGES, 13), id="another size"),
        pytest.param(IMAGES[:3], id="three"),
        pytest.param(IMAGES[:1], id="one"),
    ],
)
def test_odd_images_leave_finite_weights(images: Tensor):
    recover = ["compensate", "bn", "distill"]
    done = iso.prune(cnn(), IMAGES[:1], ratio=0.5, criterion="l2", recover=recover, calibration=images, distill_steps=2)
    assert all(bool(tensor.isfinite().all()) for tensor in done.model.state_dict().values())
    assert all(judged.after <= judged.before or not judged.stays for judged in done.applied[0].judged)


def test_data_without_labels_are_scored_on_the_models_own_answers():
    model = cnn().eval()
    answers = model(IMAGES).argmax(1)
    options: dict[str, Any] = {"ratio": 0.5, "criterion": "taylor"}
    found = iso.plan(model, IMAGES[:1], data=[IMAGES], loss=iso.own_answer_loss, **options)
    expected = iso.plan(model, IMAGES[:1], data=[(IMAGES, answers)], **options)
    for name, scores in expected.scores.items():
        torch.testing.assert_close(found.scores[name], scores)
    with pytest.raises(UserError, match="without labels, loss=isomorphic.own_answer_loss takes the model's own"):
        iso.plan(model, IMAGES[:1], data=[IMAGES], **options)


# --- mirror images ---


def test_each_image_is_followed_by_its_mirror_image():
    pair = torch.arange(12.0).view(2, 1, 2, 3)
    found: Any = with_mirror_images(pair)
    assert found[:, 0, 0].tolist() == [[0, 1, 2], [2, 1, 0], [6, 7, 8], [8, 7, 6]]
    for other in (VECTORS, {"images": IMAGES}):
        with pytest.raises(UserError, match=r"mirror images are of images \(N, C, H, W\), and the calibration has"):
            with_mirror_images(other)


def test_mirror_images_are_fitted_but_judge_nothing():
    """Every fifth image is held out, 4 of 24, before the others are doubled."""
    few: dict[str, Any] = {"ratio": 0.5, "criterion": "l2", "recover": ["compensate"]}
    plain = iso.prune(cnn(), IMAGES[:1], calibration=IMAGES, **few)
    mirrored = iso.prune(cnn(), IMAGES[:1], calibration=IMAGES, mirror_calibration=True, **few)
    assert plain.applied[0].held_out == mirrored.applied[0].held_out == 4
    weights = [each.model.get_parameter("3.weight") for each in (plain, mirrored)]
    assert not torch.equal(*weights)
    with pytest.raises(UserError, match=r"mirror_calibration=True belongs to recover=\[…\]"):
        iso.prune(cnn(), IMAGES[:1], ratio=0.5, criterion="l2", mirror_calibration=True)


def test_few_images_of_a_world_with_two_alike_sides_say_more_with_their_mirror_images():
    """Smooth pictures, as often one way round as the other; judged on 512 others of the kind."""

    def pictures(count: int, seed: int) -> Tensor:
        coarse = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
        return nn.functional.interpolate(coarse, size=16, mode="bilinear")

    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 6),
    ).eval()  # fmt: skip
    others, errors = pictures(512, 99), {True: 0.0, False: 0.0}
    for mirrored in errors:
        for seed in range(3):
            images = pictures(10, seed)
            few: Any = {"recover": ["compensate"], "calibration": images, "mirror_calibration": mirrored}
            pruned = iso.prune(dense, others[:1], ratio=0.5, criterion="l2", **few).model
            with torch.no_grad():
                errors[mirrored] += float((pruned(others) - dense(others)).square().mean())
    assert errors[True] < 0.9 * errors[False]
