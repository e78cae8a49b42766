"""Step 2, classify: which groups have the same topology and may be ranked against each other.

Isomorphic Pruning (Fang et al., ECCV 2024, section 3.2) compares importance only between sub-structures whose graphs
are isomorphic. Here a group's graph has one node per layer side, labelled by layer kind and side, and one directed
edge per data flow between two layers, with views and element-wise operations contracted. Two groups share a class if
and only if a label-preserving isomorphism between their graphs exists: a canonical hash sorts them into buckets, and
an exact check decides inside a bucket. An attention group's units sit in heads, which is a label of its nodes. Groups
that one dim was divided into are classified as what they were: by their graphs joined at the layers that they share.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

import networkx as nx

from isomorphic.pruning.groups import CoupledGroup


def classify(groups: Sequence[CoupledGroup], *, detailed: bool = False) -> dict[str, int]:
    """Numbers the isomorphism classes of `groups` in the order of their first groups.

    Args:
        groups: all groups; those of one pool get the same class.
        detailed: tell layers apart by `LayerNode.detail`, too (kernel sizes, for one); the paper does not.

    Returns:
        Class number (from 0) by group name.
    """
    buckets: dict[str, list[tuple[int, nx.DiGraph]]] = defaultdict(list)  # hash -> one representative a class
    classes: dict[str, int] = {}
    numbers = itertools.count()
    pools: dict[str, list[CoupledGroup]] = defaultdict(list)
    for group in groups:
        pools[f"pool {group.split_dim}" if group.split_dim else f"group {group.name}"].append(group)
    for members in pools.values():
        graph = topology(*members, detailed=detailed)
        bucket = buckets[canonical_hash(graph)]
        number = next((number for number, other in bucket if are_isomorphic(graph, other)), None)
        if number is None:
            number = next(numbers)
            bucket.append((number, graph))
        classes |= dict.fromkeys((group.name for group in members), number)
    return classes


def topology(*groups: CoupledGroup, detailed: bool = False) -> nx.DiGraph:
    """The labelled directed graph of a group, or of a pool of them; one node per layer side."""
    graph = nx.DiGraph()
    unit = "head dim" if any(group.heads for group in groups) else "channel"
    for group in groups:
        sides = _layer_sides(group)
        for side, node in zip(sides, group.nodes, strict=True):
            detail = f", {node.detail}" if detailed else ""
            graph.add_node(side, label=f"{node.kind} {node.side}{detail}, {unit}")
        graph.add_edges_from((sides[source], sides[target]) for source, target in group.edges)
    return graph


def canonical_hash(graph: nx.DiGraph) -> str:
    """A hash that isomorphic graphs share: Weisfeiler-Lehman colours over both edge directions, until they settle."""
    colors = {node: _digest(label) for node, label in graph.nodes(data="label")}
    num_colors = 0
    while num_colors < len(set(colors.values())):
        num_colors = len(set(colors.values()))
        colors = {
            node: _digest(
                colors[node],
                sorted(colors[other] for other in graph.pred[node]),
                sorted(colors[other] for other in graph.succ[node]),
            )
            for node in graph
        }
    return _digest(sorted(colors.values()))


def are_isomorphic(first: nx.DiGraph, second: nx.DiGraph) -> bool:
    """Whether a bijection of the nodes keeps labels and edges (VF2++)."""
    return nx.vf2pp_is_isomorphic(first, second, node_label="label")


def _layer_sides(group: CoupledGroup) -> list[Hashable]:
    """What identifies each node's layer side in every group: the layer and the tensor dims that it touches."""
    tensors: dict[int, set[tuple[str, int]]] = defaultdict(set)
    for member in group.members:
        tensors[member.node].add((member.tensor, member.dim))
    seen: Counter[Hashable] = Counter()
    sides = []
    for position, node in enumerate(group.nodes):
        side = (node, frozenset(tensors[position]))
        seen[side] += 1
        sides.append((side, seen[side]))
    return sides


def _digest(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
