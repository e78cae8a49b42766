"""Data movement on axes: what they say goes is what goes when the data is cut first and moved then."""

from __future__ import annotations

from itertools import accumulate
from operator import mul
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isomorphic.pruning.grouping import axes as move
from isomorphic.pruning.grouping.axes import Axes
from isomorphic.pruning.grouping.units import Axis, UnitTable
from tests.unit.pruning.grouping.movements import check, draw_program, trace

STABLE = settings(deadline=None, derandomize=True, database=None)
SEEDS = st.integers(0, 2**32)


@pytest.fixture
def table():
    return UnitTable()


def told(axis):
    """An axis's rows and ids; None where it is fixed."""
    return axis and (axis.rows, axis.ids.tolist())


def reasons(table):
    """By reason, the ids that are frozen for it."""
    found = {}
    for ids, reason, _ in table._frozen:
        found.setdefault(reason, set()).update(ids.ravel().tolist())
    return found


# --- random programs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("programs", "length"),
    [(100, 5), pytest.param(1000, 8, marks=pytest.mark.slow), pytest.param(300, 16, marks=pytest.mark.slow)],
)
def test_cutting_and_moving_commute(programs, length):
    """Also that much may go: to freeze everything would commute, too."""
    shares = []

    @settings(STABLE, max_examples=programs)
    @given(SEEDS)
    def check_all(seed):
        program = draw_program(Random(seed), length)
        traced = trace(program)
        for again in range(2):
            gone, free = check(program, traced, Random(again))
            shares.append((gone, free))

    check_all()
    gone, free = map(sum, zip(*shares, strict=True))
    assert gone > 0.3 * free > 500


def test_what_a_row_axis_carries_is_not_forgotten(table):
    """(4, 6) to (8, 3) to (24,): units of 4 and of 6 share the one axis that is left."""
    first, second = table.new(4), table.new(6)
    axes = move.view(table, [Axis(first), Axis(second)], (4, 6), (8, 3))
    (axis,) = move.view(table, axes, (8, 3), (24,))
    frozen = set().union(*reasons(table).values())
    assert frozen >= {*first.tolist(), *second.tolist()}
    assert axis is None or set(axis.ids.ravel().tolist()) <= frozen


# --- views --------------------------------------------------------------------------------------------------


@st.composite
def reshapes(draw):
    """Two shapes of equally many elements: factors in one order, grouped in two ways, among axes of length 1."""
    factors = draw(st.lists(st.sampled_from((2, 2, 3, 4, 5)), max_size=6))
    shapes = []
    for _ in range(2):
        shape, rest = [], draw(st.permutations(factors)) if draw(st.booleans()) else list(factors)
        while rest:
            count = draw(st.integers(1, len(rest)))
            shape.append(int(np.prod(rest[:count])))
            rest = rest[count:]
        for _ in range(draw(st.integers(0, 2))):
            shape.insert(draw(st.integers(0, len(shape))), 1)
        shapes.append(tuple(shape))
    return shapes


@settings(STABLE, max_examples=100)
@given(reshapes())
def test_segments_are_the_independent_parts_of_a_view(shapes):
    before, after = shapes
    found = move.segments(before, after)
    assert [dim for part in found for dim in part.before] == [dim for dim, size in enumerate(before) if size > 1]
    assert [dim for part in found for dim in part.after] == [dim for dim, size in enumerate(after) if size > 1]
    common = {*accumulate(before, mul)} & {*accumulate(after, mul)}
    assert len(found) == len(common - {1}), "as many as there are places where both shapes have an edge"
    old = torch.cartesian_prod(*(torch.arange(n) for n in (1, *before))).reshape(-1, len(before) + 1)[:, 1:]
    new = torch.cartesian_prod(*(torch.arange(n) for n in (1, *after))).reshape(-1, len(after) + 1)[:, 1:]
    for part in found:
        assert torch.equal(_position(old, part.before, before), _position(new, part.after, after))


def _position(places, dims, shape):
    """The position in some axes alone, of elements at `places` (n, rank)."""
    total = torch.zeros(len(places), dtype=torch.int64)
    for dim in dims:
        total = total * shape[dim] + places[:, dim]
    return total


