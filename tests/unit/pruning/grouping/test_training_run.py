"""What a model computes or returns in training only is traced in training, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isomorphic.pruning.grouping.training_run import does_more_in_training, doubled, may_do_more_in_training
from tests.unit.pruning.grouping.halves import OUTPUT, found, half, stays

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Segmenter(nn.Module):
    """A head, and an auxiliary head on earlier features; `kind` says what becomes of that in training."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.a, self.b, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.head, self.aux = nn.Conv2d(16, 3, 1), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Any:
        low = self.norm(self.a(x)).relu()
        extra, out = self.aux(low), self.head(self.b(low).relu())
        if not self.training or self.kind == "never":
            return {"out": out} if self.kind == "dict" else out
        return {
            "stack": lambda: torch.stack([out, extra], 1),
            "sum": lambda: out + 0.4 * extra,
            "dict": lambda: {"out": out, "aux": extra},
            "list": lambda: [out, extra],
            "nested": lambda: (out, {"aux": [extra]}),
            "features": lambda: (out, low),
        }[self.kind]()


WITH_AUX = ["stack", "sum", "dict", "list", "nested"]


@pytest.mark.parametrize("kind", WITH_AUX)
def test_an_auxiliary_head_makes_outputs(kind: str):
    model = Segmenter(kind)
    assert found(model, X) == {"a.weight:0": 16, "b.weight:0": 16}
    assert stays(model, X) == {"head.weight:0": OUTPUT, "aux.weight:0": OUTPUT}
    cut = half(model, X)
    assert (cut.a.out_channels, cut.b.in_channels, cut.b.out_channels) == (8, 8, 8)
    assert (cut.aux.in_channels, cut.aux.out_channels) == (8, 3)


def test_features_that_training_returns_stay():
    model = Segmenter("features")
    assert stays(model, X) == {"a.weight:0": OUTPUT, "head.weight:0": OUTPUT}
    assert found(model, X) == {"b.weight:0": 16, "aux.weight:0": 3}
    cut = half(model, X, ignore=["aux"])
    assert (cut.a.out_channels, cut.b.out_channels, cut.aux.out_channels) == (16, 8, 3)


def test_what_is_computed_in_vain_in_both_modes_is_no_output():
    model = Segmenter("never")
    assert found(model, X)["aux.weight:0"] == 3
    assert stays(model, X) == {"head.weight:0": OUTPUT}


@pytest.mark.parametrize(("kind", "more"), [(kind, True) for kind in (*WITH_AUX, "features")] + [("never", False)])
def test_more_is_noticed(kind: str, more: bool):
    """Convolutions, norm and activations are called in both modes."""
    model = Segmenter(kind).eval()
    calls: list[Any] = []

    class Notes(torch.overrides.TorchFunctionMode):  # type: ignore[name-defined]
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(func)
            return func(*args, **(kwargs or {}))

    with Notes():
        model(X)
    assert does_more_in_training(model, doubled(X), calls, [torch.Size([2, 3, 8, 8])]) is more
    assert model.training


class AsksInAHelper(nn.Module):
    """Its forward code asks for the mode in a method and a property that it names."""

    @property
    def is_trained(self) -> bool:
        return self.training

    def forward(self, x: Tensor) -> Tensor:
        return self.helped(x)

    def helped(self, x: Tensor) -> Tensor:
        return x * 2 if self.is_trained else x


class AsksElsewhere(nn.Module):
    """It asks for the mode where no forward pass comes by."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def reset(self) -> bool:
        return self.training


class Inherits(AsksInAHelper):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Decorated(nn.Module):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if self.training else x


def helper(module: nn.Module, x: Tensor) -> Tensor:
    return x * 2 if module.training else x


class AsksAFunction(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return helper(self, x)


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if not self.training else x * torch.rand(())


def test_who_may_do_more_in_training_is_seen_without_a_run():
    assert may_do_more_in_training(nn.Sequential(Segmenter("never")))
    assert may_do_more_in_training(AsksInAHelper())
    torch_s_own = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.BatchNorm1d(4), nn.LSTM(4, 4), DropPath())
    assert not may_do_more_in_training(torch_s_own)
    assert not may_do_more_in_training(AsksElsewhere())
    assert may_do_more_in_training(Inherits())
    assert may_do_more_in_training(Decorated())
    assert may_do_more_in_training(AsksAFunction())
    changed = AsksElsewhere()
    changed.forward = lambda x: x
    assert may_do_more_in_training(changed)


def test_inputs_are_doubled():
    scale = torch.tensor(2.0)
    both = doubled({"image": X, "scale": scale})
    assert isinstance(both, dict) and both["image"].shape == (4, 3, 8, 8) and both["scale"] is scale
    assert torch.equal(both["image"][:2], both["image"][2:])
