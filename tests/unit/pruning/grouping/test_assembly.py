"""From classes of ids to coupled groups: names, units, members, blocks, heads, reasons, and lengths of axes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isomorphic.pruning.cutting.sizes import AxisLengths
from isomorphic.pruning.expressions import Attribute, AxisSize, Constant, Length, Operation
from isomorphic.pruning.grouping import exact
from isomorphic.pruning.groups import SectionStructure
from tests.unit.pruning.grouping.cutting import Net, error_of_random_cut, randomized, why_frozen

TOKENS = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
OUTPUT = "it reaches the model's output"


def traced(function, **parts):
    """A net with generic parameters, and its graph."""
    net = randomized(Net(function, **parts))
    return net, exact.trace(net, TOKENS)


def positions(group):
    """By tensor and dim: the positions of each unit, as numbers where each has one."""
    found = {}
    for member in group.members:
        rows = member.index.tolist()
        found[f"{member.name}:{member.dim}"] = [row[0] for row in rows] if len(rows[0]) == 1 else rows
    return found


# --- units --------------------------------------------------------------------------------------------------


def test_a_group_is_what_makes_scales_and_reads_the_same_units():
    _, graph = traced(
        lambda m, x: m.two(m.norm(m.one(x))), one=nn.Linear(3, 4), norm=nn.LayerNorm(4), two=nn.Linear(4, 5, bias=False)
    )
    (group,) = graph.groups
    assert (group.name, group.num_units, group.sections, group.split_dim) == ("one.weight:0", 4, None, "")
    tensors = ("one.weight:0", "one.bias:0", "norm.weight:0", "norm.bias:0", "two.weight:1")
    assert positions(group) == {name: [0, 1, 2, 3] for name in tensors}
    assert [(node.module, node.side) for node in group.nodes] == [("one", "out"), ("norm", "both"), ("two", "in")]
    assert why_frozen(graph) == {"two.weight:0": OUTPUT}


def test_units_of_a_concatenation_belong_to_whoever_makes_them():
    _, graph = traced(
        lambda m, x: m.two(torch.cat([m.one(x), m.few(x)], -1) + m.all(x)),
        **{"one": nn.Linear(3, 4), "few": nn.Linear(3, 2), "all": nn.Linear(3, 6), "two": nn.Linear(6, 4)},
    )
    one, few = graph.groups
    assert (one.name, few.name, one.split_dim, few.split_dim) == ("one.weight:0", "few.weight:0", "", "")
    assert positions(one)["all.weight:0"] == positions(one)["two.weight:1"] == [0, 1, 2, 3]
    assert positions(few)["all.weight:0"] == positions(few)["two.weight:1"] == [4, 5]


def test_one_dim_that_different_layers_read_parts_of_is_a_pool():
    net, graph = traced(
        lambda m, x: m.two(m.one(x)[..., : m.split] * m.gate(x)) + m.rest(m.one(x)[..., m.split :]),
        **{
            "split": 3,
            "one": nn.Linear(3, 8),
            "gate": nn.Linear(3, 3),
            "two": nn.Linear(3, 4),
            "rest": nn.Linear(5, 4),
        },
    )
    gated, rest = graph.groups
    assert [(g.name, g.num_units, g.split_dim) for g in (gated, rest)] == [
        ("one.weight:0:0", 3, "one.weight:0"),
        ("one.weight:0:3", 5, "one.weight:0"),
    ]
    assert positions(gated)["one.weight:0"] == [0, 1, 2] and positions(rest)["one.weight:0"] == [3, 4, 5, 6, 7]
    assert positions(rest)["rest.weight:1"] == [0, 1, 2, 3, 4]
    assert error_of_random_cut(net, graph, TOKENS) < 1e-9


def test_a_unit_may_have_many_positions_in_any_order():
    """(4 rows, 2) turned over: the even channels go together."""
    net, graph = traced(
        lambda m, x: m.two(m.one(x).unflatten(-1, (4, -1)).mT.flatten(-2)), one=nn.Linear(3, 8), two=nn.Linear(8, 4)
    )
    (group,) = graph.groups
    assert (group.num_units, group.sections) == (2, None)
    assert positions(group)["one.weight:0"] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert positions(group)["two.weight:1"] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert error_of_random_cut(net, graph, TOKENS) < 1e-9


def test_a_tied_tensor_is_a_member_by_each_of_its_names():
    one, again, two = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(6, 4)
    again.weight = one.weight
    net, graph = traced(lambda m, x: m.two(m.one(x) * m.again(x)), one=one, again=again, two=two)
    (group,) = graph.groups
    assert [(m.module, m.tensor, m.dim) for m in group.members] == [
        ("one", "weight", 0),
        ("again", "weight", 0),
        ("one", "bias", 0),
        ("again", "bias", 0),
        ("two", "weight", 1),
    ]
    assert error_of_random_cut(net, graph, TOKENS) < 1e-9


def test_both_dims_of_a_square_weight_may_be_one_groups():
    _, graph = traced(
        lambda m, x: m.two(m.one(x) + m.square(m.one(x))),
        **{"one": nn.Linear(3, 4), "square": nn.Linear(4, 4), "two": nn.Linear(4, 4)},
    )
    (group,) = graph.groups
    found = positions(group)
    assert found["square.weight:0"] == found["square.weight:1"] == [0, 1, 2, 3]


def test_buffers_are_members():
    _, graph = traced(
        lambda m, x: m.two(m.norm(m.one(x).mT).mT),
        **{"one": nn.Linear(3, 4), "norm": nn.BatchNorm1d(4), "two": nn.Linear(4, 4)},
    )
    assert {"norm.running_mean:0", "norm.running_var:0"} <= positions(graph.groups[0]).keys()
    assert "norm.num_batches_tracked:0" not in positions(graph.groups[0])


def test_a_buffer_with_channels_is_cut_along():
    net, graph = traced(
        lambda m, x: m.two(m.one(x) * m.mask), one=nn.Linear(3, 4), mask=torch.rand(1, 4), two=nn.Linear(4, 4)
    )
    assert positions(graph.groups[0])["mask:1"] == [0, 1, 2, 3]
    assert error_of_random_cut(net, graph, TOKENS) < 1e-9


def test_units_that_no_layer_makes_are_no_group():
    """The channels of a position embedding that nothing is added to by a layer; those of a norm on the input."""
    _, graph = traced(
        lambda m, x: m.one(m.norm(x + m.position)),
        **{"position": nn.Parameter(torch.zeros(5, 3)), "norm": nn.LayerNorm(3), "one": nn.Linear(3, 4)},
    )
    assert graph.groups == () and why_frozen(graph) == {"one.weight:0": OUTPUT}


# --- blocks -------------------------------------------------------------------------------------------------


def test_blocks_keep_equally_many_and_stay():
    net, graph = traced(
        lambda m, x: m.two(m.norm(m.one(x).mT).mT),
        **{"one": nn.Linear(3, 6), "norm": nn.GroupNorm(2, 6), "two": nn.Linear(6, 4)},
    )
    (group,) = graph.groups
    assert group.sections == SectionStructure(2) and group.heads is None
    for seed in range(3):
        assert error_of_random_cut(net, graph, TOKENS, seed) < 1e-9


def test_where_part_of_a_block_stays_the_other_blocks_stay_as_wide():
    """Channels 0 to 2 are the first of two groups of a norm and reach the output."""

    def forward(m, x):
        x = m.one(x)
        return m.two(m.norm(x.mT).mT), x[..., :3].square()

    _, graph = traced(forward, one=nn.Linear(3, 6), norm=nn.GroupNorm(2, 6), two=nn.Linear(6, 4))
    assert graph.groups == ()
    assert str(graph.frozen["one.weight:0"]) in (OUTPUT, "it shares evenly split rows with channels that stay")


def test_of_a_dim_that_stays_in_part_the_share_is_told():
    def forward(m, x):
        x = m.one(x)
        return m.two(x), x[..., :2]

    _, graph = traced(forward, one=nn.Linear(3, 6), two=nn.Linear(6, 4))
    assert {group.name: group.num_units for group in graph.groups} == {"one.weight:0": 4}
    assert positions(graph.groups[0])["one.weight:0"] == [2, 3, 4, 5]
    assert str(graph.frozen["one.weight:0"]) == f"{OUTPUT} (2 of 6)"


def test_of_several_reasons_the_first_for_most_channels_is_told():
    def forward(m, x):
        x = m.one(x)
        return m.two(x), x[..., :2], x[..., 2:].roll(1, -1).sum(-1)

    _, graph = traced(forward, one=nn.Linear(3, 6), two=nn.Linear(6, 4))
    assert str(graph.frozen["one.weight:0"]) == "its units are rolled"


# --- heads --------------------------------------------------------------------------------------------------


def attention(m, x):
    """Three heads of four dims, with a temperature and a bias for each head; any number of channels in between."""
    x = m.embed(x)
    q, k, v = m.qkv(x).reshape(*x.shape[:2], 3, m.num_heads, m.head_dim).permute(2, 0, 3, 1, 4).unbind()
    logits = (q @ k.mT) * m.temperature + m.table[m.places].permute(2, 0, 1)
    return m.head((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


def attention_parts():
    return {
        **{"embed": nn.Linear(3, 6), "qkv": nn.Linear(6, 36), "head": nn.Linear(12, 4), "num_heads": 3, "head_dim": 4},
        "temperature": nn.Parameter(torch.ones(3, 1, 1)),
        "table": nn.Parameter(torch.zeros(7, 3)),
        "places": torch.arange(25).reshape(5, 5) % 7,
    }


def test_heads_go_with_what_belongs_to_them():
    net, graph = traced(attention, **attention_parts())
    group = next(group for group in graph.groups if group.name == "qkv.weight:0")
    assert (group.num_units, group.num_sections, group.section_size) == (12, 3, 4)
    assert positions(group)["qkv.weight:0"] == [[unit, 12 + unit, 24 + unit] for unit in range(12)]
    assert positions(group)["head.weight:1"] == [*range(12)]
    assert group.heads is not None
    assert [(m.name, m.dim, m.index.tolist()) for m in group.heads.members] == [
        ("temperature", 0, [[0], [1], [2]]),
        ("table", 1, [[0], [1], [2]]),
    ]
    for seed in range(4):
        assert error_of_random_cut(net, graph, TOKENS, seed) < 1e-9


def test_lengths_of_axes_count_units_heads_and_rows():
    _, graph = traced(attention, **attention_parts())
    name = "qkv.weight:0"
    assert {(e.expression, e.axis.fixed, tuple(e.axis.units.items()), e.axis.rows) for e in graph.equations} == {
        (Attribute("", "num_heads"), 0, ((name, 1),), 1),
        (Attribute("", "head_dim"), 0, ((name, 3),), 9),
    }
    by_attribute = {e.expression: e.axis for e in graph.equations}
    assert by_attribute[Attribute("", "num_heads")].counts_heads
    assert by_attribute[Attribute("", "head_dim")].row_group == name


def test_heads_stay_where_their_number_is_spelled_out():
    """The heads of q and k on the one side and of v on the other are sections of two groups; the code says three."""

    def forward(m, x):
        q, k, v = (layer(x).unflatten(-1, (3, -1)).transpose(1, 2) for layer in (m.q, m.k, m.v))
        return m.head(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))

    parts = {name: nn.Linear(3, 12) for name in "qkv"}
    net, graph = traced(forward, **parts, head=nn.Linear(12, 4))
    assert [(g.name, g.num_units, g.sections) for g in graph.groups] == [
        ("q.weight:0", 12, SectionStructure(3)),
        ("v.weight:0", 12, SectionStructure(3)),
    ]
    assert error_of_random_cut(net, graph, TOKENS) < 1e-9


@pytest.mark.parametrize("fixed", ["temperature", "table"])
def test_heads_that_something_fixed_counts_stay(fixed):
    """A constant for each head, instead of a parameter."""

    def forward(m, x):
        values = {"temperature": m.temperature, "table": m.table[m.places].permute(2, 0, 1)}
        values[fixed] = torch.arange(3.0)[:, None, None]
        q, k, v = m.qkv(m.embed(x)).reshape(2, 5, 3, m.num_heads, m.head_dim).permute(2, 0, 3, 1, 4).unbind()
        logits = (q @ k.mT) * values["temperature"] + values["table"]
        return m.head((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))

    net, graph = traced(forward, **attention_parts())
    group = next(group for group in graph.groups if group.name == "qkv.weight:0")
    assert group.sections == SectionStructure(3)
    assert error_of_random_cut(net, graph, TOKENS) < 1e-9


def test_lengths_are_of_groups_and_of_what_is_fixed():
    """Five channels of one layer, three of another and a padding of two, concatenated: `x.shape[-1] // 2` of them."""

    def forward(m, x):
        x = F.pad(torch.cat([m.one(x), m.few(x)], -1), (0, 2))
        return m.two(x + x.new_zeros(x.shape[-1]))

    _, graph = traced(forward, one=nn.Linear(3, 5), few=nn.Linear(3, 3), two=nn.Linear(10, 4))
    size = AxisSize(2, {"one.weight:0": 1, "few.weight:0": 1})
    assert [(e.expression, e.axis, e.axis.units) for e in graph.equations] == [(Length(size), size, size.units)]
    assert graph.equations[0].expression.axis.units == size.units  # type: ignore[union-attr]


def test_equations_that_no_cut_can_touch_are_left_out():
    def forward(m, x):
        x = m.two(F.relu(m.one(x)))
        return x.reshape(2, 5, 2, 2)

    _, graph = traced(forward, one=nn.Linear(3, 5), two=nn.Linear(5, 4))
    assert graph.equations == ()


def test_attributes_have_equations_even_where_nothing_changes():
    """What stays must be known to stay: another equation may want the attribute to change."""

    def forward(m, x):
        return m.two(F.relu(m.one(x))).reshape(2, 5, m.rows, 4 // m.rows)

    _, graph = traced(forward, one=nn.Linear(3, 5), two=nn.Linear(5, 4), rows=2)
    rows = Attribute("", "rows")
    assert [e.expression for e in graph.equations] == [rows, Operation("//", Constant(4), rows)]
    assert [AxisLengths(graph)(e.axis) for e in graph.equations] == [2, 2]


@torch.library.custom_op("isomorphic_tests::unknown_product", mutates_args=())
def unknown_product(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.t()


@unknown_product.register_fake
def _(x, weight):
    return x.new_empty(*x.shape[:-1], len(weight))


@pytest.mark.parametrize(
    ("forward", "name"),
    [
        (lambda m, x: m.head(m.first(x) + m.table(torch.arange(x.shape[1]))), "first.weight:0"),  # by the layer
        (lambda m, x: m.head(m.table(torch.arange(x.shape[1])) + m.first(x)), "table.weight:1"),  # looked up first
        (lambda m, x: m.head(m.second(x) + m.table(torch.arange(x.shape[1])) + m.first(x)), "second.weight:0"),
        (lambda m, x: m.head(m.second(x) + m.first(x)), "first.weight:0"),  # by the order of the parameters
    ],
)
def test_an_embedding_names_a_group_only_where_nothing_is_called_before_it(forward, name: str):
    parts = {"table": nn.Embedding(9, 8), "first": nn.Linear(3, 8), "second": nn.Linear(3, 8), "head": nn.Linear(8, 4)}
    _, graph = traced(forward, **parts)
    assert [group.name for group in graph.groups] == [name]


def test_no_weight_stays_in_silence():
    """One that the forward code never uses, one that an operation without a rule uses; a position embedding is none."""

    def forward(m, x):
        x = m.one(x) + m.positions
        return m.head(unknown_product(m.two(x).relu(), m.weight))

    parts = {"one": nn.Linear(3, 8), "two": nn.Linear(8, 6), "head": nn.Linear(5, 4), "dead": nn.Linear(7, 9)}
    parts |= {"weight": nn.Parameter(torch.randn(5, 6)), "positions": nn.Parameter(torch.randn(5, 8))}
    _, graph = traced(forward, **parts)
    assert {group.name for group in graph.groups} == {"one.weight:0"}
    assert {name: str(frozen) for name, frozen in graph.frozen.items()} == {
        "two.weight:0": "no rule for unknown_product",
        "weight:0": "no rule for unknown_product",
        "head.weight:0": "it reaches the model's output",
        "dead.weight:0": "the forward code never uses it",
    }