@pytest.mark.parametrize(
    ("shape", "q", "heads", "dims"),
    [
        ((3, 2, 4), (0, slice(None)), 0, 1),  # q, k, v one after the other
        ((2, 3, 4), (slice(None), 0), 0, 1),  # head by head
    ],
)
def test_heads_by_any_layout(table, shape, q, heads, dims):
    """24 channels as (3, 2 heads, 4 dims) in some order; q alone has blocks of its own units."""
    whole = table.new(24)
    axes = move.view(table, [Axis(whole)], (24,), shape)
    third = shape.index(3)
    axes = move.select(table, axes, third, 0)
    expected = whole.reshape(shape)[q]
    assert told(axes[dims]) == ((heads,), expected.tolist())
    assert told(move.view(table, axes, (2, 4), (8,))[0]) == ((), expected.ravel().tolist())


def test_the_head_axis_carries_blocks_until_they_merge_with_their_units(table):
    units = table.new(12)
    axes = move.view(table, [None, Axis(units)], (5, 12), (5, 3, 4))
    blocks = table.section_ids(units.reshape(3, 4))
    assert table.is_section(blocks) and len(set(blocks.tolist())) == 3
    rows = units.reshape(3, 4).tolist()
    assert [told(axis) for axis in axes] == [None, ((), blocks.tolist()), ((1,), rows)]
    assert [equal.tolist() for equal in table.rows.values()] == [rows]
    turned = move.transpose(axes, 0, 1)  # (3, 5, 4)
    assert [told(axis) for axis in turned] == [((), blocks.tolist()), None, ((0,), rows)]
    back = move.view(table, move.permute(turned, (1, 0, 2)), (5, 3, 4), (5, 12))
    assert told(back[1]) == ((), units.tolist())
    assert not reasons(table)


def test_merging_against_the_order_of_the_split_ties(table):
    """(3 heads, 4 dims) as (4, 3): the dims of all heads go together, the heads stay."""
    units = table.new(12)
    axes = move.view(table, [Axis(units)], (12,), (3, 4))
    blocks = table.section_ids(units.reshape(3, 4))
    (merged,) = move.view(table, move.transpose(axes, 0, 1), (4, 3), (12,))
    classes = table.classes()
    assert classes[units].tolist() == [0, 1, 2, 3] * 3
    assert merged and classes[merged.ids].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert reasons(table) == {move.INTERLEAVED: set(blocks.tolist())}


@pytest.mark.parametrize(
    ("before", "row", "after", "rows", "shape"),
    [
        ((4, 3, 6), 1, (4, 3, 2, 3), (1,), (3, 4)),  # a view elsewhere
        ((4, 1, 3, 6), 2, (4, 3, 6), (1,), (3, 4)),
        ((4, 6), 1, (4, 2, 3), (1, 2), (2, 3, 4)),  # the rows are split
    ],
)
def test_rows_behind_their_units_stay_apart(table, before, row, after, rows, shape):
    """The first axis carries units that differ along another one."""
    units = table.new(before[row] * 4).reshape(-1, 4)
    axes: Axes = [Axis(units, (row,)), *[None] * (len(before) - 1)]
    assert told(move.view(table, axes, before, after)[0]) == (rows, units.reshape(shape).tolist())
    assert not reasons(table) and table.classes()[units].tolist() == units.tolist()


def test_rows_that_merge_with_pixels_are_repeated(table):
    """(4 units, 3 rows, 2 pixels) as (4, 6)."""
    units = table.new(12).reshape(3, 4)
    found = move.view(table, [Axis(units, (1,)), None, None], (4, 3, 2), (4, 6))[0]
    assert told(found) == ((1,), np.repeat(units, 2, axis=0).tolist())


def test_two_kinds_of_units_cannot_share_an_axis(table):
    one, two = table.new(3), table.new(4)
    move.view(table, [Axis(one), Axis(two)], (3, 4), (12,))
    assert reasons(table) == {"two kinds of units share one axis": {*one.tolist(), *two.tolist()}}


def test_units_times_pixels_keep_their_channels(table):
    """(B, C, H·W) flattened: each channel takes all of its pixels along."""
    units = table.new(3)
    axes = move.view(table, [None, Axis(units), None], (2, 3, 4), (2, 12))
    assert [told(axis) for axis in axes] == [None, ((), np.repeat(units, 4).tolist())]
    (together,) = move.view(table, [None, Axis(units)], (2, 3), (6,))
    assert told(together) == ((), 2 * units.tolist())


def test_an_empty_tensor_carries_nothing(table):
    assert move.view(table, [None, Axis(table.new(3))], (0, 3), (3, 0, 5)) == [None] * 3


