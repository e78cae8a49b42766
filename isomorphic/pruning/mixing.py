"""Operations that mix channels: their results depend on how many elements they run over.

A layer norm of a masked model divides by the dense width, that of the cut model by the new one. `Recorder` notes, call
by call, how many elements each such operation runs over in one model; `Replayer` lets another run count as many, those
that it lacks being zero: means and variances over the recorded count, zeros in a softmax's denominator, maxima that do
not fall below zero. Both look at aten operations, so the models must run where composite operations decompose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from isomorphic.errors import UserError

Dims = int | Sequence[int] | None


class Recorder(TorchDispatchMode):
    """Notes each mixing operation and how many elements it runs over, in `calls`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in MIXING:
            self.calls.append((func, MIXING[func].elements(*args, **kwargs)))
        return func(*args, **kwargs)


class Replayer(TorchDispatchMode):
    """Lets each mixing operation run over as many elements as were recorded.

    Raises:
        UserError: while it runs, where the next operation is not the recorded one.
    """

    def __init__(self, calls: Sequence[tuple[Any, int]]) -> None:
        super().__init__()
        self._calls = calls
        self._position = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in MIXING:
            return func(*args, **kwargs)
        recorded, count = self._calls[self._position] if self._position < len(self._calls) else (None, 0)
        if recorded is not func:
            self._diverge(recorded, func)
        self._position += 1
        if count == MIXING[func].elements(*args, **kwargs):
            return func(*args, **kwargs)
        return MIXING[func].compute(count, *args, **kwargs)

    def finish(self) -> None:
        """Raises UserError where recorded operations are left over."""
        if self._position < len(self._calls):
            self._diverge(self._calls[self._position][0], None)

    def _diverge(self, recorded: Any, found: Any) -> None:
        expected, instead = (str(func) if func else "the end" for func in (recorded, found))
        raise UserError(
            "the cut model takes another way through its code than the dense one: "
            f"after {self._position} operations that mix channels {instead} follows instead of {expected}"
        )


@dataclass(frozen=True)
class Mixing:
    """One kind of operation.

    Attributes:
        elements: of the operation's arguments: how many elements each of its statistics runs over.
        compute: of (count, *arguments): what it gives where zeros bring its elements to `count`.
    """

    elements: Callable[..., int]
    compute: Callable[..., Any]


def _dims(x: Tensor, dim: Dims) -> list[int]:
    return [dim] if isinstance(dim, int) else list(dim or range(x.dim()))


def _along(x: Tensor, dim: Dims = None, *_: Any, **__: Any) -> int:
    return math.prod(x.shape[d] for d in _dims(x, dim))


def _moments(count: int, x: Tensor, dims: list[int]) -> tuple[Tensor, Tensor]:
    """The mean over `count` elements, and the sum of the squared deviations from it; reduced dims stay, of size 1."""
    mean = x.sum(dims, keepdim=True) / count
    missing = count - _along(x, dims)
    return mean, (x - mean).square().sum(dims, keepdim=True) + missing * mean.square()


