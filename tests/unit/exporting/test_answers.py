"""Batches to compare on, and what the largest difference is relative to."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from isomorphic.errors import UserError
from isomorphic.exporting.answers import (
    Answer,
    ask,
    batch_length,
    bound_of,
    difference,
    independent_copy,
    make_batch,
    precision_of,
)

INF, NAN = math.inf, math.nan


def test_a_batch_has_different_items_made_of_the_same_values():
    image = torch.arange(6.0).view(1, 2, 3)
    batch = make_batch(image, 3)
    assert isinstance(batch, Tensor)
    assert batch.tolist() == [[[0, 1, 2], [3, 4, 5]], [[2, 0, 1], [5, 3, 4]], [[1, 2, 0], [4, 5, 3]]]


def test_items_that_are_there_are_taken_first():
    images = torch.arange(8.0).view(4, 2)
    assert torch.equal(make_batch(images, 3), images[:3])  # type: ignore[arg-type]
    assert make_batch(images[:2], 3).tolist() == [[0, 1], [2, 3], [1, 0]]  # type: ignore[union-attr]


def test_every_input_as_long_as_the_first_is_part_of_the_batch():
    inputs = {"ids": torch.tensor([[1, 2]]), "step": torch.tensor([7]), "scale": torch.tensor(2.0)}
    inputs["table"] = torch.ones(5, 2)
    batch = make_batch(inputs, 3)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {  # type: ignore[union-attr]
        "ids": (3, 2), "step": (3,), "scale": (), "table": (5, 2)}  # fmt: skip


def test_inputs_in_a_list_have_no_batch_to_change():
    images = ([torch.zeros(3, 4, 4)],)
    assert batch_length(images) is None and make_batch(images, 3) is images
    assert batch_length(torch.tensor(1.0)) is None


def answer(*outputs: Tensor) -> Answer:
    return Answer(torch.zeros(2, 1), 2, [(f"output[{index}]", output) for index, output in enumerate(outputs)])


@pytest.mark.parametrize(
    ("expected", "given", "value"),
    [
        ([1.0, -100.0], [1.5, -100.0], 0.005),  # of the largest value of the output, not of 1.0
        ([1e-9, 1e-9], [1e-9, 2e-9], 1.0),  # small outputs are held to the same share
        ([0.0, 0.0], [0.25, 0.0], 0.25),
        ([-INF, 4.0, NAN], [-INF, 5.0, NAN], 0.25),
        ([INF, 1.0], [-INF, 1.0], INF),
        ([1.0], [NAN], INF),
        ([NAN], [1.0], INF),
    ],
)
def test_a_difference_is_a_share_of_the_largest_value_of_its_output(expected: list, given: list, value: float):
    found = difference(answer(torch.zeros(3), torch.tensor(expected)), [torch.zeros(3), torch.tensor(given)])
    assert found.value == pytest.approx(value, rel=1e-6)
    assert (found.output, found.batch_size) == ("output[1]", 2)


def test_whole_numbers_complex_ones_and_nothing_at_all_are_compared():
    assert difference(answer(torch.tensor([3, 4])), [torch.tensor([3, 3])]).value == 0.25
    assert difference(answer(torch.tensor([True])), [torch.tensor([False])]).value == 1
    assert difference(answer(torch.tensor([1 + 2j])), [torch.tensor([[1.0, 1.0]])]).value == 0.5
    assert difference(answer(torch.zeros(0, 4)), [torch.zeros(0, 4)]).value == 0


def test_missing_outputs_and_other_shapes_are_refused():
    with pytest.raises(UserError, match="the original returns 1 tensors and the exported model 2"):
        difference(answer(torch.zeros(2)), [torch.zeros(2)] * 2)
    told = r"output\[0\] of a batch of 2 has shape \(2, 1\) in the original and \(2,\) in the exported model"
    with pytest.raises(UserError, match=told):
        difference(answer(torch.zeros(2, 1)), [torch.zeros(2)])


def test_a_model_that_answers_at_random_cannot_be_compared():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout())
    with pytest.raises(UserError, match="answers differently each time"):
        ask(model.train(), torch.ones(1, 4), 1)
    assert len(ask(model.eval(), torch.ones(1, 4), 3).outputs[0][1]) == 3


def test_what_is_asked_is_said_in_one_line():
    with pytest.raises(UserError, match=r"does not take these inputs \(batch of 1\): .*mat1 and mat2"):
        ask(nn.Linear(4, 4), torch.ones(1, 3), 1)
    nothing = nn.Linear(4, 4)
    nothing.forward = lambda x: "text"  # type: ignore[method-assign]
    with pytest.raises(UserError, match="returns str, in which there is no tensor"):
        ask(nothing, torch.ones(1, 4), 1)


class WithTable(nn.Linear):
    """Holds a tensor that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.table, self.source = torch.ones(2), None


def test_the_copy_shares_nothing_and_is_in_eval_mode():
    model = WithTable()
    twin = independent_copy(model)
    assert isinstance(twin, WithTable)
    twin.weight.data.zero_()
    twin.table.zero_()
    assert model.training and not twin.training
    assert model.weight.abs().sum() > 0 and model.table.tolist() == [1, 1]
    model.source = (value for value in ())  # type: ignore[assignment]
    with pytest.raises(UserError, match="the model cannot be copied: cannot pickle 'generator' object"):
        independent_copy(model)


def test_what_forward_code_has_computed_is_copied_too():
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(2, 2)))  # whose weight is computed from two parameters
    model.last = model(torch.ones(1, 2))  # type: ignore[assignment]
    twin = independent_copy(model)
    assert torch.equal(twin(torch.ones(1, 2)), model.last) and model.last.requires_grad  # type: ignore[attr-defined]


def test_half_precision_has_a_bound_of_its_own():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).half())
    assert precision_of(model) == torch.float16 and precision_of(model[0]) == torch.float32
    assert [bound_of(dtype) for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)] == [
        1e-4, 1e-4, 2e-2, 2e-2]  # fmt: skip
