"""The teacher: what it sees, what it refuses, how it stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers.std_conv import StdConv2d
from torch import Tensor, nn

from isomorphic.checkpoints.save import save_model
from isomorphic.data.transforms import Preprocessing
from isomorphic.errors import UserError
from isomorphic.models import ModelSpec, build_model, describe_model
from isomorphic.training.precision import pick_teacher_dtype
from isomorphic.training.teacher import Teacher, open_teacher

STUDENT = Preprocessing(32, 36, mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 0.5))
IMAGENET = Preprocessing(32, 36)


KWARGS = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}


@pytest.fixture
def vit_spec() -> ModelSpec:
    return describe_model("vit_tiny_patch16_224", kwargs=KWARGS, input_size=32)


class Same(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images


def test_images_come_normalised_as_the_teacher_knows_them():
    pixels = torch.rand(2, 3, 4, 4)

    def normalised(p: Preprocessing) -> Tensor:
        return (pixels - torch.tensor(p.mean)[:, None, None]) / torch.tensor(p.std)[:, None, None]

    seen = Teacher(Same(), own=IMAGENET, student=STUDENT)(normalised(STUDENT))
    assert torch.allclose(seen, normalised(IMAGENET), atol=1e-5)
    images = normalised(STUDENT)
    assert Teacher(Same(), own=STUDENT, student=STUDENT)(images) is images


def test_a_teacher_never_trains():
    teacher = Teacher(nn.Sequential(nn.Linear(2, 2), nn.Dropout()), STUDENT, STUDENT).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_checkpoint_teaches_with_its_own_weights(tmp_path: Path, vit_spec: ModelSpec):
    model = build_model(vit_spec)
    save_model(tmp_path / "teacher.safetensors", model, vit_spec, provenance={})
    teacher = open_teacher(str(tmp_path / "teacher.safetensors"), vit_spec.preprocessing, 10, input_size=32)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(teacher(images), model(images))


# --- low precision ---

AUTOCAST = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # and their unit of roundoff
MODELS = {
    "convnext_atto": {},
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "depth": 4},
    "regnety_002": {},  # batch norms
}


def random_model(name: str, *, scale: float = 1.0) -> nn.Module:
    """With statistics of batch norms that a few images gave, and logits far enough apart to be told."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=20, **MODELS[name]).train()
    for parameter in model.get_classifier().parameters():  # type: ignore[operator]
        nn.init.normal_(parameter, std=scale)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(16, 3, 32, 32))
    return model.eval()


@pytest.mark.parametrize("dtype", list(AUTOCAST))
@pytest.mark.parametrize("name", list(MODELS))
def test_low_precision_is_autocast_with_the_weights_cast_once(name: str, dtype: torch.dtype):
    model, images = random_model(name), torch.randn(32, 3, 32, 32)
    with torch.no_grad():
        exact = model(images)
        with torch.autocast("cpu", dtype=dtype):
            cast = model(images).float()
    answer = Teacher(model, STUDENT, STUDENT, dtype=dtype).ask(images)()
    assert answer.dtype == torch.float32 and torch.equal(answer, cast)
    error = (answer - exact).norm() / exact.norm()
    assert 0 < error < 8 * AUTOCAST[dtype]
    agree = answer.argmax(1) == exact.argmax(1)
    margin = exact.topk(2).values.diff(dim=1).abs().squeeze(1)
    assert agree.float().mean() >= 0.9 and agree[margin > 0.1 * exact.std()].all()


def test_what_low_precision_stores_how():
    teacher = Teacher(random_model("regnety_002"), STUDENT, STUDENT, dtype=torch.bfloat16)
    for name, tensor in [*teacher.named_parameters(), *teacher.named_buffers()]:
        kept = "bn" in name or name in ("scale", "shift")
        assert tensor.dtype in ((torch.float32, torch.int64) if kept else (torch.bfloat16,)), name


