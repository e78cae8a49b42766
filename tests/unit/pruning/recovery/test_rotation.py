"""Rotation: a linear stream loses its weakest directions; what is no linear stream stays as it is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isomorphic.pruning.apply import Applied, Recovery, applied_lines, apply_plan
from isomorphic.pruning.cutting.cut import cut
from isomorphic.pruning.grouping.trace import trace_groups
from isomorphic.pruning.groups import ChannelGraph
from isomorphic.pruning.plan import PruningPlan
from isomorphic.pruning.recovery.rotation import Rotation, rotate
from tests.unit.pruning.recovery.test_compensation import distance, random, randomized

IMAGES = random(64, 3, 12, 12, seed=3)


class Bottlenecks(nn.Module):
    """Two projections write a stream without an activation, two expansions read it: a MobileNet in small."""

    def __init__(self, *, activation: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU())
        self.first = nn.Sequential(nn.Conv2d(12, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.expand = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.project = nn.Sequential(nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8))
        self.last = nn.Conv2d(8, 10, 3, padding=1)  # zero padding: nothing constant may be left over
        self.head = nn.Linear(10, 5)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x))
        x = x + self.project(self.expand(x))
        x = F.relu(x) if self.activation else x
        return self.head(F.relu(self.last(x)).mean((2, 3)))


def net(**options: Any) -> Any:
    torch.manual_seed(0)
    return randomized(Bottlenecks(**options), 0.3)


@torch.no_grad()
def flattened(model: Any, rank: int) -> Any:
    """The same with a stream that fills only `rank` of its eight dims, none of which is a channel."""
    basis = torch.linalg.qr(random(8, 8, seed=9))[0][:, :rank]
    onto = basis @ basis.T
    for layer, norm in (model.first, model.project):
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        weight, bias = scale[:, None] * layer.weight.flatten(1), torch.zeros(8) if layer.bias is None else layer.bias
        bias = norm.bias + scale * (bias - norm.running_mean)
        layer.weight.copy_((onto @ weight)[:, :, None, None])
        for tensor, value in ((norm.weight, 1.0), (norm.running_mean, 0.0), (norm.running_var, 1 - norm.eps)):
            tensor.fill_(value)
        norm.bias.copy_(onto @ bias)
        if layer.bias is not None:
            layer.bias.zero_()
    return model


def stream_plan(graph: ChannelGraph, count: int) -> PruningPlan:
    """Keeps the first `count` channels of the stream and everything else."""
    is_stream = {group.name: group.name.startswith("first") for group in graph.groups}
    return PruningPlan({g.name: tuple(range(count if is_stream[g.name] else g.num_units)) for g in graph.groups})


def rotated(dense: Any, count: int, images: Tensor = IMAGES) -> tuple[Any, Rotation]:
    model, graph = copy.deepcopy(dense), trace_groups(dense, images[:2])
    plan = stream_plan(graph, count)
    found = rotate(model, graph, plan, images[:2], images)
    cut(model, graph, plan)
    return model, found


def recovered(dense: Any, count: int) -> tuple[Any, Applied]:
    model, graph = copy.deepcopy(dense), trace_groups(dense, IMAGES[:2])
    recovery = Recovery(frozenset({"compensate"}), IMAGES)
    return model, apply_plan(model, graph, stream_plan(graph, count), IMAGES[:2], recovery, self_check=True)


def test_a_stream_that_fills_few_dims_is_cut_to_them_without_loss():
    dense = flattened(net(), 5)
    model, found = rotated(dense, 5)
    assert list(found.linear.merged) == ["first.0.weight:0"] and model.last.in_channels == 5
    assert distance(model, dense, IMAGES) < 1e-9
    plain, graph = copy.deepcopy(dense), trace_groups(dense, IMAGES[:2])
    cut(plain, graph, stream_plan(graph, 5))
    assert distance(plain, dense, IMAGES) > 1e-2  # no five channels say it all


@torch.no_grad()
def test_what_is_lost_are_the_smallest_eigenvalues_of_what_readers_ask_for():
    """With one reader, of orthonormal rows, they are those of the stream's second moment."""
    torch.manual_seed(0)
    dense: Any = nn.Sequential(nn.Conv2d(3, 20, 1), nn.ReLU(), nn.Conv2d(20, 6, 1), nn.Conv2d(6, 6, 1)).eval()
    dense[3].weight.copy_(torch.linalg.qr(random(6, 6))[0][:, :, None, None])
    graph = trace_groups(dense, IMAGES[:2])
    name = "2.weight:0"
    plan = PruningPlan({g.name: tuple(range(4 if g.name == name else g.num_units)) for g in graph.groups})
    model = copy.deepcopy(dense)
    assert list(rotate(model, graph, plan, IMAGES[:2], IMAGES).linear.merged) == [name]
    cut(model, graph, plan)
    stream = dense[:3](IMAGES).movedim(1, -1).flatten(0, 2).double()
    energies = torch.linalg.eigvalsh(stream.T @ stream / len(stream))
    lost = (model(IMAGES) - dense(IMAGES)).double().square().sum(1).mean().item()
    assert lost == pytest.approx(energies[:2].sum().item(), rel=1e-3)


def test_batch_norms_have_the_moments_of_the_directions_that_go_through_them():
    model, _ = rotated(net(), 5)
    for layer, norm, reads in ((*model.first, model.stem), (*model.project, nn.Sequential(*model.first, model.expand))):
        with torch.no_grad():
            source = model.stem(IMAGES)
            made = layer(reads(IMAGES) if reads is model.stem else reads(source))
        flat = made.movedim(1, -1).flatten(0, 2)
        # of the full model: the projection reads what all eight channels made, so that little is missing
        assert (norm.running_mean - flat.mean(0)).abs().max() < 0.5 * flat.std()
        torch.testing.assert_close(norm.running_var, flat.var(0), rtol=0.5, atol=0.5)
        assert norm.weight.min() > 0


def test_an_activation_on_the_stream_is_found_by_trying():
    dense = net(activation=True)
    model, found = rotated(dense, 5)
    assert not found.linear.merged and found.linear.plain["first.0.weight:0"] == "more than linear layers lie on it"
    plain, graph = copy.deepcopy(dense), trace_groups(dense, IMAGES[:2])
    cut(plain, graph, stream_plan(graph, 5))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))


def test_compensation_begins_with_it_and_says_so():
    dense = net()
    model, done = recovered(dense, 5)
    assert done.check_error is not None and done.check_error < 1e-4
    assert done.rotated == ["first.0.weight:0"] and not done.plain
    assert "Rotated: first.0" in list(applied_lines(done))
    (judged,) = done.judged
    assert judged.step == "compensate" and judged.stays and judged.after < 0.5 * judged.before
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in dense.named_parameters()}


def test_a_compensation_that_loses_is_undone_with_its_rotation(monkeypatch: pytest.MonkeyPatch):
    def spoil(dense: Any, model: Any, *others: Any, **options: Any) -> list[Any]:
        with torch.no_grad():
            model.head.weight.neg_()
        return []

    monkeypatch.setattr("isomorphic.pruning.recovery.recover.compensate", spoil)
    dense = net()
    model, done = recovered(dense, 5)
    plain, graph = copy.deepcopy(dense), trace_groups(dense, IMAGES[:2])
    cut(plain, graph, stream_plan(graph, 5))
    assert not done.judged[0].stays and not done.rotated and done.plain == ["first.0.weight:0"]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))
