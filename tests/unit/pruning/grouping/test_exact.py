"""The tracer's face: what it finds whichever way a model runs, and what it leaves behind."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isomorphic.pruning.grouping import exact
from tests.unit.pruning.grouping.cutting import Net, error_of_random_cut, randomized, why_frozen

TOKENS = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
OUTPUT = "it reaches the model's output"


def net(function, **parts: Any):
    """Widths 3, 6 and 4, and what else is asked for."""
    return randomized(Net(function, **{"one": nn.Linear(3, 6), "two": nn.Linear(6, 4), **parts}))


def sizes(graph):
    return {group.name: group.num_units for group in graph.groups}


def plain(m, x):
    return m.two(F.relu(m.one(x)))


def data_dependent(m, x):
    """Runs on real data alone."""
    return plain(m, x) * x.abs().max().item()


def broken(m, x):
    plain(m, x)
    raise ValueError("no way through")


# --- how it was before --------------------------------------------------------------------------------------


class Everything(nn.Module):
    """Attributes of many kinds, a norm with statistics, dropout, shared and frozen parameters, a hook, heads."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function, self.num_heads, self.shape, self.split = function, 3, (3, 2), [2, 4]
        self.one, self.norm, self.two = nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)
        self.drop, self.aux = nn.Dropout(0.5), nn.Linear(6, 2)
        self.again = self.two
        self.two.weight.requires_grad_(False)
        self.calls = 0
        self.one.register_forward_hook(lambda *_: None)

    def forward(self, x):
        x = self.norm(self.one(x).mT).mT.unflatten(-1, self.shape).flatten(2)
        x = torch.cat(x.split(self.split, -1), -1)
        if self.training:
            return self.function(self, x), self.aux(self.drop(x))
        return self.function(self, x)


def state_of(model):
    """All that could be left changed, tensors by value."""
    modules = {}
    for name, module in model.named_modules(remove_duplicate=False):
        own = {key: value for key, value in vars(module).items() if not key.startswith("_")}
        modules[name] = (own, [type(value) for value in own.values()], len(module._forward_hooks))
        modules[name] += ([type(entry) for value in own.values() if type(value) in (tuple, list) for entry in value],)
    tensors = {name: (id(t), t.requires_grad, t.grad) for name, t in model.state_dict(keep_vars=True).items()}
    flags = (torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled)
    return modules, tensors, flags, dict(vars(math)), torch.is_inference_mode_enabled(), torch.is_grad_enabled()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "function", [lambda m, x: m.two(x), lambda m, x: m.two(x) * x.mean().item()], ids=["shapes", "data"]
)
def test_the_model_is_left_as_it_was(function, training):
    model = Everything(function).train(training)
    before, values, seed = state_of(model), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    images = TOKENS.clone()
    assert exact.trace(model, images).groups
    assert state_of(model) == before
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), seed) and torch.equal(images, TOKENS)


@pytest.mark.parametrize("asks_first", [False, True])
def test_the_model_is_left_as_it_was_when_its_forward_fails(asks_first):
    def fails(m, x):
        if asks_first:
            x.sum().item()
        raise ValueError("no way through")

    model = Everything(fails)
    before, values = state_of(model), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="no way through"):
        exact.trace(model, TOKENS)
    assert state_of(model) == before
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def test_an_error_of_another_kind_is_not_taken_for_a_question_for_data():
    """Ctrl-C, or a module that is missing: one run is enough to know."""
    runs = []

    def interrupted(m, x):
        runs.append(x.device.type)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        exact.trace(net(interrupted), TOKENS)
    assert runs == ["meta"]


def test_inputs_are_left_as_they_were():
    tokens = TOKENS.clone()
    exact.trace(net(lambda m, x: data_dependent(m, x.add_(1))), tokens)
    assert torch.equal(tokens, TOKENS)


@pytest.mark.parametrize("function", [plain, data_dependent])
def test_two_traces_are_equal(function):
    """Member by member, whatever the random state."""
    model = net(function)
    torch.manual_seed(1)
    first = exact.trace(model, TOKENS)
    torch.manual_seed(2)
    second = exact.trace(model, TOKENS)
    assert dataclasses.replace(first, groups=()) == dataclasses.replace(second, groups=())
    for one, other in zip(first.groups, second.groups, strict=True):
        assert dataclasses.replace(one, members=()) == dataclasses.replace(other, members=())
        for member, same in zip(one.members, other.members, strict=True):
            assert (member.name, member.dim, member.node) == (same.name, same.dim, same.node)
            assert torch.equal(member.index, same.index)


