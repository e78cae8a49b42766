"""Integers that remember where they come from: what they are worth, what they report, what they leave behind."""

from __future__ import annotations

import math
import operator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from isomorphic.pruning.expressions import OPERATORS, Attribute, AxisSize, Constant, Length, Operation, evaluate
from isomorphic.pruning.grouping.integers import (
    TracedFloat,
    TracedInt,
    expression_of,
    plain,
    traced,
    traced_attributes,
    traced_math,
)

STABLE = settings(deadline=None, derandomize=True, database=None, max_examples=100)
WIDTH, HEADS = Attribute("block", "width"), Attribute("block", "heads")


class Listener(list):
    """Notes the pairs that must stay equal, and apart from them those that may not."""

    def __init__(self):
        super().__init__()
        self.doubted = []

    def __call__(self, left, right, *, in_doubt=False):
        (self.doubted if in_doubt else self).append((left, right))


@pytest.fixture
def heard():
    return Listener()


@pytest.fixture
def width(heard):
    return traced(48, WIDTH, heard)


# --- arithmetic ---------------------------------------------------------------------------------------------


@st.composite
def calculations(draw):
    """Values of three attributes and of a length, and steps: an operator, two operands by number or as constants."""
    values = [draw(st.integers(1, 60)) for _ in range(4)]
    operand = st.one_of(st.integers(0, 8), st.sampled_from((Constant(2), Constant(7), Constant(0.5), Constant(-0.5))))
    steps = st.tuples(st.sampled_from(sorted(OPERATORS)), operand, operand)
    return values, draw(st.lists(steps, min_size=1, max_size=5))


def _calculable(symbol, left, right):
    """Whether two plain numbers have a modest real result."""
    try:
        value = OPERATORS[symbol](left, right)
    except (ZeroDivisionError, OverflowError):
        return False
    return not isinstance(value, complex) and abs(value) < 1e12


@STABLE
@given(calculations())
def test_expressions_have_the_values_that_forward_code_sees(calculation):
    values, steps = calculation
    attributes = {Attribute("block", f"a{number}"): value for number, value in enumerate(values[:-1])}
    leaves, heard = [*attributes, Length(AxisSize(values[-1]))], Listener()
    numbers = [traced(value, leaf, heard) for value, leaf in zip(values, leaves, strict=True)]
    for symbol, *operands in steps:
        pair = [one.value if isinstance(one, Constant) else numbers[one % len(numbers)] for one in operands]
        left, right = map(plain, pair)
        is_traced = any(isinstance(number, (TracedInt, TracedFloat)) for number in pair)
        forgets = [type(number) for number in pair] == [float, TracedInt]  # python asks the right side last
        if is_traced and not forgets and _calculable(symbol, left, right):
            values.append(OPERATORS[symbol](left, right))
            numbers.append(OPERATORS[symbol](*pair))
    for number, value in zip(numbers, values, strict=True):
        assert isinstance(number, TracedInt if isinstance(value, int) else TracedFloat)
        assert plain(number) == value and type(plain(number)) is type(value)
        assert evaluate(number.expression, lambda axis: axis.fixed, attributes.__getitem__) == value
    assert not heard, "arithmetic alone says nothing of what must stay"


