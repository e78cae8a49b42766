"""Streams behind layer norms lose their weakest directions; where something else lies on them, nothing is done."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isomorphic.pruning.cutting.cut import cut
from isomorphic.pruning.grouping.trace import trace_groups
from isomorphic.pruning.plan import PruningPlan
from isomorphic.pruning.recovery.normed_streams import normed_directions
from isomorphic.pruning.recovery.principal import random_turn, zero_sum_basis
from isomorphic.pruning.recovery.rotation import Rotation, rotate
from tests.unit.pruning.recovery.test_compensation import distance, random, randomized

WIDTH, TOKENS, RANK = 12, 6, 4
IMAGES = random(64, TOKENS, 5, seed=3)


class Scale(nn.Module):
    """A layer scale, as timm writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Transformer(nn.Module):
    """Two pre-norm MLPs on a stream with a class token and positions, and a head behind a norm."""

    def __init__(
        self, norm: type[nn.Module] = nn.LayerNorm, *, activation: bool = False, first_norm: bool = False
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(5, WIDTH)
        self.first_norm = norm(WIDTH) if first_norm else nn.Identity()
        self.cls = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.zeros(1, TOKENS + 1, WIDTH))
        self.norms = nn.ModuleList(norm(WIDTH) for _ in range(2))
        self.rise = nn.ModuleList(nn.Linear(WIDTH, 20) for _ in range(2))
        self.fall = nn.ModuleList(nn.Linear(20, WIDTH) for _ in range(2))
        self.scales = nn.ModuleList(Scale() for _ in range(2))
        self.norm, self.head = norm(WIDTH), nn.Linear(WIDTH, 7)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(len(x), -1, -1), self.first_norm(self.embed(x))], dim=1) + self.positions
        for norm, rise, fall, scale in zip(self.norms, self.rise, self.fall, self.scales, strict=True):
            x = x + scale(fall(rise(norm(x)).relu()))
            x = x.relu() if self.activation else x
        return self.head(self.norm(x).mean(1))


