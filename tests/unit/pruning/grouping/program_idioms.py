"""Blocks of random programs for what is written less often, and for what is easily traced wrongly."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.unit.pruning.grouping.program_blocks import axis_of, layer, over_space


class Copies(nn.Module):
    """Every channel several times over."""

    def __init__(self, inputs: int, outputs: int, space: str, width: int, times: int, style: str) -> None:
        super().__init__()
        self.style, self.times, self.axis = style, times, axis_of(space)
        self.one, self.two = layer(inputs, width, space), layer(width * times, outputs, space)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        if self.style == "repeat":
            shape = [1] * x.dim()
            shape[self.axis] = self.times
            x = x.repeat(shape)
        elif self.style == "interleave":
            x = x.repeat_interleave(self.times, dim=self.axis)
        elif self.style == "expand":
            x = x.movedim(self.axis, -1)
            x = x.unsqueeze(-1).expand(*x.shape, self.times).flatten(-2).movedim(-1, self.axis)
        else:
            x = torch.cat([x] * self.times, dim=self.axis)
        return self.two(F.gelu(x))


class Maxout(nn.Module):
    """Neighbouring channels reduced to one, or weighted against each other (ResNeSt)."""

    def __init__(self, inputs: int, outputs: int, space: str, width: int, pieces: int, style: str) -> None:
        super().__init__()
        self.style, self.pieces, self.width, self.axis = style, pieces, width, axis_of(space)
        self.one, self.two = layer(inputs, width * pieces, space), layer(width, outputs, space)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x).movedim(self.axis, -1)
        if self.style == "max":
            x = x.unflatten(-1, (-1, self.pieces)).amax(-1)
        elif self.style == "mean":
            x = x.reshape(*x.shape[:-1], self.width, self.pieces).mean(dim=-1)
        elif self.style == "outer":
            x = x.reshape(*x.shape[:-1], self.pieces, x.shape[-1] // self.pieces).sum(-2)
        else:
            x = x.unflatten(-1, (self.pieces, -1))
            x = (x * x.softmax(-2)).sum(-2)
        return self.two(x.movedim(-1, self.axis))


class Experts(nn.Module):
    """A layer whose weight is mixed, image by image, from a bank of weights."""

    def __init__(self, inputs: int, outputs: int, space: str, experts: int, style: str) -> None:
        super().__init__()
        self.style, self.space, self.inputs, self.outputs = style, space, inputs, outputs
        self.router = nn.Linear(inputs, experts)
        self.bank = nn.Parameter(torch.ones(experts, outputs, inputs))
        self.bias = nn.Parameter(torch.ones(experts, outputs))

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(axis_of(self.space), -1)
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])  # (B, N, C)
        gates = self.router(tokens.mean(1)).softmax(-1)  # (B, E)
        if self.style == "einsum":
            weight = torch.einsum("be,eoi->boi", gates, self.bank)
        else:
            weight = (gates @ self.bank.flatten(1)).view(-1, self.outputs, self.inputs)
        y = tokens @ weight.transpose(1, 2) + (gates @ self.bias).unsqueeze(1)
        return y.reshape(*x.shape[:-1], -1).movedim(-1, axis_of(self.space))


class Modulated(nn.Module):
    """StyleGAN: a convolution with a kernel for each image, all images as groups of one."""

    def __init__(self, inputs: int, outputs: int, space: str, demodulate: bool) -> None:
        super().__init__()
        self.demodulate = demodulate
        self.style = nn.Linear(inputs, inputs)
        self.weight = nn.Parameter(torch.ones(outputs, inputs, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        style = self.style(x.mean((2, 3)))  # (B, I)
        weight = self.weight * style[:, None, :, None, None]  # (B, O, I, 3, 3)
        if self.demodulate:
            weight = weight * torch.rsqrt(weight.square().sum((2, 3, 4), keepdim=True) + 1e-3)
        weight = weight.reshape(-1, channels, 3, 3)
        x = F.conv2d(x.reshape(1, batch * channels, height, width), weight, padding=1, groups=batch)
        return x.reshape(batch, -1, height, width)


class Standardized(nn.Module):
    """A convolution or linear whose weight is normalised on its way (BiT, weight norm)."""

    def __init__(self, inputs: int, outputs: int, space: str, style: str) -> None:
        super().__init__()
        self.style, self.space = style, space
        self.layer = layer(inputs, outputs, space, kernel=3)
        self.gain = nn.Parameter(torch.ones(outputs))
        self.out = layer(outputs, outputs, space)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight
        if self.style == "batch_norm" and self.space == "map":
            flat = weight.reshape(1, weight.shape[0], -1)
            weight = F.batch_norm(flat, None, None, weight=self.gain, training=True, eps=1e-3).reshape_as(weight)
        elif self.style in ("batch_norm", "var_mean"):
            dims = tuple(range(1, weight.dim()))
            variance, mean = torch.var_mean(weight, dims, unbiased=False, keepdim=True)
            gain = self.gain.reshape(-1, *[1] * len(dims))
            weight = (weight - mean) * (variance + 1e-3).rsqrt() * gain
        else:
            gain = self.gain.reshape(-1, *[1] * (weight.dim() - 1))
            weight = F.normalize(weight.flatten(1), dim=1).view_as(weight) * gain
        x = F.conv2d(x, weight, padding=1) if self.space == "map" else F.linear(x, weight)
        return self.out(F.relu(x))


class Outer(nn.Module):
    """Bilinear features: every channel of one layer times every channel of another."""

    def __init__(self, inputs: int, outputs: int, space: str, one: int, two: int, style: str) -> None:
        super().__init__()
        self.style, self.features = style, one * two
        self.one, self.two = layer(inputs, one, space), layer(inputs, two, space)
        self.out = layer(one * two, outputs, space)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.one(x), self.two(x)
        if self.style == "einsum":
            return self.out(torch.einsum("...i,...j->...ij", one, two).flatten(-2))
        return self.out((one.unsqueeze(-1) * two.unsqueeze(-2)).reshape(*x.shape[:-1], self.features))


class InPlace(nn.Module):
    """Parts of a tensor written over, or a tensor filled piece by piece."""

    def __init__(self, inputs: int, outputs: int, space: str, width: int, part: int, style: str) -> None:
        super().__init__()
        self.style, self.part, self.width, self.space = style, part, width, space
        self.one, self.some = layer(inputs, width, space), layer(part, part, space)
        self.out = layer(width, outputs, space)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        y = x.movedim(axis_of(self.space), -1)
        some = self.some(y[..., : self.part].movedim(-1, axis_of(self.space))).movedim(axis_of(self.space), -1)
        if self.style == "assign":
            y[..., : self.part] = some
        elif self.style == "add":
            y[..., : self.part] += some
        elif self.style == "fill":
            filled = x.new_zeros(*y.shape[:-1], self.width)
            filled[..., : self.part] = some
            filled[..., self.part :] = y[..., self.part :]
            y = filled
        else:
            filled = torch.zeros_like(y)
            filled[..., self.part :].copy_(y[..., self.part :])
            filled.narrow(-1, 0, self.part).add_(some)
            y = filled
        return self.out(F.gelu(y.movedim(-1, axis_of(self.space))))


class Positional(nn.Module):
    """What depends on a channel's number: it must stay, or keep its number."""

    def __init__(self, inputs: int, outputs: int, space: str, width: int, style: str) -> None:
        super().__init__()
        self.style, self.space, self.width = style, space, width
        self.one, self.out = layer(inputs, width, space), layer(width, outputs, space)
        self.register_buffer("table", torch.arange(width) / width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        channels = x.shape[axis_of(self.space)]
        factor: Any = {
            "linspace": lambda: torch.linspace(0.5, 1.5, channels, dtype=x.dtype),
            "arange": lambda: torch.arange(self.width, dtype=x.dtype) / self.width,
            "buffer": lambda: self.table,
            "ones": lambda: torch.ones(channels, dtype=x.dtype),
            "eye": lambda: torch.eye(channels, dtype=x.dtype).sum(0),
            "width": lambda: torch.full((1,), 1 / channels, dtype=x.dtype),
        }[self.style]()
        return self.out(F.gelu(x * over_space(factor, self.space)))


class Resampled(nn.Module):
    """Smaller and larger again, by a transposed convolution or by interpolation."""

    def __init__(self, inputs: int, outputs: int, space: str, groups: int, width: int, style: str) -> None:
        super().__init__()
        self.style = style
        self.down = nn.Conv2d(inputs, groups * width, 3, stride=2, padding=1)
        if style == "transposed":
            self.up: Any = nn.ConvTranspose2d(groups * width, outputs, 2, stride=2, groups=groups)
        else:
            self.up = nn.Conv2d(groups * width, outputs, 3, padding=1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.down(x))
        if self.style == "bilinear":
            y = F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False)
        elif self.style == "size":
            y = F.interpolate(y, size=x.shape[-2:], mode="nearest")
        return self.up(y)


