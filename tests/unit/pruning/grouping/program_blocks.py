"""Blocks that random programs are made of, written as people write them.

A block takes a map (B, C, H, W), tokens (B, N, C) or vectors (B, C), as its `space` says, and gives the same kind with
another number of channels. What differs between codebases (how a size is read, how an axis is split) is an option.
Activations on the way map zero to zero, so that a masked channel stays at zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SPACES = ("map", "tokens", "vector")
ACTIVATIONS = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "hardswish": nn.Hardswish,
    "leaky_relu": nn.LeakyReLU,
}


def layer(inputs: int, outputs: int, space: str, *, kernel: int = 1, groups: int = 1, bias: bool = True) -> Any:
    """A convolution on maps, a linear elsewhere."""
    if space == "map":
        return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=bias)
    return nn.Linear(inputs, outputs, bias)


def axis_of(space: str) -> int:
    """The axis of the channels."""
    return -1 if space == "tokens" else 1


def over_space(vector: Tensor, space: str) -> Tensor:
    """(C,), or (B, C), in a shape that broadcasts over a space's activations."""
    return {"map": vector[..., None, None], "tokens": vector.unsqueeze(-2), "vector": vector}[space]


class Layer(nn.Module):
    """A convolution or linear with its activation."""

    def __init__(self, inputs: int, outputs: int, space: str, kernel: int, bias: bool, activation: str) -> None:
        super().__init__()
        self.layer = layer(inputs, outputs, space, kernel=kernel, bias=bias)
        self.act = nn.PReLU(outputs) if activation == "prelu" else ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.layer(x))


class GroupedConv(nn.Module):
    """A 1×1, then a convolution in groups."""

    def __init__(self, inputs: int, outputs: int, space: str, groups: int, width: int, kernel: int) -> None:
        super().__init__()
        self.reduce = layer(inputs, groups * width, space)
        self.grouped = layer(groups * width, outputs, space, kernel=kernel, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.grouped(F.gelu(self.reduce(x))))


