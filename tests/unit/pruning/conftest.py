"""Small models, traced once a session, and plans over their groups."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from isomorphic.pruning.classify import classify
from isomorphic.pruning.cutting.cut import cut
from isomorphic.pruning.grouping.trace import TRACERS, trace_groups
from isomorphic.pruning.groups import ChannelGraph, CoupledGroup
from isomorphic.pruning.plan import PruningPlan

VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 10}
CONVNEXT: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 48), "num_classes": 10}
SWIN: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 16,
    "depths": (2, 2, 2),
    "num_heads": (2, 4, 4),
    "num_classes": 10,
}
NAMES = ("deit", "vit", "convnext", "resnet", "cnn")  # what both tracers find all groups of


class BatchNormCnn(nn.Module):
    """A residual block, a depthwise convolution, a concatenation, a flattened map and a batch norm on vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_bn(3, 8, 3)
        self.residual = _conv_bn(8, 8, 3)
        self.depthwise = _conv_bn(8, 8, 3, groups=8, bias=True)
        self.branch = _conv_bn(8, 12, 1)
        self.join = _conv_bn(20, 6, 8, stride=8)
        self.hidden = nn.Sequential(nn.Linear(6 * 16, 14), nn.BatchNorm1d(14))
        self.head = nn.Linear(14, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.residual(x) + x)
        x = F.relu(self.depthwise(x))
        x = torch.cat([x, F.relu(self.branch(x))], dim=1)
        x = F.relu(self.join(x)).flatten(1)
        return self.head(F.relu(self.hidden(x)))


class TiedCnn(nn.Module):
    """Two convolutions share one weight, and the residual stream couples both of its dims."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 5)
        self.one, self.two = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x + F.relu(self.one(x))
        return self.head((x + F.relu(self.two(x))).mean((2, 3)))


@pytest.fixture
def tied_cnn() -> TiedCnn:
    return TiedCnn().eval()


def _conv_bn(
    inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1, bias: bool = False
) -> nn.Module:
    padding = kernel // 2 if stride == 1 else 0
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=bias), nn.BatchNorm2d(outputs)
    )


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "deit": lambda: timm.create_model("deit_tiny_distilled_patch16_224", **VIT),
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", **VIT, init_values=0.5, qkv_bias=False),
    "convnext": lambda: timm.create_model("convnext_tiny", **CONVNEXT),
    "resnet": lambda: timm.create_model("resnet10t", channels=(8, 12, 16, 24), stem_width=8, num_classes=10),
    "cnn": BatchNormCnn,
    "mobilenet": lambda: torchvision.models.mobilenet_v2(width_mult=0.25, num_classes=10),
    "swin": lambda: timm.create_model("swin_tiny_patch4_window7_224", **SWIN),
}


def _randomized(model: nn.Module) -> nn.Module:
    """Generic weights: no zeros, no ones, and batch norm statistics as after a training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + noise.abs())
            else:
                is_scale = name.endswith("weight") and tensor.dim() == 1
                tensor.add_(0.2 * noise) if is_scale else tensor.add_(0.1 * noise)
    return model.eval()


@dataclass(frozen=True)
class Subject:
    """A small model with everything that the five steps need; the tests must not change `model`."""

    name: str
    tracer: str
    model: nn.Module
    inputs: Tensor
    graph: ChannelGraph
    classes: dict[str, int]

    @property
    def groups(self) -> tuple[CoupledGroup, ...]:
        """The prunable groups."""
        return self.graph.groups

    def copy(self) -> nn.Module:
        """A model that a test may change."""
        return copy.deepcopy(self.model)

    def group(self, name: str) -> CoupledGroup:
        """The group of this name."""
        return next(group for group in self.groups if group.name == name)

    def cut(self, plan: PruningPlan) -> nn.Module:
        """A copy, cut by `plan`."""
        model = self.copy()
        cut(model, self.graph, plan)
        return model

    def random_plan(self, seed: int, only: Callable[[CoupledGroup], bool] = lambda _: True) -> PruningPlan:
        """Any plan that the model can be cut by; groups that are not wanted stay whole."""
        generator = torch.Generator().manual_seed(seed)
        kept = {}
        for group in self.groups:
            kept[group.name] = _random_units(group, generator) if only(group) else tuple(range(group.num_units))
        return PruningPlan(kept)

    @functools.cached_property
    def output(self) -> Tensor:
        """What the dense model says to `inputs`."""
        with torch.no_grad():
            return self.model(self.inputs)


def _random_units(group: CoupledGroup, generator: torch.Generator) -> tuple[int, ...]:
    """Some heads, or all blocks that are none, and of each as many units, its own choice."""

    def draw(total: int, count: int) -> list[int]:
        return sorted(torch.randperm(total, generator=generator)[:count].tolist())

    def size(total: int) -> int:
        return 1 + int(torch.randint(total, (), generator=generator))

    num_sections = size(group.num_sections) if group.heads else group.num_sections
    blocks, width = draw(group.num_sections, num_sections), size(group.section_size)
    return tuple(block * group.section_size + unit for block in blocks for unit in draw(group.section_size, width))


@functools.cache
def _subject(name: str, tracer: str = "exact") -> Subject:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _randomized(BUILDERS[name]())
    inputs = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    graph = trace_groups(model, inputs, tracer)
    return Subject(name, tracer, model, inputs, graph, classify(graph.groups))


@pytest.fixture(params=TRACERS)
def tracer(request: Any) -> str:
    """Each tracer in turn."""
    return request.param


@pytest.fixture(params=NAMES)
def subject(request: Any, tracer: str) -> Subject:
    """Each small model in turn, traced by each tracer."""
    return _subject(request.param, tracer)


@pytest.fixture
def subjects(tracer: str) -> Callable[[str], Subject]:
    """The small model of a name, traced by each tracer."""
    return functools.partial(_subject, tracer=tracer)


@pytest.fixture
def traced() -> Callable[[str, str], Subject]:
    """The small model of a name, traced by the tracer of a name."""
    return _subject


@pytest.fixture
def keep_all() -> Callable[[Iterable[CoupledGroup]], PruningPlan]:
    """The plan that removes nothing, for any groups."""
    return lambda groups: PruningPlan({group.name: tuple(range(group.num_units)) for group in groups})


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    """Three batches of images (4, 3, 32, 32) with labels in 0 … 9; the last one is smaller."""
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(size, 3, 32, 32, generator=generator), torch.randint(10, (size,), generator=generator))
        for size in (4, 4, 3)
    ]
