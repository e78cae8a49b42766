"""RNNs, graph and point-cloud networks, transformers, U-Nets: half the width goes, and what stays is the same model.

At half of every width, a pruned model must be what its constructor builds with half the widths: the same tensors in the
same shapes, and, with its weights loaded there, the same outputs. That holds for every prunable width of these models.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isomorphic.pruning.classify import classify
from isomorphic.pruning.cutting.cut import cut
from isomorphic.pruning.cutting.self_check import cut_error, masked_copy
from isomorphic.pruning.grouping.trace import trace_groups
from isomorphic.pruning.groups import ChannelGraph
from isomorphic.pruning.plan import PruningPlan
from isomorphic.pruning.ranking.ranker import Ranker, RankingRules, Ratios
from isomorphic.pruning.scoring import normalize, score_groups

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
CELLS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
RECURRENT = {
    f"{cell}-{layers}-{'both' if bidirectional else 'one'}": (cell, layers, bidirectional)
    for cell in CELLS
    for layers in (1, 2)
    for bidirectional in (False, True)
}
NAMES = (*RECURRENT, "lstm-tied", "gat", "dgcnn", "transformer-batch", "transformer-length", "unet")


class TiedLanguageModel(nn.Module):
    """The embedding's weight is the output layer's as well, so that states are as wide as words."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.recurrent = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, 11)
        self.head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.recurrent(self.embedding(words))[0])


class TransformerClassifier(nn.Module):
    """Tokens, positions, two encoder layers, a classifier of the mean."""

    def __init__(self, width: int, num_heads: int, hidden: int, *, batch_first: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.positions = nn.Parameter(torch.randn(7, 1, width))
        layer = nn.TransformerEncoderLayer(width, num_heads, hidden, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=batch_first)
        self.head = nn.Linear(width, 3)
        self.batch_first = batch_first

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words.T) + self.positions  # (length, B, width)
        if self.batch_first:
            return self.head(self.encoder(x.transpose(0, 1)).mean(1))
        return self.head(self.encoder(x).mean(0))


class UNet(nn.Module):
    """Two scales down, two up: once by a transposed convolution, once bilinear; skips are concatenated."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.outer, self.inner, self.bottom = _conv(3, width), _conv(width, 2 * width), _conv(2 * width, 4 * width)
        self.up = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.from_inner, self.from_outer = _conv(4 * width, 2 * width), _conv(3 * width, width)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        outer = self.outer(x)
        inner = self.inner(F.max_pool2d(outer, 2))
        x = self.up(self.bottom(F.max_pool2d(inner, 2)))
        x = self.from_inner(torch.cat([x, inner], dim=1))
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return self.head(self.from_outer(torch.cat([outer, x], dim=1)))


def _conv(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


@dataclass(frozen=True)
class Case:
    """A model by its width (`build(1)` has half the widths of `build(2)`) and what it runs on."""

    build: Callable[[int], nn.Module]
    inputs: Tensor


@pytest.fixture
def case_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Case]:
    """The case of a name; models of the examples come from there."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(11, (4, 7), generator=generator)

    def build_case(name: str) -> Case:
        if name in RECURRENT:
            cell, layers, bidirectional = RECURRENT[name]
            model = importlib.import_module("lstm_text").TextClassifier
            options: dict[str, Any] = {"cell": CELLS[cell], "num_layers": layers, "bidirectional": bidirectional}
            return Case(lambda n: model(11, 3 * n, 5 * n, 4, **options), words)
        if name.startswith("transformer"):
            batch_first = name.endswith("batch")
            return Case(lambda n: TransformerClassifier(8 * n, 2, 5 * n, batch_first=batch_first), words)
        if name == "gat":
            adjacency = (torch.rand(9, 9, generator=generator) < 0.4).double() + torch.eye(9)
            model = importlib.import_module("gat_graph").GAT
            features = torch.randn(2, 9, 7, generator=generator)
            return Case(lambda n: model(adjacency, 7, 3, num_heads=3, head_dim=2 * n), features)
        if name == "dgcnn":
            model = importlib.import_module("dgcnn_points").DGCNN
            points = torch.randn(3, 3, 12, generator=generator)
            return Case(lambda n: model((4 * n, 5 * n, 6 * n), 7 * n, 5 * n, 3, k=4), points)
        if name == "unet":
            return Case(lambda n: UNet(3 * n), torch.randn(2, 3, 12, 12, generator=generator))
        return Case(lambda n: TiedLanguageModel(3 * n), words)

    return build_case


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest, case_of: Callable[[str], Case]) -> Case:
    """Each architecture in turn."""
    return case_of(request.param)


def randomized(model: nn.Module) -> nn.Module:
    """Generic weights in double precision: no zeros, no ones, norm statistics as after a training."""
    model.double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator, dtype=torch.float64))
    return model.eval()


def halved(model: nn.Module, inputs: Tensor, ranking: str) -> tuple[nn.Module, ChannelGraph, PruningPlan]:
    """A copy of `model` without half of the width, the groups of `model`, and the plan."""
    graph = trace_groups(model, inputs, tracer="exact")
    scores = {name: normalize(values, "mean") for name, values in score_groups(model, graph.groups, "l2").items()}
    plan = Ranker(graph, scores, classify(graph.groups), RankingRules(ranking)).plan(Ratios(0.5))
    pruned = copy.deepcopy(model)
    cut(pruned, graph, plan)
    return pruned, graph, plan


def on(case: Case) -> Tensor:
    return case.inputs.double() if case.inputs.is_floating_point() else case.inputs


def dense(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return randomized(case.build(2))


def test_local_pruning_gives_the_same_architecture_at_half_the_width(case: Case):
    model, inputs = dense(case), on(case)
    pruned, graph, plan = halved(model, inputs, "local")
    narrow = case.build(1).double().eval()
    assert {name: t.shape for name, t in pruned.state_dict().items()} == {
        name: t.shape for name, t in narrow.state_dict().items()
    }
    narrow.load_state_dict(pruned.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(pruned(inputs), narrow(inputs), rtol=0, atol=1e-12)
    assert cut_error(masked_copy(model, graph, plan), pruned, inputs) < 1e-9


def test_isomorphic_pruning_halves_each_class_and_computes_what_masking_does(case: Case):
    model, inputs = dense(case), on(case)
    pruned, graph, plan = halved(model, inputs, "isomorphic")
    assert cut_error(masked_copy(model, graph, plan), pruned, inputs) < 1e-9
    classes = classify([group for group in graph.groups if group.has_width])
    for number in set(classes.values()):
        members = [group for group in graph.groups if classes.get(group.name) == number]
        total, kept = sum(g.num_units for g in members), sum(len(plan.kept[g.name]) for g in members)
        assert abs(kept - total / 2) <= max(g.num_sections for g in members) / 2


@pytest.mark.parametrize("ranking", ["local", "isomorphic"])
def test_a_pruned_model_trains(case: Case, ranking: str):
    inputs = on(case)
    pruned, *_ = halved(dense(case), inputs, ranking)
    pruned.train()
    pruned(inputs).square().mean().backward()
    for name, parameter in pruned.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.shape == parameter.shape, name
