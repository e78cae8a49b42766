"""`F.multi_head_attention_forward` in the open: the same computation with its views spelled out.

The library's function hides them behind an assertion that the inner width is the stream's. Written out, the two widths
are one equation of the trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isomorphic.errors import UserError


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Query (L, B, E), key and value (S, B, …), or without B; see `torch.nn.MultiheadAttention`.

    `is_causal` is not read: torch demands the mask as well, which this flag says is causal.

    Raises:
        UserError: keys are added to the given ones, or stand in for them.
    """
    if bias_k is not None or bias_v is not None or add_zero_attn:
        raise UserError("multi-head attention with add_bias_kv or add_zero_attn cannot be traced")
    if static_k is not None or static_v is not None:
        raise UserError("multi-head attention with static_k or static_v cannot be traced")
    unbatched = query.dim() == 2
    if unbatched:
        query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    length, batch, width = query.shape
    assert width == embed_dim_to_check
    weights: Any = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else in_proj_weight
    q, k, v = _heads((query, key, value), weights, in_proj_bias, num_heads)
    mask, attended, dropout = _mask(attn_mask, key_padding_mask, q), None, dropout_p if training else 0.0
    if need_weights:
        logits = (q * (width // num_heads) ** -0.5) @ k.transpose(-2, -1)
        attended = (logits if mask is None else logits + mask).softmax(-1)  # (B, heads, L, S)
        out = F.dropout(attended, dropout) @ v
        attended = attended.mean(1) if average_attn_weights else attended
        attended = attended.squeeze(0) if unbatched else attended
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    out = F.linear(out.permute(2, 0, 1, 3).reshape(length, batch, width), out_proj_weight, out_proj_bias)
    return (out.squeeze(1) if unbatched else out), attended


def _heads(
    inputs: tuple[Tensor, Tensor, Tensor], weights: Tensor | Sequence[Tensor], bias: Tensor | None, num_heads: int
) -> tuple[Tensor, ...]:
    """q, k and v (B, heads, length, head dim) from inputs (length, B, …); one weight (3 · E, E), or one for each."""
    query, key, value = inputs
    length, batch, width = query.shape
    head_dim = width // num_heads
    if isinstance(weights, Tensor) and query is key and key is value:
        found = F.linear(query, weights, bias).view(length, batch, 3, num_heads, head_dim).unbind(2)
    else:
        if isinstance(weights, Tensor):
            weights = weights.view(3, num_heads * head_dim, width).unbind()
        biases = [None] * 3 if bias is None else bias.view(3, num_heads * head_dim).unbind()
        layers = zip(inputs, weights, biases, strict=True)
        found = [F.linear(*layer).reshape(-1, batch, num_heads, head_dim) for layer in layers]
    return tuple(tensor.permute(1, 2, 0, 3) for tensor in found)


def _mask(attn_mask: Tensor | None, padding: Tensor | None, query: Tensor) -> Tensor | None:
    """What is added to the logits (B, heads, L, S): forbidden places of both masks are -inf."""
    total = None
    for mask in (attn_mask, None if padding is None else padding[:, None, None, :]):
        if mask is not None:
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask, -torch.inf)
            if mask.dim() == 3:  # (B · heads, L, S)
                mask = mask.view(query.size(0), -1, *mask.shape[1:])
            total = mask if total is None else total + mask
    return total
