"""Outputs on the meta device, made from shapes alone.

PyTorch works out these functions' meta outputs in Python, which is nearly all the time of a forward pass there. Each
entry gives an output for the arguments of its function, or None where PyTorch should decide: arguments that do not fit
are left to PyTorch, for its error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _like_first(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.new_empty(x.shape) if x.is_contiguous() else torch.empty_like(x)  # new_empty is much the faster


def _elementwise_output(x: Tensor, other: Any, **kwargs: Any) -> Tensor | None:
    """For a sum or product that has the first operand's shape."""
    if kwargs or not x.is_floating_point():
        return None
    if isinstance(other, Tensor):
        sizes = zip(reversed(other.shape), reversed(x.shape), strict=False)
        fits = other.dtype == x.dtype and other.dim() <= x.dim() and all(n in (1, m) for n, m in sizes)
    else:
        fits = isinstance(other, (int, float))
    return _like_first(x) if fits else None


def _linear_output(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    fits = x.shape[-1] == weight.shape[-1] and (bias is None or bias.shape == weight.shape[:1])
    return x.new_empty((*x.shape[:-1], weight.shape[0])) if fits else None


def _layer_norm_output(x: Tensor, normalized_shape: Any, weight: Any = None, *_: Any, **__: Any) -> Tensor | None:
    shape = tuple(normalized_shape)
    fits = x.shape[-len(shape) :] == shape and (weight is None or weight.shape == shape)
    return x.new_empty(x.shape) if fits else None


def _batch_norm_output(x: Tensor, running_mean: Tensor | None, *_: Any, **__: Any) -> Tensor | None:
    fits = running_mean is not None and running_mean.shape == x.shape[1:2]
    return _like_first(x) if fits else None


def _attention_output(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *_: Any, **__: Any
) -> Tensor | None:
    same_batch = query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
    fits = same_batch and query.shape[-1] == key.shape[-1] and key.shape[-2] == value.shape[-2]
    return query.new_empty((*query.shape[:-1], value.shape[-1])) if fits and attn_mask is None else None


META_OUTPUTS: Mapping[Callable[..., Any], Callable[..., Tensor | None]] = {
    F.linear: _linear_output,
    F.layer_norm: _layer_norm_output,
    F.batch_norm: _batch_norm_output,
    F.scaled_dot_product_attention: _attention_output,
    **dict.fromkeys((F.gelu, F.hardtanh), _like_first),
    torch.roll: lambda x, *_, **__: x.new_empty(x.shape) if x.is_contiguous() else None,
    **dict.fromkeys((Tensor.add, Tensor.mul), _elementwise_output),
}
