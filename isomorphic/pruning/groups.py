"""Coupled groups: the plain data that every later step works on.

A model's channels are not free: a unit removed from one layer's output must go from every layer that reads it.
A `CoupledGroup` is `n` units (channels, hidden dims, head dims) with, for each tensor that they touch, the positions
of every unit along one of its dims. A `ChannelGraph` adds what holds between groups: which shrink together, and which
integers of the forward code follow their sizes. Nothing after this step knows how any of it was found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from isomorphic.pruning.expressions import Attribute, AxisSize, Expression

# Layer kinds whose `weight` carries a unit's importance; embeddings, tokens and layer scales do not.
SCORED_KINDS = frozenset({"conv", "depthwise_conv", "linear", "norm"})


@dataclass(frozen=True)
class LayerNode:
    """One layer's side in the group's topology.

    Attributes:
        module: the layer's name in the model ("" where a parameter sits on the model itself).
        kind: "conv", "depthwise_conv", "linear", "embedding", "norm" or "parameter".
        side: "out" where the layer makes the units, "in" where it reads them, "both" where they pass through.
        detail: what tells layers of a kind apart where the ranking is asked to: kernel and groups of a convolution,
            the operation that joins a parameter to its stream.
    """

    module: str
    kind: str
    side: str
    detail: str = ""


@dataclass(frozen=True)
class Member:
    """One dim of one tensor that a group's units occupy.

    Attributes:
        module: name of the module that holds the tensor.
        tensor: name of the parameter or buffer in that module.
        dim: the dim along which units lie (non-negative).
        index: int64, shape (n, k): the k positions of each of the n units, in the dense model's coordinates.
        node: position in `CoupledGroup.nodes` of the layer that this tensor belongs to; -1 for what goes with sections.
        also: kind of a scored layer that has the same tensor, where the first one is not scored: "linear" for an
            embedding's table that is the output layer's weight, too. It counts once, whatever names it has.
    """

    module: str
    tensor: str
    dim: int
    index: Tensor
    node: int
    also: str = ""

    @property
    def name(self) -> str:
        """The tensor's name in the model's state dict."""
        return f"{self.module}.{self.tensor}" if self.module else self.tensor


@dataclass(frozen=True)
class SectionStructure:
    """A group's units lie in `num_sections` sections of equally many, one after the other; all stay equally wide.

    Attributes:
        num_sections: sections in the dense model: heads of an attention, groups of a norm or a convolution, pieces of a
            tensor that is split evenly.
        are_heads: the sections are attention heads, which may be removed as a whole.
        members: tensors with positions of whole heads (bias tables, temperatures), index (num_sections, k).
        head_set: where a head has sections in several groups, as with q, k and v of separate layers: the name of the
            first of these groups, whose `members` are those of all. Section i of each is head i. "" where a head is a
            section of this group alone.
        are_units: the units are the heads themselves, in tensors whose dims all heads share, as behind a rotary
            embedding: the members are each head's positions there, where the dims, of another group, have theirs, too.
    """

    num_sections: int
    are_heads: bool = False
    members: tuple[Member, ...] = ()
    head_set: str = ""
    are_units: bool = False


def short_name(group: str) -> str:
    """The name of a group as a person reads it: "blocks.0.mlp.fc1", and "conv1:16" of "conv1.weight:0:16"."""
    return group.replace(".weight:0", "", 1)


@dataclass(frozen=True)
class CoupledGroup:
    """Units that many tensors share.

    Attributes:
        name: the first producer's parameter and dim, such as "blocks.0.mlp.fc1.weight:0": the same for every tracer.
            Where one dim carries several groups, the position of the first unit follows ("conv1.weight:0:16").
        num_units: n.
        members: the tensors cut together; every member has n rows of positions.
        nodes: the layers behind the members.
        edges: (source, target) positions in `nodes`: data flows from one layer to the other with nothing but
            movement and element-wise operations between.
        sections: section structure, None for plain units.
        split_dim: the dim that was divided into several groups because its units touch different tensors; they are
            classified and ranked as one. "" where the group stands alone.
    """

    name: str
    num_units: int
    members: tuple[Member, ...]
    nodes: tuple[LayerNode, ...]
    edges: frozenset[tuple[int, int]]
    sections: SectionStructure | None = None
    split_dim: str = ""

    @property
    def heads(self) -> SectionStructure | None:
        """The section structure of an attention group whose heads may be removed."""
        return self.sections if self.sections and self.sections.are_heads else None

    @property
    def head_set(self) -> str:
        """The name of the first group that its heads have sections in; "" where it has no heads."""
        return (self.heads.head_set or self.name) if self.heads else ""

    @property
    def has_width(self) -> bool:
        """Whether units may go that are no whole heads."""
        return not (self.sections and self.sections.are_units)

    @property
    def num_sections(self) -> int:
        """Sections that keep equally many units each: 1 for a plain group."""
        return self.sections.num_sections if self.sections else 1

    @property
    def section_size(self) -> int:
        """Units of a section: all of them for a plain group."""
        return self.num_units // self.num_sections

    @property
    def all_members(self) -> tuple[Member, ...]:
        """The members, and what goes with whole sections."""
        return (*self.members, *(self.sections.members if self.sections else ()))

    def weights(self) -> list[Member]:
        """All tensors but biases that the units occupy: weights, norm scales, tables and tokens, and buffers."""
        return [member for member in self.members if "bias" not in member.tensor]

    def scored_members(self, with_bias: bool = False) -> list[Member]:
        """The weights, and with `with_bias` the biases, that carry importance (tokens and layer scales do not).

        Layers name them "weight" and "bias", or recurrent ones and attentions "weight_ih_l0", "in_proj_bias" and alike.
        """
        kinds = ("weight", "bias") if with_bias else ("weight",)
        members = [one for one in self.members if {self.nodes[one.node].kind, one.also} & SCORED_KINDS]
        return [member for member in members if any(kind in member.tensor for kind in kinds)]


@dataclass(frozen=True)
class SizeEquation:
    """`expression`, an integer of the forward code, must equal the length of `axis`, in the dense and the cut model.

    `where` is the line of that code.
    """

    expression: Expression
    axis: AxisSize
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class Rescaling:
    """Positions of a tensor to multiply, so that a factor computed from a size has the effect that it had.

    Attention divides q·k by √head_dim. In the masked dense model that is the old head dim, in the cut model the new
    one: q is multiplied by (dense value of `factor` / cut value).

    Attributes:
        module, tensor: what to rescale, along dim 0.
        index: int64 (m,), positions in the dense model's coordinates; float attributes of `holder` that are named
            a scale and equal the dense factor follow it.
        factor: the number that the forward code computes.
        holder: name of the module whose forward computes it.
    """

    module: str
    tensor: str
    index: Tensor
    factor: Expression
    holder: str


@dataclass(frozen=True)
class WidthRecord:
    """An integer by which a model tells its width to others, such as `num_features`, and which no forward code needs.

    Attributes:
        attribute: the integer.
        layers: names of the layers that read the channels which it counts: it keeps its proportion to their sum.
    """

    attribute: Attribute
    layers: tuple[str, ...]


UNUSED = "the forward code does not use it on these inputs"  # on others it may: see `branches.py`
FIXED_SIZE = "a size in the forward code depends on it and cannot follow"


@dataclass(frozen=True)
class Frozen:
    """Channels that stay, of one dim of a parameter. It prints as "its units are rolled (2 of 8)".

    Attributes:
        reason: why they stay; the most common one if there are several.
        count: how many channels stay.
        total: all channels of the dim.
        where: the line of forward code that froze them, "timm/layers/mlp.py:45"; "" where it was none.
    """

    reason: str
    count: int
    total: int
    where: str = field(default="", compare=False)

    @property
    def part(self) -> str:
        """The share that stays, "(2 of 8)"; empty where all do."""
        return f"({self.count} of {self.total})" if self.count < self.total else ""

    def __str__(self) -> str:
        return f"{self.reason} {self.part}".rstrip()


@dataclass(frozen=True)
class ChannelGraph:
    """All coupled groups of a model, what holds between them, and what stays as it is.

    Attributes:
        groups: the prunable groups, in the order of their names' first producers in the model, those of whole heads
            last.
        frozen: why channels may not be removed, and how many, by the dim that makes them (named as groups are).
        shrink_together: sets of group names whose sections, as many as are kept, all keep one fraction of their units.
        equations: what the forward code's integers must equal; the cut solves them for module attributes.
        rescalings: see `Rescaling`.
        frozen_heads: why attention over a group's channels keeps its heads, by the group's name.
        frozen_head_lines: the line of forward code that is behind it, where there is one.
        unused: names of the parameters that the forward code does not use on the traced inputs.
        records: integers of the model that count channels and that no equation determines.
    """

    groups: tuple[CoupledGroup, ...]
    frozen: Mapping[str, Frozen]
    shrink_together: tuple[tuple[str, ...], ...] = ()
    equations: tuple[SizeEquation, ...] = ()
    rescalings: tuple[Rescaling, ...] = ()
    frozen_heads: Mapping[str, str] = field(default_factory=dict)
    frozen_head_lines: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    records: tuple[WidthRecord, ...] = ()

    @property
    def head_sets(self) -> list[tuple[CoupledGroup, ...]]:
        """The groups that may lose whole heads, in sets that lose the same ones; most often one group makes a set."""
        sets: dict[str, list[CoupledGroup]] = {}
        for group in self.groups:
            if group.heads:
                sets.setdefault(group.head_set, []).append(group)
        return [tuple(groups) for groups in sets.values()]

    @property
    def attention(self) -> list[CoupledGroup]:
        """The groups of all `head_sets`, in the order of `groups`."""
        may_lose_heads = {group.name for groups in self.head_sets for group in groups}
        return [group for group in self.groups if group.name in may_lose_heads]
