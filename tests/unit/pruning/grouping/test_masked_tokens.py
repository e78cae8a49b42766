"""Masked assignments and scatters over tokens: all channels of a token are written together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.pruning.grouping.halves import OUTPUT, found, half, stays
from tests.versions import IS_NEWEST_TORCH

X = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
WIDTHS = {"a.weight:0": 16, "fc1.weight:0": 24}
Code = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


class Net(nn.Module):
    """Tokens (B, 5, 16), of which `code` writes those where the mask (B, 5) is true, and an MLP."""

    def __init__(self, code: Code) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.code = code
        self.a, self.other = nn.Linear(3, 16), nn.Linear(3, 16)
        self.fc1, self.fc2, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 4)
        self.token = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        mask = torch.zeros(h.shape[:2], dtype=torch.bool, device=h.device)
        mask[:, 1:3] = True
        h = self.code(self, h, mask, x)
        return self.head(h + self.fc2(self.fc1(h).relu()))


def _assigned(h: Tensor, index: Any, value: Any) -> Tensor:
    h = h.clone()
    h[index] = value
    return h


def _picked(x: Tensor) -> Tensor:
    return x[:, 1:3]


def _at(h: Tensor, *places: int) -> Tensor:
    return torch.tensor(places, device=h.device)


CODES: dict[str, Code] = {
    "token in training": lambda net, h, mask, x: _assigned(h, mask, net.token) if net.training else h,
    "token": lambda net, h, mask, x: _assigned(h, mask, net.token.to(h.dtype)),
    "token at times": lambda net, h, mask, x: _assigned(h, (slice(None), mask[0]), net.token),
    "token at places": lambda net, h, mask, x: _assigned(h, mask.nonzero(as_tuple=True), net.token),
    "zero": lambda net, h, mask, x: _assigned(h, mask, 0),
    "masked_fill": lambda net, h, mask, x: h.masked_fill(mask[..., None], 0.0),
    "where": lambda net, h, mask, x: torch.where(mask[..., None], net.token, h),
    "read": lambda net, h, mask, x: h[mask].view(len(h), 2, h.shape[-1]),
    "layer's outputs": lambda net, h, mask, x: _assigned(h, mask, net.other(x[mask])),
    "masked_scatter": lambda net, h, mask, x: h.masked_scatter(
        mask[..., None].expand_as(h), net.other(_picked(x).reshape(-1, 3))
    ),
    "masked_scatter, mask broadcast": lambda net, h, mask, x: h.masked_scatter(
        mask[..., None], net.other(_picked(x).reshape(-1, 3))
    ),
    "index_add": lambda net, h, mask, x: h.index_add(1, _at(h, 1, 2), net.other(_picked(x))),
    "index_copy": lambda net, h, mask, x: h.index_copy(1, _at(h, 1, 2), net.other(_picked(x))),
    "index_fill": lambda net, h, mask, x: h.index_fill(1, _at(h, 1), 0.0),
    "scatter_add": lambda net, h, mask, x: h.scatter_add(
        1, torch.ones(len(h), 2, h.shape[-1], dtype=torch.long, device=h.device), net.other(_picked(x))
    ),
}


@pytest.mark.parametrize("code", CODES)
def test_tokens_are_written(code: str):
    model = Net(CODES[code])
    # the other layer, or the token, goes with the stream that it is written to
    unused = {name: size for name, size in found(model, X).items() if name not in WIDTHS}
    assert found(model, X) == {**WIDTHS, **unused} and not {"fc2.weight:0", "head.weight:0"} & set(unused)
    cut = half(model, X)
    assert (cut.a.out_features, cut.fc1.out_features, cut.head.in_features) == (8, 12, 8)
    if "token" in code or code == "where":
        assert cut.token.shape == (8,)
    if "scatter" in code or "index_add" in code or "layer" in code or "index_copy" in code:
        assert cut.other.out_features == 8


def _channels(net: Any, h: Tensor, mask: Tensor, x: Tensor) -> Tensor:
    mask = torch.zeros(len(h), h.shape[-1], dtype=torch.bool, device=h.device)
    mask[:, 1] = True
    return _assigned(h.transpose(1, 2), mask, 0.0).transpose(1, 2)


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (_channels, "one of its units is picked by number"),
        (lambda net, h, mask, x: h.index_fill(2, _at(h, 1), 0.0), None),
        (lambda net, h, mask, x: h.index_add(2, _at(h, 1, 2), net.other(x)[..., 1:3]), None),
    ],
    ids=["mask", "index_fill", "index_add"],
)
def test_channels_that_are_written_by_number_stay(code: Code, why: str | None):
    model = Net(code)
    reasons = stays(model, X)
    assert {"a.weight:0", "fc2.weight:0"} <= set(reasons) and reasons["head.weight:0"] == OUTPUT
    if why and IS_NEWEST_TORCH:  # older versions write by a mask in another operation
        assert reasons["a.weight:0"] == reasons["fc2.weight:0"] == why
    assert found(model, X)["fc1.weight:0"] == 24
    cut = half(model, X)
    assert (cut.a.out_features, cut.fc1.out_features) == (16, 12)
