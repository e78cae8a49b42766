"""Integers of the cut model: the lengths of axes, and the attributes that the sizes in forward code ask for."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from isomorphic.pruning.cutting.sizes import AxisLengths, SizeConflictError, dense_values, solve_attributes
from isomorphic.pruning.expressions import Attribute, AxisSize, Constant, Length, Operation, evaluate
from isomorphic.pruning.groups import ChannelGraph, CoupledGroup, SectionStructure, SizeEquation
from isomorphic.pruning.plan import PruningPlan

STABLE = settings(deadline=None, derandomize=True, max_examples=200)
DENSE = {"dim": 48, "heads": 4, "head_dim": 12, "hidden": 192, "odd": 7}
DIM, HEADS, HEAD_DIM, HIDDEN, ODD = (Attribute("block", name) for name in DENSE)


def axis(length):
    """An axis of a known length: nothing of it belongs to a group."""
    return AxisSize(length)


def equal(expression, length):
    return SizeEquation(expression, axis(length))


def solve(*equations):
    """The solved attributes by name; axes are as long as they say."""
    values = solve_attributes(equations, lambda size: size.fixed, lambda attribute: DENSE[attribute.name])
    return {attribute.name: value for attribute, value in values.items()}


def op(left, operator, right):
    left, right = (Constant(side) if isinstance(side, int) else side for side in (left, right))
    return Operation(operator, left, right)


# --- lengths ------------------------------------------------------------------------------------------------


@pytest.fixture
def graph():
    heads = SectionStructure(4, are_heads=True)
    groups = (
        CoupledGroup("attention", 12, (), (), frozenset(), heads),
        CoupledGroup("stream", 10, (), (), frozenset()),
        CoupledGroup("norm groups", 8, (), (), frozenset(), SectionStructure(2)),
    )
    return ChannelGraph(groups, {})


@pytest.fixture
def plan():
    """Two of four heads with two of three dims each, six of ten channels, and two of four in both groups."""
    return PruningPlan({"attention": (0, 2, 9, 10), "stream": (0, 1, 2, 5, 8, 9), "norm groups": (0, 1, 4, 6)})


@pytest.mark.parametrize(
    ("size", "dense", "cut"),
    [
        (AxisSize(5), 5, 5),
        (AxisSize(0, {"stream": 1}), 10, 6),
        (AxisSize(2, {"stream": 3, "attention": 1}), 44, 24),
        (AxisSize(0, {"attention": 3}, rows=3), 12, 4),  # q, k and v, one after the other
        (AxisSize(0, {"attention": 3}, rows=12, row_group="attention"), 3, 2),  # the dims of a head
        (AxisSize(0, {"attention": 1}, counts_heads=True), 4, 2),
        (AxisSize(0, {"attention": 3}, rows=3, counts_heads=True), 4, 2),
        (AxisSize(0, {"norm groups": 1}, rows=2, row_group="norm groups"), 4, 2),
        (AxisSize(0, {"norm groups": 1}, counts_heads=True), 2, 2),
    ],
)
def test_lengths_of_axes(graph, plan, size, dense, cut):
    assert AxisLengths(graph)(size) == dense
    assert AxisLengths(graph, plan)(size) == cut
    assert isinstance(AxisLengths(graph, plan)(size), int)


def test_rows_that_cannot_be_equally_long_have_no_whole_length(graph, plan):
    assert AxisLengths(graph, plan)(AxisSize(1, {"stream": 1}, rows=2)) == 3.5


# --- attributes ---------------------------------------------------------------------------------------------


def test_attributes_are_read_by_any_name_of_their_module():
    shared = nn.Linear(3, 4)
    shared.shape = (5, 6)  # type: ignore[assignment]
    value_of = dense_values(nn.ModuleDict({"first": shared, "second": shared}))
    for name in ("first", "second"):
        assert value_of(Attribute(name, "out_features")) == 4
        assert value_of(Attribute(name, "shape", 1)) == 6


def test_an_attribute_is_what_its_equation_says():
    assert solve(equal(DIM, 24), equal(HEADS, 4)) == {"dim": 24, "heads": 4}


@pytest.mark.parametrize(
    ("expression", "length", "value"),
    [
        (op(DIM, "+", 1), 25, 24),
        (op(1, "+", DIM), 25, 24),
        (op(DIM, "-", 8), 16, 24),
        (op(100, "-", DIM), 76, 24),
        (op(DIM, "*", 3), 72, 24),
        (op(3, "*", DIM), 72, 24),
        (op(DIM, "//", 4), 6, 24),
        (op(96, "//", DIM), 4, 24),
        (op(DIM, "/", 4), 6, 24),
        (op(op(op(DIM, "//", 4), "*", 3), "+", 2), 20, 24),
        (op(2, "*", op(100, "-", op(DIM, "*", 2))), 104, 24),
        (op(DIM, "+", op(DIM, "//", 2)), 36, 24),  # where it occurs twice
        (op(DIM, "%", 48), 0, 48),
    ],
)
def test_one_attribute_is_found_along_the_chain(expression, length, value):
    assert solve(equal(expression, length)) == {"dim": value}


def test_the_dense_value_is_kept_where_it_will_do():
    assert solve(equal(op(ODD, "//", 2), 3)) == {"odd": 7}
    assert solve(equal(op(ODD, "//", 2), 2)) == {"odd": 4}  # else the exact multiple


def test_what_is_certain_comes_before_what_is_not():
    """Alone, the division would keep the dense 7."""
    for equations in (
        [equal(op(ODD, "//", 2), 3), equal(op(ODD, "*", 3), 18)],
        [equal(op(ODD, "//", 2), 3), equal(ODD, 6)],
    ):
        assert solve(*equations) == solve(*equations[::-1]) == {"odd": 6}


def test_solutions_pass_from_equation_to_equation():
    equations = [equal(op(op(DIM, "*", HEADS), "+", HIDDEN), 100), equal(op(DIM, "*", HEADS), 40), equal(HEADS, 2)]
    for order in (equations, equations[::-1]):
        assert solve(*order) == {"dim": 20, "heads": 2, "hidden": 60}


def test_lengths_are_part_of_expressions():
    assert solve(equal(op(Length(axis(24)), "//", HEADS), 8)) == {"heads": 3}
    assert solve(equal(op(Length(axis(24)), "//", HEADS), 6)) == {"heads": 4}


def test_of_several_unknown_attributes_the_first_changes():
    assert solve(equal(op(DIM, "//", HEADS), 6)) == {"dim": 24, "heads": 4}
    assert solve(equal(op(HEADS, "*", HEAD_DIM), 24)) == {"heads": 2, "head_dim": 12}


def test_several_unknown_attributes_stay_where_they_hold():
    assert solve(equal(op(DIM, "//", HEADS), 6), equal(op(HEADS, "*", HEAD_DIM), 48)) == {
        "dim": 24,
        "heads": 4,
        "head_dim": 12,
    }


def test_entries_of_a_tuple_are_attributes_of_their_own():
    first, second = Attribute("block", "dim", 0), Attribute("block", "dim", 1)
    values = solve_attributes(
        [equal(first, 3), equal(op(second, "*", first), 12)], lambda size: size.fixed, lambda _: 8
    )
    assert values == {first: 3, second: 4}


def test_nothing_to_solve():
    assert solve() == {}
    assert solve(equal(op(Length(axis(24)), "//", 2), 12), equal(Constant(5), 5)) == {}


# --- conflicts ----------------------------------------------------------------------------------------------


def conflicts(*equations):
    with pytest.raises(SizeConflictError) as error:
        solve(*equations)
    return [{equations.index(equation) for equation in conflict} for conflict in error.value.conflicts]


def test_a_constant_that_does_not_follow_is_a_conflict():
    assert conflicts(equal(Constant(48), 48), equal(Constant(48), 24)) == [{1}]
    assert conflicts(equal(op(Length(axis(24)), "//", 2), 10)) == [{0}]


def test_an_attribute_that_should_be_two_things_names_both():
    assert conflicts(equal(DIM, 24), equal(HEADS, 4), equal(DIM, 20)) == [{0, 2}]


def test_a_conflict_names_all_that_led_to_it():
    """dim // heads, where dim follows from hidden, and heads from elsewhere."""
    equations = [
        equal(op(DIM, "//", HEADS), 7),
        equal(op(HIDDEN, "//", DIM), 4),
        equal(HIDDEN, 96),
        equal(HEADS, 4),
        equal(HEAD_DIM, 6),
    ]
    assert conflicts(*equations) == [{0, 1, 2, 3}]


