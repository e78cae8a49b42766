"""Models and files that the tests of checkpoints share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from isomorphic.checkpoints.save import save_model
from isomorphic.checkpoints.structure import METADATA_KEY
from isomorphic.models import ModelSpec, build_model, describe_model, example_inputs
from isomorphic.pruning.cutting.cut import cut
from isomorphic.pruning.grouping.trace import trace_groups
from isomorphic.pruning.ranking.ranker import Ranker, RankingRules, Ratios
from isomorphic.pruning.weights.dimap import mask
from isomorphic.pruning.weights.layer_roles import assign_roles

VIT = describe_model(
    "deit_tiny_distilled_patch16_224",
    kwargs={"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 10},
)
CONVNEXT = describe_model(
    "convnext_atto", kwargs={"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32], "num_classes": 10}, input_size=32
)
TOY = ModelSpec("torchvision", "toy")


class Toy(nn.Module):
    """What timm's models seldom have: tied weights, empty places for tensors, a buffer outside the state dict."""

    table: Tensor

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(width, width, bias=False)
        self.second = nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.width, self.pair, self.title, self._secret = width, (width, 2.5), "toy", 1
        self.register_buffer("table", torch.arange(float(width)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) + self.table


def make_toy(weights: None = None, **kwargs: Any) -> Toy:
    return Toy(**kwargs)


@pytest.fixture(autouse=True)
def known_toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_toy, "__module__", "torchvision.models.toy")  # which makes it a classifier
    monkeypatch.setitem(torchvision.models._api.BUILTIN_MODELS, "toy", make_toy)


def pruned(spec: ModelSpec) -> nn.Module:
    """The spec's model with random weights, cut to half of its widths, heads and head dims by random scores."""
    torch.manual_seed(0)
    model = build_model(spec)
    graph = trace_groups(model, example_inputs(spec))
    scores = {group.name: torch.rand(group.num_units) for group in graph.groups}
    ranker = Ranker(graph, scores, dict.fromkeys(scores, 0), RankingRules())
    cut(model, graph, ranker.plan(Ratios(0.5, heads=0.34, head_dims=0.25)))
    return model


def masked_vit() -> tuple[nn.Module, ModelSpec]:
    torch.manual_seed(0)
    model = build_model(VIT)
    masking = mask(model, assign_roles(model, example_inputs(VIT)), 0.6)
    return model, VIT.masking(masking.names)


OWN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.width, self.halves, self.nested = width, [width, width], ((width, [width]), 1.5)
        self.stem = nn.Conv2d(3, 2 * width, 3)
        self.norm = nn.BatchNorm2d(2 * width)
        self.side = nn.Linear(width, width)
        self.cell = nn.LSTM(width, 3, batch_first=True)
        self.head = nn.Linear(3 + width, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).flatten(2).mT  # (N, H·W, 2 · width)
        left, right = x.split(self.halves, dim=2)
        right = right.reshape(len(right), -1, self.nested[0][1][0])
        return self.head(torch.cat((self.side(right).mean(1), self.cell(left)[0][:, -1]), dim=1))

def build(width=4):
    return Net(width)

def stubborn(width=4):  # cannot be built without data
    net = Net(width)
    net.width = round(torch.full((), float(width)).item())
    return net
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "code" / "own.py"
    path.parent.mkdir()
    path.write_text(OWN)
    return path


class Bomb:
    """Makes the file `marker` when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """A path that exists at the end if any code in a file was run."""
    path = tmp_path / "code was run"
    yield path
    assert not path.exists()


@pytest.fixture(scope="module")
def saved_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "vit.safetensors"
    save_model(path, pruned(VIT), VIT, provenance={})
    return path


def rewritten(
    saved: Path, folder: Path, change: Callable[[dict[str, Any]], Any], tensors: dict[str, Tensor] | None = None
) -> Path:
    """A copy of a checkpoint whose header went through `change`."""
    with safe_open(saved, framework="pt") as file:
        header = json.loads(file.metadata()[METADATA_KEY])
    changed = change(header) or header
    path = folder / "changed.safetensors"
    save_file(tensors or load_file(saved), path, metadata={METADATA_KEY: json.dumps(changed)})
    return path
