"""Operations that mix channels: their results depend on which elements they run over, and how many.

A layer norm of a masked model divides by the dense width, that of the cut model by the new one. `StatisticsRecorder`
notes, call by call, the statistics of each such operation in one model: its means, variances, maxima, sums.
`StatisticsReplayer` runs another model on them. Where a statistic has the same shape there, it is handed over, once it
is clear that the other model runs over the same elements but for some that are all alike: zeros as a rule, or what the
code before has made of zeros. Where it has another shape, zeros bring its elements to the recorded count. Both modes
look at aten operations, so the models must run where composite operations decompose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.utils._python_dispatch import TorchDispatchMode

from isomorphic.errors import UserError

Dims = int | Sequence[int] | None
Statistics = tuple[Tensor, ...]
# New random numbers.
_RANDOM = frozenset(
    f"aten::{name}" for name in ("rand", "randn", "rand_like", "randn_like", "uniform_", "normal_", "exponential_")
)


@dataclass(frozen=True)
class Mixing:
    """One kind of operation.

    Attributes:
        over: of the operation's arguments: the tensor and the dims of it that the statistics run over.
        statistics: of (count, *arguments): what they are where zeros bring the elements to `count`.
        result: of (statistics, *arguments): what the operation returns.
    """

    over: Callable[..., tuple[Tensor, list[int]]]
    statistics: Callable[..., Statistics]
    result: Callable[..., Any]


@dataclass(frozen=True)
class Recorded:
    """One call of a mixing operation.

    Attributes:
        func: the aten overload.
        elements: one number for each element that its statistics run over, shape (count,); see `_elements`.
        statistics: of the call.
    """

    func: Any
    elements: Tensor
    statistics: Statistics


class _Mode(TorchDispatchMode):
    """Shows mixing operations to `mix`, norms and losses as what they are made of; draws no random numbers.

    Tensors of different shapes get different ones from one seed.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in MIXING:
            return self.mix(func, MIXING[func], args, kwargs)
        if func in _COMPOSED:
            with self:
                return _COMPOSED[func](*args, **kwargs)
        if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if func._schema.name in _RANDOM:
            out.fill_(0.5)
        return out

    def mix(self, func: Any, mixing: Mixing, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError


class StatisticsRecorder(_Mode):
    """Notes each mixing operation, in `calls`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Recorded] = []

    def mix(self, func: Any, mixing: Mixing, args: Any, kwargs: Any) -> Any:
        elements = _elements(*mixing.over(*args, **kwargs))
        self.calls.append(Recorded(func, elements, mixing.statistics(len(elements), *args, **kwargs)))
        return func(*args, **kwargs)


class StatisticsReplayer(_Mode):
    """Runs each mixing operation on the recorded statistics.

    Raises:
        UserError: while it runs, where the next operation is not the recorded one.
    """

    def __init__(self, calls: Sequence[Recorded]) -> None:
        super().__init__()
        self._calls = calls
        self._position = 0

    def mix(self, func: Any, mixing: Mixing, args: Any, kwargs: Any) -> Any:
        recorded = self._calls[self._position] if self._position < len(self._calls) else None
        if recorded is None or recorded.func is not func:
            self._diverge(recorded, func)
        self._position += 1
        x, dims = mixing.over(*args, **kwargs)
        count = len(recorded.elements)
        if not _missing(count, x, dims):
            return func(*args, **kwargs)
        statistics = mixing.statistics(count, *args, **kwargs)
        same_shape = [one.shape for one in statistics] == [one.shape for one in recorded.statistics]
        if same_shape and _is_all_but_alike(_elements(x, dims), recorded.elements, x.dtype):
            statistics = recorded.statistics
        return mixing.result(statistics, *args, **kwargs)

    def finish(self) -> None:
        """Raises UserError where recorded operations are left over."""
        if self._position < len(self._calls):
            self._diverge(self._calls[self._position], None)

    def _diverge(self, recorded: Recorded | None, found: Any) -> NoReturn:
        expected, instead = (str(func) if func else "the end" for func in (recorded and recorded.func, found))
        raise UserError(
            "the cut model takes another way through its code than the dense one: "
            f"after {self._position} operations that mix channels {instead} follows instead of {expected}"
        )


def _elements(x: Tensor, dims: list[int]) -> Tensor:
    """One number for each position of `dims`, shape (count,): a fixed random combination of what `x` holds there."""
    x = torch.view_as_real(x) if x.is_complex() else x
    rest = [dim for dim in range(x.dim()) if dim not in dims]
    columns = x.permute(*rest, *dims).reshape(math.prod(x.shape[dim] for dim in rest), -1).double()
    weights = torch.rand(len(columns), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return weights.to(x.device) @ columns


def _is_all_but_alike(some: Tensor, all_: Tensor, dtype: torch.dtype) -> bool:
    """Whether the first numbers are among the second ones, of which those that are missing equal one another."""
    tolerance = all_.abs().max() * (1e-9 if dtype == torch.float64 else 1e-5)
    ordered = all_.sort().values
    above = torch.searchsorted(ordered, some).clamp(max=len(ordered) - 1)
    distance = torch.minimum((ordered[above] - some).abs(), (ordered[(above - 1).clamp(min=0)] - some).abs())
    missing = len(all_) - len(some)
    mean = (all_.sum() - some.sum()) / missing
    spread = (all_.square().sum() - some.square().sum()) / missing - mean.square()
    is_alike = spread.abs() <= tolerance * all_.abs().max()
    return missing > 0 and bool((distance <= tolerance).all() and is_alike)


# --- statistics over `count` elements, with reduced dims of size 1, and results made of them -----------------------


def _dims(x: Tensor, dim: Dims) -> list[int]:
    dims = [dim] if isinstance(dim, int) else dim or range(x.dim())
    return [d % x.dim() for d in dims]


def _missing(count: int, x: Tensor, dims: list[int]) -> int:
    return count - math.prod(x.shape[dim] for dim in dims)


def _along(x: Tensor, dim: Dims = None, *_: Any, **__: Any) -> tuple[Tensor, list[int]]:
    return x, _dims(x, dim)


def _reduced(statistic: Tensor, x: Tensor, dim: Dims = None, keepdim: bool = False) -> Tensor:
    return statistic if keepdim else statistic.squeeze(_dims(x, dim))


def _only(statistics: Statistics, x: Tensor, dim: Dims = None, keepdim: bool = False, **_: Any) -> Tensor:
    return _reduced(statistics[0], x, dim, keepdim)


def _sum(_: int, x: Tensor, dim: Dims = None, *__: Any, **___: Any) -> Statistics:
    return (x.sum(_dims(x, dim), keepdim=True),)


def _mean(count: int, x: Tensor, dim: Dims = None, *_: Any, **__: Any) -> Statistics:
    return (x.sum(_dims(x, dim), keepdim=True) / count,)


def _along_norm(x: Tensor, order: float = 2, dim: Dims = None, *_: Any, **__: Any) -> tuple[Tensor, list[int]]:
    return x, _dims(x, dim)


def _norm(_: int, x: Tensor, order: float = 2, dim: Dims = None, *__: Any, **___: Any) -> Statistics:
    return (torch.linalg.vector_norm(x, order, _dims(x, dim), keepdim=True),)


def _as_norm(
    statistics: Statistics, x: Tensor, order: float = 2, dim: Dims = None, keepdim: bool = False, **_: Any
) -> Tensor:
    return _reduced(statistics[0], x, dim, keepdim)


def _moments(count: int, x: Tensor, dims: list[int]) -> Statistics:
    """The mean, and the sum of the squared deviations from it."""
    mean = x.sum(dims, keepdim=True) / count
    return mean, (x - mean).square().sum(dims, keepdim=True) + _missing(count, x, dims) * mean.square()


def _variance_and_mean(
    count: int, x: Tensor, dim: Dims = None, *, correction: float | None = None, keepdim: bool = False
) -> Statistics:
    mean, deviation = _moments(count, x, _dims(x, dim))
    return deviation / (count - (1 if correction is None else correction)), mean


def _spread(*made: Callable[[Tensor, Tensor], Tensor]) -> Mixing:
    """Results made of a variance and a mean."""

    def result(statistics: Statistics, x: Tensor, dim: Dims = None, *, keepdim: bool = False, **_: Any) -> Any:
        found = [_reduced(one(*statistics), x, dim, keepdim) for one in made]
        return tuple(found) if len(found) > 1 else found[0]

    return Mixing(_along, _variance_and_mean, result)


def _extreme(reduce: Callable[..., Tensor], bound: Callable[[Tensor, float], Tensor], where: Any = None) -> Mixing:
    """A maximum that is not below the missing zeros, or a minimum that is not above them, and perhaps its place."""

    def statistics(count: int, x: Tensor, dim: Dims = None, *_: Any) -> Statistics:
        dims = _dims(x, dim)
        extreme = reduce(x, dims, keepdim=True)
        return (bound(extreme, 0) if _missing(count, x, dims) else extreme,)

    def result(statistics: Statistics, x: Tensor, dim: Dims = None, keepdim: bool = False) -> Any:
        extreme = _reduced(statistics[0], x, dim, keepdim)
        return (extreme, where(x, dim, keepdim)) if where else extreme

    return Mixing(_along, statistics, result)


def _log_of_sum(count: int, x: Tensor, dim: Dims, *_: Any, **__: Any) -> Statistics:
    dims = _dims(x, dim)
    top = x.amax(dims, keepdim=True).clamp_min(0)
    return (top + ((x - top).exp().sum(dims, keepdim=True) + _missing(count, x, dims) * (-top).exp()).log(),)


def _log_softmax(statistics: Statistics, x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x - statistics[0]


def _softmax(statistics: Statistics, x: Tensor, *_: Any, **__: Any) -> Tensor:
    return (x - statistics[0]).exp()


_aten = torch.ops.aten
# What is taken apart into statistics and what is computed from them.
_COMPOSED = {
    func: decomposition_table[func]
    for func in (
        _aten.native_layer_norm.default,
        _aten._fused_rms_norm.default,
        _aten.native_group_norm.default,
        _aten.native_batch_norm.default,
        _aten.mse_loss.default,
        _aten.smooth_l1_loss.default,
        _aten.huber_loss.default,
        _aten.binary_cross_entropy.default,
    )
}
_max, _min = (torch.amax, torch.clamp_min), (torch.amin, torch.clamp_max)
MIXING: dict[Any, Mixing] = {
    **dict.fromkeys((_aten.sum.default, _aten.sum.dim_IntList), Mixing(_along, _sum, _only)),
    **dict.fromkeys((_aten.mean.default, _aten.mean.dim), Mixing(_along, _mean, _only)),
    _aten.linalg_vector_norm.default: Mixing(_along_norm, _norm, _as_norm),
    _aten.var.correction: _spread(lambda variance, mean: variance),
    _aten.std.correction: _spread(lambda variance, mean: variance.sqrt()),
    _aten.var_mean.correction: _spread(lambda variance, mean: variance, lambda variance, mean: mean),
    _aten.std_mean.correction: _spread(lambda variance, mean: variance.sqrt(), lambda variance, mean: mean),
    _aten.logsumexp.default: Mixing(_along, _log_of_sum, _only),
    **dict.fromkeys((_aten._softmax.default, _aten._safe_softmax.default), Mixing(_along, _log_of_sum, _softmax)),
    _aten._log_softmax.default: Mixing(_along, _log_of_sum, _log_softmax),
    **dict.fromkeys((_aten.amax.default, _aten.max.default), _extreme(*_max)),
    **dict.fromkeys((_aten.amin.default, _aten.min.default), _extreme(*_min)),
    _aten.max.dim: _extreme(*_max, torch.argmax),
    _aten.min.dim: _extreme(*_min, torch.argmin),
}
