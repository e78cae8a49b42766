"""From the forward code's sizes to groups that shrink together, and to what the modules' integers become."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isomorphic.errors import UserError
from isomorphic.pruning.grouping import exact
from isomorphic.pruning.grouping.size_arguments import SIZE_RULES
from isomorphic.pruning.plan import PruningPlan
from tests.unit.pruning.grouping.cutting import Net, cut_copy, error_of_random_cut, randomized, why_frozen

TOKENS = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).double()
IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)).double()
FIXED = "a size in the forward code depends on it and cannot follow"
UNCOMMON = "its size has no fraction in common with those that it must follow"


def traced(function, inputs=TOKENS, /, **parts: Any):
    """A net with generic parameters, and its graph; whatever may be cut from it must be exact."""
    net = randomized(Net(function, **parts)).double()
    graph = exact.trace(net, inputs)
    for seed in range(4 if graph.groups else 0):
        assert error_of_random_cut(net, graph, inputs, seed) < 1e-9
    return net, graph


def together(graph):
    return [set(names) for names in graph.shrink_together]


def heads(graph):
    """By group: its blocks, if they are heads."""
    return {group.name: group.num_sections for group in graph.groups if group.heads}


def kept(graph, **widths):
    """A plan that keeps the first units of each block of the groups named, by module, and all of the others."""
    units = {g.name: widths.get(g.name.split(".")[0], g.section_size) for g in graph.groups}
    return PruningPlan(
        {g.name: tuple(u for u in range(g.num_units) if u % g.section_size < units[g.name]) for g in graph.groups}
    )


# --- groups that shrink together ----------------------------------------------------------------------------


def attention_parts(inner=12):
    return {
        **{"embed": nn.Linear(3, 12), "qkv": nn.Linear(12, 3 * inner), "out": nn.Linear(inner, 12)},
        **{"head": nn.Linear(12, 4), "num_heads": 3, "head_dim": inner // 3},
    }


def attention(split, merge, num_heads=lambda m: m.num_heads):
    """Self-attention whose sizes are spelled out by two functions of the module and the stream's shape."""

    def forward(m, x):
        x = m.embed(x)
        heads_of = num_heads(m)
        qkv = m.qkv(x).reshape(*split(m, x.shape, heads_of))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        out = ((q @ k.mT).softmax(-1) @ v).transpose(1, 2)
        return m.head(x + m.out(out.reshape(*merge(m, x.shape))))

    return forward


