"""Operations that reduce channels: their results depend on which elements they run over, and how many.

A layer norm of a masked model divides by the dense width, that of the cut model by the new one. `StatisticsRecorder`
notes, call by call, the statistics of each such operation in one model: its means, variances, maxima, sums.
`StatisticsReplayer` runs another model on them. Where a statistic has the same shape there, it is handed over, once it
is clear that the other model runs over the same elements but for some that are all alike: zeros as a rule, or what the
code before has made of zeros. Where it has another shape, zeros bring its elements to the recorded count. Both modes
look at aten operations, so the models must run where composite operations decompose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._decomp import decomposition_table

from isomorphic.errors import UserError
from isomorphic.observe import EagerMode
from isomorphic.torch_versions import known_overloads

Statistics = tuple[Tensor, ...]
# New random numbers.
_RANDOM = frozenset(
    f"aten::{name}" for name in ("rand", "randn", "rand_like", "randn_like", "uniform_", "normal_", "exponential_")
)


@dataclass(frozen=True)
class Recorded:
    """One call of a reduction, as the dense model made it.

    Attributes:
        func: the aten overload.
        elements: one number for each element that its statistics run over, shape (count,); see `Reduction.elements`.
        statistics: of the call.
    """

    func: Any
    elements: Tensor
    statistics: Statistics


class _Mode(EagerMode):
    """Shows reductions to `reduce`, norms and losses as what they are made of; draws no random numbers.

    Tensors of different shapes get different ones from one seed.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in REDUCTIONS:
            return self.reduce(_bound(func, args, kwargs), func, args, kwargs)
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

    def reduce(self, reduction: Reduction, func: Any, args: Any, kwargs: Any) -> Any:
        """Returns the call's result."""
        raise NotImplementedError


