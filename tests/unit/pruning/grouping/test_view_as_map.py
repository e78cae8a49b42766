"""A linear layer's outputs viewed as a map or a sequence: all pixels of a channel are one unit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isomorphic.pruning.grouping.trace import trace_groups
from tests.unit.pruning.grouping.halves import FOLLOWS, OUTPUT, found, half, stays, units

Z = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
WIDTHS = {"before.weight:0": 20, "grown.weight:0": 16, "conv.weight:0": 12}


class Net(nn.Module):
    """Rows (B, 6) become maps (B, 16, 4, 4), to which something is done, and maps of 3 channels.

    Args:
        shape: of the view.
        between: of this module and the maps.
        conv: reads the maps.
    """

    def __init__(self, shape: Callable[[Tensor], Tensor], between: Callable[[Any, Tensor], Tensor], **conv: Any):
        super().__init__()
        torch.manual_seed(0)
        self.shape, self.between, self.pixels = shape, between, 4
        self.before, self.grown = nn.Linear(6, 20), nn.Linear(20, 256)
        self.conv = nn.Conv2d(16, 12, **{"kernel_size": 3, "padding": 1, **conv})
        self.out = nn.Conv2d(12, 3, 1)
        self.batch, self.group, self.instance = nn.BatchNorm2d(16), nn.GroupNorm(4, 16), nn.InstanceNorm2d(16)
        self.affine, self.depth = nn.InstanceNorm2d(16, affine=True), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.places, self.scale = nn.Parameter(torch.randn(1, 16, 4, 4)), nn.Parameter(torch.randn(16, 1, 1))
        self.skip, self.ups = nn.Conv2d(6, 16, 1), nn.ConvTranspose2d(16, 16, 2, stride=2)

    def forward(self, z: Tensor) -> Tensor:
        x = self.between(self, self.shape(self.grown(self.before(z).relu())))
        return self.out(self.conv(x).relu())


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: x.view(x.shape[0], -1, 4, 4),
    "reshape": lambda x: x.reshape(len(x), x.shape[1] // 16, 4, 4),
    "unflatten": lambda x: x.unflatten(1, (-1, 4, 4)),
}
BETWEEN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "nothing": lambda net, x: x,
    "batch norm": lambda net, x: net.batch(x).relu(),
    "upsampled": lambda net, x: F.interpolate(x, scale_factor=2.0),
    "bilinear": lambda net, x: F.interpolate(x, size=(7, 7), mode="bilinear"),
    "average pooled": lambda net, x: F.avg_pool2d(x, 2),
    "max pooled": lambda net, x: F.max_pool2d(x, 2),
    "instance norm": lambda net, x: net.instance(x),
    "affine instance norm": lambda net, x: net.affine(x),
    "places": lambda net, x: x + net.places,
    "scale": lambda net, x: x * net.scale,
    "places and norm": lambda net, x: net.batch(x + net.places).relu(),
    "skip": lambda net, x: x + net.skip(torch.ones(len(x), 6, 4, 4, device=x.device)),
    "padded": lambda net, x: F.pad(x, (1, 1, 1, 1)),
    "depthwise": lambda net, x: net.depth(x),
    "shuffled": lambda net, x: x.flip(3).transpose(2, 3),
}


@pytest.mark.parametrize("view", VIEWS)
def test_a_channel_is_all_of_its_pixels(view: str):
    model = Net(VIEWS[view], BETWEEN["nothing"])
    graph = trace_groups(model.eval(), Z)
    assert units(graph) == WIDTHS
    (grown,) = (group for group in graph.groups if group.name == "grown.weight:0")
    rows = {member.name: tuple(member.index.shape) for member in grown.members if member.module == "grown"}
    assert rows == {"grown.weight": (16, 16), "grown.bias": (16, 16)}
    cut = half(model, Z)
    assert (cut.before.out_features, cut.grown.out_features, cut.conv.in_channels) == (10, 128, 8)
    kept = cut.grown.bias.view(8, 16)
    dense = model.grown.bias.view(16, 16)  # type: ignore[union-attr,operator]
    assert all(any(torch.equal(row, other) for other in dense) for row in kept)


@pytest.mark.parametrize("between", list(BETWEEN)[1:])
def test_what_is_done_to_the_map(between: str):
    model = Net(VIEWS["view"], BETWEEN[between])
    assert found(model, Z) == WIDTHS
    cut = half(model, Z)
    assert (cut.grown.out_features, cut.conv.in_channels, cut.conv.out_channels) == (128, 8, 6)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padded_with_itself(mode: str):
    model = Net(VIEWS["view"], lambda net, x: F.pad(x, (1, 1, 1, 1), mode=mode))
    assert found(model, Z) == WIDTHS


def test_sections_of_a_group_norm():
    model = Net(VIEWS["view"], lambda net, x: net.group(x))
    graph = trace_groups(model.eval(), Z)
    assert units(graph) == WIDTHS
    assert [group.num_sections for group in graph.groups if group.name == "grown.weight:0"] == [4]
    cut = half(model, Z)
    assert (cut.grown.out_features, cut.group.num_channels, cut.group.num_groups) == (128, 8, 4)


@pytest.mark.parametrize("bias", [False, True])
def test_pointwise_convolution(bias: bool):
    model = Net(VIEWS["view"], BETWEEN["nothing"], kernel_size=1, padding=0, bias=bias)
    assert found(model, Z) == WIDTHS
    assert half(model, Z).grown.out_features == 128


class Row(nn.Module):
    """A batch norm on the row before it is a map, or a map that becomes a row again, or a sequence."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.before, self.grown, self.norm = nn.Linear(6, 20), nn.Linear(20, 256), nn.BatchNorm1d(256)
        self.conv, self.out, self.line = nn.Conv2d(16, 12, 3, padding=1), nn.Conv2d(12, 3, 1), nn.Conv1d(16, 12, 3)
        self.ends, self.flat = nn.Conv1d(12, 3, 1), nn.Linear(256, 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.grown(self.before(z).relu())
        if self.kind == "norm before":
            return self.out(self.conv(self.norm(x).relu().view(len(x), -1, 4, 4)).relu())
        if self.kind == "flattened":
            x = x.view(len(x), -1, 4, 4)
            return self.out(self.conv(x).relu()).mean((2, 3)) + self.flat((x * 2).relu().flatten(1))
        if self.kind == "transposed":
            return self.ends(self.line(x.view(len(x), 16, -1).transpose(1, 2)).relu())
        return self.ends(self.line(x.view(len(x), -1, 16)).relu())


@pytest.mark.parametrize("kind", ["norm before", "flattened", "sequence"])
def test_rows_maps_and_sequences(kind: str):
    model = Row(kind)
    last = "line" if kind == "sequence" else "conv"
    assert found(model, Z) == {"before.weight:0": 20, "grown.weight:0": 16, f"{last}.weight:0": 12}
    cut = half(model, Z)
    assert cut.grown.out_features == 128 and getattr(cut, last).out_channels == 6
    assert cut.norm.num_features == (128 if kind == "norm before" else 256)
    assert cut.flat.in_features == (128 if kind == "flattened" else 256)


# What spells out the number of channels.


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.view(len(x), 16, 4, 4),
        lambda x: x.view(-1, 16, 4, 4),
        lambda x: x.view(len(x), 16, 4, -1),
        lambda x: x.unflatten(1, (16, 4, 4)),
        lambda x: x.reshape(len(x), 4, 4, 16).permute(0, 3, 1, 2),
    ],
    ids=["view", "batch left open", "width left open", "unflatten", "channels last"],
)
def test_spelt_out_channels_stay(view: Callable[[Tensor], Tensor]):
    model = Net(view, BETWEEN["nothing"])
    assert stays(model, Z)["grown.weight:0"] == FOLLOWS
    assert found(model, Z) == {"before.weight:0": 20, "conv.weight:0": 12}
    cut = half(model, Z)
    assert (cut.before.out_features, cut.grown.out_features, cut.conv.out_channels) == (10, 256, 6)


def test_the_outputs_stay():
    class Generator(Row):
        def forward(self, z: Tensor) -> Tensor:
            return F.avg_pool2d(self.grown(self.before(z).relu()).view(len(z), -1, 4, 4), 2)

    model = Generator("")
    assert stays(model, Z)["grown.weight:0"] == OUTPUT
    assert found(model, Z) == {"before.weight:0": 20}
    assert half(model, Z).grown.in_features == 10