def _normalized(count: int, x: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean, deviation = _moments(count, x, dims)
    scale = (deviation / count + eps).rsqrt()
    return (x - mean) * scale, mean, scale


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _by_channel(x: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.view(-1, *[1] * (x.dim() - 2)) for t in tensors]


def _layer_norm(
    count: int, x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    normalized, mean, scale = _normalized(count, x, list(range(-len(shape), 0)), eps)
    return _affine(normalized, weight, bias), mean, scale


def _rms_norm(
    count: int, x: Tensor, shape: Sequence[int], weight: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    squares = x.square().sum(list(range(-len(shape), 0)), keepdim=True)
    scale = (squares / count + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt()
    return _affine(x * scale, weight, None), scale


def _group_norm(
    count: int, x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, c: int, hw: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    normalized, mean, scale = _normalized(count, x.reshape(n, groups, -1), [2], eps)
    return _affine(normalized.reshape(x.shape), *_by_channel(x, weight, bias)), mean.flatten(1), scale.flatten(1)


def _batch_norm(
    count: int, x: Tensor, weight: Tensor | None, bias: Tensor | None, *learned_and_momentum_and_eps: Any
) -> tuple[Tensor, Tensor, Tensor]:
    eps = learned_and_momentum_and_eps[-1]
    normalized, mean, scale = _normalized(count, x, [d for d in range(x.dim()) if d != 1], eps)
    return _affine(normalized, *_by_channel(x, weight, bias)), mean.flatten(), scale.flatten()


def _batch_norm_elements(
    x: Tensor, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: bool, *_: Any
) -> int:
    """Of its own statistics; those that were learned depend on no count."""
    return x.numel() // x.shape[1] if training else 0


def _mean(
    count: int, x: Tensor, dim: Dims = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    return x.sum(_dims(x, dim), keepdim, dtype=dtype) / count


def _variance_and_mean(
    count: int, x: Tensor, dim: Dims = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    dims = _dims(x, dim)
    mean, deviation = _moments(count, x, dims)
    variance = deviation / (count - (1 if correction is None else correction))
    return (variance, mean) if keepdim else (variance.squeeze(dims), mean.squeeze(dims))


def _std_and_mean(count: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    variance, mean = _variance_and_mean(count, *args, **kwargs)
    return variance.sqrt(), mean


def _logsumexp(count: int, x: Tensor, dim: Dims, keepdim: bool = False) -> Tensor:
    dims = _dims(x, dim)
    top = x.amax(dims, keepdim=True).clamp_min(0)
    missing = count - _along(x, dims)
    result = top + ((x - top).exp().sum(dims, keepdim=True) + missing * (-top).exp()).log()
    return result if keepdim else result.squeeze(dims)


def _log_softmax(count: int, x: Tensor, dim: int, *_: Any) -> Tensor:
    return x - _logsumexp(count, x, dim, keepdim=True)


def _softmax(count: int, x: Tensor, dim: int, *_: Any, **__: Any) -> Tensor:
    return _log_softmax(count, x, dim).exp()


def _extreme(operation: Any, bound: Callable[[Tensor, float], Tensor]) -> Mixing:
    """A maximum that is not below the missing zeros, or a minimum that is not above them."""

    def compute(_: int, *args: Any, **kwargs: Any) -> Any:
        result = operation(*args, **kwargs)
        return bound(result, 0) if isinstance(result, Tensor) else (bound(result[0], 0), *result[1:])

    return Mixing(_along, compute)


_aten = torch.ops.aten
MIXING: dict[Any, Mixing] = {
    _aten.native_layer_norm.default: Mixing(lambda x, shape, *_: math.prod(shape), _layer_norm),
    _aten._fused_rms_norm.default: Mixing(lambda x, shape, *_: math.prod(shape), _rms_norm),
    _aten.native_group_norm.default: Mixing(lambda x, w, b, n, c, hw, groups, eps: c // groups * hw, _group_norm),
    _aten.native_batch_norm.default: Mixing(_batch_norm_elements, _batch_norm),
    _aten.mean.default: Mixing(_along, _mean),
    _aten.mean.dim: Mixing(_along, _mean),
    _aten.var.correction: Mixing(_along, lambda *args, **kwargs: _variance_and_mean(*args, **kwargs)[0]),
    _aten.std.correction: Mixing(_along, lambda *args, **kwargs: _std_and_mean(*args, **kwargs)[0]),
    _aten.var_mean.correction: Mixing(_along, _variance_and_mean),
    _aten.std_mean.correction: Mixing(_along, _std_and_mean),
    _aten._softmax.default: Mixing(_along, _softmax),
    _aten._safe_softmax.default: Mixing(_along, _softmax),
    _aten._log_softmax.default: Mixing(_along, _log_softmax),
    _aten.logsumexp.default: Mixing(_along, _logsumexp),
    _aten.amax.default: _extreme(_aten.amax.default, torch.clamp_min),
    _aten.amin.default: _extreme(_aten.amin.default, torch.clamp_max),
    _aten.max.default: _extreme(_aten.max.default, torch.clamp_min),
    _aten.min.default: _extreme(_aten.min.default, torch.clamp_max),
    _aten.max.dim: _extreme(_aten.max.dim, torch.clamp_min),
    _aten.min.dim: _extreme(_aten.min.dim, torch.clamp_max),
}
