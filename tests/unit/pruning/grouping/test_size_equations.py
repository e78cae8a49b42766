"""Sizes in forward code: the equation that each kind of call gives, and the numbers that it pins.

`x` and `w` are parameters whose dims carry units: `x.0` is the first dim of `x`, `x.0[2:5]` part of it, `x.0 as (3, 4)`
the same in rows, `blocks (3,)` are those rows and `new (3,)` units that belong to no parameter.
"""

from __future__ import annotations

import contextlib
import copy
import math
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from isomorphic.pruning.cutting.cut import cut
from isomorphic.pruning.cutting.self_check import cut_error, masked_copy
from isomorphic.pruning.grouping.size_arguments import SIZE_RULES
from isomorphic.pruning.grouping.trace import trace_groups
from isomorphic.pruning.plan import PruningPlan
from tests.unit.pruning.grouping.watch import Code, watch

VECTOR, MATRIX, ROW, IMAGE = {"x": (12,)}, {"x": (2, 12)}, {"x": (1, 12)}, {"x": (1, 4, 2, 2)}
ATTRIBUTES = {"heads": 3, "part": 4, "rest": 8, "width": 12, "both": (4, 8), "one": 1, "groups": 2, "value": 2}


def case(name, function, shapes, *equations):
    return pytest.param(function, shapes, list(equations), id=name)


