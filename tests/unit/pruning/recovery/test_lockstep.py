"""Two models side by side: what is seen and when, and that errors of either come out and leave nothing behind."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref

import pytest
import torch
from torch import Tensor, nn

from isomorphic.errors import UserError
from isomorphic.pruning.recovery.lockstep import Seen, run_side_by_side

IMAGES = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
NAMES = ["0", "2", "4"]


def perceptron(seed: int = 0, inplace: bool = True) -> nn.Sequential:
    torch.manual_seed(seed)
    relu = [nn.ReLU(inplace=inplace) for _ in range(2)]
    return nn.Sequential(nn.Linear(6, 6), relu[0], nn.Linear(6, 6), relu[1], nn.Linear(6, 3))


class Fails(nn.Module):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


def nothing(seen: Seen, inputs: Tensor) -> None:
    pass


def nothing_is_left(*models: nn.Module) -> bool:
    hooks = [h for model in models for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    return not hooks and not [thread for thread in threading.enumerate() if thread.name == "dense model"]


def test_every_layer_is_visited_in_order_with_what_both_saw():
    dense, pruned = perceptron(0), perceptron(1)
    made: dict[str, Tensor] = {}
    sees: dict[str, Tensor] = {}
    with torch.no_grad():
        x = y = IMAGES
        for name, layer in perceptron(0, inplace=False).named_children():
            made[name] = x = layer(x)
        for name, layer in perceptron(1, inplace=False).named_children():
            sees[name], y = y, layer(y)
    visited = []

    def visit(seen: Seen, inputs: Tensor) -> None:
        visited.append(seen.name)
        assert torch.equal(seen.outputs, made[seen.name])  # no ReLU in place has been over it
        assert torch.equal(inputs, sees[seen.name])
        assert not torch.is_grad_enabled() and not seen.outputs.requires_grad

    run_side_by_side(dense, pruned, IMAGES, NAMES, visit)
    assert visited == NAMES and nothing_is_left(dense, pruned)


def test_a_layer_makes_its_outputs_with_the_weights_that_its_visit_left():
    dense, pruned = perceptron(0), perceptron(1)

    def copy_weights(seen: Seen, inputs: Tensor) -> None:
        layer, original = pruned.get_submodule(seen.name), dense.get_submodule(seen.name)
        layer.load_state_dict(original.state_dict())
        torch.testing.assert_close(layer.forward(inputs), seen.outputs)  # since all layers before are copies, too

    run_side_by_side(dense, pruned, IMAGES, NAMES, copy_weights)
    assert torch.equal(pruned(IMAGES), dense(IMAGES))


def test_modes_come_back():
    dense, pruned = perceptron(0).train(), perceptron(1).train()
    pruned[2].eval()
    seen_modes = []

    def visit(seen: Seen, inputs: Tensor) -> None:
        seen_modes.append((dense.training, pruned.training))

    run_side_by_side(dense, pruned, IMAGES, NAMES, visit)
    assert seen_modes == [(False, False)] * 3
    assert [module.training for module in (*dense, *pruned)] == [True] * 7 + [False] + [True] * 2


@pytest.mark.parametrize("place", [0, 3, 5])
@pytest.mark.parametrize("side", ["dense", "pruned"])
@pytest.mark.parametrize("error", [RuntimeError("broken layer"), KeyboardInterrupt(), UserError("no such thing")])
def test_an_error_of_either_model_comes_out(side: str, place: int, error: BaseException):
    dense, pruned = perceptron(0).train(), perceptron(1).train()
    broken = dense if side == "dense" else pruned
    broken.insert(place, Fails(error))
    other = pruned if side == "dense" else dense
    other.insert(place, nn.Identity())
    moved = [str(int(name) + (int(name) >= place)) for name in NAMES]
    with pytest.raises(type(error)) as caught:
        run_side_by_side(dense, pruned, IMAGES, moved, nothing)
    assert caught.value is error
    assert nothing_is_left(dense, pruned) and dense.training and pruned.training


@pytest.mark.parametrize("at", NAMES)
def test_an_error_of_a_visit_comes_out(at: str):
    dense, pruned = perceptron(0), perceptron(1)

    def visit(seen: Seen, inputs: Tensor) -> None:
        if seen.name == at:
            raise ValueError("singular")

    with pytest.raises(ValueError, match="singular"):
        run_side_by_side(dense, pruned, IMAGES, NAMES, visit)
    assert nothing_is_left(dense, pruned)
    run_side_by_side(dense, pruned, IMAGES, NAMES, nothing)  # and the models work on


class Order(nn.Module):
    """Square layers that run in the order that `order` gives."""

    def __init__(self, *order: str) -> None:
        super().__init__()
        self.a, self.b, self.c, self.order = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), order

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order:
            x = self.get_submodule(name)(x)
        return x


@pytest.mark.parametrize(
    ("dense", "pruned"), [("abc", "acb"), ("ab", "abc"), ("abc", "aabc"), ("", "a"), ("bca", "abc")]
)
def test_models_that_come_to_other_layers_are_an_error(dense: str, pruned: str):
    models = Order(*dense), Order(*pruned)
    with pytest.raises(UserError, match="where the dense one does not"):
        run_side_by_side(*models, IMAGES, ["a", "b", "c"], nothing)
    assert nothing_is_left(*models)


@pytest.mark.parametrize(("dense", "pruned", "layer"), [("abc", "ab", "c"), ("abc", "", "a"), ("aab", "a", "a")])
def test_a_pruned_model_that_leaves_layers_out_is_an_error(dense: str, pruned: str, layer: str):
    models = Order(*dense).train(), Order(*pruned).train()
    with pytest.raises(UserError, match=f"the dense model comes to {layer} where the pruned one does not"):
        run_side_by_side(*models, IMAGES, ["a", "b", "c"], nothing)
    assert nothing_is_left(*models) and all(model.training for model in models)


def test_no_activation_outlives_its_visit():
    dense, pruned = (nn.Sequential(*(nn.Linear(6, 6) for _ in range(12))) for _ in range(2))
    shown: list[weakref.ref] = []
    alive: list[int] = []

    def visit(seen: Seen, inputs: Tensor) -> None:
        alive.append(sum(reference() is not None for reference in shown))
        shown.extend([weakref.ref(seen.outputs), weakref.ref(inputs)])

    run_side_by_side(dense, pruned, IMAGES, [str(n) for n in range(12)], visit)
    assert len(alive) == 12 and max(alive) <= 4  # those of the last two layers, however deep the model


class Alone(nn.Linear):
    """Asks in its forward pass, which takes a while, that no other layer is in its own."""

    lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        assert self.lock.acquire(blocking=False), "two layers compute at once"
        time.sleep(0.005)
        self.lock.release()
        return super().forward(x)


class Stubborn(nn.Module):
    """Goes on whatever happens in its first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        with contextlib.suppress(Exception):
            x = self.first(x)
        try:
            return self.second(x)
        except:  # noqa: E722 - the worst that a model can do
            return self.second(x)


def test_a_dense_model_that_catches_everything_is_stopped():
    dense, pruned = Stubborn(), nn.ModuleDict({"first": nn.Linear(6, 6), "second": nn.Linear(6, 6)})

    def forward(x: Tensor) -> Tensor:
        return pruned["second"](pruned["first"](x))

    pruned.forward = forward  # type: ignore[method-assign]

    def visit(seen: Seen, inputs: Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_side_by_side(dense, pruned, IMAGES, ["first", "second"], visit)
    assert nothing_is_left(dense, pruned)


def test_only_one_of_the_models_computes_at_any_time():
    dense, pruned = (nn.Sequential(*(Alone(6, 6) for _ in range(12))) for _ in range(2))
    run_side_by_side(dense, pruned, IMAGES, ["2", "3", "7"], nothing)


def test_many_runs_end_alike():
    dense, pruned = perceptron(0), perceptron(1)

    def sums() -> list[float]:
        found: list[float] = []
        run_side_by_side(
            dense, pruned, IMAGES, NAMES, lambda seen, x: found.append((seen.outputs.sum() - x.sum()).item())
        )
        return found

    first = sums()
    assert len(first) == 3 and all(sums() == first for _ in range(30))
