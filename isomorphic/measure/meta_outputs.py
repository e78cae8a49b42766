"""Outputs on the meta device, made from shapes alone.

PyTorch works out these functions' meta outputs in Python, which is nearly all the time of a forward pass there. Each
entry gives an output for the arguments of its function or aten overload, or None where PyTorch should decide: arguments
that do not fit are left to PyTorch, for its error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from isomorphic.observe import EagerMode


def _like_first(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.new_empty(x.shape) if x.is_contiguous() else torch.empty_like(x)  # new_empty is much the faster


def _elementwise_output(x: Tensor, other: Any, **kwargs: Any) -> Tensor | None:
    """For a sum or product that has the first operand's shape."""
    if kwargs or not x.is_floating_point():
        return None
    if isinstance(other, Tensor):
        sizes = zip(reversed(other.shape), reversed(x.shape), strict=False)
        same_kind = other.is_meta and other.dtype == x.dtype
        fits = same_kind and other.dim() <= x.dim() and all(n in (1, m) for n, m in sizes)
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


def _aten_batch_norm_output(x: Tensor, weight: Any, bias: Any, running_mean: Tensor | None, *_: Any) -> Tensor | None:
    return _batch_norm_output(x, running_mean)


def _attention_output(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *_: Any, **__: Any
) -> Tensor | None:
    same_batch = query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
    fits = same_batch and query.shape[-1] == key.shape[-1] and key.shape[-2] == value.shape[-2]
    return query.new_empty((*query.shape[:-1], value.shape[-1])) if fits and attn_mask is None else None


def _activation_output(x: Tensor, *_: Any, **__: Any) -> Tensor | None:
    return _like_first(x) if x.is_floating_point() else None


def _in_place_output(x: Tensor, *_: Any, **__: Any) -> Tensor | None:
    return x if x.is_floating_point() else None


def _group_norm_output(x: Tensor, groups: int, weight: Any = None, *_: Any, **__: Any) -> Tensor | None:
    fits = x.shape[1] % groups == 0 and (weight is None or weight.shape == x.shape[1:2])
    return x.new_empty(x.shape) if fits and x.is_contiguous() else None


def _rolled_output(x: Tensor, *_: Any, **__: Any) -> Tensor | None:
    return x.new_empty(x.shape) if x.is_contiguous() else None


def _sampled_output(x: Tensor, grid: Tensor, *_: Any, **__: Any) -> Tensor | None:
    """(N, C, H, W) at a grid (N, h, w, 2) is (N, C, h, w); with depth alike."""
    fits = x.dim() == grid.dim() and x.shape[0] == grid.shape[0] and grid.shape[-1] == x.dim() - 2
    return x.new_empty((*x.shape[:2], *grid.shape[1:-1])) if fits and grid.is_meta and x.dtype == grid.dtype else None


_aten = torch.ops.aten
_ACTIVATIONS = ("relu", "hardtanh", "elu", "leaky_relu", "celu", "selu", "hardswish", "hardsigmoid", "mish", "softplus")
_IN_PLACE = ("hardtanh_", "elu_", "leaky_relu_", "celu_", "selu_", "hardswish_", "hardsigmoid_", "mish_", "sigmoid_")
META_OUTPUTS: Mapping[Callable[..., Any], Callable[..., Tensor | None]] = {
    **dict.fromkeys((F.linear, _aten.linear.default), _linear_output),
    **dict.fromkeys((F.layer_norm, _aten.layer_norm.default), _layer_norm_output),
    F.batch_norm: _batch_norm_output,
    _aten.batch_norm.default: _aten_batch_norm_output,
    **dict.fromkeys((F.scaled_dot_product_attention, _aten.scaled_dot_product_attention.default), _attention_output),
    **dict.fromkeys((F.gelu, _aten.gelu.default, F.hardtanh), _like_first),
    **dict.fromkeys((getattr(_aten, name).default for name in _ACTIVATIONS), _activation_output),
    **dict.fromkeys((getattr(_aten, name).default for name in _IN_PLACE), _in_place_output),
    _aten.group_norm.default: _group_norm_output,
    **dict.fromkeys((torch.roll, _aten.roll.default), _rolled_output),
    **dict.fromkeys((F.grid_sample, _aten.grid_sampler.default), _sampled_output),
    **dict.fromkeys((_aten.grid_sampler_2d.default, _aten.grid_sampler_3d.default), _sampled_output),
    **dict.fromkeys((Tensor.add, _aten.add.Tensor, Tensor.mul, _aten.mul.Tensor), _elementwise_output),
}


def call_for_shapes(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """``func(*args, **kwargs)``, made from shapes alone where that is known and the first argument has no data."""
    made = META_OUTPUTS[func](*args, **kwargs) if func in META_OUTPUTS and args and args[0].is_meta else None
    return func(*args, **kwargs) if made is None else made


class ShapeKernels(EagerMode):
    """While active, aten operations make their meta outputs so, and no torch function mode sees how PyTorch does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return call_for_shapes(func, args, kwargs or {})