# --- joining ------------------------------------------------------------------------------------------------


def test_a_fixed_axis_freezes_what_it_is_combined_with(table):
    units, others = table.new(3), table.new(3)
    result = move.unite_axes(table, [Axis(units), None, Axis(others)], [3, 3, 3], "it meets pixels")
    assert result is None
    assert reasons(table) == {"it meets pixels": {*units.tolist(), *others.tolist()}}


def test_an_axis_of_length_one_does_not_count(table):
    axis = Axis(table.new(3))
    assert move.unite_axes(table, [None, axis], [1, 3], "never") is axis
    assert not reasons(table) and table.classes().tolist() == [0, 1, 2]


def test_united_axes_keep_the_finest_rows(table):
    """(2, 3) units against 3 that are the same for both rows: these become one, and each row may still be told."""
    rows, plain = table.new(6).reshape(2, 3), table.new(3)
    result = move.unite_axes(table, [Axis(plain), Axis(rows, (0,))], [3, 3], "never")
    assert told(result) == ((0,), rows.tolist())
    assert table.classes().tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2]


def test_broadcasting_aligns_at_the_right(table):
    image, scale = table.new(4), table.new(4)
    operands = [([None, Axis(image), None], (2, 4, 7)), ([Axis(scale), None], (4, 1))]
    result = move.broadcast(table, operands, (2, 4, 7), "never")
    assert [axis is None for axis in result] == [True, False, True]
    assert table.classes().tolist() == [0, 1, 2, 3] * 2


def test_pieces_of_a_concatenation_keep_their_own_units_and_share_the_other_axes(table):
    one, two, rows = table.new(2), table.new(3), table.new(8).reshape(2, 4)
    first: Axes = [Axis(one), Axis(rows[0])]
    second: Axes = [Axis(two), Axis(rows[1])]
    joined, _ = move.concatenate(table, [(first, (2, 4)), (second, (3, 4))], 0, "never")
    assert told(joined) == ((), [*one.tolist(), *two.tolist()])
    assert table.classes()[rows].tolist() == [rows[0].tolist()] * 2


def test_positions_that_no_layer_makes_stay_where_they_are_joined(table):
    units = table.new(2)
    (axis,) = move.concatenate(table, [([Axis(units)], (2,)), ([None], (3,))], 0, "never")
    assert axis and axis.ids[:2].tolist() == units.tolist()
    assert reasons(table) == {"it is joined with positions that no layer makes": set(axis.ids[2:].tolist())}
    assert move.concatenate(table, [([None], (2,)), ([None], (3,))], 0, "never") == [None]


def test_stacked_tensors_keep_equally_many_of_their_own_units(table):
    one, two = table.new(3), table.new(3)
    new, units = move.stack(table, [([Axis(one)], (3,)), ([Axis(two)], (3,))], 0, "never")
    rows = [one.tolist(), two.tolist()]
    assert new is None and told(units) == ((0,), rows)
    assert [equal.tolist() for equal in table.rows.values()] == [rows]
    assert table.classes().tolist() == [*range(6)], "each its own choice"


def test_stacked_with_something_fixed_nothing_goes(table):
    units = table.new(3)
    move.stack(table, [([Axis(units)], (3,)), ([None], (3,))], 1, "it meets pixels")
    assert reasons(table) == {"it meets pixels": set(units.tolist())}


def test_a_unit_that_is_picked_by_number_freezes_the_axis(table):
    units = table.new(3)
    assert move.select(table, [None, Axis(units)], 1, 2) == [None]
    assert reasons(table) == {"one of its units is picked by number": set(units.tolist())}


def test_removing_an_axis_ties_what_differed_along_it(table):
    rows = table.new(6).reshape(2, 3)
    (axis,) = move.remove(table, [None, Axis(rows, (0,))], [0])
    assert told(axis) == ((), rows[0].tolist())
    assert table.classes().tolist() == [0, 1, 2] * 2


def test_short_axes_carry_nothing(table):
    """Of length 1, and rows of length 1."""
    units = table.new(4)
    axes: Axes = [Axis(units[:1]), Axis(units.reshape(1, 4), (0,)), Axis(units.reshape(2, 1, 2), (3, 0))]
    expected = [None, ((), units.tolist()), ((3,), units.reshape(2, 2).tolist())]
    assert [told(axis) for axis in move.drop_short(axes)] == expected