def test_no_whole_number_will_do():
    assert conflicts(equal(op(DIM, "*", 4), 30)) == [{0}]
    assert conflicts(equal(op(HIDDEN, "//", op(DIM, "-", DIM)), 30)) == [{0}]
    assert conflicts(equal(DIM, 3.5)) == [{0}]


def test_the_message_names_the_code():
    with pytest.raises(SizeConflictError, match=r"1 sizes cannot be had, such as \(block.dim \* 4\)"):
        solve(equal(op(DIM, "*", 4), 30))


# --- generated systems --------------------------------------------------------------------------------------


def no_length(_):
    raise AssertionError("these expressions have no lengths")


@st.composite
def systems(draw):
    """Attributes with dense and cut values, and equations that both satisfy: some attributes, others mixtures."""
    names = [Attribute("m", f"a{number}") for number in range(draw(st.integers(1, 5)))]
    values = {name: (8 * draw(st.integers(1, 12)), 8 * draw(st.integers(1, 12))) for name in names}
    equations, dense_lengths, cut_lengths = [], {}, {}

    def add(expression):
        place = AxisSize(len(equations))
        lengths = [evaluate(expression, no_length, lambda a, i=i: values[a][i]) for i in (0, 1)]
        dense_lengths[place.fixed], cut_lengths[place.fixed] = lengths
        equations.append(SizeEquation(expression, place))

    for name in names:
        if draw(st.booleans()):
            add(name)
    for _ in range(draw(st.integers(0, 6))):
        left: Any = draw(st.sampled_from(names))
        for _ in range(draw(st.integers(1, 2))):
            right = draw(st.one_of(st.sampled_from(names), st.integers(1, 9).map(Constant)))
            left = Operation(draw(st.sampled_from("+*-")), left, right)
        add(left)
    order = draw(st.permutations(range(len(equations))))
    return [equations[number] for number in order], values, dense_lengths, cut_lengths


