"""A model comes back as it was, whatever a cut or a forward pass did to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from isomorphic.measure.complexity import count_complexity
from isomorphic.pruning.cutting.cut import cut
from isomorphic.pruning.cutting.snapshot import Snapshot


class Helper:
    """Something of the user's that is no module."""

    def __init__(self) -> None:
        self.seen: list[int] = []


class Forgetful(nn.Module):
    """Writes into a list, a dictionary and an object that two modules share, and makes new attributes."""

    def __init__(self, helper: Helper) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.helper, self.cache, self.sizes = helper, {}, [3, 4]

    def forward(self, x: Tensor) -> Tensor:
        self.helper.seen.append(len(x))
        self.cache[len(x)] = x
        self.sizes[0] = self.latest = len(x)
        return self.layer(x)


def test_a_cut_model_comes_back(subject):
    model = subject.copy()
    tensors, dense = dict(model.state_dict(keep_vars=True)), count_complexity(model, subject.inputs)
    attributes = [dict(vars(module)) for module in model.modules()]
    snapshot = Snapshot(model)
    for seed in range(2):
        cut(model, subject.graph, subject.random_plan(seed))
        snapshot.restore()
        assert all(tensor is tensors[name] for name, tensor in model.state_dict(keep_vars=True).items())
        assert count_complexity(model, subject.inputs) == dense
    assert [vars(module).keys() for module in model.modules()] == [own.keys() for own in attributes]


def test_what_a_forward_pass_wrote_is_gone_each_time():
    helper = Helper()
    one, other = Forgetful(helper), Forgetful(helper)
    model = nn.Sequential(one, nn.Identity(), other)
    snapshot = Snapshot(model)
    for _ in range(2):
        one(torch.zeros(2, 3))
        other(torch.zeros(5, 3))
        assert one.helper.seen == [2, 5]
        one.layer = nn.Linear(3, 1)
        model.add_module("more", nn.Identity())
        snapshot.restore()
        for module in (one, other):
            assert (module.cache, module.sizes, module.helper.seen) == ({}, [3, 4], [])
            assert not hasattr(module, "latest") and module.layer.out_features == 4
        assert one.helper is other.helper and not hasattr(model, "more")


class Watched(nn.Module):
    """Installs a hook in its first forward pass, as some libraries capture what layers return."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))

    def forward(self, x: Tensor) -> int:
        if not hasattr(self, "_seen"):
            self._seen: Any = []
            self.layer.register_forward_hook(lambda module, inputs, output: self._seen.append(output))
            self.register_buffer("latest", x, persistent=False)
        self.layer(x)
        return len(self._seen)


def test_hooks_that_a_forward_pass_installs_are_gone_each_time():
    model = Watched()
    snapshot = Snapshot(model)
    for _ in range(3):
        assert model(torch.ones(2, 3)) == 1
        snapshot.restore()
        assert len(model.layer._forward_hooks) == 0 and len(model.layer._forward_pre_hooks) == 1
        assert not hasattr(model, "latest") and not model._non_persistent_buffers_set
