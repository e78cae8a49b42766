"""Coupled groups: the plain data that every later step works on.

A model's channels are not free: a unit removed from one layer's output must go from every layer that reads it.
A `CoupledGroup` is `n` units (channels, hidden dims, head dims) with, for each tensor that they touch, the positions
of every unit along one of its dims. Nothing after this step knows how the groups were found.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# Layer kinds whose `weight` carries a unit's importance; embeddings, tokens and layer scales do not.
SCORED_KINDS = frozenset({"conv", "depthwise_conv", "linear", "norm"})


@dataclass(frozen=True)
class LayerNode:
    """One layer's side in the group's topology.

    Attributes:
        module: the layer's name in the model ("" where a parameter sits on the model itself).
        kind: "conv", "depthwise_conv", "linear", "norm" or "parameter".
        side: "out" where the layer makes the units, "in" where it reads them, "both" where they pass through.
    """

    module: str
    kind: str
    side: str


@dataclass(frozen=True)
class Member:
    """One dim of one tensor that a group's units occupy.

    Attributes:
        module: name of the module that holds the tensor.
        tensor: name of the parameter or buffer in that module.
        dim: the dim along which units lie (non-negative).
        index: int64, shape (n, k): the k positions of each of the n units, in the dense model's coordinates.
        node: position in `CoupledGroup.nodes` of the layer that this tensor belongs to.
    """

    module: str
    tensor: str
    dim: int
    index: Tensor
    node: int

    @property
    def name(self) -> str:
        """The tensor's name in the model's state dict."""
        return f"{self.module}.{self.tensor}" if self.module else self.tensor


@dataclass(frozen=True)
class HeadStructure:
    """The units of an attention group are `num_heads` heads of equally many head dims, head by head.

    Attributes:
        module: name of the attention module, whose head count and head dim follow the cut.
        num_heads: heads in the dense model.
    """

    module: str
    num_heads: int


@dataclass(frozen=True)
class CoupledGroup:
    """Units that many tensors share.

    Attributes:
        name: the first producer's parameter and dim, such as "blocks.0.mlp.fc1.weight:0": the same for every tracer.
        num_units: n.
        members: the tensors cut together; every member has n rows of positions.
        nodes: the layers behind the members.
        edges: (source, target) positions in `nodes`: data flows from one layer to the other with nothing but
            movement and element-wise operations between.
        heads: head structure of an attention group, None for plain units.
    """

    name: str
    num_units: int
    members: tuple[Member, ...]
    nodes: tuple[LayerNode, ...]
    edges: frozenset[tuple[int, int]]
    heads: HeadStructure | None = None

    @property
    def num_heads(self) -> int:
        """Blocks that keep equally many units each: 1 for a plain group."""
        return self.heads.num_heads if self.heads else 1

    @property
    def head_dim(self) -> int:
        """Units of a block: all of them for a plain group."""
        return self.num_units // self.num_heads

    def scored_members(self, with_bias: bool = False) -> list[Member]:
        """The weights, and with `with_bias` the biases, that carry importance (tokens and layer scales do not)."""
        tensors = {"weight", "bias"} if with_bias else {"weight"}
        return [m for m in self.members if m.tensor in tensors and self.nodes[m.node].kind in SCORED_KINDS]


@dataclass(frozen=True)
class ChannelGraph:
    """All coupled groups of a model, and what stays as it is.

    Attributes:
        groups: the prunable groups, in the order of their names' first producers in the model.
        frozen: reason by group name, for channels that may not be removed.
    """

    groups: tuple[CoupledGroup, ...]
    frozen: dict[str, str]
