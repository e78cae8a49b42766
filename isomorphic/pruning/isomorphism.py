"""Step 2, classify: which groups have the same topology and may be ranked against each other.

Isomorphic Pruning (Fang et al., ECCV 2024, section 3.2) compares importance only between sub-structures whose graphs
are isomorphic. Here a group's graph has one node per layer side, labelled by layer kind and side, and one directed
edge per data flow between two layers, with views and element-wise operations contracted. Two groups share a class if
and only if a label-preserving isomorphism between their graphs exists: a canonical hash sorts them into buckets, and
an exact check decides inside a bucket. An attention group's units sit in heads, which is a label of its nodes.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

import networkx as nx

from isomorphic.pruning.groups import CoupledGroup


def classify(groups: Sequence[CoupledGroup]) -> dict[str, int]:
    """Numbers the isomorphism classes of `groups` in the order of their first groups.

    Returns:
        Class number (from 0) by group name.
    """
    buckets: dict[str, list[tuple[int, nx.DiGraph]]] = defaultdict(list)  # hash -> one representative a class
    classes: dict[str, int] = {}
    for group in groups:
        graph = topology(group)
        bucket = buckets[canonical_hash(graph)]
        number = next((number for number, other in bucket if are_isomorphic(graph, other)), None)
        if number is None:
            number = len(set(classes.values()))
            bucket.append((number, graph))
        classes[group.name] = number
    return classes


def topology(group: CoupledGroup) -> nx.DiGraph:
    """The group's labelled directed graph, one node per layer side."""
    graph = nx.DiGraph()
    unit = "head dim" if group.heads else "channel"
    for position, node in enumerate(group.nodes):
        graph.add_node(position, label=f"{node.kind} {node.side}, {unit}")
    graph.add_edges_from(group.edges)
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


def _digest(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
