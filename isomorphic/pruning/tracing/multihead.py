"""`F.multi_head_attention_forward` in the open: the same computation with its views spelled out.

The library's function hides them behind an assertion that the inner width is the stream's. Written out, the two widths
are one equation of the trace.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


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
        NotImplementedError: keys are added to the given ones.
    """
    if bias_k is not None or bias_v is not None or add_zero_attn:
        raise NotImplementedError("multi-head attention with added keys")
    unbatched = query.dim() == 2
    if unbatched:
        query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
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
    out = F.scaled_dot_product_attention(q, k, v, _mask(attn_mask, key_padding_mask, k))
    out = out.permute(2, 0, 1, 3).reshape(length, batch, width)
    out = F.linear(out, out_proj_weight, out_proj_bias)
    attended = torch.zeros(batch, length, k.size(2)) if need_weights else None
    return (out.squeeze(1) if unbatched else out), attended


def _mask(attn_mask: Tensor | None, padding: Tensor | None, key: Tensor) -> Tensor | None:
    """Both masks as one; their shapes are all that the trace sees of them."""
    if attn_mask is not None:
        return attn_mask if attn_mask.dim() != 3 else attn_mask.view(key.size(0), -1, *attn_mask.shape[1:])
    return None if padding is None else ~padding[:, None, None, :].bool()
