"""Where in the forward code channels are frozen."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isomorphic as iso
from isomorphic.errors import UserError
from isomorphic.pruning.grouping.forward_line import forward_line

X = torch.randn(2, 5, 3)


class Net(nn.Module):
    """Channels that are rolled, spelled out, sorted in a helper, and fixed by a library's function."""

    def __init__(self) -> None:
        super().__init__()
        self.free, self.rolled, self.spelled, self.ordered = (nn.Linear(8 if i else 3, 8) for i in range(4))
        self.padded, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.rolled(self.free(x).relu()).roll(1, -1)
        x = self.spelled(x).view(-1, 8)
        x = self.helper(self.ordered(x))
        x = F.pad(self.padded(x), (1, 1), mode="circular")[:, 1:9]
        return self.head(x)

    def helper(self, x: Tensor) -> Tensor:
        return x.sort(-1).values


def line_of(method: object, text: str) -> str:
    source, first = inspect.getsourcelines(method)  # type: ignore[arg-type]
    (offset,) = (number for number, line in enumerate(source) if text in line)
    return str(first + offset)


def test_each_reason_has_its_line():
    graph = iso.trace(Net(), X)
    assert {group.name for group in graph.groups} == {"free.weight:0"}
    found = {name.partition(".")[0]: frozen.where for name, frozen in graph.frozen.items()}
    file, numbers = "test_forward_line.py", {name: where.rpartition(":")[2] for name, where in found.items()}
    assert all(where.rpartition(":")[0].endswith(file) for where in found.values() if where)
    assert numbers == {
        "rolled": line_of(Net.forward, "self.rolled("),
        "spelled": line_of(Net.forward, "self.spelled("),
        "padded": line_of(Net.forward, "self.padded("),
        "ordered": line_of(Net.helper, "sort"),
        "head": "",
    }


def test_a_graph_prints_the_line_and_the_share():
    text = str(iso.trace(Net(), X))
    (line,) = (line for line in text.splitlines() if line.startswith("Kept: rolled"))
    number = line_of(Net.forward, "self.rolled(")
    assert line.startswith("Kept: rolled (its units are rolled, ")
    assert line.endswith(f"test_forward_line.py:{number}), 18.2% of the width")


def test_the_error_of_a_model_without_groups_has_the_lines():
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).sort(-1).values

    with pytest.raises(UserError, match=r"layer.weight:0: its units have an order in sort, .*test_forward_line.py:\d+"):
        iso.trace(Sorted(), X)


def test_there_is_no_line_outside_of_a_forward():
    assert forward_line() == ""