VIEWS = [
    case(
        "view",
        lambda m: m.x.view(m.heads, m.x.shape[0] // m.heads),
        VECTOR,
        *("heads = blocks (3,)", "len(x.0) // heads = x.0 as (3, 4)"),
    ),
    case("view-tuple", lambda m: m.x.view((m.heads, 4)), VECTOR, "heads = blocks (3,)", "4 = x.0 as (3, 4)"),
    case("view-minus-one", lambda m: m.x.view(m.heads, -1), VECTOR, "heads = blocks (3,)"),
    case("view-dtype", lambda m: m.x.view(torch.int32), VECTOR),
    case("view-and-back", lambda m: m.x.view(-1, m.part).view(m.width), VECTOR, "part = x.0 as (3, 4)", "width = x.0"),
    case(
        "reshape",
        lambda m: m.x.reshape(*m.x.shape[:-1], m.heads, -1),
        MATRIX,
        *("len(x.0) = x.0", "heads = blocks (3,)"),
    ),
    case(
        "reshape-tuple",
        lambda m: m.x.reshape((*m.x.size()[:1], -1, m.part)),
        MATRIX,
        *("len(x.0) = x.0", "part = x.1 as (3, 4)"),
    ),
    case("reshape-keyword", lambda m: m.x.reshape(shape=(m.heads, -1)), VECTOR, "heads = blocks (3,)"),
    case("torch.reshape", lambda m: torch.reshape(m.x, (m.heads, -1)), VECTOR, "heads = blocks (3,)"),
    case(
        "torch.reshape-keywords", lambda m: torch.reshape(input=m.x, shape=(-1, m.part)), VECTOR, "part = x.0 as (3, 4)"
    ),
    case("unflatten", lambda m: m.x.unflatten(-1, (m.heads, -1)), MATRIX, "heads = blocks (3,)"),
    case("torch.unflatten", lambda m: torch.unflatten(m.x, 0, (-1, m.part)), VECTOR, "part = x.0 as (3, 4)"),
    case("expand", lambda m: m.x.expand(m.heads, m.x.size(1)), ROW, "heads = new (3,)", "len(x.1) = x.1"),
    case("expand-minus-one", lambda m: m.x.expand(m.heads, -1), ROW, "heads = new (3,)"),
    case("broadcast_to", lambda m: torch.broadcast_to(m.x, (m.heads, 12)), ROW, "heads = new (3,)", "12 = x.1"),
    case("Tensor.broadcast_to", lambda m: m.x.broadcast_to((m.heads, 12)), ROW, "heads = new (3,)", "12 = x.1"),
]
FORMS = {
    name: [("", getattr(Tensor, name)), ("torch.", getattr(torch, name))] for name in ("hsplit", "vsplit", "dsplit")
}
PIECES = [
    case("split", lambda m: m.x.split(m.part), VECTOR, *(f"part = x.0[{n}:{n + 4}]" for n in (0, 4, 8))),
    case("split-keyword", lambda m: m.x.split(split_size=6), VECTOR, "6 = x.0[0:6]", "6 = x.0[6:12]"),
    case("split-list", lambda m: m.x.split([4, m.rest], dim=1), MATRIX, "4 = x.1[0:4]", "rest = x.1[4:12]"),
    case(
        "torch.split",
        lambda m: torch.split(m.x, [m.part, m.x.shape[1] - m.part], -1),
        MATRIX,
        *("part = x.1[0:4]", "len(x.1) - part = x.1[4:12]"),
    ),
    case("split-tuple", lambda m: m.x.split(m.both), VECTOR, "both[0] = x.0[0:4]", "both[1] = x.0[4:12]"),
    case(
        "split_with_sizes", lambda m: m.x.split_with_sizes(m.both), VECTOR, "both[0] = x.0[0:4]", "both[1] = x.0[4:12]"
    ),
    case(
        "split_with_sizes-keyword",
        lambda m: m.x.split_with_sizes(split_sizes=m.both),
        VECTOR,
        *("both[0] = x.0[0:4]", "both[1] = x.0[4:12]"),
    ),
    case("chunk", lambda m: m.x.chunk(3), VECTOR),
    case("chunk-attribute", lambda m: m.x.chunk(m.heads, 0), VECTOR, "heads - 3 = 0"),
    case(
        "chunk-unequal",
        lambda m: m.x.chunk(3),
        {"x": (11,)},
        *("(len(x.0) + 2) // 3 = x.0[0:4]", "(len(x.0) + 2) // 3 = x.0[4:8]"),
    ),
    case("torch.chunk-keywords", lambda m: torch.chunk(input=m.x, chunks=3), VECTOR),
    case(
        "tensor_split",
        lambda m: m.x.tensor_split(2),
        {"x": (11,)},
        *("(len(x.0) + 1) // 2 = x.0[0:6]", "(len(x.0) + 0) // 2 = x.0[6:11]"),
    ),
    case("tensor_split-list", lambda m: m.x.tensor_split([m.part, 7]), VECTOR, "part = x.0[0:4]", "7 = x.0[0:7]"),
    case(
        "torch.split_with_sizes", lambda m: torch.split_with_sizes(m.x, [5, 7]), VECTOR, "5 = x.0[0:5]", "7 = x.0[5:12]"
    ),
    case("tensor_split-keyword", lambda m: m.x.tensor_split(indices=(m.part,)), VECTOR, "part = x.0[0:4]"),
    case("tensor_split-from-zero", lambda m: torch.tensor_split(m.x, [0, m.part]), VECTOR, "part = x.0[0:4]"),
    *(
        case(f"{name}hsplit", lambda m, f=function: f(m.x, (m.part,)), MATRIX, "part = x.1[0:4]")
        for name, function in FORMS["hsplit"]
    ),
    *(
        case(
            f"{name}vsplit",
            lambda m, f=function: f(m.x, [m.part, 7]),
            {"x": (12, 2)},
            "part = x.0[0:4]",
            "7 = x.0[0:7]",
        )
        for name, function in FORMS["vsplit"]
    ),
    *(
        case(f"{name}dsplit", lambda m, f=function: f(m.x, indices=[m.part]), {"x": (2, 3, 12)}, "part = x.2[0:4]")
        for name, function in FORMS["dsplit"]
    ),
    case("hsplit-of-a-vector", lambda m: m.x.hsplit([m.part]), VECTOR, "part = x.0[0:4]"),
    case(
        "vsplit-equally",
        lambda m: m.x.vsplit(m.groups),
        {"x": (12, 2)},
        *("groups - 2 = 0", "(len(x.0) + 1) // 2 = x.0[0:6]", "(len(x.0) + 0) // 2 = x.0[6:12]"),
    ),
    case("narrow", lambda m: m.x.narrow(0, m.part, m.rest), VECTOR, "part = x.0[0:4]", "rest = x.0[4:12]"),
    case(
        "narrow-from-the-end",
        lambda m: m.x.narrow(0, -m.part, 2),
        VECTOR,
        "(part * -1) * -1 = x.0[8:12]",
        "2 = x.0[8:10]",
    ),
    case("torch.narrow", lambda m: torch.narrow(m.x, -1, 0, m.part), MATRIX, "part = x.1[0:4]"),
]
SLICES = [
    case("to", lambda m: m.x[: m.part], VECTOR, "part = x.0[0:4]"),
    case("from", lambda m: m.x[m.part :], VECTOR, "part = x.0[0:4]"),
    case("from-to", lambda m: m.x[m.part : 2 * m.part], VECTOR, "part = x.0[0:4]", "2 * part = x.0[0:8]"),
    case("constants", lambda m: m.x[2:5], VECTOR, "2 = x.0[0:2]", "5 = x.0[0:5]"),
    case("from-the-end", lambda m: m.x[-m.part :], VECTOR, "(part * -1) * -1 = x.0[8:12]"),
    case("to-the-end", lambda m: m.x[: -m.part], VECTOR, "(part * -1) * -1 = x.0[8:12]"),
    case("constant-from-the-end", lambda m: m.x[-4:], VECTOR, "4 = x.0[8:12]"),
    case("after-ellipsis", lambda m: m.x[..., : m.part], MATRIX, "part = x.1[0:4]"),
    case("before-ellipsis", lambda m: m.x[:1, ...], MATRIX, "1 = x.0[0:1]"),
    case("around-ellipsis", lambda m: m.x[:, ..., m.part :, :], {"x": (2, 3, 12, 5)}, "part = x.2[0:4]"),
    case("new-axes", lambda m: m.x[:, None, m.part :, None], MATRIX, "part = x.1[0:4]"),
    case("beside-numbers", lambda m: m.x[0, : m.part], MATRIX, "part = x.1[0:4]"),
    case("beside-an-index", lambda m: m.x[torch.tensor([0, 1]), : m.part], MATRIX, "part = x.1[0:4]"),
    case("beside-a-mask", lambda m: m.x[torch.tensor([True, True]), : m.part], MATRIX, "part = x.1[0:4]"),
    case("by-number", lambda m: m.x[m.one], MATRIX, "one - 1 = 0"),
    case("all", lambda m: m.x[: m.width], VECTOR, "width = x.0"),
    case("all-by-a-constant", lambda m: m.x[:12], VECTOR),
    case("beyond-the-end", lambda m: m.x[: m.width + 1], VECTOR, "(width + 1) - 13 = 0"),
    case("written-to", lambda m: (m.x + 1).__setitem__(slice(0, m.part), 0.0), VECTOR, "part = x.0[0:4]"),
]
BLANK = ("zeros", "ones", "empty", "rand", "randn")
NEW = [
    *(
        case(name, lambda m, name=name: getattr(torch, name)(m.part, 5, dtype=torch.float64), VECTOR, *expected)
        for expected in [("part = new (4,)", "5 = new (4, 5)")]
        for name in BLANK
    ),
    case(
        "size-tuple", lambda m: torch.zeros((m.part, m.x.shape[0])), VECTOR, "part = new (4,)", "len(x.0) = new (4, 12)"
    ),
    case("size-keyword", lambda m: torch.ones(size=(m.part,)), VECTOR, "part = new (4,)"),
    *(
        case(f"new_{name}", lambda m, name=name: getattr(m.x, f"new_{name}")(m.part), VECTOR, "part = new (4,)")
        for name in BLANK[:3]
    ),
    case("new-size-tuple", lambda m: m.x.new_zeros((m.part,)), VECTOR, "part = new (4,)"),
    case("new-size-keyword", lambda m: m.x.new_empty(size=(m.part,)), VECTOR, "part = new (4,)"),
    case("new-beside-a-tensor", lambda m: m.x.new_zeros((torch.tensor(3), m.part)), VECTOR, "part = new (3, 4)"),
    case("full", lambda m: torch.full((m.part,), m.value), VECTOR, "part = new (4,)", "value - 2 = 0"),
    case("full-keywords", lambda m: torch.full(size=(m.part,), fill_value=1.0), VECTOR, "part = new (4,)"),
    case(
        "new_full", lambda m: m.x.new_full((m.part,), m.value / 4), VECTOR, "part = new (4,)", "(value / 4) - 0.5 = 0"
    ),
]


def convolved(name, *arguments):
    """A convolution of 4 channels with filters of 1, over as many axes of length 2 as its name says."""
    dims = int(name[-2])
    shapes = {"x": (1, 4, *[2] * dims), "w": (4, 1, *[1] * dims)}
    return case(name, lambda m: getattr(F, name)(m.x, m.w, *arguments, groups=m.part), shapes, "part = x.1")


LAYERS = [
    case(
        "conv-groups", lambda m: F.conv2d(m.x, m.w, None, 1, 0, 1, m.groups), IMAGE | {"w": (6, 2, 1, 1)}, "groups = 2"
    ),
    case("conv-depthwise", lambda m: F.conv2d(m.x, m.w, groups=m.part), IMAGE | {"w": (8, 1, 1, 1)}, "part = x.1"),
    case(
        "conv-by-size", lambda m: F.conv2d(m.x, m.w, groups=m.x.shape[1]), IMAGE | {"w": (4, 1, 1, 1)}, "len(x.1) = x.1"
    ),
    case("conv-constant", lambda m: F.conv2d(m.x, m.w, groups=4), IMAGE | {"w": (4, 1, 1, 1)}, "4 = x.1"),
    case("conv-dense", lambda m: F.conv2d(m.x, m.w), IMAGE | {"w": (5, 4, 1, 1)}),
    case(
        "conv-keywords",
        lambda m: F.conv2d(input=m.x, weight=m.w, groups=m.part),
        IMAGE | {"w": (4, 1, 1, 1)},
        "part = x.1",
    ),
    case(
        "conv-without-a-batch", lambda m: F.conv1d(m.x, m.w, groups=m.part), {"x": (4, 5), "w": (4, 1, 1)}, "part = x.0"
    ),
    *(convolved(f"{name}{dims}d") for name in ("conv", "conv_transpose") for dims in (1, 2, 3)),
    case(
        "conv_transpose-groups",
        lambda m: F.conv_transpose2d(m.x, m.w, None, 1, 0, 0, m.groups),
        IMAGE | {"w": (4, 3, 1, 1)},
        "groups = 2",
    ),
    case("group_norm", lambda m: F.group_norm(m.x, m.groups), IMAGE, "groups = 2"),
    case("group_norm-constant", lambda m: F.group_norm(m.x, 2), IMAGE),
    case("group_norm-each-its-own", lambda m: F.group_norm(m.x, m.part), IMAGE, "part = x.1"),
    case("group_norm-all-by-a-constant", lambda m: F.group_norm(m.x, 4), IMAGE, "4 = x.1"),
    case("layer_norm", lambda m: F.layer_norm(m.x, m.both), {"x": (4, 8)}, "both[1] = x.1", "both[0] = x.0"),
    case("layer_norm-keyword", lambda m: F.layer_norm(m.x, normalized_shape=(12,)), VECTOR, "12 = x.0"),
    case("torch.group_norm", lambda m: torch.group_norm(m.x, m.part), IMAGE, "part = x.1"),
    case("torch.layer_norm", lambda m: torch.layer_norm(m.x, (m.width,)), VECTOR, "width = x.0"),
    case("torch.rms_norm", lambda m: torch.rms_norm(m.x, (m.width,)), VECTOR, "width = x.0"),
    case("rms_norm", lambda m: F.rms_norm(m.x, m.x.shape[-1:]), VECTOR, "len(x.0) = x.0"),
    case("pad", lambda m: F.pad(m.x, (m.one, 3)), VECTOR, "one - 1 = 0"),
    case("pad-keyword", lambda m: F.pad(m.x, pad=(0, m.one)), VECTOR, "one - 1 = 0"),
]
OTHERS = [
    case("arange", lambda m: torch.arange(m.x.shape[0]), VECTOR, "len(x.0) - 12 = 0"),
    case("tensor", lambda m: torch.tensor([m.value, 1]), VECTOR, "value - 2 = 0"),
    case("repeat", lambda m: m.x.repeat(m.value), VECTOR, "value - 2 = 0"),
    case("sum", lambda m: m.x + m.x.shape[0] ** -0.5, VECTOR, f"(len(x.0) ** -0.5) - {12**-0.5} = 0"),
    case("mean-by-hand", lambda m: m.x.sum() / m.x.shape[0], VECTOR, "len(x.0) - 12 = 0"),
    case("number-of-elements", lambda m: m.x.sum() / m.x.numel(), MATRIX, "((1 * len(x.0)) * len(x.1)) - 24 = 0"),
    case(
        "number-of-elements-keyword",
        lambda m: m.x.sum() / torch.numel(input=m.x),  # type: ignore[call-arg]
        MATRIX,
        "((1 * len(x.0)) * len(x.1)) - 24 = 0",
    ),
    case("product", lambda m: torch.mul(m.x, other=m.x.shape[0]), VECTOR, "len(x.0) - 12 = 0"),
    case("logarithm", lambda m: m.x.add(int(math.log2(m.part))), VECTOR, "part - 4.0 = 0"),
    case("int", lambda m: m.x.view(int(m.x.shape[0] // 3), 3), VECTOR, "4 = blocks (4,)", "3 = x.0 as (4, 3)"),
    case("assertion", lambda m: m.x if m.x.shape[0] == m.width else None, VECTOR, "len(x.0) - width = 0"),
    case("other-size", lambda m: m.x if m.x.shape[0] == m.part else None, VECTOR),
    case("divisibility", lambda m: m.x if m.x.shape[0] % m.heads == 0 else None, VECTOR),
]


CASES = [*VIEWS, *PIECES, *SLICES, *NEW, *LAYERS, *OTHERS]


@pytest.mark.parametrize(("function", "shapes", "equations"), CASES)
def test_equations_of_a_call(function, shapes, equations):
    assert watch(function, shapes, **ATTRIBUTES).equations() == equations


class Spy(TorchFunctionMode):
    """Notes which functions are called."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.add(func)
        return func(*args, **(kwargs or {}))


def test_every_size_rule_has_a_case():
    spy = Spy()
    for one in CASES:
        function, shapes, *_ = cast(Any, one.values)
        with spy:
            Code(function, shapes, **ATTRIBUTES)()
    attention = {F.scaled_dot_product_attention}  # below, with a whole model
    assert {*SIZE_RULES} - spy.seen == attention


def test_what_the_forward_code_catches_leaves_no_trace():
    """A call that fails, of the library and of our own version of one."""

    def function(m):
        with contextlib.suppress(RuntimeError):
            m.x.view(5, 5)
        with contextlib.suppress(AssertionError):  # another width is expected
            F.multi_head_attention_forward(m.x, m.x, m.x, 11, 3, m.x, None, None, None, False, 0.0, m.x, None)
        return m.x * 2.0

    seen = watch(function, {"x": (2, 1, 12)})
    assert seen.recorder.caller is None
    assert (Tensor.mul, (2.0,)) in seen.sizes.calls


# --- numbers that a parameter can make up for ---------------------------------------------------------------


class Attention(nn.Module):
    """Three heads of four dims, and a function of q, k and v (B, heads, length, head dim)."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.q, self.k, self.v, self.out = nn.Linear(5, 12), nn.Linear(5, 12), nn.Linear(5, 12), nn.Linear(12, 4)
        self.scale = 0.5

    def forward(self, x):
        heads = (layer(x).unflatten(-1, (3, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(self.function(self, *heads).transpose(1, 2).flatten(2))


def attend(logits, v):
    """Not a softmax: it forgives what is added."""
    return logits.sigmoid() @ v


def scaled_in_place(q):
    q = q.clone()
    q *= q.shape[-1] ** -0.5
    return q


TOKENS = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)).double()
COMPENSATED = {
    "q": lambda m, q, k, v: attend(q * q.shape[-1] ** -0.5 @ k.mT, v),
    "number-first": lambda m, q, k, v: attend((q.shape[-1] ** -0.5 * q) @ k.mT, v),
    "in-place": lambda m, q, k, v: attend(scaled_in_place(q) @ k.mT, v),
    "logits": lambda m, q, k, v: attend((q @ k.mT) / math.sqrt(k.size(-1)), v),
    "torch.div": lambda m, q, k, v: attend(torch.div(q @ k.mT, q.shape[-1] ** 0.5), v),
    "einsum": lambda m, q, k, v: attend(torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1], v),
    "negative": lambda m, q, k, v: attend(q @ k.mT * -(q.shape[-1] ** -0.5), v),
    "fused": lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v),
    "sum-of-products": lambda m, q, k, v: attend((q @ k.mT + 2 * (q @ k.mT)) * q.shape[-1], v),
}
PINNED = {
    "after-a-nonlinearity": lambda m, q, k, v: attend(q.tanh() * q.shape[-1] ** -0.5 @ k.mT, v),
    "beside-another-reader": lambda m, q, k, v: attend(q * q.shape[-1] ** -0.5 @ k.mT + q.exp().mean(), v),
    "a-number-is-added": lambda m, q, k, v: attend((q @ k.mT + 1) * q.shape[-1] ** -0.5, v),
    "a-number-is-subtracted": lambda m, q, k, v: attend((q @ k.mT).sub_(1) * q.shape[-1] ** -0.5, v),
    "as-a-divisor": lambda m, q, k, v: attend(torch.ones(1) / (q @ k.mT) * q.shape[-1] ** -0.5, v),
    "squared": lambda m, q, k, v: attend((q * q) @ (k * k).mT * q.shape[-1] ** -0.5, v),
    "padded": lambda m, q, k, v: attend(F.pad(q @ k.mT, (0, 1), value=1) * q.shape[-1] ** -0.5, F.pad(v, (0, 0, 0, 1))),
    "as-a-fill": lambda m, q, k, v: attend(q @ k.mT * torch.full((1,), q.shape[-1] ** -0.5), v),
}


def traced_and_cut(function):
    """The graph of an attention, and how much a model with fewer head dims differs from the masked one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Attention(function).eval().double()
    graph = trace_groups(model, TOKENS)
    kept = {g.name: tuple(n for n in range(12) if n % 4 in (0, 3) or g.section_size < 4) for g in graph.groups}
    plan = PruningPlan(kept)
    pruned = copy.deepcopy(model)
    cut(pruned, graph, plan)
    return graph, cut_error(masked_copy(model, graph, plan), pruned, TOKENS)


@pytest.mark.parametrize("form", COMPENSATED)
def test_a_factor_of_the_head_dim_is_made_up_for(form):
    graph, error = traced_and_cut(COMPENSATED[form])
    assert {rescaling.module for rescaling in graph.rescalings} == {"q"}
    assert [(rescaling.tensor, rescaling.index.tolist()) for rescaling in graph.rescalings] == [
        ("weight", [*range(12)]),
        ("bias", [*range(12)]),
    ]
    assert error < 1e-9


@pytest.mark.parametrize("form", PINNED)
def test_numbers_that_nothing_can_make_up_for_freeze(form):
    graph, error = traced_and_cut(PINNED[form])
    assert {"q.weight:0", "k.weight:0"} <= graph.frozen.keys()
    assert not graph.rescalings and error < 1e-9


def test_stored_factors_are_left_alone():
    for form in (
        lambda m, q, k, v: attend(q * m.scale @ k.mT, v),
        lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3),
    ):
        graph, error = traced_and_cut(form)
        assert [group.name for group in graph.groups] == ["q.weight:0", "v.weight:0"]
        assert not graph.rescalings and error < 1e-9


def test_two_factors_are_made_up_for_each_by_its_own():
    graph, error = traced_and_cut(
        lambda m, q, k, v: attend((q * q.shape[-1] ** -0.25) @ (k * k.shape[-1] ** -0.25).mT, v)
    )
    assert {rescaling.module for rescaling in graph.rescalings} == {"q", "k"}
    assert error < 1e-9


# --- arguments by name --------------------------------------------------------------------------------------


class Between(nn.Module):
    """Eight channels x (B, 5, 8) between two layers, and a function of them and of a vector (8,)."""

    def __init__(self, function):
        super().__init__()
        self.one, self.two, self.vector = nn.Linear(3, 8), nn.Linear(8, 4), nn.Parameter(torch.rand(8) + 0.5)
        self.function = function

    def forward(self, x):
        return self.two(self.function(self.one(x), self.vector))


BY_NAME = {
    "torch.layer_norm": lambda x, w: torch.layer_norm(input=x, normalized_shape=x.shape[-1:], weight=w),
    "F.layer_norm": lambda x, w: F.layer_norm(input=x, normalized_shape=x.shape[-1:], weight=w),
    "torch.rms_norm": lambda x, w: torch.rms_norm(input=x, normalized_shape=x.shape[-1:], weight=w),
    "group_norm": lambda x, w: F.group_norm(input=x.mT, num_groups=1, weight=w).mT,
    "pad": lambda x, w: F.pad(input=x, pad=(0, 0, 1, 1)),
    "reshape": lambda x, w: torch.reshape(input=x, shape=(*x.shape[:2], x.shape[2])),
    "narrow": lambda x, w: torch.narrow(input=x, dim=-1, start=0, length=x.shape[-1]),
    "broadcast_to": lambda x, w: x + torch.broadcast_to(input=w, size=(5, x.shape[-1])),
    "repeat": lambda x, w: x + w[None].repeat(repeats=(5, 1)),
    "chunk": lambda x, w: torch.cat(tensors=torch.chunk(input=x, chunks=2, dim=-1), dim=-1),
    "mul": lambda x, w: torch.mul(input=x, other=x.shape[-1] ** -0.5),
    "Tensor.mul": lambda x, w: x.mul(other=x.shape[-1] ** -0.5),
    "div": lambda x, w: torch.div(x, other=x.shape[-1] ** 0.5),
    "attention": lambda x, w: F.scaled_dot_product_attention(query=x, key=x, value=x, scale=1.0),
    "baddbmm": lambda x, w: torch.baddbmm(input=x.new_zeros(1, 1, 5), batch1=x, batch2=x.mT) @ x,
    "linear": lambda x, w: F.linear(input=x, weight=w[:, None] * w, bias=w),
}


@pytest.mark.parametrize("name", BY_NAME)
def test_arguments_by_name_freeze_no_channel(name):
    model, x = Between(BY_NAME[name]).double(), torch.randn(2, 5, 3, dtype=torch.float64)
    graph = trace_groups(model, x)
    assert [(group.name, group.num_units) for group in graph.groups] == [("one.weight:0", 8)]
    plan = PruningPlan({"one.weight:0": (0, 2, 5, 7)})
    pruned = copy.deepcopy(model)
    cut(pruned, graph, plan)
    assert cut_error(masked_copy(model, graph, plan), pruned, x) < 1e-10