BY_WIDTH = (lambda m, s, h: (s[0], s[1], 3, h, s[2] // h)), (lambda m, s: s)
BY_ATTRIBUTE = (lambda m, s, h: (s[0], s[1], 3, h, m.head_dim)), (lambda m, s: (s[0], s[1], h_times_d(m)))
BY_HEADS = (lambda m, s, h: (s[0], s[1], 3, h, -1)), (lambda m, s: (s[0], s[1], -1))


def h_times_d(m):
    return m.num_heads * m.head_dim


def test_an_attention_as_wide_as_its_stream_shrinks_with_it():
    """`C // num_heads` and `reshape(B, N, C)`."""
    _, graph = traced(attention(*BY_WIDTH), **attention_parts())
    assert together(graph) == [{"embed.weight:0", "qkv.weight:0"}]
    assert why_frozen(graph) == {"head.weight:0": "it reaches the model's output"}


@pytest.mark.parametrize("sizes", [BY_ATTRIBUTE, BY_HEADS])
def test_an_attention_of_its_own_width_does_not(sizes):
    _, graph = traced(attention(*sizes), **attention_parts(inner=6))
    assert together(graph) == []
    assert heads(graph) == {"qkv.weight:0": 3}


def test_heads_may_go_where_their_number_is_an_attribute_and_not_where_it_is_spelled_out():
    for count, expected in ((lambda m: m.num_heads, {"qkv.weight:0": 3}), (lambda m: 3, {})):
        _, graph = traced(attention(*BY_HEADS, num_heads=count), **attention_parts())
        assert heads(graph) == expected
        assert {g.name: g.num_sections for g in graph.groups}["qkv.weight:0"] == 3, "the dims of all heads may go still"


def test_groups_of_different_sizes_keep_the_same_fraction():
    """Twice as many hidden channels as the stream has, says the forward."""

    def forward(m, x):
        x = m.one(x)
        return m.two(F.gelu(m.hidden(x)).view(2, 5, 2 * x.shape[-1]))

    parts = {"one": nn.Linear(3, 6), "hidden": nn.Linear(6, 12), "two": nn.Linear(12, 4)}
    net, graph = traced(forward, **parts)
    assert together(graph) == [{"one.weight:0", "hidden.weight:0"}]
    with pytest.raises(UserError, match="must shrink together"):
        cut_copy(net, graph, kept(graph, one=3))


def test_one_attribute_for_two_groups_ties_them():
    def forward(m, x):
        return m.end(m.one(x).view(2, 5, m.width)) + m.finish(m.two(x).view(2, 5, m.width))

    parts = {"one": nn.Linear(3, 6), "two": nn.Linear(3, 6), "end": nn.Linear(6, 4), "finish": nn.Linear(6, 4)}
    net, graph = traced(forward, **parts, width=6)
    assert together(graph) == [{"one.weight:0", "two.weight:0"}]
    pruned: Any = cut_copy(net, graph, kept(graph, one=2, two=2))
    assert pruned.width == 2


def test_unequal_chunks_shrink_together():
    """11 channels in pieces of 4, 4 and 3 would have no fraction in common; 10 in pieces of 4, 4 and 2 do."""

    def forward(m, x):
        first, second, third = m.one(x).chunk(3, -1)
        return m.two(first) + m.three(second) + m.four(third)

    def parts(width, last):
        layers = {"two": nn.Linear(4, 4), "three": nn.Linear(4, 4), "four": nn.Linear(last, 4)}
        return {"one": nn.Linear(3, width)} | layers

    _, graph = traced(forward, **parts(10, 2))
    assert len(together(graph)) == 1 and {g.num_units for g in graph.groups} == {2, 4}
    with pytest.raises(AssertionError):
        assert traced(forward, **parts(11, 3))[1].groups
    _, graph = traced(forward, **parts(11, 3))
    assert graph.frozen["one.weight:0"].reason.startswith((UNCOMMON, FIXED))


def test_equal_chunks_need_no_equation():
    def forward(m, x):
        first, second = m.one(x).chunk(2, -1)
        return m.two(first) + m.three(second)

    _, graph = traced(forward, one=nn.Linear(3, 12), two=nn.Linear(6, 4), three=nn.Linear(6, 4))
    assert graph.equations == ()
    assert together(graph) == [{"one.weight:0:0", "one.weight:0:6"}]


def test_groups_without_a_common_fraction_stay_and_the_others_do_not():
    """6 + 1 hidden channels for a stream of 6 and an extra one: five and seven have no fraction in common."""

    def forward(m, x):
        x = m.one(x)
        return m.two(F.gelu(m.hidden(x)).view(2, 5, x.shape[-1] + 2)) + m.free(m.wide(x))

    parts = {"one": nn.Linear(3, 5), "hidden": nn.Linear(5, 7), "two": nn.Linear(7, 4)}
    _, graph = traced(forward, **parts, wide=nn.Linear(5, 9), free=nn.Linear(9, 4))
    assert [group.name for group in graph.groups] == ["wide.weight:0"]
    assert {str(graph.frozen[f"{name}.weight:0"]) for name in ("one", "hidden")} <= {UNCOMMON, FIXED}


# --- what cannot follow -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "read",
    [
        lambda m, x: x.view(2, 5, 2, 3).flatten(2),
        lambda m, x: x.expand(2, 5, 6),
        lambda m, x: torch.cat(x.split([2, 4], -1), -1),
        lambda m, x: x + torch.zeros(6),
        lambda m, x: F.layer_norm(x, (6,)),
        lambda m, x: x.tanh() / x.shape[-1],
        lambda m, x: x * float(x.shape[-1]),
        lambda m, x: x + len(x[0, 0]),
        lambda m, x: x if x.numel() == 60 else x.square(),
    ],
)
def test_a_size_that_is_spelled_out_freezes(read):
    _, graph = traced(lambda m, x: m.two(read(m, m.one(x))), one=nn.Linear(3, 6), two=nn.Linear(6, 4))
    assert graph.groups == ()
    assert str(graph.frozen["one.weight:0"]) in (FIXED, "its length is used as a number")


@pytest.mark.parametrize(
    "read",
    [
        lambda m, x: x * (0.5 * x.shape[-1]),  # python asks the float first, which does not remember
        lambda m, x: x.sum(-1, keepdim=True) / int(x.shape[-1]) + x,
        lambda m, x: x.mul(round(x.shape[-1] / 2)),
        lambda m, x: x.square() if x.shape[-1] > 5 else x,
    ],
)
def test_what_no_equation_tells_a_trial_does(read):
    """Numbers that arithmetic forgets, and branches, show when half of the channels are left out."""
    _, graph = traced(lambda m, x: m.two(read(m, m.one(x))), one=nn.Linear(3, 6), two=nn.Linear(6, 4))
    assert graph.groups == ()
    assert "one.weight:0" in graph.frozen


def test_only_the_groups_behind_a_conflict_stay():
    def forward(m, x):
        x = F.relu(m.free(x))
        return m.two(m.one(x).view(2, 5, 2, 3).flatten(2))

    _, graph = traced(forward, free=nn.Linear(3, 7), one=nn.Linear(7, 6), two=nn.Linear(6, 4))
    assert [group.name for group in graph.groups] == ["free.weight:0"]
    assert str(graph.frozen["one.weight:0"]) == FIXED


# --- what the integers become -------------------------------------------------------------------------------


def test_attributes_follow_the_widths():
    """A number, entries of a tuple and of a list; what has nothing to do with channels stays."""

    def forward(m, x):
        x = m.one(x).view(*x.shape[:2], m.rows, m.columns).flatten(2)
        first, second = m.two(x).split(m.split, -1)
        return m.head(F.layer_norm(torch.cat([first, second], -1), m.shape)) * m.depth

    parts = {"one": nn.Linear(3, 12), "two": nn.Linear(12, 10), "head": nn.Linear(10, 4)}
    numbers = {"rows": 3, "columns": 4, "split": [4, 6], "shape": (10,), "depth": 2}
    net, graph = traced(forward, **parts, **numbers)
    plan = PruningPlan(
        {g.name: tuple(range(g.num_units)) for g in graph.groups}
        | {"one.weight:0": (0, 1, 4, 6, 9, 11), "two.weight:0:0": (1,), "two.weight:0:4": (0, 2, 5)}
    )
    pruned: Any = cut_copy(net, graph, plan)
    assert (pruned.rows, pruned.columns, pruned.split, pruned.shape, pruned.depth) == (3, 2, [1, 3], (4,), 2)
    assert type(pruned.split) is list and type(pruned.shape) is tuple
    assert all(type(n) is int for n in (pruned.rows, pruned.columns, *pruned.split, *pruned.shape))


def test_heads_and_their_dims_follow():
    net, graph = traced(attention(*BY_ATTRIBUTE), **attention_parts())
    name = "qkv.weight:0"
    plan = kept(graph, embed=7)
    pruned: Any = cut_copy(net, graph, PruningPlan({**plan.kept, name: (0, 2, 3, 9, 10, 11)}))  # a head and a dim go
    assert (pruned.num_heads, pruned.head_dim) == (2, 3)
    assert (pruned.qkv.out_features, pruned.qkv.in_features, pruned.embed.out_features) == (18, 7, 7)


def test_layers_of_the_library_know_their_new_widths():
    def forward(m, x):
        x = m.depthwise(m.one(x))
        x = m.channels(m.groups(x))
        return m.head(m.norm(x.mean((2, 3))))

    parts = {
        **{"one": nn.Conv2d(3, 8, 1), "depthwise": nn.Conv2d(8, 8, 3, groups=8), "groups": nn.GroupNorm(2, 8)},
        **{"channels": nn.GroupNorm(8, 8), "norm": nn.LayerNorm(8), "head": nn.Linear(8, 4)},
    }
    net, graph = traced(forward, IMAGES, **parts)
    pruned: Any = cut_copy(net, graph, kept(graph, one=3))  # of each half
    assert (pruned.one.out_channels, pruned.depthwise.in_channels, pruned.depthwise.groups) == (6, 6, 6)
    assert (pruned.groups.num_channels, pruned.groups.num_groups) == (6, 2)
    assert (pruned.channels.num_channels, pruned.channels.num_groups) == (6, 6)
    assert (pruned.norm.normalized_shape, pruned.head.in_features) == ((6,), 6)


def test_multihead_attention_of_the_library_keeps_its_own_sizes_right():
    parts = {"embed": nn.Linear(3, 12), "attention": nn.MultiheadAttention(12, 3, batch_first=True)}

    def forward(m, x):
        x = m.embed(x)
        return m.head(x + m.attention(x, x, x, need_weights=False)[0])

    net, graph = traced(forward, **parts, head=nn.Linear(12, 4))
    assert [g.name for g in graph.groups] == ["embed.weight:0", "attention.in_proj_weight:0"]
    assert together(graph) == [{"embed.weight:0", "attention.in_proj_weight:0"}]
    pruned: Any = cut_copy(net, graph, kept(graph, embed=6, attention=2))
    pruned = pruned.attention
    assert (pruned.embed_dim, pruned.num_heads, pruned.head_dim) == (6, 3, 2)


def test_a_size_that_the_trace_misreads_and_that_no_group_is_behind_is_left_out(monkeypatch):
    """Nothing that is cut could make it true, and looking for it would never end."""

    def misread(mode, out, /, tensor, dim, start, length):
        mode.equate(length, mode.interned(None, 7))

    monkeypatch.setitem(SIZE_RULES, Tensor.narrow, misread)

    def forward(m, x):
        tokens = x.narrow(1, 0, m.tokens).expand(2, m.tokens, 3)
        return m.two(m.one(tokens).relu())

    net, graph = traced(forward, one=nn.Linear(3, 6), two=nn.Linear(6, 4), tokens=4)
    assert [(group.name, group.num_units) for group in graph.groups] == [("one.weight:0", 6)]
    assert cut_copy(net, graph, kept(graph, one=3)).tokens == 4
