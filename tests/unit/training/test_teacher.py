"""The teacher: what it sees, what it refuses, how it stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from isomorphic.checkpoint import save_model
from isomorphic.data import Preprocessing
from isomorphic.errors import UserError
from isomorphic.models import ModelSpec, build_model
from isomorphic.training.teacher import Teacher, open_teacher

STUDENT = Preprocessing(32, 36, mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 0.5))
IMAGENET = Preprocessing(32, 36)


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