class StatisticsRecorder(_Mode):
    """Notes each reduction, in `calls`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Recorded] = []

    def reduce(self, reduction: Reduction, func: Any, args: Any, kwargs: Any) -> Any:
        elements = reduction.elements()
        self.calls.append(Recorded(func, elements, reduction.statistics(len(elements))))
        return func(*args, **kwargs)


class StatisticsReplayer(_Mode):
    """Runs each reduction on the recorded statistics.

    Raises:
        UserError: while it runs, where the next operation is not the recorded one.
    """

    def __init__(self, calls: Sequence[Recorded]) -> None:
        super().__init__()
        self._calls = calls
        self._position = 0

    def reduce(self, reduction: Reduction, func: Any, args: Any, kwargs: Any) -> Any:
        recorded = self._calls[self._position] if self._position < len(self._calls) else None
        if recorded is None or recorded.func is not func:
            self._diverge(recorded, func)
        self._position += 1
        count = len(recorded.elements)
        if not reduction.missing(count):
            return func(*args, **kwargs)
        statistics = reduction.statistics(count)
        same_shape = [one.shape for one in statistics] == [one.shape for one in recorded.statistics]
        if same_shape and _is_all_but_alike(reduction.elements(), recorded.elements, reduction.x.dtype):
            statistics = recorded.statistics
        return reduction.result(statistics)

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


def _is_all_but_alike(some: Tensor, all_: Tensor, dtype: torch.dtype) -> bool:
    """Returns True if all of the first numbers are among the second ones, and the others of these equal one another."""
    tolerance = all_.abs().max() * (1e-9 if dtype == torch.float64 else 1e-5)
    ordered = all_.sort().values
    above = torch.searchsorted(ordered, some).clamp(max=len(ordered) - 1)
    distance = torch.minimum((ordered[above] - some).abs(), (ordered[(above - 1).clamp(min=0)] - some).abs())
    missing = len(all_) - len(some)
    mean = (all_.sum() - some.sum()) / missing
    spread = (all_.square().sum() - some.square().sum()) / missing - mean.square()
    is_alike = spread.abs() <= tolerance * all_.abs().max()
    return missing > 0 and bool((distance <= tolerance).all() and is_alike)


# --- reductions: statistics over `count` elements, and results made of them -----------------------------------------


class Reduction:
    """One call of an operation that reduces channels, with its arguments bound.

    For x of shape (2, 8, 5) and a mean over dim 1, which the dense model takes over 12 channels: `statistics(12)` is
    the sum of 8 channels over 12, shape (2, 1, 5), as if four more were zero, and `result` drops the dim of size 1.

    Attributes:
        x: what is reduced.
        dims: the dims that go, non-negative.
        keepdim: they stay with size 1.
    """

    def __init__(self, x: Tensor, dim: int | Sequence[int] | None = None, keepdim: bool = False, **_: Any) -> None:
        """
        Args:
            x, dim, keepdim: the operation's, under its own names; no dim is all of them.
        """
        self.x, self.keepdim = x, keepdim
        dims = [dim] if isinstance(dim, int) else dim or range(x.dim())
        self.dims = [d % x.dim() for d in dims]

    def statistics(self, count: int) -> Statistics:
        """The statistics where zeros bring the elements to `count`, with reduced dims of size 1."""
        raise NotImplementedError

    def result(self, statistics: Statistics) -> Any:
        """Returns the result of the operation, made of these statistics."""
        return self.reduced(statistics[0])

    def elements(self) -> Tensor:
        """One number for each position of `dims`, shape (count,): a fixed random combination of what x holds there."""
        x = torch.view_as_real(self.x) if self.x.is_complex() else self.x
        rest = [dim for dim in range(x.dim()) if dim not in self.dims]
        columns = x.permute(*rest, *self.dims).reshape(math.prod(x.shape[dim] for dim in rest), -1).double()
        weights = torch.rand(len(columns), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return weights.to(x.device) @ columns

    def missing(self, count: int) -> int:
        """How many zeros bring the elements to `count`."""
        return count - math.prod(self.x.shape[dim] for dim in self.dims)

    def reduced(self, statistic: Tensor) -> Tensor:
        """A statistic without the dims of size 1, unless they are to stay."""
        return statistic if self.keepdim else statistic.squeeze(self.dims)


class _Sum(Reduction):
    def statistics(self, count: int) -> Statistics:
        return (self.x.sum(self.dims, keepdim=True),)


class _Mean(Reduction):
    def statistics(self, count: int) -> Statistics:
        return (self.x.sum(self.dims, keepdim=True) / count,)


class _Norm(Reduction):
    def __init__(self, x: Tensor, ord: float = 2, **others: Any) -> None:
        super().__init__(x, **others)
        self.order = ord

    def statistics(self, count: int) -> Statistics:
        return (torch.linalg.vector_norm(self.x, self.order, self.dims, keepdim=True),)


class _Variance(Reduction):
    """Its statistics are the variance and the mean; results are made of one of them, or of both."""

    def __init__(self, x: Tensor, correction: float | None = None, **others: Any) -> None:
        super().__init__(x, **others)
        self.correction = 1 if correction is None else correction

    def statistics(self, count: int) -> Statistics:
        mean = self.x.sum(self.dims, keepdim=True) / count
        deviation = (self.x - mean).square().sum(self.dims, keepdim=True) + self.missing(count) * mean.square()
        return deviation / (count - self.correction), mean


class _Deviation(_Variance):
    def result(self, statistics: Statistics) -> Any:
        variance, _ = statistics
        return self.reduced(variance.sqrt())


class _VarianceAndMean(_Variance):
    def result(self, statistics: Statistics) -> Any:
        variance, mean = statistics
        return self.reduced(variance), self.reduced(mean)


class _DeviationAndMean(_Variance):
    def result(self, statistics: Statistics) -> Any:
        variance, mean = statistics
        return self.reduced(variance.sqrt()), self.reduced(mean)


class _Maximum(Reduction):
    """Not below the missing zeros."""

    def statistics(self, count: int) -> Statistics:
        largest = self.x.amax(self.dims, keepdim=True)
        return (largest.clamp_min(0) if self.missing(count) else largest,)


class _Minimum(Reduction):
    """Not above the missing zeros."""

    def statistics(self, count: int) -> Statistics:
        smallest = self.x.amin(self.dims, keepdim=True)
        return (smallest.clamp_max(0) if self.missing(count) else smallest,)


class _MaximumAndPlace(_Maximum):
    def result(self, statistics: Statistics) -> Any:
        return self.reduced(statistics[0]), self.x.argmax(self.dims[0], self.keepdim)


class _MinimumAndPlace(_Minimum):
    def result(self, statistics: Statistics) -> Any:
        return self.reduced(statistics[0]), self.x.argmin(self.dims[0], self.keepdim)


class _LogOfSum(Reduction):
    """log Σ exp x; each missing zero adds exp 0."""

    def statistics(self, count: int) -> Statistics:
        top = self.x.amax(self.dims, keepdim=True).clamp_min(0)
        others = self.missing(count) * (-top).exp()
        return (top + ((self.x - top).exp().sum(self.dims, keepdim=True) + others).log(),)


class _LogSoftmax(_LogOfSum):
    def result(self, statistics: Statistics) -> Any:
        return self.x - statistics[0]


class _Softmax(_LogOfSum):
    def result(self, statistics: Statistics) -> Any:
        return (self.x - statistics[0]).exp()


_aten = torch.ops.aten
# What is taken apart into statistics and what is computed from them.
_COMPOSED = {
    func: decomposition_table[func]
    for func in (
        _aten.native_layer_norm.default,
        *known_overloads("_fused_rms_norm"),
        _aten.native_group_norm.default,
        _aten.native_batch_norm.default,
        _aten.mse_loss.default,
        _aten.smooth_l1_loss.default,
        _aten.huber_loss.default,
        _aten.binary_cross_entropy.default,
    )
}
REDUCTIONS: dict[Any, type[Reduction]] = {
    _aten.sum.default: _Sum,
    _aten.sum.dim_IntList: _Sum,
    _aten.mean.default: _Mean,
    _aten.mean.dim: _Mean,
    _aten.linalg_vector_norm.default: _Norm,
    _aten.var.correction: _Variance,
    _aten.std.correction: _Deviation,
    _aten.var_mean.correction: _VarianceAndMean,
    _aten.std_mean.correction: _DeviationAndMean,
    _aten.logsumexp.default: _LogOfSum,
    _aten._softmax.default: _Softmax,
    _aten._safe_softmax.default: _Softmax,
    _aten._log_softmax.default: _LogSoftmax,
    _aten.amax.default: _Maximum,
    _aten.max.default: _Maximum,
    _aten.max.dim: _MaximumAndPlace,
    _aten.amin.default: _Minimum,
    _aten.min.default: _Minimum,
    _aten.min.dim: _MinimumAndPlace,
}


def _bound(func: Any, args: Any, kwargs: Any) -> Reduction:
    """The call's reduction, with each argument under the name that torch gives it."""
    names = (argument.name for argument in func._schema.arguments)
    x, *positional = args
    return REDUCTIONS[func](x, **dict(zip(list(names)[1:], positional, strict=False)), **kwargs)
