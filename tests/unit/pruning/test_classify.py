"""Step 2: classes are isomorphism classes of labelled graphs, whatever the order of discovery."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isomorphic.pruning.classify import are_isomorphic, canonical_hash, classify, topology
from isomorphic.pruning.groups import CoupledGroup, LayerNode, Member, SectionStructure

STABLE = settings(deadline=None, derandomize=True, max_examples=60)

# (label of each node, edges): pairs that a count of nodes, labels or degrees takes for the same
CYCLE_OF_SIX = ("aaaaaa", [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 0)])
TWO_TRIANGLES = ("aaaaaa", [(0, 1), (1, 2), (2, 0), (3, 4), (4, 5), (5, 3)])
CHAIN = ("abab", [(0, 1), (1, 2), (2, 3)])
CHAIN_TURNED = ("abab", [(1, 0), (2, 1), (3, 2)])
FORK = ("abbcc", [(0, 1), (0, 2), (1, 3), (2, 4)])
FORK_TO_ONE_SIDE = ("abbcc", [(0, 1), (0, 2), (1, 3), (1, 4)])
CROSSED = ("aabb", [(0, 2), (0, 3), (1, 2), (1, 3)])
NEAR_MISSES = [
    (CYCLE_OF_SIX, TWO_TRIANGLES),  # also equal to Weisfeiler and Lehman
    (CHAIN, CHAIN_TURNED),
    (FORK, FORK_TO_ONE_SIDE),
    (CROSSED, ("aabb", [(0, 2), (0, 3), (1, 2)])),
    (CROSSED, ("aabbb", [(0, 2), (0, 3), (1, 2), (1, 3)])),
    (CHAIN, ("abba", [(0, 1), (1, 2), (2, 3)])),
]
LAYERS = [("a", "conv", "out"), ("norm", "norm", "both"), ("b", "conv", "in"), ("c", "linear", "in")]
KINDS = {"a": ("conv", "out"), "b": ("norm", "both"), "c": ("conv", "in")}


def make_group(name, labels, edges, order=None, heads=None):
    """A group with these nodes, discovered in `order`; the classes look at nothing but nodes and edges."""
    order = list(range(len(labels))) if order is None else list(order)
    place = {node: position for position, node in enumerate(order)}
    nodes = tuple(LayerNode(f"{name}.{node}", *KINDS[labels[node]]) for node in order)
    relabelled = frozenset((place[source], place[target]) for source, target in edges)
    return CoupledGroup(name, 4, (), nodes, relabelled, heads)


def naive_is_isomorphic(one, other):
    """Tries every bijection."""
    if len(one.nodes) != len(other.nodes):
        return False
    labels = [[(node.kind, node.side) for node in group.nodes] for group in (one, other)]
    for image in itertools.permutations(range(len(one.nodes))):
        if all(labels[0][node] == labels[1][image[node]] for node in range(len(image))) and {
            (image[source], image[target]) for source, target in one.edges
        } == set(other.edges):
            return True
    return False


@st.composite
def graphs(draw):
    labels = "".join(draw(st.lists(st.sampled_from("ab"), min_size=1, max_size=5)))
    pairs = [(source, target) for source in range(len(labels)) for target in range(len(labels))]
    return labels, draw(st.lists(st.sampled_from(pairs), unique=True, max_size=9))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("labels", "edges"), [pair[0] for pair in NEAR_MISSES[:4]])
def test_the_order_of_discovery_does_not_matter(labels, edges, seed):
    order = random.Random(seed).sample(range(len(labels)), len(labels))
    classes = classify([make_group("one", labels, edges), make_group("other", labels, edges, order)])
    assert classes == {"one": 0, "other": 0}


@pytest.mark.parametrize(("one", "other"), NEAR_MISSES)
def test_near_misses_are_kept_apart(one, other):
    assert classify([make_group("one", *one), make_group("other", *other)]) == {"one": 0, "other": 1}


def test_the_exact_check_decides_where_the_hash_cannot():
    one, other = (topology(make_group("g", *graph)) for graph in (CYCLE_OF_SIX, TWO_TRIANGLES))
    assert canonical_hash(one) == canonical_hash(other)
    assert not are_isomorphic(one, other)


def test_kind_and_side_are_labels_and_names_and_sizes_are_not():
    plain = make_group("plain", *FORK)
    wider = dataclasses.replace(make_group("wider", *FORK), num_units=99)
    turned = make_group("turned", "abbca", FORK[1])
    assert classify([plain, wider, turned]) == {"plain": 0, "wider": 0, "turned": 1}


def test_head_dims_are_not_channels_and_the_number_of_heads_does_not_matter():
    graph = ("ac", [(0, 1)])
    groups = [
        make_group("mlp", *graph),
        make_group("attention", *graph, heads=SectionStructure(2, are_heads=True)),
        make_group("more heads", *graph, heads=SectionStructure(4, are_heads=True)),
    ]
    assert classify(groups) == {"mlp": 0, "attention": 1, "more heads": 1}


def test_details_are_labels_where_they_are_asked_for():
    groups = []
    for name, kernel in (("small", "3x3"), ("large", "7x7"), ("also small", "3x3")):
        group = make_group(name, *FORK)
        first = dataclasses.replace(group.nodes[0], detail=kernel)
        groups.append(dataclasses.replace(group, nodes=(first, *group.nodes[1:])))
    assert classify(groups) == {"small": 0, "large": 0, "also small": 0}
    assert classify(groups, detailed=True) == {"small": 0, "large": 1, "also small": 0}


def test_a_pool_is_classified_as_the_dim_that_its_groups_divide():
    """A convolution whose first half goes on to one layer more: together they are like the undivided one."""
    layers = {name: LayerNode(name, kind, side) for name, kind, side in LAYERS}

    def group(name, of, edges, split_dim=""):
        nodes = tuple(layers[layer] for layer in of)
        members = tuple(
            Member(node.module, "weight", int(node.side == "in"), torch.arange(4)[:, None], number)
            for number, node in enumerate(nodes)
        )
        return CoupledGroup(name, 4, members, nodes, frozenset(edges), None, split_dim)

    divided = [
        group("left", ["a", "norm", "b", "c"], [(0, 1), (1, 2), (1, 3)], split_dim="a"),
        group("right", ["b", "norm", "a"], [(2, 1), (1, 0)], split_dim="a"),
    ]
    whole = group("whole", ["b", "a", "c", "norm"], [(1, 3), (3, 0), (3, 2)])
    other = group("other", ["a", "norm", "b"], [(0, 1), (1, 2)])
    assert classify([whole, *divided, other]) == {"whole": 0, "left": 0, "right": 0, "other": 1}
    alone = [dataclasses.replace(one, split_dim="") for one in divided]
    assert classify([whole, *alone, other]) == {"whole": 0, "left": 0, "right": 1, "other": 1}


@STABLE
@given(st.lists(graphs(), min_size=2, max_size=4), st.randoms(use_true_random=False))
def test_classes_are_what_trying_every_bijection_gives(drawn, rng):
    groups = []
    for number, (labels, edges) in enumerate(drawn):
        groups.append(make_group(f"g{number}", labels, edges))
        groups.append(make_group(f"p{number}", labels, edges, rng.sample(range(len(labels)), len(labels))))
    classes = classify(groups)
    for one, other in itertools.combinations(groups, 2):
        assert (classes[one.name] == classes[other.name]) == naive_is_isomorphic(one, other)


@STABLE
@given(st.lists(graphs(), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_the_partition_does_not_depend_on_the_order_of_the_groups(drawn, rng):
    groups = [make_group(f"g{number}", *graph) for number, graph in enumerate(drawn)]
    shuffled = rng.sample(groups, len(groups))
    one, other = classify(groups), classify(shuffled)
    for first, second in itertools.combinations(one, 2):
        assert (one[first] == one[second]) == (other[first] == other[second])
    seen = list(dict.fromkeys(other[group.name] for group in shuffled))
    assert seen == list(range(len(seen))), "numbered in the order of their first groups"


def test_classes_of_a_vision_transformer(subjects):
    classes = subjects("deit").classes
    assert list(classes.values()) == [0, 1, 2, 1, 2]


def test_classes_of_a_convnext(subjects):
    """All MLPs share one class; the streams of the stages differ in depth, or in what follows them."""
    classes = subjects("convnext").classes
    assert len({number for name, number in classes.items() if ".mlp." in name}) == 1
    streams = [number for name, number in classes.items() if ".mlp." not in name]
    assert len(set(streams)) == len(streams) == 4


def test_inner_convolutions_of_a_resnet_share_a_class(subjects):
    classes = subjects("resnet").classes
    inner = {number for name, number in classes.items() if name.endswith(".0.conv1.weight:0")}
    assert len(inner) == 1
    assert classes["layer2.0.conv2.weight:0"] == classes["layer3.0.conv2.weight:0"]
    assert classes["layer4.0.conv2.weight:0"] != classes["layer3.0.conv2.weight:0"]  # the classifier follows
