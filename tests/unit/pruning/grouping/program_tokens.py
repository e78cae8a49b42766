"""Blocks of random programs that work on tokens (B, N, C), and the ways between maps, tokens and vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Self-attention as many codebases write it.

    Attributes:
        layout: how q, k and v are made: by three layers, or by one and then split.
        product: how they meet.
        scale_by: where the temperature comes from.
        join: how the heads become one axis again.
    """

    def __init__(
        self, inputs: int, outputs: int, heads: int, head_dim: int, tokens: int, layout: str, product: str,
        scale_by: str, join: str, norm: str, bias: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_heads, self.head_dim, self.inner = heads, head_dim, heads * head_dim
        self.sizes = [self.inner] * 3
        self.scale = head_dim**-0.5
        self.layout, self.product, self.scale_by, self.join = layout, product, scale_by, join
        if layout.startswith("separate"):
            self.q, self.k, self.v = (nn.Linear(inputs, self.inner, i != 1) for i in range(3))
        else:
            self.qkv = nn.Linear(inputs, 3 * self.inner)
        norms = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
        self.q_norm, self.k_norm = ((norms[norm](head_dim, eps=1e-6) if norm else nn.Identity()) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(heads, tokens, tokens)) if bias else None
        self.proj = nn.Linear(self.inner, outputs)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)  # (B, H, N, D) each
        x = self.attend(self.q_norm(q), self.k_norm(k), v)
        batch, _, tokens, head_dim = x.shape
        if self.join == "flatten":
            return self.proj(x.transpose(1, 2).flatten(2))
        if self.join == "inner":
            return self.proj(x.transpose(1, 2).reshape(batch, tokens, self.inner))
        if self.join == "product":
            return self.proj(x.permute(0, 2, 1, 3).contiguous().view(batch, tokens, self.num_heads * head_dim))
        if self.join == "concat":
            return self.proj(torch.cat([head.squeeze(1) for head in x.split(1, dim=1)], dim=-1))
        if self.join == "einsum":
            weight = self.proj.weight.view(-1, x.shape[1], head_dim)
            return torch.einsum("bhnd,ohd->bno", x, weight) + self.proj.bias
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, -1))

    def heads(self, x: Tensor) -> Sequence[Tensor]:
        batch, tokens, width = x.shape
        if self.layout == "separate":
            shape = (batch, tokens, self.num_heads, self.head_dim)
            return [layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v)]
        if self.layout == "separate, inferred":
            q, k, v = self.q(x), self.k(x), self.v(x)
            return [t.reshape(batch, tokens, self.num_heads, -1).permute(0, 2, 1, 3) for t in (q, k, v)]
        if self.layout == "separate, by dim":
            return [p(x).unflatten(-1, (-1, self.head_dim)).transpose(-2, -3) for p in (self.q, self.k, self.v)]
        qkv = self.qkv(x)
        if self.layout == "joint":
            return qkv.reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        if self.layout == "joint, C // heads":
            return qkv.reshape(batch, tokens, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        if self.layout == "joint, inner first":
            parts = qkv.view(batch, tokens, 3, self.inner).unbind(2)
        elif self.layout == "joint, split":
            parts = qkv.split(self.sizes, dim=-1)
        elif self.layout == "joint, heads first":
            parts = qkv.view(batch, tokens, self.num_heads, 3 * self.head_dim).chunk(3, dim=-1)
            return [part.transpose(1, 2) for part in parts]
        else:
            parts = qkv.chunk(3, dim=-1)
        return [part.reshape(batch, tokens, self.num_heads, -1).transpose(1, 2) for part in parts]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.product == "fused":
            scale = {"none": 1.0, "attribute": self.scale}.get(self.scale_by)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias, scale=scale)
        scale: Any = {
            "attribute": lambda: self.scale,
            "head_dim": lambda: self.head_dim**-0.5,
            "shape": lambda: q.shape[-1] ** -0.5,
            "sqrt": lambda: 1 / math.sqrt(k.size(-1)),
            "none": lambda: 1.0,
        }[self.scale_by]()
        if self.product == "einsum":
            logits = torch.einsum("bhnd,bhmd->bhnm", q, k) * scale
        else:
            logits = q * scale @ k.transpose(-2, -1)
        attention = (logits if self.bias is None else logits + self.bias).softmax(dim=-1)
        return torch.einsum("bhnm,bhmd->bhnd", attention, v) if self.product == "einsum" else attention @ v


class GroupedQueryAttention(nn.Module):
    """Several query heads share each head of keys and values."""

    def __init__(self, inputs: int, outputs: int, kv_heads: int, repeat: int, head_dim: int, style: str) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim, self.repeat = kv_heads * repeat, kv_heads, head_dim, repeat
        self.style = style
        self.q = nn.Linear(inputs, self.num_heads * head_dim)
        self.k, self.v = (nn.Linear(inputs, kv_heads * head_dim, bias=False) for _ in range(2))
        self.proj = nn.Linear(self.num_heads * head_dim, outputs)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q = self.q(x).view(batch, tokens, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k(x).view(batch, tokens, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v(x).view(batch, tokens, self.num_kv_heads, -1).transpose(1, 2)
        if self.style == "repeat_interleave":
            k, v = (t.repeat_interleave(self.repeat, dim=1) for t in (k, v))
        elif self.style == "expand":
            shape = (batch, self.num_kv_heads, self.repeat, tokens, self.head_dim)
            k, v = (t[:, :, None].expand(shape).reshape(batch, self.num_heads, tokens, self.head_dim) for t in (k, v))
        x = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.style == "enable_gqa")
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, -1))


