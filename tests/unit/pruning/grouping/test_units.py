"""Ids of units: which become one, which stay, which make up a block."""

from __future__ import annotations

import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isomorphic.pruning.grouping.units import Axis, UnitTable, connected_components

STABLE = settings(deadline=None, derandomize=True, database=None, max_examples=50)


def ids(*values):
    return np.array(values)


@pytest.fixture
def table():
    return UnitTable()


@st.composite
def graphs(draw):
    """Number of nodes, and edges: few or many, of all shapes, loops and repetitions included."""
    size = draw(st.integers(1, 40))
    node = st.integers(0, size - 1)
    return size, draw(st.lists(st.tuples(node, node), max_size=60))


@STABLE
@given(graphs())
def test_components_are_those_of_networkx(graph):
    size, edges = graph
    expected = networkx.Graph(edges)
    expected.add_nodes_from(range(size))
    first, second = np.array(edges, np.int64).reshape(-1, 2).T
    found = connected_components(size, first, second).tolist()
    for component in networkx.connected_components(expected):
        assert {found[node] for node in component} == {min(component)}


@pytest.mark.parametrize("order", [1, -1])
def test_the_longest_path_is_one_component(order):
    """The worst case of labels that travel along edges."""
    nodes = np.random.default_rng(0).permutation(10_000)[::order]
    assert not connected_components(10_000, nodes[:-1], nodes[1:]).any()


def test_ids_are_never_given_twice(table):
    assert table.new(3).tolist() == [0, 1, 2]
    assert table.fixed(2, "a border").tolist() == [3, 4]
    assert (table.size, table.classes().tolist()) == (5, [0, 1, 2, 3, 4])


def test_unions_broadcast(table):
    """(3, 1) with (2,): all in one; (2, 2) with (2,): column by column."""
    columns, row, square = table.new(3)[:, None], table.new(2), table.new(4).reshape(2, 2)
    table.unite(square, row)
    assert table.classes().tolist() == [0, 1, 2, 3, 4, 3, 4, 3, 4]
    table.unite(columns, row)
    assert not table.classes().any()


def test_unions_chain_over_calls(table):
    first, second, third = table.new(2), table.new(2), table.new(2)
    table.unite(second, third[::-1])
    table.unite(first, second)
    assert table.classes().tolist() == [0, 1, 0, 1, 1, 0]


def test_reasons_follow_units_and_keep_their_order(table):
    units, others = table.new(3), table.new(3)
    table.freeze(others[:1], "first")
    table.freeze_axes([None, Axis(units[1:])], "second")
    table.unite(units, others)
    table.freeze(units[:1], "third", "net.py:7")
    found = [(classes.tolist(), reason, line) for classes, reason, line in table.reasons(table.classes())]
    assert found == [([0], "first", ""), ([1, 2], "second", ""), ([0], "third", "net.py:7")]


# --- rows ---------------------------------------------------------------------------------------------------


@st.composite
def axes_with_rows(draw):
    """An axis that differs along some axes of a tensor, in any order of rows."""
    rows = draw(st.permutations(range(4)).flatmap(lambda dims: st.integers(0, 3).map(lambda n: tuple(dims[:n]))))
    shape = [draw(st.integers(1, 3)) for _ in rows] + [draw(st.integers(1, 4))]
    return Axis(np.arange(np.prod(shape)).reshape(shape), rows)


@STABLE
@given(axes_with_rows())
def test_over_puts_one_dim_for_each_axis_asked_for(axis):
    sizes = dict(zip(axis.rows, axis.ids.shape, strict=False))
    spread = axis.over((0, 1, 2, 3))
    assert spread.shape == (*(sizes.get(dim, 1) for dim in range(4)), axis.ids.shape[-1])
    for place in np.ndindex(*spread.shape):
        assert spread[place] == axis.ids[(*(place[row] for row in axis.rows), place[-1])]


@STABLE
@given(axes_with_rows(), st.permutations(range(4)))
def test_moved_renames_the_rows_alone(axis, order):
    moved = axis.moved(dict(enumerate(order)))
    assert moved.rows == tuple(order[row] for row in axis.rows)
    assert moved.ids is axis.ids


@STABLE
@given(axes_with_rows(), st.sets(st.integers(0, 3)))
def test_tied_units_are_equal_along_the_rows_that_are_forgotten(axis, dims):
    table = UnitTable()
    table.new(axis.ids.size)
    tied = table.tie(axis, dims)
    assert tied.rows == tuple(row for row in axis.rows if row not in dims)
    classes, gone = table.classes(), [place for place, row in enumerate(axis.rows) if row in dims]
    first = axis.ids[tuple(slice(1) if place in gone else slice(None) for place in range(axis.ids.ndim))]
    assert np.array_equal(classes[axis.ids], np.broadcast_to(first, axis.ids.shape)), "the first id of each tied line"
    assert np.array_equal(classes[tied.ids], first.reshape(tied.ids.shape))


def test_rows_that_keep_equally_many_are_noted_once(table):
    units = table.new(12)
    for shape in ((3, 4), (4, 3), (3, 4)):
        table.keep_equal(units.reshape(shape))
    table.keep_equal(units.reshape(1, 12))  # alone, it has nothing to be equal to
    assert sorted(rows.shape for rows in table.rows.values()) == [(3, 4), (4, 3)]


def test_a_block_has_one_id_however_often_its_row_is_met(table):
    rows = table.new(6).reshape(2, 3)
    first = table.section_ids(rows)
    assert first.tolist() == [6, 7]
    assert table.section_ids(rows[::-1]).tolist() == [7, 6]
    assert table.section_ids(rows[:, ::-1]).tolist() == [8, 9], "another order is another row"
    assert table.is_section(first) and not table.is_section(rows)
    assert [row.tolist() for _, row in list(table.sections.values())[:2]] == rows.tolist()


def test_equal_rows_share_a_block(table):
    row = table.new(3)
    blocks = table.section_ids(np.stack([row, row]))
    assert blocks[0] == blocks[1]