def test_layers_that_compute_with_their_weights_keep_them():
    model, images = nn.Sequential(StdConv2d(3, 64, 3), nn.Conv2d(64, 4, 1)), torch.randn(2, 3, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        cast = model(images).float()
    teacher = Teacher(model, STUDENT, STUDENT, dtype=torch.bfloat16)
    assert [layer.weight.dtype for layer in model] == [torch.float32, torch.bfloat16]  # type: ignore[union-attr]
    assert torch.equal(teacher.ask(images)(), cast)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("ambient", [torch.bfloat16, torch.float16])
def test_the_students_autocast_is_not_the_teachers(dtype: torch.dtype | None, ambient: torch.dtype):
    images = torch.randn(2, 3, 32, 32)
    model = random_model("convnext_atto")
    with torch.no_grad():
        exact = model(images)
    teacher = Teacher(model, STUDENT, STUDENT, dtype=dtype)
    alone = teacher.ask(images)()
    with torch.autocast("cpu", dtype=ambient):
        beside = teacher.ask(images)()
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == ambient
    assert torch.equal(alone, beside) and beside.dtype == torch.float32
    assert torch.equal(alone, exact) is (dtype is None)


def test_an_answer_is_a_constant_to_whoever_learns_from_it():
    teacher = Teacher(random_model("convnext_atto"), IMAGENET, STUDENT)
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    answer = teacher.ask(images)
    first = answer()
    assert answer() is first and not first.requires_grad and not first.is_inference()
    logits = torch.randn(2, 20, requires_grad=True)
    nn.functional.kl_div(logits.log_softmax(1), first.log_softmax(1), reduction="batchmean", log_target=True).backward()
    assert logits.grad is not None


def test_questions_may_be_asked_ahead():
    teacher = Teacher(random_model("convnext_atto"), STUDENT, STUDENT)
    batches = [torch.randn(2, 3, 32, 32) for _ in range(2)]
    answers = [teacher.ask(images) for images in batches]
    assert torch.equal(answers[1](), teacher(batches[1])) and torch.equal(answers[0](), teacher(batches[0]))


@pytest.mark.parametrize("given", [torch.channels_last, torch.contiguous_format])
def test_channels_last(given: torch.memory_format):
    model, images = random_model("regnety_002"), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        exact = model(images)
    teacher = Teacher(model, STUDENT, STUDENT, channels_last=True)
    seen = []
    teacher.model.stem.conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))  # type: ignore
    answer = teacher.ask(images.to(memory_format=given))()
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    weight = teacher.model.stem.conv.weight  # type: ignore[union-attr]
    assert weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[operator]
    assert torch.allclose(answer, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "amp_dtype", "expected"),
    [
        ("auto", None, torch.bfloat16),
        ("auto", torch.float16, torch.float16),
        ("auto", torch.bfloat16, torch.bfloat16),
        ("fp32", torch.bfloat16, None),
        ("fp16", torch.bfloat16, torch.float16),
        ("bf16", torch.float16, torch.bfloat16),
        ("fp16", None, torch.float16),
    ],
)
def test_the_teachers_dtype(name: str, amp_dtype: torch.dtype | None, expected: torch.dtype | None):
    assert pick_teacher_dtype(name, amp_dtype) is expected


def test_a_teacher_is_opened_in_low_precision(tmp_path: Path):
    options: dict[str, Any] = {"input_size": 32, "pretrained": False, "channels_last": True}
    torch.manual_seed(0)
    exact = open_teacher("resnet10t", STUDENT, 7, **options)
    torch.manual_seed(0)
    cast = open_teacher("resnet10t", STUDENT, 7, dtype=torch.bfloat16, **options)
    assert exact.model.conv1[0].weight.dtype == torch.float32  # type: ignore[index, union-attr]
    assert cast.model.conv1[0].weight.dtype == torch.bfloat16  # type: ignore[index, union-attr]
    images = torch.randn(2, 3, 32, 32)
    assert cast.ask(images)().dtype == torch.float32
    assert torch.allclose(cast.ask(images)(), exact.ask(images)(), rtol=0.05, atol=0.02)


# --- whom to open ---


def test_a_name_without_weights_takes_the_students_classes():
    teacher = open_teacher("resnet10t", STUDENT, 7, input_size=32, pretrained=False)
    assert teacher(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def test_other_classes_are_refused(tmp_path: Path, vit_spec: ModelSpec):
    path = tmp_path / "teacher.safetensors"
    save_model(path, build_model(vit_spec), vit_spec, provenance={})
    with pytest.raises(UserError, match="has 10 classes but the student has 3"):
        open_teacher(str(path), STUDENT, 3, input_size=32)


def test_another_input_size_is_refused_where_the_teacher_has_a_fixed_one(tmp_path: Path, vit_spec: ModelSpec):
    path = tmp_path / "teacher.safetensors"
    save_model(path, build_model(vit_spec), vit_spec, provenance={})
    with pytest.raises(UserError, match="does not take images of 48×48 pixels"):
        open_teacher(str(path), STUDENT, 10, input_size=48)


def test_an_absent_teacher_is_named():
    with pytest.raises(UserError, match="no such checkpoint: nowhere/teacher.safetensors"):
        open_teacher("nowhere/teacher.safetensors", STUDENT, 10, input_size=32)
    with pytest.raises(UserError, match="no_such_model"):
        open_teacher("no_such_model", STUDENT, 10, input_size=32)
