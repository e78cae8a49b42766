"""The layer graph of a trace: which layer reaches which, through movement and element-wise operations alone."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from isomorphic.pruning.grouping import exact
from isomorphic.pruning.grouping.topology import Topology
from isomorphic.pruning.groups import LayerNode
from tests.unit.pruning.grouping.cutting import Net

TOKENS = torch.zeros(2, 5, 3)


def layers_of(graph):
    """By group: its nodes as "module.side" with the kind of those that are not linear, and edges between them."""
    found = {}
    for group in graph.groups:
        names = [f"{n.module or 'model'}.{n.side}" + (f" {n.kind}" if n.kind != "linear" else "") for n in group.nodes]
        found[group.name] = ({*names}, {(names[a], names[b]) for a, b in group.edges})
    return found


def linear(*widths):
    return [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]


def stream_of(function, **parts):
    """The layers and edges of the one group of a net from width 3 to 8 to 4."""
    one, two = linear(3, 8, 4)
    graph = exact.trace(Net(function, one=one, two=two, **parts), TOKENS)
    return layers_of(graph)["one.weight:0"]


def test_a_layer_side_has_one_node_and_a_parameter_the_layer_of_its_first_use():
    topology = Topology()
    first = topology.node("a", LayerNode("a", "linear", "out"))
    second = topology.node("b", LayerNode("b", "linear", "in"))
    assert topology.node("a", LayerNode("other", "norm", "both")) == first != second
    assert [node.module for node in topology.nodes] == ["a", "b"]
    topology.assign("a.weight", 0, first)
    topology.assign("a.weight", 0, second)
    assert topology.roles == {("a.weight", 0): first}
    topology.connect({first, second}, second)
    assert topology.edges == {(first, second), (second, second)}


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x,
        lambda x: F.dropout(F.gelu(x), 0.1),
        lambda x: x.unflatten(-1, (2, -1)).flip(-2).flatten(-2).mT.mT,
        lambda x: torch.cat([x[..., :4], x[..., 4:]], -1),
        lambda x: x.softmax(1) * x.mean(1, keepdim=True),
        lambda x: torch.zeros_like(x).copy_(x),
    ],
)
def test_movement_and_elementwise_operations_pass_a_flow_on(between):
    _, edges = stream_of(lambda m, x: m.two(between(m.one(x))))
    assert edges == {("one.out", "two.in")}


def test_norms_lie_on_the_way():
    nodes, edges = stream_of(lambda m, x: m.two(m.norm(m.one(x))), norm=nn.LayerNorm(8))
    assert nodes == {"one.out", "norm.both norm", "two.in"}
    assert edges == {("one.out", "norm.both norm"), ("norm.both norm", "two.in")}


def test_a_residual_stream_reaches_every_reader_from_every_writer():
    def forward(m, x):
        x = m.one(x)
        x = x + m.write(F.relu(m.read(x)))
        return m.two(x)

    read, write = linear(8, 5, 8)
    nodes, edges = stream_of(forward, read=read, write=write)
    assert nodes == {"one.out", "read.in", "write.out", "two.in"}
    assert edges == {("one.out", "read.in"), ("one.out", "two.in"), ("write.out", "two.in")}


def test_a_parameter_beside_the_stream_is_a_layer_of_its_own():
    """Its detail says what joins it to the stream."""
    one, two = linear(3, 8, 4)
    position, scale = nn.Parameter(torch.zeros(1, 5, 8)), nn.Parameter(torch.ones(8))
    net = Net(lambda m, x: m.two((m.one(x) + m.position) * m.scale), one=one, two=two, position=position, scale=scale)
    group = next(group for group in exact.trace(net, TOKENS).groups if group.name == "one.weight:0")
    parameters = [(node.side, node.detail) for node in group.nodes if node.kind == "parameter"]
    assert parameters == [("both", "add"), ("both", "mul")]
    assert {m.name: group.nodes[m.node].detail for m in group.members if m.module == ""} == {
        "position": "add",
        "scale": "mul",
    }
    into_two = {group.nodes[a].detail for a, b in group.edges if group.nodes[b].module == "two"}
    assert into_two == {"", "add", "mul"}


def test_what_is_written_into_a_tensor_flows_on_from_there():
    def forward(m, x):
        x = m.one(x)
        view = x[:, 1:]
        x[:, :1] = m.other(x[:, :1])
        return m.two(view)

    nodes, edges = stream_of(forward, other=nn.Linear(8, 8))
    assert nodes == {"one.out", "other.in", "other.out", "two.in"}
    assert edges >= {("one.out", "other.in"), ("one.out", "two.in"), ("other.out", "two.in")}


def test_a_weight_that_is_computed_with_is_the_layers_own():
    """Weight standardisation: the convolution's, not a layer that reads another."""

    def forward(m, x):
        weight = m.layer.weight - m.layer.weight.mean(1, keepdim=True)
        return m.two(F.linear(m.one(x), weight, m.layer.bias))

    one, layer, two = linear(3, 8, 6, 4)
    found = layers_of(exact.trace(Net(forward, one=one, layer=layer, two=two), TOKENS))
    assert found == {
        "one.weight:0": ({"one.out", "layer.in"}, {("one.out", "layer.in")}),
        "layer.weight:0": ({"layer.out", "two.in"}, {("layer.out", "two.in")}),
    }


def test_a_layer_that_is_called_twice_reads_its_own_output():
    nodes, edges = stream_of(lambda m, x: m.two(m.again(F.relu(m.again(m.one(x))))), again=nn.Linear(8, 8))
    assert nodes == {"one.out", "again.in", "again.out", "two.in"}
    assert edges == {("one.out", "again.in"), ("again.out", "again.in"), ("again.out", "two.in")}


def test_a_product_of_activations_comes_from_its_factors():
    keys, values = linear(3, 8), linear(3, 8)
    _, edges = stream_of(
        lambda m, x: m.two((m.one(x) @ m.keys(x).mT).softmax(-1) @ m.values(x) + m.one(x)),
        keys=keys[0],
        values=values[0],
    )
    assert edges == {("one.out", "two.in"), ("keys.out", "two.in"), ("values.out", "two.in")}
