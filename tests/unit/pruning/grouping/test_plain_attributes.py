"""Tensors that modules hold as plain attributes are traced, cut, and kept in checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import isomorphic as iso
from isomorphic.plain_tensors import named_plain_tensors
from isomorphic.pruning.grouping.trace import trace_groups
from tests.unit.pruning.grouping.halves import found, half, stays

X = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
WIDTHS = {"a.weight:0": 16, "b.weight:0": 24}
KINDS = ["added", "scaled", "two names", "shared with a buffer", "in a submodule", "of tokens alone", "mask"]


class Holder(nn.Module):
    """Adds a tensor that it was given."""

    def __init__(self, places: Tensor) -> None:
        super().__init__()
        self.places = places

    def forward(self, x: Tensor) -> Tensor:
        return x + self.places


class Net(nn.Module):
    """Tokens (B, 5, 16), to which something fixed is done, and an MLP."""

    places: Any
    known: Any

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.a, self.b, self.c, self.head = nn.Linear(3, 16), nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 4)
        places = torch.linspace(-1, 2, 80).view(5, 16)
        self.scale = torch.tensor([1.0])
        self.places: Any = None
        if kind == "added":
            self.places = places
        if kind == "scaled":
            self.places, self.factor = places, torch.linspace(0.5, 1.5, 16)
        if kind == "two names":
            self.places = self.again = places
        if kind == "shared with a buffer":
            self.register_buffer("known", places)
            self.places = self.known
        if kind == "in a submodule":
            self.one = self.other = Holder(places)
        if kind == "of tokens alone":
            self.places = torch.linspace(-1, 1, 5).view(5, 1)
        if kind == "mask":
            self.places = torch.arange(16) % 3 > 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x) * self.scale
        if self.kind == "in a submodule":
            x = self.other(self.one(x))
        elif self.kind == "scaled":
            x = x * self.factor + self.places
        elif self.kind == "two names":
            x = (x + self.places) * self.again
        elif self.kind == "shared with a buffer":
            x = x + self.places + self.known
        elif self.kind == "mask":
            x = x * self.places
        elif self.kind != "by number":
            x = x + self.places
        return self.head(x + self.c(self.b(x).relu()))


def _width(kind: str) -> int:
    return 1 if kind == "of tokens alone" else 8


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_traced_and_cut(kind: str):
    model = Net(kind)
    assert found(model, X) == WIDTHS
    cut = half(model, X)
    assert (cut.a.out_features, cut.b.out_features) == (8, 12)
    held = {name: tensor for name, tensor in named_plain_tensors(cut) if name != "scale"}
    assert held and all(tensor.shape[-1] == _width(kind) for tensor in held.values())
    if kind == "two names":
        assert cut.places is cut.again
    if kind == "shared with a buffer":
        assert cut.places is cut.known
    if kind == "in a submodule":
        assert cut.one.places is cut.other.places
    assert all(tensor.shape[-1] == 2 * _width(kind) or _width(kind) == 1 for name, tensor in
               named_plain_tensors(model) if name != "scale")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_right_columns_stay(kind: str):
    model = Net(kind).eval()
    done: Any = iso.prune(model, X, ratio=0.5, criterion="l2", ranking="local", self_check=True)
    kept = list(done.plan.kept["a.weight:0"])
    dense = dict(named_plain_tensors(model))
    for name, tensor in named_plain_tensors(done.model):
        expected = dense[name] if dense[name].shape[-1] == 1 else dense[name][..., kept]
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(kind: str, steps: int, tmp_path: Path):
    done = iso.prune(Net(kind).eval(), X, ratio=0.5, criterion="l2", ranking="local", steps=steps, self_check=True)
    done.save(tmp_path / "net.safetensors")
    loaded: Any = iso.load_model(tmp_path / "net.safetensors", model=Net(kind))
    loaded = (loaded[0] if isinstance(loaded, tuple) else loaded).eval()
    with torch.no_grad():
        assert torch.equal(loaded(X), done.model(X))
    before, after = dict(named_plain_tensors(done.model)), dict(named_plain_tensors(loaded))
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    assert {k: len(v) for k, v in done.plan.kept.items()} == {"a.weight:0": 8, "b.weight:0": 12}


def test_values_that_no_cut_touches_are_the_builders(tmp_path: Path):
    """Only plain tensors that were cut are written, where the dense model is built by its user."""
    done: Any = iso.prune(Net("added").eval(), X, ratio=0.5, criterion="l2")
    done.save(tmp_path / "net.safetensors")
    assert done.model.scale.shape == (1,)
    other: Any = Net("added")
    other.scale = torch.tensor([2.0])
    loaded: Any = iso.load_model(tmp_path / "net.safetensors", model=other)
    assert loaded.places.shape == (5, 8)


def test_the_self_check_is_in_double_precision():
    """Single precision would leave differences of more than this."""
    done = iso.prune(Net("scaled").eval(), X, ratio=0.5, criterion="l2", self_check=True)
    (line,) = (line for line in str(done).splitlines() if "Self-check" in line)
    assert float(line.partition(" by ")[2].partition(" ")[0]) < 1e-12


def test_a_weight_norm_is_no_plain_tensor():
    model: Any = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 16)), nn.ReLU(), nn.Linear(16, 4)).eval()
    model(X)
    assert [name for name, _ in named_plain_tensors(model)] == []
    with torch.no_grad():
        model(X)
    assert [name for name, _ in named_plain_tensors(model)] == []
    graph = trace_groups(model, X)
    assert [group.num_units for group in graph.groups] == [16]
    assert half(model, X)[2].in_features == 8


class ByNumber(Net):
    """A plain tensor of indices picks channels."""

    def __init__(self) -> None:
        super().__init__("by number")
        self.order = torch.tensor([1, 0, *range(2, 16)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)[..., self.order]
        return self.head(x + self.c(self.b(x).relu()))


def test_channels_that_an_index_picks_stay():
    model = ByNumber()
    why = stays(model, X, "head")
    assert set(why) >= {"a.weight:0"}
    assert found(model, X)["b.weight:0"] == 24
    cut = half(model, X)
    assert (cut.a.out_features, len(cut.order), cut.b.out_features) == (16, 16, 12)
