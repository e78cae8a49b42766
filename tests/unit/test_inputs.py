"""Running models on what they take, and walking through nested values."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isomorphic.inputs import call, device_of, map_tensors, move_to, tensors_in, without_data

Boxes = namedtuple("Boxes", "corners labels")


class Encoding(UserDict):
    """Like a tokenizer's batch: its entries are attributes, too, and it holds something of its own."""

    def __init__(self, data: dict[str, Any], encodings: str = "") -> None:
        super().__init__(data)
        self.encodings = encodings

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "data" not in self.__dict__:
            raise AttributeError(name)
        return self.data[name]


@dataclasses.dataclass(frozen=True)
class Output:
    logits: Tensor
    name: str = "output"


def doubled(values: Any) -> Any:
    return map_tensors(values, lambda tensor: 2 * tensor)


def test_inputs_are_a_tensor_positional_or_keyword_arguments():
    def model(a: int, b: int = 5) -> tuple[int, int]:
        return a, b

    assert call(model, torch.tensor(1)) == (torch.tensor(1), 5)
    assert call(model, (1, 2)) == (1, 2)
    assert call(model, {"b": 3, "a": 4}) == (4, 3)
    assert call(model, Encoding({"b": 3, "a": 4})) == (4, 3)


@pytest.mark.parametrize(
    "values",
    [
        {"x": torch.ones(2), "n": 3},
        OrderedDict(x=torch.ones(2), n=3),
        defaultdict(list, x=torch.ones(2), n=3),
        Encoding({"x": torch.ones(2), "n": 3}, "kept"),
    ],
    ids=["dict", "ordered", "default", "encoding"],
)
def test_mappings_keep_their_kind(values: Any):
    found = doubled(values)
    assert type(found) is type(values) and list(found) == ["x", "n"] and found["n"] == 3
    assert found["x"].tolist() == [2, 2] and values["x"].tolist() == [1, 1], "the given one is left alone"


def test_what_else_a_mapping_holds_is_kept():
    found = doubled(Encoding({"x": torch.ones(2)}, "kept"))
    assert found.encodings == "kept" and found.x.tolist() == [2, 2]
    assert doubled(defaultdict(list, x=torch.ones(1)))["missing"] == []


def test_mappings_that_cannot_be_written_to_become_dicts():
    assert doubled(MappingProxyType({"x": torch.ones(1)})) == {"x": torch.tensor([2.0])}


def test_tuples_lists_and_dataclasses_keep_their_kind():
    found = doubled([(torch.ones(1), "a"), Boxes(torch.ones(1), [torch.ones(1)]), Output(torch.ones(1))])
    assert [type(part) for part in found] == [tuple, Boxes, Output]
    assert all(float(tensor) == 2 for tensor in tensors_in(found)) and len(tensors_in(found)) == 4
    assert found[2].name == "output"


def test_other_objects_are_passed_on():
    marker = object()
    assert doubled({"a": marker, "b": None})["a"] is marker


def test_moving_returns_the_same_object_where_nothing_moves():
    values = {"x": torch.ones(1)}
    assert move_to(values, torch.device("cpu")) is values
    assert device_of(without_data(values)).type == "meta"
    assert device_of({"n": 3}).type == "cpu"


def test_tensors_are_found_in_objects_but_not_in_modules():
    class Holder:
        def __init__(self) -> None:
            self.inner = [torch.ones(1)]

    assert len(tensors_in([Holder(), nn.Linear(1, 1), {"x": (torch.ones(1),)}])) == 2


@pytest.mark.parametrize(
    "inputs",
    [{"batch": {"image": torch.ones(2)}}, ({"image": torch.ones(2)},), [{"image": torch.ones(2)}], ([torch.ones(2)],)],
    ids=["by name", "mapping", "list of one", "list"],
)
def test_a_forward_writes_into_a_batch_of_its_own(inputs: Any):
    def forward(batch: Any) -> Tensor:
        entries: Any = batch[0] if isinstance(batch, list) and isinstance(batch[0], dict) else batch
        key: Any = 0 if isinstance(entries, list) else "image"
        entries[key] = entries[key] * 2
        return entries[key]

    results = [call(forward, inputs) for _ in range(2)]
    assert all(torch.equal(result, torch.full((2,), 2.0)) for result in results)
    assert [torch.equal(tensor, torch.ones(2)) for tensor in tensors_in(inputs)] == [True]