# --- which way it runs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        data_dependent,
        lambda m, x: m.two(m.one(x)) if x.sum() > -1e9 else x,
        lambda m, x: m.two(m.one(x)[:, x[0, :, 0].abs().argsort()[:3].tolist()]),
        lambda m, x: m.two(m.one(x) + torch.from_numpy(x.numpy()).mean()),
    ],
)
def test_a_forward_that_depends_on_data_runs_on_data(function):
    model = net(function)
    graph = exact.trace(model, TOKENS)
    assert sizes(graph) == {"one.weight:0": 6} and why_frozen(graph) == {"two.weight:0": OUTPUT}
    assert error_of_random_cut(model, graph, TOKENS) < 1e-9


def test_values_that_leave_torch_take_their_units_along():
    """They may come back in any order."""

    def around(m, x):
        return m.two(torch.tensor(m.one(x).flatten().tolist()).view(2, 5, 6))

    assert "one.weight:0" in exact.trace(net(around), TOKENS).frozen


def test_several_inputs_and_such_that_are_no_tensors():
    def forward(m, x, times, y=None):
        return m.two(m.one(x) * times) if y is None else m.two(m.one(x) + y.unsqueeze(-1))

    inputs = (TOKENS, 2, torch.ones(2, 5))
    model = net(forward)
    graph = exact.trace(model, inputs)
    assert sizes(graph) == {"one.weight:0": 6}
    assert error_of_random_cut(model, graph, inputs) < 1e-9


def test_a_branch_of_the_training_is_found():
    """An auxiliary classifier reads the channels, too, and has some of its own."""

    def forward(m, x):
        x = m.one(x)
        return (m.two(x), m.aux_head(F.relu(m.aux(x)))) if m.training else m.two(x)

    model = net(forward, aux=nn.Linear(6, 5), aux_head=nn.Linear(5, 4))
    graph = exact.trace(model, TOKENS)
    assert sizes(graph) == {"one.weight:0": 6, "aux.weight:0": 5}
    assert ("aux", 1) in {(m.module, m.dim) for m in graph.groups[[*sizes(graph)].index("one.weight:0")].members}
    assert why_frozen(graph) == {"two.weight:0": OUTPUT, "aux_head.weight:0": OUTPUT}


def test_a_training_branch_that_needs_more_than_it_is_given_is_left_alone():
    def forward(m, x, targets: Any = None):
        x = m.one(x)
        return m.two(x) if not m.training else F.mse_loss(m.aux(x), targets)

    graph = exact.trace(net(forward, aux=nn.Linear(6, 5)), TOKENS)
    assert str(graph.frozen["two.weight:0"]) == OUTPUT
    (group,) = (group for group in graph.groups if group.name == "one.weight:0")
    assert group.num_units == 6


def test_batch_norms_of_a_single_value_are_no_obstacle():
    """In training mode they want more than one."""
    model = net(lambda m, x: m.two(m.norm(m.one(x[:, 0]))), norm=nn.BatchNorm1d(6), unused=nn.Linear(2, 2))
    assert sizes(exact.trace(model, TOKENS[:1])) == {"one.weight:0": 6}


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script.*:FutureWarning", "ignore:.*torch.jit.script.*:DeprecationWarning"
)
def test_torchscript_code_that_reshapes_freezes():
    """Its sizes are hidden; what it computes element by element is not."""
    reshape, activate = torch.jit.script(reshaped), torch.jit.script(activated)
    graph = exact.trace(net(lambda m, x: m.two(reshape(m.one(x), 2))), TOKENS)
    assert str(graph.frozen["one.weight:0"]) == "TorchScript code reshapes it"
    assert sizes(exact.trace(net(lambda m, x: m.two(activate(m.one(x)))), TOKENS)) == {"one.weight:0": 6}


def activated(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def reshaped(x: Tensor, rows: int) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1], rows, -1).flatten(2)


# --- outputs ------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "logits features")


@dataclasses.dataclass
class Result:
    logits: Tensor


class Box:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Mine(dict):
    pass


@pytest.mark.parametrize(
    "pack",
    [
        lambda x: [x],
        lambda x: {"logits": [None, (x,)]},
        lambda x: OrderedDict(logits=x),
        lambda x: Pair(x, 3),
        Mine,
        Result,
        Box,
    ],
    ids=["list", "nested", "ordered", "named tuple", "mapping", "dataclass", "object"],
)
def test_whatever_outputs_come_in_they_stay(pack):
    model = net(lambda m, x: pack({"logits": plain(m, x)} if pack is Mine else plain(m, x)))
    graph = exact.trace(model, TOKENS)
    assert sizes(graph) == {"one.weight:0": 6} and why_frozen(graph) == {"two.weight:0": OUTPUT}
