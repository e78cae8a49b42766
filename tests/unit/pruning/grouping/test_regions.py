"""Regions of maps and deformable convolutions, as detectors use them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import ops

from isomorphic.pruning.grouping.trace import trace_groups
from tests.unit.pruning.grouping.halves import OUTPUT, found, half, stays, units

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
BOXES = [[0, 0.0, 0.0, 8.0, 8.0], [0, 2.0, 2.0, 12.0, 14.0], [0, 4.0, 1.0, 15.0, 9.0]]  # image, x, y, x, y
MOVED = "deform_conv2d moves over it"


class Deformable(nn.Module):
    """A stem, offsets and a mask from it, a deformable convolution, and a head."""

    def __init__(self, offset_groups: int = 1, groups: int = 1, masked: bool = True, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.masked = masked
        self.a, self.offsets = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 18 * offset_groups, 3, padding=1)
        self.mask = nn.Conv2d(16, 9 * offset_groups, 3, padding=1)
        self.deform = ops.DeformConv2d(16, 12, 3, padding=1, groups=groups, bias=bias)
        self.norm, self.head = nn.BatchNorm2d(12), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        mask = self.mask(x).sigmoid() if self.masked else None
        return self.head(self.norm(self.deform(x, self.offsets(x), mask)).relu())


@pytest.mark.parametrize("offset_groups", [1, 2, 4])
@pytest.mark.parametrize("masked", [True, False])
def test_a_deformable_convolution(offset_groups: int, masked: bool):
    model: Any = Deformable(offset_groups, masked=masked, bias=masked)
    graph = trace_groups(model.eval(), X)
    assert {name: n for name, n in units(graph).items() if name != "mask.weight:0"} == {
        "a.weight:0": 16,
        "deform.weight:0": 12,
    }
    (stem,) = (group for group in graph.groups if group.name == "a.weight:0")
    assert stem.num_sections == offset_groups  # each keeps equally many
    why = stays(model, X)
    assert why["offsets.weight:0"] == MOVED and why["head.weight:0"] == OUTPUT
    assert why.get("mask.weight:0") == (MOVED if masked else None)
    cut = half(model, X)
    assert cut.a.out_channels == 8
    assert tuple(cut.deform.weight.shape) == (6, 8, 3, 3) and cut.norm.num_features == cut.head.in_channels == 6
    assert (cut.offsets.in_channels, cut.offsets.out_channels) == (8, 18 * offset_groups)
    kept = {row.item() for row in cut.a.bias}
    for part in model.a.bias.view(offset_groups, -1):
        assert len(kept & {row.item() for row in part}) == 8 // offset_groups


def test_a_deformable_convolution_with_groups():
    model = Deformable(groups=2)
    # a channel of each group is one unit
    assert found(model, X) == {"a.weight:0": 8, "deform.weight:0": 12}
    cut = half(model, X)
    assert (cut.a.out_channels, tuple(cut.deform.weight.shape), cut.deform.groups) == (8, (6, 4, 3, 3), 2)


@pytest.mark.parametrize(("groups", "channels"), [(1, (8, 6)), (2, (8, 6)), (4, (8, 8))])  # 2 of 3
def test_its_attributes_follow(groups: int, channels: tuple[int, int]):
    deform = half(Deformable(groups=groups), X).deform
    assert (deform.in_channels, deform.out_channels) == channels
    assert (deform.weight.shape[1] * groups, deform.weight.shape[0]) == channels


class Detector(nn.Module):
    """A map, regions of it as `kind` makes them, and two layers on each region: classes and boxes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.deform = kind, Deformable()
        self.deform.head = nn.Conv2d(12, 36, 1)
        self.region, self.box = nn.Linear(4 * 9 if kind.startswith("ps") else 36 * 9, 10), nn.Linear(10, 4)
        self.logits, self.conv = nn.Linear(10, 2), nn.Conv2d(36, 10, 3)

    def regions(self, x: Tensor, boxes: Tensor) -> Any:
        """Small maps (K, C, 3, 3) of the map (N, 36, 16, 16)."""
        if self.kind == "roi_pool":
            return ops.roi_pool(x, boxes, 3)
        if self.kind == "ps_roi_align":
            return ops.ps_roi_align(x, boxes, 3)
        if self.kind == "ps_roi_pool":
            return ops.ps_roi_pool(x, boxes, 3)
        if self.kind == "two levels":
            return ops.roi_align(x, boxes, 3) + ops.roi_align(nn.functional.avg_pool2d(x, 2), boxes, 3, 0.5)
        return ops.roi_align(x, boxes, 3, aligned=True)

    def forward(self, x: Tensor) -> Any:
        boxes = torch.tensor(BOXES, device=x.device, dtype=x.dtype)
        regions = self.regions(self.deform(x).relu(), boxes)
        regions = self.conv(regions).flatten(1) if self.kind == "convolution" else self.region(regions.flatten(1))
        return self.logits(regions.relu()), self.box(regions.relu())


@pytest.mark.parametrize("kind", ["roi_align", "roi_pool", "two levels", "convolution", "ps_roi_align", "ps_roi_pool"])
def test_regions_of_a_map(kind: str):
    model = Detector(kind)
    of_map = 4 if kind.startswith("ps") else 36  # nine channels of the map are one of the regions
    layer = "conv" if kind == "convolution" else "region"
    graph = units(trace_groups(model.eval(), X))
    assert graph == {
        "deform.a.weight:0": 16,
        "deform.deform.weight:0": 12,
        "deform.head.weight:0": of_map,
        f"{layer}.weight:0": 10,
    }
    assert stays(model, X, "deform") == {"box.weight:0": OUTPUT, "logits.weight:0": OUTPUT}
    cut = half(model, X)
    assert (len(cut.deform.deform.weight), cut.deform.head.out_channels) == (6, 18)
    assert cut.box.in_features == cut.logits.in_features == 5
    assert cut.region.in_features == {"convolution": 324, "ps_roi_align": 18, "ps_roi_pool": 18}.get(kind, 162)


class BoxesFromChannels(Detector):
    """The map's own channels are the boxes: what the regions are picked by stays."""

    def __init__(self) -> None:
        super().__init__("roi_align")
        self.propose = nn.Linear(36, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.deform(x).relu()
        corners = self.propose(x.mean((2, 3))).sigmoid() * 8
        boxes = torch.cat([torch.zeros_like(corners[:, :1]), corners[:, :2], corners[:, 2:] + 8], 1)
        regions = self.region(self.regions(x, boxes).flatten(1))
        return self.logits(regions.relu()), self.box(regions.relu())


def test_boxes_that_a_layer_proposes_stay():
    model = BoxesFromChannels()
    assert stays(model, X, "deform")["propose.weight:0"] == "roi_align picks regions from it"
    cut = half(model, X)
    assert (cut.propose.in_features, cut.propose.out_features, cut.deform.head.out_channels) == (18, 4, 18)