class DepthwiseConv(nn.Module):
    """A depthwise convolution that gives `multiplier` channels for each, then a 1×1 or nothing."""

    def __init__(self, inputs: int, outputs: int, space: str, multiplier: int, kernel: int, pointwise: bool) -> None:
        super().__init__()
        width = inputs * multiplier
        self.depthwise = nn.Conv2d(inputs, width, kernel, padding=kernel // 2, groups=inputs)
        self.norm = nn.BatchNorm2d(width)
        self.pointwise = layer(width, outputs, space) if pointwise else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(F.silu(self.norm(self.depthwise(x))))


class Normed(nn.Module):
    """A layer and its norm, in either order."""

    def __init__(self, inputs: int, outputs: int, space: str, size: int, style: str, groups: int, first: bool) -> None:
        super().__init__()
        self.style, self.space, self.first = style, space, first
        self.layer = layer(inputs, outputs, space)
        width = inputs if first else outputs
        batch_norm = nn.BatchNorm2d if space == "map" else nn.BatchNorm1d
        self.norm: Any = {
            "batch": lambda: batch_norm(width),
            "batch, plain": lambda: batch_norm(width, affine=False),
            "group": lambda: nn.GroupNorm(groups, width),
            "layer": lambda: nn.LayerNorm(width),
            "layer, plain": lambda: nn.LayerNorm(width, elementwise_affine=False),
            "layer, all axes": lambda: nn.LayerNorm([width, *[size] * (2 if space == "map" else 0)]),
            "rms": lambda: nn.RMSNorm(width, eps=1e-6),
            "one group": lambda: nn.GroupNorm(1, width),
        }.get(style, nn.Identity)()
        if style in ("by hand", "functional"):
            self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            return self.layer(self.normalized(x))
        return F.gelu(self.normalized(self.layer(x)))

    def normalized(self, x: Tensor) -> Tensor:
        if self.style == "by hand":
            dim = axis_of(self.space)
            variance, mean = torch.var_mean(x, dim, unbiased=False, keepdim=True)
            return (x - mean) * torch.rsqrt(variance + 1e-5) * over_space(self.weight, self.space)
        if self.style == "functional":
            moved = x.movedim(axis_of(self.space), -1)
            return F.layer_norm(moved, (moved.shape[-1],), self.weight).movedim(-1, axis_of(self.space))
        if self.style in ("layer", "layer, plain", "rms"):
            return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if self.space == "map" else self.norm(x)
        if self.style == "layer, all axes":
            return self.norm(x)
        return self.norm(x.transpose(1, 2)).transpose(1, 2) if self.space == "tokens" else self.norm(x)


class Residual(nn.Module):
    """inner(x), and x as it is, projected, padded or sliced to the same width."""

    def __init__(
        self, inner: Sequence[nn.Module], inputs: int, outputs: int, space: str, style: str, in_place: bool
    ) -> None:
        super().__init__()
        self.inner = nn.Sequential(*inner)
        self.style, self.space, self.in_place = style, space, in_place
        self.missing, self.outputs = outputs - inputs, outputs
        self.shortcut = layer(inputs, outputs, space) if style == "project" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y, x = self.inner(x), self.shortcut(x)
        if self.style == "pad":
            x = F.pad(x, (0, 0, 0, 0, 0, self.missing) if self.space == "map" else (0, self.missing))
        if self.style == "pad both":
            left = self.missing // 2
            sides = (left, self.missing - left)
            x = F.pad(x, (0, 0, 0, 0, *sides) if self.space == "map" else sides)
        if self.style == "pad to fit":
            missing = y.shape[1] - x.shape[1]
            x = F.pad(x, (0, 0, 0, 0, 0, missing))
        if self.style == "zeros":
            axis = axis_of(self.space)
            shape = list(x.shape)
            shape[axis] = self.missing
            x = torch.cat([x, x.new_zeros(shape)], axis)
        if self.style == "slice":
            x = x[..., : self.outputs] if self.space == "tokens" else x[:, : self.outputs]
        if self.in_place:
            y += x
            return y
        return x + y


class Gate(nn.Module):
    """Squeeze and excitation, a gate by position, FiLM, or attention pooling."""

    def __init__(self, inputs: int, outputs: int, space: str, style: str, hidden: int) -> None:
        super().__init__()
        self.style, self.space = style, space
        self.layer = layer(inputs, outputs, space)
        linear = space if style == "keepdim" else "vector"
        if style == "position":
            self.reduce, self.expand = layer(outputs, hidden, space), layer(hidden, 1, space)
        else:
            self.reduce = layer(outputs, hidden, linear)
            self.expand = layer(hidden, 2 * outputs if style == "film" else outputs, linear)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        if self.style == "position":
            return x * self.expand(F.relu(self.reduce(x))).sigmoid()
        dims = {"map": (2, 3), "tokens": (1,), "vector": ()}[self.space]
        pooled = x.mean(dims, keepdim=self.style == "keepdim") if dims else x
        gate = self.expand(F.relu(self.reduce(pooled)))
        if self.style == "keepdim":
            return x * torch.sigmoid(gate)
        if self.style == "film":
            scale, shift = gate.chunk(2, dim=1)
            return x * (1 + over_space(scale, self.space)) + over_space(shift, self.space)
        if self.style == "view" and self.space == "map":
            return x * F.hardsigmoid(gate).view(x.shape[0], x.shape[1], 1, 1)
        return x * F.hardsigmoid(over_space(gate, self.space)).expand_as(x)


class Glu(nn.Module):
    """Twice the width, one half gating the other."""

    def __init__(self, inputs: int, outputs: int, space: str, style: str, hidden: int) -> None:
        super().__init__()
        self.style, self.space, self.hidden = style, space, hidden
        self.wide = layer(inputs, 2 * hidden, space)
        self.out = layer(hidden, outputs, space)

    def forward(self, x: Tensor) -> Tensor:
        x, axis = self.wide(x), axis_of(self.space)
        if self.style == "F.glu":
            return self.out(F.glu(x, dim=axis))
        if self.style == "split":
            value, gate = x.split(self.hidden, dim=axis)
        elif self.style == "half":
            value, gate = torch.split(x, x.shape[axis] // 2, dim=axis)
        elif self.style == "narrow":
            value, gate = x.narrow(axis, 0, self.hidden), x.narrow(axis, self.hidden, self.hidden)
        elif self.style == "index" and self.space != "tokens":
            value, gate = x[:, : self.hidden], x[:, self.hidden :]
        elif self.style == "unflatten" and self.space == "tokens":
            value, gate = x.unflatten(-1, (2, -1)).unbind(-2)
        else:
            gate, value = x.chunk(2, dim=axis)
        return self.out(value * F.silu(gate))


class Split(nn.Module):
    """Pieces of unequal widths, each with a layer or none of its own, side by side again."""

    def __init__(
        self, inputs: int, outputs: int, space: str, sizes: Sequence[int], plain: int, style: str, join: bool
    ) -> None:
        super().__init__()
        self.style, self.space, self.sizes = style, space, list(sizes)
        self.first = sizes[0]
        self.wide = layer(inputs, sum(sizes), space)
        self.pieces = nn.ModuleList(layer(size, size, space) for size in sizes)
        if plain >= 0:
            self.pieces[plain] = nn.Identity()
        self.join = layer(sum(sizes), outputs, space) if join else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x, axis = F.gelu(self.wide(x)), axis_of(self.space)
        if self.style == "attribute":
            parts = x.split(self.sizes, dim=axis)
        elif self.style == "rest":
            parts = torch.split(x, [self.first, x.shape[axis] - self.first], dim=axis)
        elif self.style == "tensor_split":
            parts = torch.tensor_split(x, [self.first], dim=axis)
        else:
            parts = torch.split(x, 4, dim=axis)
        return self.join(torch.cat([piece(part) for piece, part in zip(self.pieces, parts, strict=True)], dim=axis))


class Chunk(nn.Module):
    """Equal pieces that are added, multiplied or stacked behind one another."""

    def __init__(self, inputs: int, outputs: int, space: str, pieces: int, width: int, style: str) -> None:
        super().__init__()
        self.style, self.space, self.pieces, self.width = style, space, pieces, width
        self.wide = layer(inputs, pieces * width, space)
        self.out = layer(width if style != "cascade" else pieces * width, outputs, space)
        self.steps = nn.ModuleList(layer(width, width, space) for _ in range(pieces - 1 if style == "cascade" else 0))

    def forward(self, x: Tensor) -> Tensor:
        axis = axis_of(self.space)
        parts = self.wide(x).chunk(self.pieces, dim=axis)
        if self.style == "sum":
            return self.out(F.relu(torch.stack(parts).sum(0)))
        if self.style == "product":
            return self.out(math.prod(parts[1:], start=parts[0]))
        done = [parts[0]]
        for step, part in zip(self.steps, parts[1:], strict=True):  # Res2Net
            done.append(F.silu(step(part + done[-1])))
        return self.out(torch.cat(done, dim=axis))


class Dense(nn.Module):
    """DenseNet: what came in stays beside what is made of it."""

    def __init__(self, inputs: int, outputs: int, space: str, growth: Sequence[int], first: bool) -> None:
        super().__init__()
        self.axis, self.first = axis_of(space), first
        widths = [inputs + sum(growth[:i]) for i in range(len(growth))]
        self.layers = nn.ModuleList(layer(w, g, space) for w, g in zip(widths, growth, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        for step in self.layers:
            new = F.relu(step(x))
            x = torch.cat([new, x] if self.first else [x, new], dim=self.axis)
        return x


class Branches(nn.Module):
    """Inception: several ways, side by side."""

    def __init__(self, inner: Sequence[nn.Module], inputs: int, outputs: int, space: str, pool: bool) -> None:
        super().__init__()
        self.axis, self.pool = axis_of(space), pool and space == "map"
        self.inner = nn.ModuleList(inner)

    def forward(self, x: Tensor) -> Tensor:
        ways = [branch(x) for branch in self.inner]
        if self.pool:
            ways.append(F.max_pool2d(x, 3, stride=1, padding=1))
        return torch.cat(ways, dim=self.axis)


class Shuffle(nn.Module):
    """ShuffleNet: channels of all groups take turns."""

    def __init__(self, inputs: int, outputs: int, space: str, groups: int, width: int, style: str, conv: bool) -> None:
        super().__init__()
        self.style, self.space, self.groups = style, space, groups
        self.wide = layer(inputs, groups * width, space)
        grouped = space == "map" and conv
        self.out = layer(groups * width, outputs, space, groups=groups if grouped else 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.wide(x))
        if self.space == "map":
            batch, channels, height, width = x.shape
            if self.style == "flatten":
                x = x.view(batch, self.groups, -1, height, width).transpose(1, 2).flatten(1, 2)
            elif self.style == "spell out":
                x = x.reshape(batch, self.groups, channels // self.groups, height, width)
                x = x.permute(0, 2, 1, 3, 4).reshape(batch, channels, height, width)
            else:
                x = F.channel_shuffle(x, self.groups)
        else:
            x = x.unflatten(-1, (self.groups, -1)).transpose(-1, -2).flatten(-2)
        return self.out(x)


class Pixels(nn.Module):
    """Between channels and pixels, and back."""

    def __init__(self, inputs: int, outputs: int, space: str, style: str, hidden: int) -> None:
        super().__init__()
        self.style, self.hidden = style, hidden
        wide = {"up": inputs, "down": 4 * inputs, "focus": 4 * inputs, "merge": 4 * inputs, "down and up": 4 * inputs}
        self.one = nn.Conv2d(wide[style], 4 * hidden, 1)
        self.two = nn.Conv2d(hidden, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        if self.style in ("down", "down and up"):
            x = F.pixel_unshuffle(x, 2)
        if self.style == "focus":
            x = x.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
            x = x.reshape(batch, channels * 4, height // 2, width // 2)
        if self.style == "merge":  # Swin's patch merging
            x = torch.cat([x[:, :, i::2, j::2] for j in (0, 1) for i in (0, 1)], dim=1)
        x = F.pixel_shuffle(F.gelu(self.one(x)), 2)
        return self.two(F.avg_pool2d(x, 2) if self.style == "up" else x)


class Slice(nn.Module):
    """Some of the channels go through a layer, or only some are read at all."""

    def __init__(self, inputs: int, outputs: int, space: str, width: int, part: int, style: str) -> None:
        super().__init__()
        self.style, self.space, self.part = style, space, part
        self.wide = layer(inputs, width, space)
        self.some = layer(part, part, space)
        self.out = layer(part if style in ("first", "last") else width, outputs, space)

    def forward(self, x: Tensor) -> Tensor:
        x, axis = F.gelu(self.wide(x)), axis_of(self.space)
        if self.style == "first":
            return self.out(self.some(x[..., : self.part] if self.space == "tokens" else x[:, : self.part]))
        if self.style == "last":
            return self.out(self.some(x[..., -self.part :] if self.space == "tokens" else x[:, -self.part :]))
        rest = x.shape[axis] - self.part
        some, others = x.narrow(axis, 0, self.part), x.narrow(axis, self.part, rest)
        if self.style == "add":
            return self.out(x + F.pad(self.some(some).movedim(axis, -1), (0, rest)).movedim(-1, axis))
        return self.out(torch.cat([self.some(some), others], dim=axis))


class Stack(nn.Module):
    """Ways on an axis of their own, reduced, and perhaps weighted (SKNet)."""

    def __init__(self, inputs: int, outputs: int, space: str, ways: int, dim: int, style: str) -> None:
        super().__init__()
        self.style, self.dim = style, dim
        self.ways = nn.ModuleList(layer(inputs, outputs, space, kernel=2 * i + 1) for i in range(ways))
        self.weight = nn.Parameter(torch.zeros(ways))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.stack([F.relu(way(x)) for way in self.ways], dim=self.dim)
        if self.style == "mean":
            return x.mean(self.dim)
        if self.style == "weighted":
            return (x.movedim(self.dim, -1) * self.weight.softmax(0)).sum(-1)
        return x.sum(dim=self.dim)


class Scaled(nn.Module):
    """A layer scale, and a shift."""

    def __init__(self, inputs: int, outputs: int, space: str, style: str) -> None:
        super().__init__()
        self.style, self.space = style, space
        self.layer = layer(inputs, outputs, space)
        shape = (1, outputs, 1, 1) if style == "shaped" and space == "map" else (outputs,)
        self.gamma, self.beta = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        if self.space == "map" and self.style == "view":
            return x.mul(self.gamma.view(1, -1, 1, 1)) + self.beta.reshape(1, x.shape[1], 1, 1)
        if self.style == "last" and self.space == "map":
            return (x.permute(0, 2, 3, 1) * self.gamma + self.beta).permute(0, 3, 1, 2)
        if self.gamma.dim() == 4:
            return torch.addcmul(self.beta, x, self.gamma)
        return x * over_space(self.gamma, self.space) + over_space(self.beta, self.space)


class Tied(nn.Module):
    """One weight at work in two places."""

    def __init__(self, inputs: int, outputs: int, space: str, style: str) -> None:
        super().__init__()
        self.style, self.space = style, space
        self.into = layer(inputs, outputs, space)
        self.one = layer(outputs, outputs, space)
        if style == "two layers":
            self.two = layer(outputs, outputs, space)
            self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        if self.style == "two layers":
            return x + self.two(F.gelu(self.one(x)))
        if self.style == "transposed" and self.space != "map":
            return F.linear(F.gelu(self.one(x)), self.one.weight.t())
        return self.one(F.gelu(self.one(F.gelu(x))))


class Bottleneck(nn.Module):
    """A hidden layer whose weight is used again, transposed, on the way back (an auto-encoder's tie)."""

    def __init__(self, inputs: int, outputs: int, space: str, hidden: int) -> None:
        super().__init__()
        self.encode, self.out = layer(inputs, hidden, space), layer(inputs, outputs, space)
        self.space = space

    def forward(self, x: Tensor) -> Tensor:
        weight, hidden = self.encode.weight, F.gelu(self.encode(x))
        if self.space == "map":
            return self.out(F.conv_transpose2d(hidden, weight))
        return self.out(hidden @ weight)


class Reordered(nn.Module):
    """Channels in another order."""

    def __init__(self, inputs: int, outputs: int, space: str, width: int, style: str) -> None:
        super().__init__()
        self.style, self.axis = style, axis_of(space)
        self.wide, self.out = layer(inputs, width, space), layer(width, outputs, space)
        order = torch.arange(width).roll(width // 2 + 1)
        self.register_buffer("order", order)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(x)
        if self.style == "flip":
            x = x.flip(self.axis)
        elif self.style == "roll":
            x = x.roll(1, self.axis)
        else:
            x = x.index_select(self.axis, self.order)  # type: ignore[arg-type]
        return self.out(x)


class ChannelAttention(nn.Module):
    """XCiT: features attend to features, not tokens to tokens."""

    def __init__(self, inputs: int, outputs: int, space: str, hidden: int, heads: int, style: str) -> None:
        super().__init__()
        self.style, self.heads = style, heads
        self.qkv, self.out = nn.Linear(inputs, 3 * heads * hidden), nn.Linear(heads * hidden, outputs)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 4, 1)  # (3, B, H, D, N)
        q, k, v = qkv[0], qkv[1], qkv[2]
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        if self.style == "fused":
            x = F.scaled_dot_product_attention(q * self.temperature, k, v, scale=1.0)
        else:
            x = (q @ k.transpose(-2, -1) * self.temperature).softmax(-1) @ v
        return self.out(x.permute(0, 3, 1, 2).reshape(batch, tokens, -1))


class TokenMixer(nn.Module):
    """MLP-Mixer: a hidden layer over tokens, then one over channels."""

    def __init__(self, inputs: int, outputs: int, space: str, tokens: int, hidden: int, style: str) -> None:
        super().__init__()
        self.style = style
        self.norm = nn.LayerNorm(inputs)
        self.one, self.back = nn.Linear(tokens, hidden), nn.Parameter(torch.ones(hidden, tokens))
        self.out = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.style == "einsum":
            y = torch.einsum("bnc,hn->bch", y, self.one.weight) + self.one.bias
            return self.out(x + torch.einsum("bch,hn->bnc", F.gelu(y), self.back))
        return self.out(x + (F.gelu(self.one(y.transpose(1, 2))) @ self.back).transpose(1, 2))
