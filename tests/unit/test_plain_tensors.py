"""Tensors that modules hold as plain attributes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from isomorphic.plain_tensors import named_plain_tensors, own_plain_tensors


def _model() -> Any:
    inner: Any = nn.Linear(2, 2)
    inner.places = torch.ones(2)
    model: Any = nn.Module()
    model.one, model.other, model.table = inner, inner, torch.arange(3)
    model.register_buffer("known", torch.zeros(1))
    model.number, model.listed = 3, [torch.ones(1)]
    return model


def test_tensors_have_their_names():
    model = _model()
    found = list(named_plain_tensors(model))
    assert [name for name, _ in found] == ["table", "one.places", "other.places"]
    assert found[0][1] is model.table and found[1][1] is found[2][1] is model.one.places


def test_parameters_buffers_and_lists_are_none():
    model = nn.BatchNorm1d(2)
    assert list(named_plain_tensors(model)) == []
    assert [name for name, _ in own_plain_tensors(_model())] == ["table"]


def test_a_computed_weight_is_none():
    model: Any = nn.utils.weight_norm(nn.Linear(2, 2))  # its `weight` is an attribute, of `weight_g` and `weight_v`
    model(torch.ones(1, 2))
    assert "weight" in vars(model) and list(own_plain_tensors(model)) == []
    with torch.no_grad():
        model(torch.ones(1, 2))  # carries no gradient now
    assert not vars(model)["weight"].requires_grad and list(own_plain_tensors(model)) == []


def test_what_carries_a_gradient_is_none():
    model: Any = nn.Module()
    model.fixed, model.learnt = torch.ones(2), torch.ones(2, requires_grad=True)
    assert [name for name, _ in own_plain_tensors(model)] == ["fixed"]