class QueryPool(nn.Module):
    """Learned queries look at the tokens; then tokens look at what they found (Perceiver)."""

    def __init__(self, inputs: int, outputs: int, heads: int, head_dim: int, queries: int, style: str) -> None:
        super().__init__()
        self.style, self.heads = style, heads
        self.query = nn.Parameter(torch.ones(queries, inputs))
        width = heads * head_dim
        self.q, self.kv = nn.Linear(inputs, width), nn.Linear(inputs, 2 * width)
        self.back, self.out = nn.Linear(inputs, width), nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        q = self.q(self.query).unflatten(-1, (self.heads, -1)).transpose(0, 1).expand(batch, -1, -1, -1)
        k, v = self.kv(x).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(q, k, v)  # (B, H, M, D)
        b = self.back(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        if self.style == "scaled":
            weights = (b @ found.mT / math.sqrt(b.shape[-1])).softmax(-1)
        else:
            weights = F.softmax(b @ found.mT, dim=-1)
        return self.out((weights @ found).transpose(1, 2).flatten(2))


class Rotary(nn.Module):
    """Attention with rotary position embeddings: head dims in pairs, each pair with a frequency of its own."""

    def __init__(self, inputs: int, outputs: int, heads: int, head_dim: int, tokens: int, style: str) -> None:
        super().__init__()
        self.style, self.heads, self.head_dim = style, heads, head_dim
        self.qkv, self.out = nn.Linear(inputs, 3 * heads * head_dim), nn.Linear(heads * head_dim, outputs)
        angles = torch.arange(tokens)[:, None] / 10.0 ** (torch.arange(head_dim // 2) / head_dim)
        angles = torch.cat([angles, angles], -1) if style == "half" else angles.repeat_interleave(2, -1)
        self.register_buffer("sin", angles.sin())
        self.register_buffer("cos", angles.cos())

    def rotated(self, x: Tensor) -> Tensor:
        if self.style == "half":
            one, two = x.chunk(2, dim=-1)
            turned = torch.cat([-two, one], dim=-1)
        elif self.style == "index":
            turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
        else:
            turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).reshape(x.shape)
        return x * self.get_buffer("cos") + turned * self.get_buffer("sin")

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(self.rotated(q), self.rotated(k), v)
        return self.out(x.transpose(1, 2).reshape(batch, tokens, -1))


class Sinusoids(nn.Module):
    """A position embedding that is worked out from the width as it stands."""

    def __init__(self, inputs: int, outputs: int, width: int, style: str) -> None:
        super().__init__()
        self.style = style
        self.layer, self.out = nn.Linear(inputs, width), nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        _, tokens, width = x.shape
        half = width // 2
        rates = torch.exp(torch.arange(half, dtype=x.dtype) * (-math.log(100.0) / half))
        angles = torch.arange(tokens, dtype=x.dtype)[:, None] * rates
        if self.style == "cat":
            table = torch.cat([angles.sin(), angles.cos()], dim=-1)
        else:
            table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
        return self.out(x + (table if width % 2 == 0 else F.pad(table, (0, 1))))


class Highway(nn.Module):
    """x·(1 − g) + y·g, and other ways for two streams to meet."""

    def __init__(self, inputs: int, outputs: int, space: str, style: str) -> None:
        super().__init__()
        self.style = style
        self.one, self.two, self.gate = (layer(inputs, outputs, space) for _ in range(3))
        self.alpha = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.one(x), self.two(x)
        if self.style == "lerp":
            return torch.lerp(one, two, self.gate(x).sigmoid())
        if self.style == "maximum":
            return torch.maximum(one, two) + torch.minimum(one, self.gate(x))
        if self.style == "where":
            return torch.where(self.gate(x) > 0, one, two * self.alpha)
        gate = torch.sigmoid(self.gate(x))
        return one * gate + (1 - gate) * two