@STABLE
@given(systems())
def test_solutions_satisfy_every_equation_and_dense_lengths_give_dense_values(system):
    equations, values, dense_lengths, cut_lengths = system
    dense = solve_attributes(equations, lambda size: dense_lengths[size.fixed], lambda a: values[a][0])
    assert dense == {attribute: values[attribute][0] for attribute in dense}
    try:
        solved = solve_attributes(equations, lambda size: cut_lengths[size.fixed], lambda a: values[a][0])
    except SizeConflictError as error:
        direct = {equation.expression for equation in equations if isinstance(equation.expression, Attribute)}
        assert not values.keys() <= direct, "with an equation of its own for each there is nothing to guess"
        assert error.conflicts
        return
    for equation in equations:
        assert evaluate(equation.expression, no_length, solved.__getitem__) == cut_lengths[equation.axis.fixed]


def test_many_equations_are_solved_one_evaluation_each_or_so():
    """Chains in the worst order: the work grows with the equations, not with their square."""
    count = 3000
    names = [Attribute("m", f"a{number}") for number in range(count)]
    chain = [equal(op(names[n + 1], "-", names[n]), 1) for n in range(count - 1)]
    asked = []

    def value_of(attribute):
        asked.append(attribute)
        return 2 * int(attribute.name[1:])

    values = solve_attributes([*chain[::-1], equal(names[0], 5)], lambda size: size.fixed, value_of)
    assert [values[name] for name in names] == list(range(5, 5 + count))
    assert len(asked) < 20 * count
