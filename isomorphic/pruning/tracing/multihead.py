"""`F.multi_head_attention_forward` in the open: the same computation with its views spelled out.

The library's function hides them behind an assertion that the inner width is the stream's. Written out, the two widths
are one equation of the trace.
"""

from __future__ import annotations

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

    Raises:
        UserError: keys are added to the given ones.
    """
    if bias_k is not None or bias_v is not None or add_zero_attn:
        raise UserError("multi-head attention with add_bias_kv or add_zero_attn cannot be traced")
    unbatched = query.dim() == 2
    if unbatched:
        query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    length, batch, width = query.shape
    assert width == embed_dim_to_check
    head_dim = width // num_heads
    if use_separate_proj_weight or not (query is key and key is value):
        weights: Any = (q_proj_weight, k_proj_weight, v_proj_weight)
        if in_proj_weight is not None:
            weights = in_proj_weight.view(3, num_heads * head_dim, width).unbind()
        biases = [None] * 3 if in_proj_bias is None else in_proj_bias.view(3, num_heads * head_dim).unbind()
        inputs: Any = zip((query, key, value), weights, biases, strict=True)
        q, k, v = (F.linear(*one).reshape(-1, batch, num_heads, head_dim) for one in inputs)
    else:
        assert in_proj_weight is not None
        joint = F.linear(query, in_proj_weight, in_proj_bias).view(length, batch, 3, num_heads, head_dim)
        q, k, v = joint.unbind(2)
    q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (q, k, v))  # (B, heads, length, head dim)
    mask, attended = _mask(attn_mask, key_padding_mask, q), None
    if need_weights:
        logits = (q * head_dim**-0.5) @ k.transpose(-2, -1)
        attended = (logits if mask is None else logits + mask).softmax(-1)  # (B, heads, L, S)
        out = F.dropout(attended, dropout_p, training) @ v
        attended = attended.mean(1) if average_attn_weights else attended
        attended = attended.squeeze(0) if unbatched else attended
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p if training else 0.0)
    out = F.linear(out.permute(2, 0, 1, 3).reshape(length, batch, width), out_proj_weight, out_proj_bias)
    return (out.squeeze(1) if unbatched else out), attended


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
