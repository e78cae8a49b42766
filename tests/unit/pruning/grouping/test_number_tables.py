"""Numbers that modules keep in mappings, and in the layers of einops, follow the cut."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import isomorphic as iso
from isomorphic.pruning.cutting.self_check import cut_error, masked_copy

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Four heads of four dims on tokens (B, 5, 16); its numbers lie where `kind` says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        if kind == "mapping":
            self.sizes = {"heads": 4, "width": 16, "name": "attention", "scale": 0.5}
        else:
            layers = pytest.importorskip("einops.layers.torch", reason="einops is not installed")
            if kind == "einops, heads counted":
                self.split = layers.Rearrange("b n (three h d) -> three b h n d", three=3, h=4)
            else:  # the other way round, as some write it: heads are what is left
                self.split = layers.Rearrange("b n (three h d) -> three b h n d", three=3, d=4)
            self.join = layers.Rearrange("b h n d -> b n (h d)")

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "mapping":
            b, n, _ = x.shape
            packed = self.qkv(x).reshape(b, n, 3, self.sizes["heads"], -1).permute(2, 0, 3, 1, 4)
        else:
            packed = self.split(self.qkv(x))
        q, k, v = packed.unbind()
        mixed = (q @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        if self.kind == "mapping":
            return x + self.out(mixed.transpose(1, 2).reshape(b, n, self.sizes["width"]))
        return x + self.out(self.join(mixed))


def network(kind: str) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), Attention(kind), nn.Linear(16, 3)).eval()


KINDS = ["mapping", "einops, heads counted", "einops, dims counted"]


@pytest.mark.parametrize("kind", KINDS)
def test_heads_and_head_dims_go_and_the_numbers_follow(kind: str, tmp_path: Path):
    model = network(kind)
    dense = copy.deepcopy(model)
    graph = iso.trace(model, X)
    [group] = graph.attention
    assert (group.num_units, group.num_sections) == (16, 4)
    pruned: Any = iso.prune(model, X, ratio=0.0, head_ratio=0.5, criterion="l2", ranking="local")
    again: Any = iso.prune(
        pruned.model, X, ratio=0.5, ratios={"0": 0.0}, criterion="l2", ranking="local", head_ratio=0.0
    )
    for each, heads, dims in ((pruned, 2, 4), (again, 2, 2)):
        attention = each.model[1]
        assert attention.qkv.out_features == 3 * heads * dims and attention.out.in_features == heads * dims
        if kind == "mapping":
            assert attention.sizes == {"heads": heads, "width": heads * dims, "name": "attention", "scale": 0.5}
        else:
            numbers = {"three": 3, "h": heads} if kind == "einops, heads counted" else {"three": 3, "d": dims}
            assert attention.split.axes_lengths == numbers == dict(attention.split._axes_lengths)
            assert all(type(number) is int for number in attention.split.axes_lengths.values())
    assert cut_error(masked_copy(dense, graph, pruned.plan), pruned.model, X) < 1e-6
    again.save(tmp_path / "net.safetensors")
    loaded = iso.load_model(tmp_path / "net.safetensors", model=network(kind))
    assert torch.equal(loaded(X), again.model(X)) and torch.equal(copy.deepcopy(loaded)(X), loaded(X))


def test_a_trace_leaves_mappings_and_layers_of_einops_as_they_were():
    for kind in KINDS:
        model = network(kind)
        before = {name: value for name, value in vars(model[1]).items() if isinstance(value, dict)}
        iso.trace(model, X)
        assert all(vars(model[1])[name] is value for name, value in before.items())
        if kind != "mapping":
            assert [type(number) for _, number in model[1].split._axes_lengths] == [int, int]


class Decoder(nn.Module):
    """A vector becomes a map (B, 8, 4, 4), as generators do it with einops."""

    def __init__(self) -> None:
        super().__init__()
        layers = pytest.importorskip("einops.layers.torch", reason="einops is not installed")
        self.project, self.conv = nn.Linear(16, 128), nn.Conv2d(8, 3, 1)
        self.fold = layers.Rearrange("b n (c h w) -> (b n) c h w", c=8, h=4)
        self.pool = layers.Reduce("b c (h two) (w also) -> b c h w", "mean", two=2, also=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(self.fold(self.project(x))))


def test_the_channels_of_a_map_that_einops_folds():
    model = Decoder().eval()
    pruned: Any = iso.prune(model, X, ratio=0.5, criterion="l2", ranking="local")
    assert pruned.model.fold.axes_lengths == {"c": 4, "h": 4} and pruned.model.project.out_features == 64
    assert pruned.model.pool.axes_lengths == {"two": 2, "also": 2}
    assert cut_error(masked_copy(model, iso.trace(model, X), pruned.plan), pruned.model, X) < 1e-6


def count(module: Any, inputs: object) -> None:
    module.calls["forward"] = module.calls.get("forward", 0) + 1


def test_a_table_that_forward_passes_fill_is_no_structure(tmp_path: Path):
    def build() -> nn.Module:
        model: Any = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 3))
        model.calls = {}
        model.register_forward_pre_hook(count)
        return model

    pruned: Any = iso.prune(build(), X, ratio=0.5, criterion="l2")
    pruned.model(X)
    assert pruned.model.calls["forward"]
    pruned.save(tmp_path / "net.safetensors")
    loaded = iso.load_model(tmp_path / "net.safetensors", model=build())
    assert torch.equal(loaded(X), pruned.model(X))


@pytest.mark.parametrize(
    "spoil", [lambda table: table.pop("h"), lambda table: table.update(h="four"), lambda table: table.update(x=1)]
)
def test_a_file_with_other_keys_or_values_is_refused(spoil: Callable[[dict], object]):
    from isomorphic.checkpoints.structure import restore_structure

    model = network("einops, heads counted")
    table = {"three": 3, "h": 2}
    spoil(table)
    structure = {"attributes": {"1.split": {"axes_lengths": table}}, "gained": [], "lost": []}
    with pytest.raises(ValueError, match="may not set 'axes_lengths' of 1.split"):
        restore_structure(model, structure, {})