class MultiHead(nn.Module):
    """torch's own attention, on normalised tokens, in the residual stream."""

    def __init__(self, inputs: int, outputs: int, heads: int, bias: bool, need_weights: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(inputs)
        self.attention = nn.MultiheadAttention(inputs, heads, bias=bias, batch_first=True)
        self.out, self.need_weights = nn.Linear(inputs, outputs), need_weights

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y, _ = self.attention(y, y, y, need_weights=self.need_weights)
        return self.out(x + y)


class ClassToken(nn.Module):
    """One token more, in front of the others."""

    def __init__(self, inputs: int, outputs: int, style: str) -> None:
        super().__init__()
        self.style = style
        self.layer = nn.Linear(inputs, outputs)
        self.token = nn.Parameter(torch.zeros(1, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        if self.style == "expand":
            token = self.token.expand(x.shape[0], -1, -1)
        elif self.style == "sizes":
            token = self.token.expand(x.shape[0], 1, x.shape[-1])
        else:
            token = self.token.repeat(x.shape[0], 1, 1)
        return torch.cat((token, x), dim=1)


class PositionEmbedding(nn.Module):
    """A parameter or a table that is looked up, added to all images' tokens."""

    def __init__(self, inputs: int, outputs: int, tokens: int, style: str) -> None:
        super().__init__()
        self.style = style
        self.layer = nn.Linear(inputs, outputs)
        if style == "lookup":
            self.table = nn.Embedding(tokens, outputs)
        elif style == "buffer":
            self.register_buffer("position", torch.randn(tokens, outputs))
        else:
            self.position = nn.Parameter(torch.zeros(1, tokens, outputs))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        if self.style == "lookup":
            return x + self.table(torch.arange(x.shape[1], device=x.device))
        if self.style == "sliced":
            return x + self.position[:, : x.size(1)]
        return x + self.position  # type: ignore[operator]


class Windows(nn.Module):
    """Blocks on the tokens of 4×4 windows of a map, as in Swin."""

    def __init__(self, inner: Sequence[nn.Module], inputs: int, outputs: int, shift: bool) -> None:
        super().__init__()
        self.window, self.shift = 4, 2 if shift else 0
        self.inner = nn.Sequential(*inner)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        x = torch.roll(x.permute(0, 2, 3, 1), (-self.shift, -self.shift), dims=(1, 2))
        x = x.view(batch, height // self.window, self.window, width // self.window, self.window, channels)
        x = self.inner(x.transpose(2, 3).reshape(-1, self.window * self.window, channels))
        x = x.view(batch, height // self.window, width // self.window, self.window, self.window, -1)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(batch, height, width, -1)
        return torch.roll(x, (self.shift, self.shift), dims=(1, 2)).permute(0, 3, 1, 2)


class ToTokens(nn.Module):
    """A map's pixels, or patches of 2×2, as tokens."""

    def __init__(self, inputs: int, outputs: int, style: str) -> None:
        super().__init__()
        self.style = style
        if style == "unfold":
            self.layer: Any = nn.Linear(4 * inputs, outputs)
        else:
            self.layer = nn.Conv2d(inputs, outputs, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        if self.style == "unfold":
            return self.layer(F.unfold(x, 2, stride=2).transpose(1, 2))
        x = self.layer(x)
        if self.style == "permute":
            batch, channels, *_ = x.shape
            return x.permute(0, 2, 3, 1).reshape(batch, -1, channels)
        if self.style == "view":
            return x.view(x.shape[0], x.shape[1], -1).permute(0, 2, 1)
        return x.flatten(2).transpose(1, 2)


class ToMap(nn.Module):
    """Tokens of a square as a map."""

    def __init__(self, inputs: int, outputs: int, style: str) -> None:
        super().__init__()
        self.style = style
        self.layer = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        batch, tokens, channels = x.shape
        side = math.isqrt(tokens)
        if self.style == "transpose":
            return x.transpose(1, 2).reshape(batch, channels, side, side)
        if self.style == "unflatten":
            return x.mT.unflatten(2, (side, side))
        return x.reshape(batch, side, side, -1).permute(0, 3, 1, 2)


class Flatten(nn.Module):
    """A small map, all of it, as one vector."""

    def __init__(self, inputs: int, outputs: int, style: str) -> None:
        super().__init__()
        self.style, self.features = style, 4 * inputs
        self.layer = nn.Linear(4 * inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(x, 2)
        if self.style == "view":
            x = x.contiguous().view(x.size(0), -1)
        elif self.style == "size":
            x = x.reshape(-1, self.features)
        elif self.style == "channels last":
            x = x.permute(0, 2, 3, 1).flatten(1)
        else:
            x = torch.flatten(x, 1)
        return F.relu(self.layer(x))


class Pool(nn.Module):
    """Maps or tokens to vectors."""

    def __init__(self, inputs: int, outputs: int, space: str, style: str) -> None:
        super().__init__()
        self.space, self.style = space, style
        self.norm = nn.LayerNorm(inputs) if style == "norm" else nn.Identity()
        self.layer = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        if self.space == "map":
            x = x.mean((-2, -1)) if self.style == "mean" else F.adaptive_avg_pool2d(x, 1).flatten(1)
        elif self.style == "first":
            x = x[:, 0]
        elif self.style == "pool":
            x = F.adaptive_avg_pool1d(x.transpose(1, 2), 1).squeeze(-1)
        else:
            x = x.mean(dim=1)
        return self.layer(self.norm(x))
