"""Code as it is found in models of all kinds: what it makes prunable, and that what is cut is exact."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isomorphic.pruning.grouping.trace import trace_groups
from tests.unit.pruning.grouping.cutting import cut_copy, error_of_random_cut, random_plan, randomized

IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Separate projections; the scale is the root of an attribute, in the forward code."""

    def __init__(self, scaled: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size = 2, 6
        self.embed = nn.Linear(3, 8)
        self.query, self.key, self.value = (nn.Linear(8, 12) for _ in range(3))
        self.dense, self.head = nn.Linear(12, 8), nn.Linear(8, 4)
        self.scaled = scaled

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = (
            layer(x).view(*x.shape[:-1], self.num_attention_heads, self.attention_head_size).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        weights = self.scaled(self, q @ k.transpose(-1, -2)).softmax(-1)
        return self.head(x + self.dense((weights @ v).transpose(1, 2).flatten(2)))


class NormedAttention(nn.Module):
    """A norm over the dims of each head before queries and keys meet."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 2, 6
        self.embed, self.qkv, self.proj, self.head = (
            nn.Linear(3, 8),
            nn.Linear(8, 36),
            nn.Linear(12, 8),
            nn.Linear(8, 4),
        )
        self.q_norm, self.k_norm = norm(6), norm(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind()
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.head(x + self.proj(out.transpose(1, 2).flatten(2)))


class LearnedQueries(nn.Module):
    """Tokens of the model's own ask those of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(4, 8))
        self.embed, self.norm, self.head = nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x, y = self.embed(x), self.norm(self.queries)[None].expand(len(x), -1, -1)
        return self.head(y + self.attention(y, x, x)[0])


class SpectralNorm(nn.Module):
    """Weights that are divided by their largest singular value."""

    def __init__(self, normalized: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.one, self.two = normalized(nn.Conv2d(3, 8, 3)), normalized(nn.Conv2d(8, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).relu())


class DynamicConvolution(nn.Module):
    """Each image has its own mixture of kernels; images are the groups of one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.route, self.two = nn.Conv2d(3, 8, 1), nn.Linear(8, 3), nn.Conv2d(10, 4, 1)
        self.kernels = nn.Parameter(torch.randn(3, 10, 8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        shares = self.route(x.mean((2, 3))).softmax(1)
        kernels = (shares @ self.kernels.flatten(1)).view(len(x) * 10, 8, 3, 3)
        mixed = F.conv2d(x.view(1, -1, *x.shape[2:]), kernels, groups=len(x), padding=1)
        return self.two(mixed.view(len(x), 10, *x.shape[2:]))


class Spectrum(nn.Module):
    """A gate in the frequency domain, with a complex weight for each frequency and channel."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.gate = nn.Parameter(torch.randn(8, 6, 4, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.fft.rfft2(self.one(x), norm="ortho") * torch.view_as_complex(self.gate)
        return self.two(torch.fft.irfft2(x, s=(6, 6), norm="ortho"))


class Experts(nn.Module):
    """Some tokens go through one expert and are written back."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 8), nn.Linear(8, 4)
        self.expert = nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 8))
        self.chosen: Tensor
        self.register_buffer("chosen", torch.tensor([0, 3]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(0, 1)
        out = torch.zeros_like(x)
        out[self.chosen] += self.expert(x[self.chosen])
        return self.head(x + out)


class Autoencoder(nn.Module):
    """A latent that is drawn, and a loss in the forward code."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.mean, self.spread, self.two = nn.Linear(3, 6), nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.one(x).relu()
        mean, spread = self.mean(hidden), self.spread(hidden)
        latent = mean + torch.randn_like(mean) * spread.mul(0.5).exp()
        return self.two(latent), F.mse_loss(latent, mean.detach())


class Unshuffled(nn.Module):
    """Tokens are gathered by an index that is repeated over the channels, as masked autoencoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.token = nn.Linear(3, 8), nn.Linear(8, 4), nn.Parameter(torch.randn(1, 1, 8))
        self.order: Tensor
        self.register_buffer("order", torch.tensor([[3, 1, 0, 2, 4, 5, 6]]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        x = torch.cat([x, self.token.repeat(x.shape[0], 2, 1)], 1)
        return self.two(torch.gather(x, 1, self.order.repeat(len(x), 1).unsqueeze(-1).repeat(1, 1, x.shape[2])))


class Masked(nn.Module):
    """Some channels are switched off by a mask of their width."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.mask: Tensor
        self.register_buffer("mask", torch.arange(8) % 3 > 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.where(self.mask.view(1, -1, 1, 1), self.one(x), 0.0))


class Codebook(nn.Module):
    """A running average of channels that only training touches."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.average: Tensor
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        if self.training:
            self.average.mul_(0.9).add_(x.detach().mean((0, 2, 3)), alpha=0.1)
        return self.two(x)


class Cell(nn.Module):
    """States on two devices, where there is a choice."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 8
        self.embed, self.cell, self.head = nn.Linear(3, 6), nn.LSTMCell(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), self.size), torch.zeros(len(x), self.size)
        for token in self.embed(x).unbind(1):
            state = self.cell(token, state)
        return self.head(state[0])


class PositionalConvolution(nn.Module):
    """Weights that are normalised over all filters together."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 8), nn.Linear(8, 4)
        self.positions = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 3, padding=1, groups=2), dim=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return self.two(x + self.positions(x.mT).mT)


class SharedQueries(nn.Module):
    """Queries and keys from one layer: its scale would count twice in their product, so that it stays."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.both, self.head = nn.Linear(3, 6), nn.Linear(6, 8), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(F.scaled_dot_product_attention(self.both(x), self.both(x), x))


class SpelledOut(nn.Module):
    """Each linear layer is a product with its weight; queries, keys and values of a head lie side by side."""

    def __init__(self, linear: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 2, 6
        self.embed, self.qkv, self.proj = nn.Linear(3, 8), nn.Linear(8, 36), nn.Linear(12, 8)
        self.head, self.linear = nn.Linear(8, 4), linear

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(self.embed, x)
        qkv = self.linear(self.qkv, x).view(*x.shape[:-1], self.num_heads, 3, self.head_dim)
        q, k, v = (qkv[..., part, :].transpose(1, 2) for part in range(3))
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        return self.head(x + self.linear(self.proj, (weights @ v).transpose(1, 2).flatten(2)))


SPELLED_OUT = {"embed.weight:0": 8, "qkv.weight:0:0": 12, "qkv.weight:0:12": 12}  # each head its own dims
ATTENTION = {"embed.weight:0": 8, "query.weight:0": 12, "value.weight:0": 12}
IDIOMS: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, int]]] = {
    "root of an attribute": (lambda: Attention(lambda m, x: x / math.sqrt(m.attention_head_size)), TOKENS, ATTENTION),
    "power of an attribute": (lambda: Attention(lambda m, x: x * m.attention_head_size**-0.5), TOKENS, ATTENTION),
    "normed queries": (
        lambda: NormedAttention(nn.LayerNorm),
        TOKENS,
        {"embed.weight:0": 8, "qkv.weight:0": 6, "qkv.weight:0:heads": 2},
    ),
    "queries by root mean square": (
        lambda: NormedAttention(nn.RMSNorm),
        TOKENS,
        {"embed.weight:0": 8, "qkv.weight:0": 6, "qkv.weight:0:heads": 2},
    ),
    "learned queries": (
        LearnedQueries,
        TOKENS,
        {"embed.weight:0": 8, "attention.in_proj_weight:0:0": 8, "attention.in_proj_weight:0:16": 8},
    ),
    "spectral norm": (lambda: SpectralNorm(nn.utils.spectral_norm), IMAGES, {"one.weight_orig:0": 8}),
    "spectral norm as a parametrization": (
        lambda: SpectralNorm(nn.utils.parametrizations.spectral_norm),
        IMAGES,
        {"one.parametrizations.weight.original:0": 8},
    ),
    "dynamic convolution": (DynamicConvolution, IMAGES, {"route.weight:0": 3}),
    "gate of frequencies": (Spectrum, IMAGES, {"one.weight:0": 8}),
    "experts": (Experts, TOKENS, {"embed.weight:0": 8, "expert.0.weight:0": 6}),
    "autoencoder": (Autoencoder, TOKENS, {"one.weight:0": 6, "mean.weight:0": 8}),
    "repeated index": (Unshuffled, TOKENS, {"one.weight:0": 8}),
    "average of training": (Codebook, IMAGES, {"one.weight:0": 8}),
    "states on two devices": (Cell, TOKENS, {"embed.weight:0": 6, "cell.weight_ih:0": 8}),
    "norm over all filters": (PositionalConvolution, TOKENS, {"one.weight:0": 4}),
    "shared queries": (SharedQueries, TOKENS, {"embed.weight:0": 6}),
    "mask": (Masked, IMAGES, {"one.weight:0": 8}),
    "product with a weight": (lambda: SpelledOut(lambda m, x: x @ m.weight.T + m.bias), TOKENS, SPELLED_OUT),
    "product with a transposed weight": (
        lambda: SpelledOut(lambda m, x: torch.matmul(x, m.weight.transpose(0, 1)).add(m.bias)),
        TOKENS,
        SPELLED_OUT,
    ),
    "sum and product": (
        lambda: SpelledOut(lambda m, x: torch.addmm(m.bias, x.flatten(0, 1), m.weight.t()).view(*x.shape[:-1], -1)),
        TOKENS,
        SPELLED_OUT,
    ),
}


@pytest.mark.parametrize("name", IDIOMS)
def test_what_is_prunable_and_that_a_cut_is_exact(name):
    build, inputs, expected = IDIOMS[name]
    torch.manual_seed(0)
    model = randomized(build())
    graph = trace_groups(model, inputs)
    cut_copy(model, graph, random_plan(graph, 1)).train()(inputs)
    assert {group.name: group.num_units for group in graph.groups} == expected
    assert error_of_random_cut(model, graph, inputs) < 1e-6  # scales are folded into single-precision weights
