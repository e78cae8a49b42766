"""Distillation losses against computations by hand, in plain floats."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

from isomorphic.training.losses import build_objective, hard_distillation, separate_heads, soft_distillation
from isomorphic.training.recipe import LossRecipe

CLASS = [[1.0, 0.0, -1.0], [0.5, 2.0, 0.0]]
TOKEN = [[0.0, 0.3, 1.0], [1.0, -1.0, 0.5]]
TEACHER = [[0.1, 3.0, 0.2], [2.0, 0.0, 1.0]]  # argmax: 1, 0
HARD = [2, 1]
SOFT = [[0.0, 0.3, 0.7], [0.6, 0.4, 0.0]]


def log_softmax(row: list[float]) -> list[float]:
    total = math.log(sum(math.exp(value) for value in row))
    return [value - total for value in row]


def one_hot(labels: list[int]) -> list[list[float]]:
    return [[float(label == c) for c in range(3)] for label in labels]


def cross_entropy(logits: list[list[float]], targets: list[list[float]], smoothing: float = 0.0) -> float:
    """Mean over the batch of -Σ_c t_c log p_c, with the targets' share `smoothing` spread over all classes."""
    rows = [
        -sum((t * (1 - smoothing) + smoothing / 3) * lp for t, lp in zip(target, log_softmax(row), strict=True))
        for row, target in zip(logits, targets, strict=True)
    ]
    return sum(rows) / len(rows)


def divergence(teacher: list[list[float]], student: list[list[float]], tau: float) -> float:
    """Mean over the batch of Σ_c q_c (log q_c - log p_c) at temperature tau."""
    total = 0.0
    for q_row, p_row in zip(teacher, student, strict=True):
        log_q, log_p = (log_softmax([v / tau for v in row]) for row in (q_row, p_row))
        total += sum(math.exp(q) * (q - p) for q, p in zip(log_q, log_p, strict=True))
    return total / len(teacher)


@pytest.mark.parametrize("with_token", [True, False])
@pytest.mark.parametrize("soft_labels", [True, False])
def test_hard_distillation(with_token: bool, soft_labels: bool):
    outputs = (torch.tensor(CLASS), torch.tensor(TOKEN)) if with_token else torch.tensor(CLASS)
    labels = torch.tensor(SOFT if soft_labels else HARD)
    loss = hard_distillation(outputs, labels, torch.tensor(TEACHER), alpha=0.5, label_smoothing=0.1)
    learned = cross_entropy(CLASS, SOFT if soft_labels else one_hot(HARD), 0.1)
    copied = cross_entropy(TOKEN if with_token else CLASS, one_hot([1, 0]), 0.1)
    assert loss.item() == pytest.approx(0.5 * learned + 0.5 * copied, rel=1e-6)


@pytest.mark.parametrize("with_token", [True, False])
@pytest.mark.parametrize("soft_labels", [True, False])
def test_soft_distillation(with_token: bool, soft_labels: bool):
    outputs = (torch.tensor(CLASS), torch.tensor(TOKEN)) if with_token else torch.tensor(CLASS)
    labels = torch.tensor(SOFT if soft_labels else HARD)
    loss = soft_distillation(outputs, labels, torch.tensor(TEACHER), alpha=0.3, tau=2.0, label_smoothing=0.1)
    learned = cross_entropy(CLASS, SOFT if soft_labels else one_hot(HARD), 0.1)
    copied = 2.0**2 * divergence(TEACHER, TOKEN if with_token else CLASS, 2.0)
    assert loss.item() == pytest.approx(0.7 * learned + 0.3 * copied, rel=1e-6)


def test_a_student_that_is_its_teacher_has_no_divergence():
    labels = torch.tensor(HARD)
    teacher = torch.tensor(TEACHER)
    loss = soft_distillation(teacher, labels, teacher, alpha=1.0, tau=3.0, label_smoothing=0.0)
    assert loss.item() == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_objective_is_the_recipes_distillation(kind: str):
    logits, labels, taught = torch.tensor(CLASS, requires_grad=True), torch.tensor(HARD), torch.tensor(TEACHER)
    loss = build_objective(LossRecipe(0.1, kind, 0.25, 2.0))(logits, labels, taught)
    if kind == "hard":
        expected = hard_distillation(logits, labels, taught, alpha=0.25, label_smoothing=0.1)
    else:
        expected = soft_distillation(logits, labels, taught, alpha=0.25, tau=2.0, label_smoothing=0.1)
    assert loss.item() == expected.item()
    loss.backward()
    assert logits.grad is not None and logits.grad.abs().sum() > 0


@pytest.mark.parametrize(("kind", "taught"), [("none", None), ("none", TEACHER), ("soft", None)])
def test_objective_without_a_teacher_is_the_smoothed_cross_entropy(kind: str, taught: list[list[float]] | None):
    objective = build_objective(LossRecipe(label_smoothing=0.2, distillation=kind))
    outputs = (torch.tensor(CLASS), torch.tensor(TOKEN))  # of which the token's are nobody's business
    loss = objective(outputs, torch.tensor(SOFT), None if taught is None else torch.tensor(taught))
    assert loss.item() == pytest.approx(cross_entropy(CLASS, SOFT, 0.2), rel=1e-6)


def test_low_precision_logits_are_scored_in_fp32():
    logits = torch.tensor(CLASS, dtype=torch.bfloat16)
    loss = hard_distillation(logits, torch.tensor(HARD), torch.tensor(TEACHER), alpha=0.5, label_smoothing=0.0)
    assert loss.dtype == torch.float32
    taught = F.cross_entropy(logits.float(), torch.tensor([1, 0]))
    assert loss.item() == pytest.approx((F.cross_entropy(logits.float(), torch.tensor(HARD)) + taught).item() / 2)


def test_heads_are_apart_only_inside_and_only_where_enabled():
    kwargs: dict[str, Any] = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 1, "num_classes": 3}
    student = timm.create_model("deit_tiny_distilled_patch16_224", img_size=16, **kwargs).train()
    images = torch.zeros(2, 3, 16, 16)
    with separate_heads(student, True):
        assert isinstance(student(images), tuple)
    with separate_heads(student, False):
        assert isinstance(student(images), Tensor)
    assert isinstance(student(images), Tensor)
    plain = torch.nn.Linear(2, 2)
    with separate_heads(plain, True):
        assert isinstance(plain(torch.zeros(1, 2)), Tensor)
