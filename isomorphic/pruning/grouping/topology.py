"""Which layer's output reaches which layer: the nodes and edges that isomorphism classes are made of.

Every tensor carries its *flow*: the layer sides whose output it is, through movement and element-wise operations. A
layer that it reaches gets an edge from each of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from isomorphic.pruning.groups import SCORED_KINDS, LayerNode

Flow = set[int]  # positions in `Topology.nodes`; views of one tensor share the set, so that writes into them are seen


@dataclass
class Topology:
    """The layer graph of one trace."""

    nodes: list[LayerNode] = field(default_factory=list)
    edges: set[tuple[int, int]] = field(default_factory=set)
    roles: dict[tuple[str, int], int] = field(default_factory=dict)  # (tensor name, dim) -> node
    also: dict[tuple[str, int], str] = field(default_factory=dict)  # (tensor name, dim) -> kind of a layer that scores
    _numbers: dict[object, int] = field(default_factory=dict)

    def node(self, key: object, node: LayerNode) -> int:
        """The number of a layer side, one for each key."""
        if key not in self._numbers:
            self._numbers[key] = len(self.nodes)
            self.nodes.append(node)
        return self._numbers[key]

    def connect(self, flow: Flow, node: int) -> None:
        """Data with this flow reaches a layer side."""
        self.edges.update((source, node) for source in flow)

    def assign(self, tensor: str, dim: int, node: int) -> None:
        """Which layer side a dim of a parameter belongs to; the first use counts.

        An embedding's table that is the output layer's weight, too, is scored as that is.
        """
        first = self.roles.setdefault((tensor, dim), node)
        kind = self.nodes[node].kind
        if self.nodes[first].kind not in SCORED_KINDS and kind in SCORED_KINDS:
            self.also[tensor, dim] = kind
