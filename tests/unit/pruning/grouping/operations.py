"""One small call for each operation of the rules' table: what happens to eight channels that run through it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import ops

aten = torch.ops.aten
WIDTH = 8
SIZES = {"tokens": (2, 3, 5), "line": (2, 3, 4), "map": (2, 3, 6, 6), "volume": (2, 3, 4, 4, 4)}


@dataclass(frozen=True)
class Operation:
    """Code between a layer that makes eight channels and one that reads what is left of them.

    Attributes:
        name: the operation, and in which way it is used.
        space: a key of `SIZES`; channels are the last axis of tokens, and axis 1 of all others.
        code: from a module (which has the `extra` parameters) and the channels to the result.
        expected: units of the group that the channels are in, or the reason why they stay.
        axis: where the channels are in the result; None where they are in none of its axes.
        extra: shapes of further parameters.
        random: the results are not to be compared.
    """

    name: str
    space: str
    code: Callable[[Any, Tensor], Tensor]
    expected: int | str = WIDTH
    axis: int | None = -1
    extra: tuple[tuple[str, tuple[int, ...]], ...] = ()
    random: bool = False

    @property
    def channels(self) -> int:
        """Where they are."""
        return -1 if self.space == "tokens" else 1

    def inputs(self) -> Tensor:
        """Images (B, 3, …) or tokens (B, 5, 3) of standard normal numbers."""
        shape = SIZES[self.space]
        values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return values.transpose(1, 2) if self.space == "tokens" else values


class Through(nn.Module):
    """Layer `one`, an operation, layer `two`."""

    def __init__(self, operation: Operation) -> None:
        super().__init__()
        self.operation = operation
        kinds = {"tokens": nn.Linear, "line": nn.Conv1d, "map": nn.Conv2d, "volume": nn.Conv3d}
        sizes = (1,) if operation.space != "tokens" else ()
        self.one = kinds[operation.space](3, WIDTH, *sizes)
        for name, shape in operation.extra:
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.two = nn.Identity()
        if operation.axis is not None:
            with torch.no_grad():
                self.two = nn.Linear(self(operation.inputs()).shape[-1], 4)

    def forward(self, x: Tensor) -> Tensor:
        out = self.operation.code(self, self.one(x))
        if self.operation.axis is not None:
            out = out.movedim(self.operation.axis, -1)
        return self.two(out)


def _tokens(name: str, code: Callable[[Any, Tensor], Tensor], expected: int | str = WIDTH, **named: Any) -> Operation:
    return Operation(name, "tokens", code, expected, **named)


def _pixels(
    name: str, code: Callable[[Any, Tensor], Tensor], expected: int | str = WIDTH, space: str = "map", **named: Any
) -> Operation:
    return dataclasses.replace(Operation(name, space, code, expected, axis=1), **named)


def _extra(**shapes: tuple[int, ...]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple(shapes.items())


def _written(x: Tensor, index: Any, values: Tensor) -> Tensor:
    x = x.clone()
    x[index] = values
    return x


def _sum(values: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, values)


_ACTIVATIONS = (
    *("hardswish", "hardsigmoid", "hardtanh", "relu6", "celu", "selu", "elu", "gelu", "silu", "mish", "softplus"),
    *("logsigmoid", "leaky_relu"),
)
_VALUES = ("sum", "mean", "nansum", "amax", "amin", "prod", "logsumexp", "var", "std", "norm")
_PAIRS = ("max", "min", "median", "var_mean", "std_mean")
INDEX = torch.tensor([0, 2, 1, 4, 3])
FIXED = "it meets a fixed axis in"


def _elementwise() -> Iterator[Operation]:
    yield _tokens("activations", lambda m, x: _sum(getattr(F, name)(x) for name in _ACTIVATIONS))
    for name in ["dropout", "feature_dropout", "alpha_dropout"]:
        yield _tokens(name, lambda m, x, name=name: getattr(torch, name)(x, 0.5, False))
    yield _tokens("native_dropout", lambda m, x: torch.native_dropout(x, 0.5, False)[0])
    yield _tokens("threshold", lambda m, x: F.threshold(x, 0.1, 0.0))
    yield _tokens("rrelu", lambda m, x: F.rrelu(x))
    yield _tokens("float_power", lambda m, x: x.float_power(2).to(x.dtype))
    yield _tokens("bernoulli", lambda m, x: torch.bernoulli(x.sigmoid()), random=True)
    yield _tokens("clone", lambda m, x: x.clone())
    yield _tokens("contiguous", lambda m, x: x.mT.contiguous().mT)
    yield _tokens("to", lambda m, x: x.to(torch.float16).to(x.dtype), random=True)
    yield _tokens("_to_copy", lambda m, x: aten._to_copy(x, dtype=torch.float64).to(x.dtype))
    yield _tokens("type_as", lambda m, x: x.type_as(torch.ones(8)))
    for name in ["abs", "neg", "copysign", "xlogy"]:
        others = (2.0,) if name in ("copysign", "xlogy") else ()
        yield _tokens(f"{name}_", lambda m, x, name=name, others=others: getattr(x.clone(), f"{name}_")(*others))
    for name in ["rsub", "floor_divide"]:
        yield _tokens(name, lambda m, x, name=name: getattr(torch, name)(x, x.exp()))
    yield _tokens("complex", lambda m, x: torch.complex(x, x.square()).abs())
    yield _tokens("polar", lambda m, x: torch.polar(x.abs(), x).real)
    yield _tokens("detach", lambda m, x: x.detach())
    for name in ("alias", "lift", "lift_fresh"):
        yield _tokens(name, lambda m, x, name=name: getattr(aten, name)(x))
    yield _tokens("requires_grad_", lambda m, x: aten.requires_grad_(x, False))
    yield _tokens("where", lambda m, x: torch.where(x > 0, x, -x))
    yield _tokens("where-counted", lambda m, x: torch.where((x[0] > 0).all(0))[0], "where numbers its", axis=None)
    yield _tokens("masked_fill", lambda m, x: x.masked_fill(x > 0, 2.0))
    yield _tokens("copy_", lambda m, x: torch.empty_like(x).copy_(x))


def _made_alike() -> Iterator[Operation]:
    for name in ["uniform", "normal", "random", "exponential", "zero"]:
        yield _tokens(
            f"{name}_", lambda m, x, name=name: getattr(torch.empty_like(x), f"{name}_")() + x, random=name != "zero"
        )
    for name in ["zeros_like", "ones_like", "rand_like", "randn_like"]:
        yield _tokens(name, lambda m, x, name=name: getattr(torch, name)(x) * x, random=name.startswith("rand"))
    yield _tokens("randint_like", lambda m, x: torch.randint_like(x, 9) * x, random=True)
    yield _tokens("normal-around", lambda m, x: torch.normal(x, 1.0) + torch.normal(0.0, x.exp()), random=True)
    yield _tokens("normal", lambda m, x: torch.normal(0.0, 1.0, (5, 1)) * x, random=True)
    yield _tokens("fill_", lambda m, x: torch.empty_like(x).fill_(2) * x)
    yield _tokens("full_like", lambda m, x: torch.full_like(x, 2) * x)
    yield _tokens("nan_to_num", lambda m, x: x.nan_to_num())
    yield _tokens("cumsum", lambda m, x: x.cumsum(-1))
    for name in ["softmax", "log_softmax"]:
        yield _tokens(name, lambda m, x, name=name: getattr(x, name)(-1))
        yield _tokens(f"_{name}", lambda m, x, name=name: getattr(aten, f"_{name}")(x, -1, False))
    yield _tokens("_safe_softmax", lambda m, x: aten._safe_softmax(x, -1))


def _new() -> Iterator[Operation]:
    for name in ["zeros", "ones", "empty", "rand", "randn"]:
        yield _tokens(name, lambda m, x, name=name: x + getattr(torch, name)(x.shape[-1]), random=True)
    for name in ["zeros", "ones", "empty"]:
        yield _tokens(f"new_{name}", lambda m, x, name=name: x + getattr(x, f"new_{name}")(x.shape[-1]), random=True)
    yield _tokens("full", lambda m, x: x * torch.full((x.shape[-1],), 2.0))
    yield _tokens("new_full", lambda m, x: x * x.new_full((x.shape[-1],), 2))
    yield _tokens("full-constant", lambda m, x: x * torch.full((8,), 2.0), "a size in the forward code depends on it")
    yield _tokens("scalar_tensor", lambda m, x: x * torch.scalar_tensor(2.0))
    yield _tokens("arange-tokens", lambda m, x: x + torch.arange(5.0)[:, None])
    yield _tokens("arange", lambda m, x: x + torch.arange(8.0), f"{FIXED} add")
    yield _tokens("linspace", lambda m, x: x * torch.linspace(0, 1, 8), f"{FIXED} mul")
    yield _tokens("eye", lambda m, x: x @ torch.eye(8), f"{FIXED} matmul")
    yield _tokens("randint", lambda m, x: x + torch.randint(0, 9, (5, 1)), random=True)
    yield _tokens("randperm", lambda m, x: x[:, torch.randperm(5)], random=True)
    for name in ("tril_indices", "triu_indices"):
        yield _tokens(name, lambda m, x, name=name: x[:, getattr(torch, name)(3, 3)[1]])


def _views() -> Iterator[Operation]:
    yield _tokens("view", lambda m, x: x.view(10, -1))
    yield _tokens("reshape", lambda m, x: x.mT.reshape(2, -1))
    yield _tokens("_unsafe_view", lambda m, x: aten._unsafe_view(x, [10, -1]))
    yield _tokens(
        "_reshape_alias", lambda m, x: aten._reshape_alias(x, [10, 8], [8, 1]), "the forward code does something else"
    )
    yield _tokens("view_as", lambda m, x: x.flatten().view_as(x))
    yield _tokens("reshape_as", lambda m, x: x.flatten().reshape_as(x))
    yield _tokens("permute", lambda m, x: x.permute(2, 0, 1), axis=0)
    for name in ["transpose", "swapaxes", "swapdims"]:
        yield _tokens(name, lambda m, x, name=name: getattr(x, name)(0, -1), axis=0)
    yield _tokens("mT", lambda m, x: x.mT, axis=1)
    yield _tokens("t", lambda m, x: x[0].t(), axis=0)
    yield _tokens("numpy_T", lambda m, x: x[0].T, axis=0)
    yield _tokens("expand", lambda m, x: x[:, None].expand(-1, 3, -1, -1))
    yield _tokens("torch.broadcast_to", lambda m, x: torch.broadcast_to(x[:, None], (2, 3, 5, x.shape[-1])))
    yield _tokens("expand_as", lambda m, x: x[:1].expand_as(x))
    yield _tokens("broadcast_to", lambda m, x: x[:, None].broadcast_to(2, 3, 5, x.shape[-1]))
    yield _tokens("repeat", lambda m, x: x.repeat(1, 3, 2))
    yield _tokens("repeat_interleave", lambda m, x: x.repeat_interleave(2, dim=-1))
    yield _tokens("repeat_interleave-tensor", lambda m, x: x.repeat_interleave(INDEX, 1), "no rule for this repeat")
    yield _tokens("unsqueeze", lambda m, x: x.unsqueeze(-1), axis=2)
    yield _tokens("squeeze", lambda m, x: x[:1].squeeze(0))
    yield _tokens("flip", lambda m, x: x.flip(-1))
    yield _tokens("roll", lambda m, x: x.roll(1, 1))
    yield _tokens("roll-everything", lambda m, x: x.roll(3), "its units are rolled")
    yield _tokens("roll-channels", lambda m, x: x.roll(1, -1), "its units are rolled")


def _pieces() -> Iterator[Operation]:
    yield _tokens("slice", lambda m, x: x[:, 1:4])
    yield _tokens("slice-by-two", lambda m, x: x[..., ::2], 4)
    yield _tokens("slice-by-two-not-from-the-start", lambda m, x: x[..., 2::2], "every so many of its units are picked")
    yield _tokens("slice-elsewhere", lambda m, x: aten.slice(x, 2, 0, 7), "no rule for how slice slices it")
    yield _tokens("narrow", lambda m, x: x.narrow(1, 1, 3))
    yield _tokens("narrow-from-the-end", lambda m, x: x.narrow(1, -3, 2))
    yield _tokens("select", lambda m, x: x[:, 1])
    yield _tokens("select-channel", lambda m, x: x[..., 1], "one of its units is picked by number")
    yield _tokens("unbind", lambda m, x: x.unbind(1)[2])
    yield _tokens("split", lambda m, x: x.split(2, 1)[1])
    yield _tokens("split_with_sizes", lambda m, x: x.split_with_sizes([1, 4], 1)[1])
    yield _tokens("unsafe_split", lambda m, x: torch.unsafe_split(x, 2, 1)[1])
    yield _tokens("unsafe_split_with_sizes", lambda m, x: torch.unsafe_split_with_sizes(x, [1, 4], 1)[1])
    yield _tokens("chunk", lambda m, x: torch.mul(*x.chunk(2, -1)), WIDTH // 2)
    yield _tokens("unsafe_chunk", lambda m, x: torch.mul(*torch.unsafe_chunk(x, 2, -1)), WIDTH // 2)
    for name in ["cat", "concat", "concatenate"]:
        yield _tokens(name, lambda m, x, name=name: getattr(torch, name)([x, x.square()], -1))
    yield _tokens("stack", lambda m, x: torch.stack([x, x.square()], 1))
    yield _tokens("unfold", lambda m, x: x.unfold(1, 3, 1), axis=2)
    yield _tokens("unfold-channels", lambda m, x: x.unfold(2, 3, 1), "windows slide over it")


def _shuffles() -> Iterator[Operation]:
    yield _tokens("pad-tokens", lambda m, x: F.pad(x, (0, 0, 1, 2), value=1.0))
    yield _tokens("pad", lambda m, x: F.pad(x, (1, 2), value=1.0))
    yield _tokens("pad-less", lambda m, x: F.pad(x, (-1, 0)), "it is padded with itself")
    yield _tokens("constant_pad_nd", lambda m, x: aten.constant_pad_nd(x, [0, 2], 1.0))
    yield _pixels("pixel_shuffle", lambda m, x: F.pixel_shuffle(x, 2), WIDTH // 4)
    yield _pixels("pixel_unshuffle", lambda m, x: F.pixel_unshuffle(x, 2))
    yield _pixels("channel_shuffle", lambda m, x: torch.channel_shuffle(x, 2), WIDTH // 2)
    yield _pixels("native_channel_shuffle", lambda m, x: torch.native_channel_shuffle(x, 2), WIDTH // 2)
    yield _tokens("view_as_complex", lambda m, x: torch.view_as_complex(torch.stack([x, x.exp()], -1)).abs())
    yield _tokens("view_as_real", lambda m, x: torch.view_as_real(torch.complex(x, x.exp())).flatten(-2))
    yield _pixels("_fft_c2c", lambda m, x: torch.fft.fft2(torch.complex(x, x.exp())).real)
    yield _pixels("_fft_r2c", lambda m, x: torch.fft.rfft2(x).abs())
    yield _pixels("_fft_c2r", lambda m, x: torch.fft.irfft2(torch.fft.rfft2(x) * 2, x.shape[-2:]))
    yield _tokens("_fft_r2c-channels", lambda m, x: torch.fft.rfft(x).abs(), "it is transformed")
    yield _pixels("im2col", lambda m, x: F.unfold(x, 3))
    yield _pixels("col2im", lambda m, x: F.fold(x, (3, 3), (2, 2)), WIDTH // 4, "line")


def _picks() -> Iterator[Operation]:
    yield _tokens("index", lambda m, x: x[:, INDEX])
    yield _tokens("index-channels", lambda m, x: x[..., INDEX], "an index picks from it")
    yield _tokens("index_select", lambda m, x: x.index_select(1, INDEX))
    yield _tokens("index_select-channels", lambda m, x: x.index_select(2, INDEX), "an index picks from it")
    yield _tokens("gather", lambda m, x: x.gather(1, x.argsort(1)))
    yield _tokens(
        "gather-by-constants", lambda m, x: x.gather(1, INDEX[None, :, None].expand(2, 5, 8)), "a size in the"
    )
    yield _tokens("gather-channels", lambda m, x: x.gather(2, INDEX.expand(2, 5, 5)), "an index picks from it")
    yield _tokens("topk", lambda m, x: x.topk(2, 1)[0])
    yield _tokens("topk-channels", lambda m, x: x.topk(2)[0], "its units have an order in topk")
    yield _tokens("sort", lambda m, x: x.sort(1)[0])
    yield _tokens("argsort", lambda m, x: x.argsort(1).to(x.dtype), random=True)
    yield _tokens("kthvalue", lambda m, x: x.kthvalue(2, 1)[0], "no rule for kthvalue")
    yield _tokens("cumprod", lambda m, x: x.cumprod(1))
    yield _tokens("cumprod-channels", lambda m, x: x.cumprod(2), "its units have an order in cumprod")
    for name in ["cummax", "cummin"]:
        yield _tokens(name, lambda m, x, name=name: getattr(x, name)(1)[0])
    yield _tokens("index_put_", lambda m, x: _written(torch.ones_like(x), (slice(None), INDEX), x))
    yield _tokens("index_put-one", lambda m, x: x.index_put((torch.arange(2),), m.a), extra=_extra(a=(WIDTH,)))
    rows = torch.arange(2)[:, None]
    yield _tokens("index_put-pairs", lambda m, x: _written(x, (rows, INDEX[None, :2]), 2 * x[:, :2]))
    yield _tokens("index_put-mask", lambda m, x: _written(x, (x > 1,), torch.ones(())), "an index writes to it")
    tokens = torch.tensor([[True, False, True, False, False]] * 2)
    yield _tokens("index_put-tokens", lambda m, x: _written(x, (tokens,), m.a), extra=_extra(a=(WIDTH,)))
    yield _tokens("index-tokens", lambda m, x: x[tokens])
    yield _tokens("index_fill", lambda m, x: x.index_fill(1, INDEX, 2.0))
    yield _tokens(
        "masked_scatter", lambda m, x: x.masked_scatter(tokens[..., None].expand_as(x), 2 * x[:, :2].flatten(0, 1))
    )
    yield _tokens("masked_scatter-one", lambda m, x: x.masked_scatter(tokens[..., None], 2 * x[:, :2].flatten(0, 1)))
    yield _tokens("masked_scatter-channels", lambda m, x: x.masked_scatter(x > 0, 2 * x), "no rule for this")
    yield _tokens("index_put-channels", lambda m, x: _written(x, (..., INDEX), x[..., INDEX]), "an index")
    yield _tokens("logcumsumexp", lambda m, x: x.logcumsumexp(1))
    for name in ["index_add", "index_copy"]:
        yield _tokens(name, lambda m, x, name=name: getattr(torch.ones_like(x), name)(1, INDEX, x))
    yield _tokens("index_reduce", lambda m, x: torch.ones_like(x).index_reduce(1, INDEX, x, "amax"))
    yield _tokens("index_add-channels", lambda m, x: x.index_add(2, INDEX, x[..., :5]), "an index writes to it")
    for name in ["scatter", "scatter_add"]:
        yield _tokens(name, lambda m, x, name=name: getattr(torch.ones_like(x), name)(1, x.argsort(1), x))
    yield _tokens("scatter_reduce", lambda m, x: torch.ones_like(x).scatter_reduce(1, x.argsort(1), x, "sum"))
    yield _tokens("_pack_padded_sequence", lambda m, x: nn.utils.rnn.pack_padded_sequence(x, [5, 3], True).data)
    norms = _extra(weight_v=(4, WIDTH), weight_g=(4, 1))
    yield _tokens(
        "_weight_norm_interface", lambda m, x: F.linear(x, aten._weight_norm(m.weight_v, m.weight_g, 0)), extra=norms
    )
    for name in ["tril", "triu"]:
        yield _tokens(name, lambda m, x, name=name: getattr(x @ x.mT, name)(), axis=None)
        yield _tokens(f"{name}-channels", lambda m, x, name=name: getattr(x, name)(), f"it has an order in {name}")
    yield _tokens("diagonal", lambda m, x: (x @ x.mT).diagonal(dim1=1, dim2=2), axis=None)
    yield _tokens("diagonal-channels", lambda m, x: x.mT.diagonal(dim1=0, dim2=1), "it has an order in", axis=None)
    yield _tokens("diagonal-tokens", lambda m, x: x.diagonal(dim1=0, dim2=1), axis=0)
    yield _tokens("diag", lambda m, x: (x[0] @ x[0].mT).diag(), axis=None)


def _reductions() -> Iterator[Operation]:
    yield _tokens("values", lambda m, x: _sum(getattr(torch, name)(x, dim=1) for name in _VALUES))
    yield _tokens("values-and-where", lambda m, x: _sum(getattr(torch, name)(x, dim=1)[0] for name in _PAIRS))
    yield _tokens("aten.norm", lambda m, x: aten.norm(x, 2, [1], False))
    yield _tokens("linalg_vector_norm", lambda m, x: torch.linalg.vector_norm(x, dim=1))
    for name in ["argmax", "argmin", "count_nonzero"]:
        yield _tokens(name, lambda m, x, name=name: getattr(torch, name)(x, dim=1).to(x.dtype))
    for name in ["all", "any"]:
        yield _tokens(name, lambda m, x, name=name: getattr(torch, name)(x > 0, dim=1).to(x.dtype))
    for name in ["sum", "mean", "amax", "var", "norm", "logsumexp"]:
        yield _tokens(f"{name}-channels", lambda m, x, name=name: getattr(torch, name)(x.relu(), dim=-1), axis=None)
    yield _tokens("max-channels", lambda m, x: x * x.max(-1, keepdim=True)[0])
    for name in ("argmax", "max", "min"):
        places = lambda m, x, name=name: getattr(x, name)(-1)  # noqa: E731
        used = places if name == "argmax" else lambda m, x, places=places: places(m, x)[1]
        yield _tokens(f"{name}-places", used, "their places are used as numbers", axis=None)
        yield _tokens(f"{name}-compared", lambda m, x, used=used: x * (used(m, x) > 2)[..., None], "their places")
    for name in ("mse_loss", "smooth_l1_loss", "huber_loss"):
        loss = getattr(F, name)
        yield _tokens(name, lambda m, x, loss=loss: loss(x, x.square(), reduction="none") + loss(x, 2 * x))
    yield _tokens("binary_cross_entropy", lambda m, x: x * F.binary_cross_entropy(x.sigmoid(), x.relu().tanh()))
    for name in ("prod", "nanmedian", "median"):
        code = lambda m, x, name=name: getattr(torch, name)(x, dim=-1)  # noqa: E731
        values = (lambda m, x, code=code: code(m, x)[0]) if "median" in name else code
        reason = "no rule for nanmedian" if name == "nanmedian" else f"each of its units counts in {name}"
        yield _tokens(f"{name}-channels", values, reason, axis=None)
    yield _tokens("sum-keepdim", lambda m, x: x * x.sum(-1, keepdim=True))


def _products() -> Iterator[Operation]:
    square, vector, matrix = (WIDTH, 4), (WIDTH,), (4, WIDTH)
    yield _tokens("matmul", lambda m, x: x @ x.mT, axis=None)
    yield _tokens("matmul-parameter", lambda m, x: x @ m.a, extra=_extra(a=square))
    yield _tokens("mm", lambda m, x: torch.mm(x[0], m.a), extra=_extra(a=square))
    yield _tokens("bmm", lambda m, x: torch.bmm(x, x.mT), axis=None)
    yield _tokens("mv", lambda m, x: torch.mv(x[0], m.a), axis=None, extra=_extra(a=vector))
    yield _tokens("dot", lambda m, x: torch.dot(x[0, 1], m.a), axis=None, extra=_extra(a=vector))
    yield _tokens("vdot", lambda m, x: torch.vdot(x[0, 1], m.a), axis=None, extra=_extra(a=vector))
    yield _tokens(
        "linear-vector", lambda m, x: F.linear(x, m.a), "no rule for this linear", extra=_extra(a=vector), axis=None
    )
    yield _tokens("addmm", lambda m, x: torch.addmm(m.b, x[0], m.a), extra=_extra(a=square, b=(4,)))
    yield _tokens("baddbmm", lambda m, x: torch.baddbmm(x, x @ x.mT, x))
    yield _tokens("_sparse_addmm", lambda m, x: torch.sparse.mm(torch.eye(5, dtype=x.dtype).to_sparse(), x[0]))
    yield _tokens("linear", lambda m, x: F.linear(x, m.a), extra=_extra(a=matrix))
    yield _tokens("scaled_dot_product_attention", lambda m, x: F.scaled_dot_product_attention(x, x, x, scale=0.3))
    yield _tokens("cdist", lambda m, x: torch.cdist(x, x.square()), axis=None)
    yield _tokens("_cdist_forward", lambda m, x: aten._cdist_forward(x, x.square(), 2.0, None), axis=None)
    yield _tokens("glu", lambda m, x: F.glu(x), WIDTH // 2)


def _layers() -> Iterator[Operation]:
    for n, space in enumerate(("line", "map", "volume"), start=1):
        kernel = (1,) * n
        yield _pixels(
            f"conv{n}d", lambda m, x, n=n: getattr(F, f"conv{n}d")(x, m.a), space=space, extra=_extra(a=(6, 8, *kernel))
        )
        transposed = lambda m, x, n=n: getattr(F, f"conv_transpose{n}d")(x, m.a)  # noqa: E731
        yield _pixels(f"conv_transpose{n}d", transposed, space=space, extra=_extra(a=(8, 6, *kernel)))
    filters, ends = _extra(a=(6, WIDTH, 3, 3)), ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    yield _pixels("convolution", lambda m, x: aten.convolution(x, m.a, None, *ends), extra=filters)
    yield _pixels(
        "_convolution", lambda m, x: aten._convolution(x, m.a, None, *ends, False, False, False, False), extra=filters
    )
    vectors = _extra(a=(WIDTH,), b=(WIDTH,))
    yield _pixels("batch_norm", lambda m, x: F.batch_norm(x, None, None, m.a, m.b, True), extra=vectors)
    yield _pixels(
        "native_batch_norm",
        lambda m, x: aten.native_batch_norm(x, m.a, m.b, None, None, True, 0.1, 1e-5)[0],
        extra=vectors,
    )
    yield _pixels("instance_norm", lambda m, x: F.instance_norm(x, weight=m.a, bias=m.b), extra=vectors)
    yield _pixels("group_norm", lambda m, x: F.group_norm(x, 2, m.a, m.b), extra=vectors)
    yield _pixels("prelu", lambda m, x: F.prelu(x, m.a), extra=vectors[:1])
    yield _pixels("_prelu_kernel", lambda m, x: aten._prelu_kernel(x, m.a.view(-1, 1, 1)), extra=vectors[:1])
    yield _tokens("layer_norm", lambda m, x: F.layer_norm(x, x.shape[-1:], m.a, m.b), extra=vectors)
    yield _tokens(
        "layer_norm-constant", lambda m, x: F.layer_norm(x, (8,), m.a, m.b), "a size in the forward", extra=vectors
    )
    yield _tokens("rms_norm", lambda m, x: F.rms_norm(x, x.shape[-1:], m.a), extra=vectors[:1])
    untold = "a size in the forward code depends on it"
    yield _tokens(
        "native_layer_norm",
        lambda m, x: aten.native_layer_norm(x, x.shape[-1:], m.a, m.b, 1e-5)[0],
        untold,
        extra=vectors,
    )
    if hasattr(aten, "_fused_rms_norm"):
        yield _tokens(
            "_fused_rms_norm",
            lambda m, x: aten._fused_rms_norm(x, x.shape[-1:], m.a, 1e-5)[0],
            untold,
            extra=vectors[:1],
        )


def _pooling() -> Iterator[Operation]:
    spaces = ("line", "map", "volume")
    for n, space in enumerate(spaces, start=1):
        for name, size in (("max_pool", 2), ("avg_pool", 2), ("adaptive_avg_pool", 2), ("adaptive_max_pool", 2)):
            yield _pixels(f"{name}{n}d", lambda m, x, f=f"{name}{n}d", size=size: getattr(F, f)(x, size), space=space)
        for mode in [["linear"], ["bilinear", "bicubic"], ["trilinear"]][n - 1] + ["nearest"]:
            yield _pixels(
                f"upsample_{mode}{n}d", lambda m, x, mode=mode: F.interpolate(x, scale_factor=2, mode=mode), space=space
            )
        for name in (f"reflection_pad{n}d", f"replication_pad{n}d"):
            yield _pixels(name, lambda m, x, name=name, n=n: getattr(aten, name)(x, [1] * 2 * n), space=space)
        yield _pixels(
            f"_upsample_nearest_exact{n}d",
            lambda m, x, n=n: F.interpolate(x, (3,) * n, mode="nearest-exact"),
            space=space,
        )
    yield _pixels("max_pool2d_with_indices", lambda m, x: F.max_pool2d(x, 2, return_indices=True)[0])
    yield _pixels("max_pool3d_with_indices", lambda m, x: F.max_pool3d(x, 2, return_indices=True)[0], space="volume")
    yield _pixels("pad-reflected", lambda m, x: F.pad(x, (1, 0, 1, 2), "reflect"))
    yield _tokens("pad-channels-reflected", lambda m, x: F.pad(x, (1, 1), "reflect"), "it is padded with itself")
    yield _pixels("lp_pool2d", lambda m, x: F.lp_pool2d(x.exp(), 2.0, 2))
    yield _pixels("_adaptive_avg_pool2d", lambda m, x: aten._adaptive_avg_pool2d(x, [2, 2]))
    yield _pixels("_adaptive_avg_pool3d", lambda m, x: aten._adaptive_avg_pool3d(x, [2, 2, 2]), space="volume")
    for mode in ("bilinear", "bicubic"):
        yield _pixels(
            f"_upsample_{mode}2d_aa", lambda m, x, mode=mode: F.interpolate(x, (3, 3), mode=mode, antialias=True)
        )
    grid = torch.linspace(-1, 1, 2 * 4 * 4 * 2).reshape(2, 4, 4, 2)
    yield _pixels("grid_sampler", lambda m, x: F.grid_sample(x, grid.to(x), align_corners=False))
    yield _pixels("grid_sampler_2d", lambda m, x: aten.grid_sampler_2d(x, grid.to(x), 0, 0, False))
    cube = torch.linspace(-1, 1, 2 * 4 * 4 * 4 * 3).reshape(2, 4, 4, 4, 3)
    yield _pixels("grid_sampler_3d", lambda m, x: aten.grid_sampler_3d(x, cube.to(x), 0, 0, False), space="volume")


def _regions() -> Iterator[Operation]:
    boxes = torch.tensor([[0, 0.0, 0.0, 4.0, 4.0], [1, 1.0, 1.0, 5.0, 5.0]])
    yield _pixels("roi_align", lambda m, x: ops.roi_align(x, boxes.to(x), 2))
    yield _pixels("roi_pool", lambda m, x: ops.roi_pool(x, boxes.to(x), 2))
    yield _pixels("ps_roi_align", lambda m, x: ops.ps_roi_align(x, boxes.to(x), 2), 2)
    yield _pixels("ps_roi_pool", lambda m, x: ops.ps_roi_pool(x, boxes.to(x), 2), 2)
    for groups in (1, 2):  # of offsets
        extra = _extra(a=(6, WIDTH, 3, 3), b=(groups * 18, WIDTH, 3, 3))
        yield _pixels(
            f"deform_conv2d-{groups}",
            lambda m, x: ops.deform_conv2d(x, F.conv2d(x, m.b, padding=1), m.a, padding=(1, 1)),
            extra=extra,
        )


OPERATIONS: Sequence[Operation] = [
    *(_elementwise()),
    *(_made_alike()),
    *(_new()),
    *(_views()),
    *(_pieces()),
    *(_shuffles()),
    *(_picks()),
    *(_reductions()),
    *(_products()),
    *(_layers()),
    *(_pooling()),
    *(_regions()),
]
