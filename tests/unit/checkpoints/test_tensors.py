"""Tensors go into a model strictly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from isomorphic.checkpoints.tensors import load_tensors
from isomorphic.errors import UserError
from tests.faults import one_line
from tests.unit.checkpoints.conftest import Toy


@pytest.mark.parametrize(
    "bias",
    [torch.zeros(4).to_sparse(), torch.zeros(4, device="meta"), torch.zeros(4, dtype=torch.complex64)],
    ids=["sparse", "nowhere", "complex"],
)
def test_tensors_that_are_not_plain_numbers(bias: Tensor):
    model = Toy()
    tensors = model.state_dict() | {"second.bias": bias}
    with pytest.raises(UserError, match="x.pth does not fit the model: second.bias is no plain tensor") as error:
        load_tensors(model, tensors, "x.pth")
    one_line(error)


def test_numbers_that_differ_where_the_model_ties_them():
    model = Toy()
    before = model.first.weight.detach().clone()
    tensors = model.state_dict() | {"second.weight": before + 1}
    with pytest.raises(UserError, match="second.weight is not first.weight, and the model ties them") as error:
        load_tensors(model, tensors, "x.pth")
    one_line(error)
    assert torch.equal(model.first.weight, before)