def test_both_sides_of_an_operator_are_remembered(width):
    assert (width // 4).expression == Operation("//", WIDTH, Constant(4))
    assert (3 * width).expression == Operation("*", Constant(3), WIDTH)
    assert (-width).expression == Operation("*", WIDTH, Constant(-1))
    assert (width**-0.5).expression == Operation("**", WIDTH, Constant(-0.5))
    assert (2.0 - width / 2).expression == Operation("-", Constant(2.0), Operation("/", WIDTH, Constant(2)))
    sum_ = width
    sum_ += traced(4, HEADS, width.equalize)
    assert sum_.expression == Operation("+", WIDTH, HEADS)


def test_numbers_without_a_memory_stand_for_themselves(width):
    assert expression_of(5) == Constant(5) and expression_of(0.5) == Constant(0.5)
    assert type(plain(width)) is int and type(plain(width * 0.5)) is float
    assert plain(7) == 7 and plain(width) == 48


def test_other_things_are_no_operands(width):
    """A bool is an int to python; `width * True` is no size. Strings and lists are repeated as ever."""
    assert width * [1] == [1] * 48
    assert width * "a" == "a" * 48
    with pytest.raises(TypeError):
        operator.sub(width, "a")


def test_traced_integers_are_integers(width):
    assert list(range(60))[width] == 48 and [0] * width == [0] * 48
    assert {48: "found"}[width] == "found" and f"{width}" == "48"
    assert width > 47 and width < 49 and bool(width)


# --- what is reported ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("compare", [operator.eq, operator.ne])
def test_a_comparison_that_finds_equals_is_reported(width, heard, compare):
    heads = traced(48, HEADS, heard)
    assert compare(width, 48) is compare(1, 1)
    assert compare(48, width) is compare(1, 1)
    assert compare(width, heads) is compare(1, 1)
    assert heard == [(WIDTH, Constant(48)), (WIDTH, Constant(48)), (WIDTH, HEADS)]


@pytest.mark.parametrize("other", [47, None, "48", (48,)])
def test_a_comparison_that_finds_others_is_not(width, heard, other):
    assert (width == other) is False and (width != other) is True
    assert not heard


def test_a_cast_is_in_doubt(width, heard):
    assert float(width) == 48.0 and math.exp(traced(0, HEADS, heard)) == 1
    assert heard.doubted == [(WIDTH, Constant(48)), (HEADS, Constant(0))]
    half = traced(24.0, Operation("*", WIDTH, Constant(0.5)), heard)
    for cast in (float, int, round, math.floor, math.ceil, math.trunc):
        value = cast(half)
        assert type(value) is (float if cast is float else int) and value == 24
        assert heard.doubted[-1] == (half.expression, Constant(value))
    assert type(int(width)) is int and heard.doubted[-1] == (WIDTH, Constant(48))
    assert not heard


@pytest.mark.parametrize("cast", [round, math.floor, math.ceil, math.trunc])
def test_rounding_an_integer_is_none(width, heard, cast):
    assert expression_of(cast(width)) == WIDTH and not heard


# --- math ---------------------------------------------------------------------------------------------------


def test_roots_are_traced_and_logarithms_are_casts(width, heard):
    with traced_math():
        root = math.sqrt(width)
        assert math.sqrt(16) == 4.0 and type(math.sqrt(16)) is float
        assert not heard
        assert math.log2(traced(8, HEADS, heard)) == 3.0 and math.log(8, 2) == 3.0
    assert plain(root) == math.sqrt(48) and expression_of(root) == Operation("**", WIDTH, Constant(0.5))
    assert not heard and heard.doubted == [(HEADS, Constant(8))]


def test_math_is_what_it_was_afterwards(width):
    before = dict(vars(math))
    with traced_math():
        assert math.sqrt is not before["sqrt"]
    assert vars(math) == before
    with pytest.raises(ValueError, match="no way"), traced_math():
        raise ValueError("no way")
    assert vars(math) == before


# --- attributes ---------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attributes of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.shape, self.split = 4, (12, 4), [3, 5]
        self.enabled, self.mixed, self.scale, self.label, self.empty = True, (1, 2.0), 0.5, "7", ()
        self._hidden = 6
        self.stride, self.padding_idx = 2, 0
        self.inner = nn.Conv2d(3, 8, 3, groups=1)


def test_public_integers_are_traced(heard):
    block = Block()
    with traced_attributes(block, heard):
        assert expression_of(block.heads) == Attribute("", "heads")
        assert [*map(expression_of, block.shape)] == [Attribute("", "shape", 0), Attribute("", "shape", 1)]
        assert type(block.split) is list and expression_of(block.split[1]) == Attribute("", "split", 1)
        assert expression_of(block.inner.out_channels) == Attribute("inner", "out_channels")
        assert expression_of(block.inner.groups) == Attribute("inner", "groups")


def test_other_attributes_are_left_alone(heard):
    block = Block()
    with traced_attributes(block, heard):
        values = [block.enabled, *block.mixed, block.scale, block.label, block._hidden, block.training]
        values += [block.stride, block.padding_idx, *block.inner.kernel_size, *block.inner.padding]
        assert not any(isinstance(value, (TracedInt, TracedFloat)) for value in values)
        assert block.empty == ()


def test_a_shared_module_has_its_first_name(heard):
    block = Block()
    model = nn.Sequential(block, block)
    with traced_attributes(model, heard):
        assert expression_of(block.heads) == Attribute("0", "heads")


@pytest.mark.parametrize("fails", [False, True])
def test_attributes_are_as_they_were_afterwards(heard, fails):
    """Also what the forward code sets meanwhile is gone, and tensors and submodules are the same objects."""
    block = Block()
    before = {module: dict(vars(module)) for module in block.modules()}
    try:
        with traced_attributes(block, heard):
            block.heads = 9
            block.__dict__["seen"] = block.split[0] * 2
            if fails:
                raise KeyError("no way")
    except KeyError:
        assert fails
    for module, attributes in before.items():
        assert vars(module) == attributes
        assert all(value is attributes[name] for name, value in vars(module).items())
    assert type(block.heads) is int and type(block.shape[0]) is int
