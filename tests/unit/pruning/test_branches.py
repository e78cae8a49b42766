"""Branches of the forward code that the traced inputs do not take: what is said of them, and of data that take them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import isomorphic as iso
from isomorphic.errors import UserError

SEEN, SENT = torch.randn(1, 3), torch.cat([torch.ones(3, 3), -torch.ones(3, 3)])
UNUSED = "the forward code does not use it on these inputs"


class Condition(nn.Module):
    """A layer that only a second input calls for."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.e, self.c, self.o = nn.Linear(3, width), nn.Linear(2, width), nn.Linear(width, 4)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        y = self.e(x)
        return self.o((y if cond is None else y + self.c(cond)).relu())


class Normed(nn.Module):
    """One whose parameters have a single dim each."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.norm, self.o = nn.Linear(3, 16), nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        y = self.e(x)
        return self.o((y if cond is None else self.norm(y)).relu())


class Mixture(nn.Module):
    """Experts, to which tokens are sent by their sign."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.o = nn.Linear(3, 16), nn.Linear(16, 4)
        self.experts = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        out = y.clone()
        for sign, expert in enumerate(self.experts):
            mine = (x[:, 0] > 0) == bool(sign)
            if mine.any():
                out[mine] = expert(y[mine])
        return self.o(out.relu())


def square(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).square().mean()


BATCH = {"x": torch.randn(4, 3), "cond": torch.randn(4, 2)}
CASES: list[tuple[Callable[[], nn.Module], Any, Any, str]] = [
    (Condition, SEEN, BATCH, "c"),
    (Normed, SEEN, BATCH, "norm"),
    (Mixture, torch.ones(2, 3), {"x": SENT}, "experts.0"),
]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        {"criterion": "taylor", "steps": 1},
        {"criterion": "hessian", "steps": 1},
        {"criterion": "l2", "steps": 1},
        {"criterion": "taylor", "steps": 3},
    ],
)
@pytest.mark.parametrize(("make", "inputs", "batch", "layer"), CASES)
def test_data_that_take_other_branches_are_refused(
    make: Callable[[], nn.Module], inputs: Any, batch: Any, layer: str, how: dict[str, Any], inplace: bool
):
    torch.manual_seed(0)
    model = make().train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=f"that the inputs do not: {layer} was not traced.*ignore"):
        iso.prune(model, inputs, ratio=0.5, data=[batch], loss=square, inplace=inplace, **how)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.state_dict().keys() == before.keys() and all(module.training for module in model.modules())


def test_the_advice_helps():
    both: Any = iso.prune(Condition(), BATCH, ratio=0.5, data=[BATCH], loss=square).model
    assert both(**BATCH).shape == (4, 4) and both.c.out_features == 8
    spared = iso.prune(Mixture(), torch.ones(2, 3), ratio=0.5, ignore=["stem"], data=[{"x": SENT}], loss=square)
    assert spared.model(SENT).shape == (6, 4)


class Twice(nn.Module):
    """Its condition meets a stream that is not cut; another layer can be."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.c = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 4)), nn.Linear(2, 4)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.net(x) if cond is None else self.net(x) + self.c(cond)


def test_what_fits_is_cut_and_a_generator_is_enough():
    cut: Any = iso.prune(Twice(), SEEN, ratio=0.5, data=(one for one in [BATCH]), loss=square).model
    assert cut(**BATCH).shape == (4, 4) and cut.net[0].out_features == 8
    pairs = [(torch.randn(4, 3), torch.arange(4))]  # cross entropy: the inputs are the first part
    cut = iso.prune(Condition(), SEEN, ratio=0.5, data=pairs).model
    assert cut.e.out_features == 8


def test_a_loss_that_fails_by_itself_blames_no_branch():
    def narrow(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        wanted = torch.zeros(16)
        return (model.get_submodule("e")(batch["x"]) - wanted).square().mean() + model(batch["x"]).sum()

    cut: Any = iso.prune(Condition(), SEEN, ratio=0.5, data=[BATCH], loss=narrow).model
    assert cut.e.out_features == 8  # the sum of 8 and 16 fails outside of the model


def test_what_is_not_traced_is_told():
    told = str(iso.trace(Condition(), SEEN))
    assert f"Kept: c ({UNUSED})" in told
    assert "Not traced: c (if your data take that branch, give inputs that take it, too)" in told
    assert "Not traced: norm (if" in str(iso.prune(Normed(), SEEN, ratio=0.5, criterion="l2"))
    assert "Not traced" not in str(iso.trace(Condition(), BATCH))
    assert "Not traced: experts.0 (if" in str(iso.trace(Mixture(), torch.ones(2, 3)))
