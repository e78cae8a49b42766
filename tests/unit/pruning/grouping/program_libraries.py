"""Blocks of random programs as model libraries write them: helpers that remember, masks, plain tensors, decoders."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.unit.pruning.grouping.program_blocks import layer, over_space


@functools.lru_cache(maxsize=64)
def flat_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """(N, *axes, C) as (N·axes, C)."""
    rows = 1
    for size in shape[:-1]:
        rows = rows * size
    return rows, shape[-1]


@functools.lru_cache(maxsize=64)
def halves(width: int) -> list[int]:
    """Two parts of a width."""
    return [width // 2, width - width // 2]


_places: dict[int, Tensor] = {}


def places(count: int) -> Tensor:
    """0, 1, … count − 1, computed once a process."""
    if count not in _places:
        _places[count] = torch.arange(count) % 9
    return _places[count]


class Memoised(nn.Module):
    """Sizes and positions come from helpers that remember what they returned before, as einops' do."""

    def __init__(self, inputs: int, outputs: int, tokens: int, width: int, style: str) -> None:
        super().__init__()
        self.style = style
        self.one, self.out = nn.Linear(inputs, width), nn.Linear(width, outputs)
        self.table = nn.Embedding(min(tokens, 9), width) if style == "places" else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        if self.table is not None:
            return self.out(x + self.table(places(x.shape[1])))
        if self.style == "halves":
            one, two = x.split(halves(x.shape[-1]), dim=-1)
            return self.out(torch.cat([one.relu(), two.tanh()], dim=-1))
        flat = x.reshape(flat_shape(tuple(x.shape)))
        return self.out(F.gelu(flat).reshape(x.shape))


class Masked(nn.Module):
    """Some tokens are replaced, or get something added, whatever their channels."""

    def __init__(self, inputs: int, outputs: int, tokens: int, width: int, style: str) -> None:
        super().__init__()
        self.style = style
        self.one, self.out = nn.Linear(inputs, width), nn.Linear(width, outputs)
        self.token = nn.Parameter(torch.ones(width))
        self.register_buffer("chosen", torch.arange(tokens) % 3 == 1)

    def forward(self, x: Tensor) -> Tensor:
        x, chosen = self.one(x), self.get_buffer("chosen")
        mask = chosen.expand(x.shape[:2])  # (N, tokens)
        where = chosen.nonzero().flatten()
        if self.style == "assigned":
            x = x.clone()
            x[mask] = self.token
        elif self.style == "filled":
            x = x.masked_fill(mask[..., None], 0.5)
        elif self.style == "chosen":
            x = torch.where(mask[..., None], self.token, x)
        elif self.style == "added":
            x = x.index_add(1, where, self.token.expand(x.shape[0], len(where), -1))
        else:
            x = x.scatter(1, where[None, :, None].expand(x.shape[0], -1, x.shape[-1]), 0.25)
        return self.out(x)


class NumberTables(nn.Module):
    """Attention whose numbers lie in a mapping, or in pairs that were made of one, as in einops' layers."""

    def __init__(self, inputs: int, outputs: int, heads: int, head_dim: int, style: str) -> None:
        super().__init__()
        self.style = style
        self.qkv, self.out = nn.Linear(inputs, 3 * heads * head_dim), nn.Linear(heads * head_dim, outputs)
        if style == "heads in a mapping":
            self.sizes = {"heads": heads, "temperature": 0.5}
        elif style == "width in a mapping":
            self.sizes = {"heads": heads, "width": heads * head_dim, "kind": "self"}
        else:
            self.axes_lengths = {"three": 3, "h": heads} if style == "heads in pairs" else {"three": 3, "d": head_dim}
            self._axes_lengths = tuple(self.axes_lengths.items())

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        x = self.qkv(x)
        known = self.sizes if hasattr(self, "sizes") else dict(self._axes_lengths)
        heads = known.get("heads") or known.get("h") or x.shape[-1] // (3 * known["d"])
        q, k, v = x.view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
        x = ((q @ k.mT).softmax(-1) @ v).transpose(1, 2)
        return self.out(x.reshape(batch, tokens, known.get("width", x.shape[2] * x.shape[3])))


class PlainConstant(nn.Module):
    """Scales channels by a tensor that is neither a parameter nor a buffer."""

    def __init__(self, inputs: int, outputs: int, space: str, width: int, style: str) -> None:
        super().__init__()
        self.style, self.space = style, space
        self.one, self.out = layer(inputs, width, space), layer(width, outputs, space)
        factor = torch.linspace(0.5, 1.5, width, dtype=torch.float64)
        if style == "attribute":
            self.factor = factor
        elif style == "list":
            self.factors = [factor, 1 - factor]
        else:
            self.by_name = {"factor": factor}

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        if self.style == "attribute":
            return self.out(x * over_space(self.factor, self.space))
        if self.style == "list":
            first, second = self.factors
            return self.out(x * over_space(first, self.space) + over_space(second, self.space))
        return self.out(F.gelu(x) * over_space(self.by_name["factor"], self.space))


class Decoder(nn.Module):
    """A vector becomes a map: a channel is side² rows of the linear layer (or, with channels last, every C-th row)."""

    def __init__(self, inputs: int, outputs: int, width: int, side: int, style: str) -> None:
        super().__init__()
        self.style, self.width, self.side = style, width, side
        self.one = nn.Linear(inputs, width * side * side)
        self.norm, self.out = nn.BatchNorm2d(width), nn.Conv2d(width, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        if self.style == "view":
            x = x.view(x.shape[0], self.width, self.side, self.side)
        elif self.style == "inferred":
            x = x.reshape(-1, x.shape[1] // self.side**2, self.side, self.side)
        elif self.style == "unflatten":
            x = x.unflatten(1, (-1, self.side, self.side))
        else:
            x = x.view(len(x), self.side, self.side, -1).permute(0, 3, 1, 2)
        return self.out(F.relu(self.norm(x)))


class Supervised(nn.Module):
    """Blocks and a classifier; in train mode another classifier, too, on what the first block gives."""

    def __init__(self, inner: Sequence[nn.Module], first: int, inputs: int, outputs: int, style: str) -> None:
        super().__init__()
        self.style = style
        self.first, self.rest = inner[0], nn.Sequential(*inner[1:])
        self.auxiliary, self.head = nn.Linear(first, outputs), nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor] | dict[str, Tensor]:
        early = self.first(x)
        y = self.head(self.rest(early))
        if not self.training:
            return y
        auxiliary = self.auxiliary(early.mean((-2, -1)))
        return (y, auxiliary) if self.style == "tuple" else {"out": y, "aux": auxiliary}