def net(*arguments: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return randomized(Transformer(*arguments, **options), 0.3).eval()


@torch.no_grad()
def flattened(model: Any, *, is_centred: bool = True) -> Any:
    """The same with a stream that fills only `RANK` dims, none of which is a channel; beside its mean if centred."""
    basis = torch.linalg.qr(random(WIDTH, WIDTH, seed=9))[0][:, :RANK]
    if is_centred:
        basis = torch.linalg.qr(basis - basis.mean(0))[0]
    onto = basis @ basis.T
    ones = torch.ones(WIDTH)
    for layer, scale in ((model.embed, ones), *zip(model.fall, (s.gamma for s in model.scales), strict=True)):
        flat = torch.diag(1 / scale) @ onto @ torch.diag(scale)  # what is written is scaled afterwards
        layer.weight.copy_(flat @ layer.weight)
        layer.bias.copy_(flat @ layer.bias)
    model.cls.copy_(model.cls @ onto)
    model.positions.copy_(model.positions @ onto)
    if is_centred:  # a mean over channels, which norms take away
        model.positions.add_(random(1, TOKENS + 1, 1, seed=11))
    return model


def prepared(model: Any, count: int) -> tuple[Any, PruningPlan, str]:
    """The graph of a model, the plan that leaves `count` of the stream's channels, and the stream's name."""
    graph = trace_groups(model, IMAGES[:2], "exact")
    stream = next(group for group in graph.groups if group.num_units == WIDTH)
    kept = {group.name: tuple(range(group.num_units)) for group in graph.groups}
    return graph, PruningPlan({**kept, stream.name: tuple(range(1, 1 + count))}), stream.name


def turned(model: Any, count: int) -> tuple[Any, Any, Rotation, Any, PruningPlan]:
    """A turned model, the same cut, what was turned, the graph and the plan."""
    graph, plan, _ = prepared(model, count)
    whole = copy.deepcopy(model)
    rotation = rotate(whole, graph, plan, IMAGES[:2], IMAGES)
    pruned = copy.deepcopy(whole)
    cut(pruned, graph, plan)
    return whole, pruned, rotation, graph, plan


@pytest.mark.parametrize(("norm", "count"), [(nn.LayerNorm, RANK + 1), (nn.RMSNorm, RANK)])
def test_a_stream_that_fills_few_dims_is_cut_to_them_without_loss(norm: type[nn.Module], count: int):
    """A layer norm takes one dim for the mean that it takes away, a norm by the root mean square none."""
    model = flattened(net(norm), is_centred=norm is nn.LayerNorm)
    graph, plan, name = prepared(model, count)
    channels = copy.deepcopy(model)
    cut(channels, graph, plan)
    _, pruned, rotation, *_ = turned(model, count)
    assert list(rotation.normed) == [name]
    assert rotation.normed[name].shape == (count, WIDTH)
    assert distance(pruned, model, IMAGES) < 1e-6 < 0.01 < distance(channels, model, IMAGES)
    _, smaller, *_ = turned(model, count - 1)
    assert distance(smaller, model, IMAGES) > 1e-5


@torch.no_grad()
def test_what_layers_read_and_write_is_told_of_the_dense_ones():
    """With nothing lost the maps are exact: scales and means on the way out, gains and shifts on the way in."""
    model = flattened(net())
    whole, pruned, rotation, graph, plan = turned(model, RANK + 1)
    mixed = rotation.mixed(model, whole, graph, plan)
    assert set(mixed.outputs) == {"embed", "fall.0", "fall.1"}
    assert set(mixed.inputs) == {"rise.0", "rise.1", "head"}
    seen: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    for place, one in enumerate((model, pruned)):
        for name in (*mixed.outputs, *mixed.inputs):
            one.get_submodule(name).register_forward_hook(
                lambda module, inputs, output, key=(place, name): seen.update({key: (inputs[0], output)})
            )
        one(IMAGES)
    for name, made in mixed.outputs.items():
        wanted = seen[0, name][1].double() @ made.factor.T + made.offset
        torch.testing.assert_close(seen[1, name][1].double(), wanted, rtol=1e-2, atol=1e-2)
    for name, read in mixed.inputs.items():
        wanted = seen[0, name][0].double() @ read.factor.T + read.offset
        torch.testing.assert_close(seen[1, name][0].double(), wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("options", [{"activation": True}, {"first_norm": True}], ids=["activation", "written normed"])
def test_what_else_lies_on_the_stream_is_found_and_nothing_is_changed(options: dict[str, Any]):
    model = net(**options)
    whole, _, rotation, *_ = turned(model, 6)
    assert not rotation.normed
    assert len(rotation.linear.plain) == 1
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), model.state_dict().values(), strict=True))


@torch.no_grad()
def test_a_reader_without_a_bias_takes_no_shift():
    """β has nowhere to go: such a stream stays, unless all of β is nought."""
    model = net()
    model.rise[0].bias = None
    _, _, rotation, *_ = turned(model, 6)
    assert not rotation.normed
    model.norms[0].bias.zero_()
    _, _, rotation, *_ = turned(model, 6)
    assert rotation.normed


def test_a_stream_of_one_channel_behind_a_layer_norm_stays():
    """Of a single number nothing is left when its mean is taken away."""
    assert not turned(net(), 1)[2].normed


def test_bases_turns_and_directions_are_orthonormal():
    basis = zero_sum_basis(3)
    expected = torch.tensor([[1, -1, 0], [1, 1, -2]], dtype=torch.float64).T / torch.tensor([2, 6]).double().sqrt()
    torch.testing.assert_close(basis, expected)
    for keeps_ones in (True, False):
        turn = random_turn(7, keeps_ones=keeps_ones)
        torch.testing.assert_close(turn @ turn.T, torch.eye(7).double())
        assert torch.allclose(turn.sum(1), torch.ones(7).double()) is keeps_ones
    moment = torch.diag(torch.tensor([9.0, 4.0, 2.0, 1.0]).double())
    forth, gain = normed_directions(moment, 2, is_centred=False)
    torch.testing.assert_close(forth.abs(), torch.eye(4).double()[[1, 0]])
    assert gain == pytest.approx((13 / 16 * 4 / 2) ** 0.5)
    centred, _ = normed_directions(moment, 2, is_centred=True)
    torch.testing.assert_close(centred.abs(), torch.tensor([[0.5**0.5, 0, 0, 0]] * 2).double())
