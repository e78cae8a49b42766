"""Watching a model run: calls are told of while the context lasts, and modes and hooks are as before it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from isomorphic.observe import FunctionCalls, eval_mode, modes_kept, module_calls


@pytest.fixture
def model() -> nn.Sequential:
    """One layer that trains, and a dropout that does not."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout())
    model[1].eval()
    return model


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("train", [True, False])
def test_modes_are_put_back_whatever_happens_inside(model: nn.Sequential, train: bool):
    before = modes(model)
    with pytest.raises(KeyError), modes_kept(model):
        model.train(train)
        raise KeyError
    assert modes(model) == before == [True, True, False]


def test_eval_mode_holds_inside_alone(model: nn.Sequential):
    with eval_mode(model):
        assert modes(model) == [False, False, False]
    assert modes(model) == [True, True, False]


def test_eval_mode_of_a_model_in_eval_mode_calls_nothing_of_it(model: nn.Sequential):
    """Some keep what an eval run made until they are told their mode again."""
    model.eval()
    model.train = lambda mode=True: pytest.fail("told its mode")  # type: ignore[method-assign]
    with eval_mode(model):
        assert modes(model) == [False, False, False]


class Scaled(nn.Module):
    def forward(self, x: torch.Tensor, *, by: float) -> torch.Tensor:
        return x * by


def test_calls_of_modules_are_told_of_by_name_and_in_order():
    module, seen = Scaled(), []

    def before(name, positional, keyword):
        seen.append((name, positional[0].item(), keyword))

    def after(name, outputs):
        seen.append((name, outputs.item()))

    with module_calls({"scaled": module}, before=before, after=after):
        module(torch.tensor(3.0), by=2.0)
    module(torch.tensor(5.0), by=2.0)
    assert seen == [("scaled", 3.0, {"by": 2.0}), ("scaled", 6.0)]
    assert not module._forward_pre_hooks and not module._forward_hooks


def test_a_module_with_two_names_is_told_of_twice():
    layer, seen = nn.Identity(), []
    with module_calls({"a": layer, "b": layer}, after=lambda name, outputs: seen.append(name)):
        layer(torch.zeros(1))
    assert seen == ["a", "b"]


def test_calls_of_functions_are_told_of_with_all_arguments():
    seen, x, weight = [], torch.ones(1, 3), torch.ones(4, 3)
    with FunctionCalls(
        before=lambda func, arguments: seen.append((func, len(arguments))),
        after=lambda func, arguments, output: seen.append((func, tuple(output.shape))),
    ):
        F.linear(x, weight, bias=None)
    F.linear(x, weight)
    assert seen == [(F.linear, 3), (F.linear, (1, 4))]


def test_a_call_that_fails_is_told_of_before_it_and_not_after():
    seen, x, weight = [], torch.ones(1, 3), torch.ones(4, 2)
    with (
        pytest.raises(RuntimeError),
        FunctionCalls(before=lambda *call: seen.append("before"), after=lambda *call: seen.append("after")),
    ):
        F.linear(x, weight)
    assert seen == ["before"]
