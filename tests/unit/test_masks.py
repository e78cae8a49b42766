"""Masks are the zeros of the named parameters, put back in place."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from isomorphic.masks import Masks


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        for layer in model:
            layer.weight[1] = 0
            layer.bias[0] = 0
    return model


def test_zeros_of_the_named_parameters_come_back_and_no_others(model: Any):
    masks = Masks.of(model, ["0.weight"])
    before = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    masks.apply(model)
    assert not model[0].weight[1].any()
    rows = [0, 2, 3]
    assert torch.equal(model[0].weight[rows], before[0].weight[rows] + 1)
    for name in ("0.bias", "1.weight", "1.bias"):
        assert torch.equal(model.get_parameter(name), before.get_parameter(name) + 1)


def test_they_are_put_into_the_same_memory_whatever_was_there(model: Any):
    masks = Masks.of(model, ["1.weight"])
    weight, address = model[1].weight, model[1].weight.data_ptr()
    with torch.no_grad():
        weight[1] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1])
    weight.grad = torch.ones_like(weight)
    masks.apply(model)
    assert not weight[1].any() and model[1].weight is weight and weight.data_ptr() == address
    assert weight.requires_grad and bool((weight.grad == 1).all())


def test_they_fit_a_copy(model: Any):
    masks, average = Masks.of(model, ["0.weight"]), copy.deepcopy(model)
    nn.init.ones_(average[0].weight)
    masks.apply(average)
    assert average[0].weight.sum(1).tolist() == [4, 0, 4, 4]


def test_no_names_no_masks(model: Any):
    assert Masks.of(model, []) == Masks()
    Masks().apply(nn.Identity())


def test_memory_formats_do_not_matter():
    conv = nn.Conv2d(3, 4, 3)
    with torch.no_grad():
        conv.weight[:, 1] = 0
    masks = Masks.of(conv, ["weight"])
    conv = conv.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    nn.init.ones_(conv.weight)
    masks.apply(conv)
    assert conv.weight.sum((0, 2, 3)).tolist() == [36, 0, 36]


def test_a_name_that_the_model_has_not(model: Any):
    with pytest.raises(AttributeError):
        Masks.of(model, ["2.weight"])
