"""Random programs: small networks for hypothesis to draw, and to shrink where one fails.

A `Program` is plain data; its repr builds the same network again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.unit.pruning.grouping import program_blocks as blocks
from tests.unit.pruning.grouping import program_idioms as idioms
from tests.unit.pruning.grouping import program_libraries as libraries
from tests.unit.pruning.grouping import program_tokens as tokens

WIDTHS = (4, 6, 8, 9, 12, 16)
CLASSES = 5

KINDS: dict[str, Callable[..., nn.Module]] = {
    "layer": blocks.Layer,
    "grouped": blocks.GroupedConv,
    "depthwise": blocks.DepthwiseConv,
    "normed": blocks.Normed,
    "residual": blocks.Residual,
    "gate": blocks.Gate,
    "glu": blocks.Glu,
    "split": blocks.Split,
    "chunk": blocks.Chunk,
    "dense": blocks.Dense,
    "branches": blocks.Branches,
    "shuffle": blocks.Shuffle,
    "pixels": blocks.Pixels,
    "slice": blocks.Slice,
    "stack": blocks.Stack,
    "scaled": blocks.Scaled,
    "tied": blocks.Tied,
    "bottleneck": blocks.Bottleneck,
    "reordered": blocks.Reordered,
    "channel_attention": blocks.ChannelAttention,
    "token_mixer": blocks.TokenMixer,
    "copies": idioms.Copies,
    "maxout": idioms.Maxout,
    "experts": idioms.Experts,
    "modulated": idioms.Modulated,
    "standardized": idioms.Standardized,
    "outer": idioms.Outer,
    "in_place": idioms.InPlace,
    "positional": idioms.Positional,
    "resampled": idioms.Resampled,
    "highway": idioms.Highway,
    "query_pool": idioms.QueryPool,
    "rotary": idioms.Rotary,
    "sinusoids": idioms.Sinusoids,
    "attention": tokens.Attention,
    "grouped_query_attention": tokens.GroupedQueryAttention,
    "multi_head": tokens.MultiHead,
    "class_token": tokens.ClassToken,
    "position_embedding": tokens.PositionEmbedding,
    "windows": tokens.Windows,
    "to_tokens": tokens.ToTokens,
    "to_map": tokens.ToMap,
    "flatten": tokens.Flatten,
    "pool": tokens.Pool,
    "memoised": libraries.Memoised,
    "masked": libraries.Masked,
    "number_tables": libraries.NumberTables,
    "constant": libraries.PlainConstant,
    "decoder": libraries.Decoder,
    "supervised": libraries.Supervised,
}


@dataclass(frozen=True)
class Block:
    """A block to be built: a key of `KINDS`, its arguments, and the blocks in it."""

    kind: str
    options: dict[str, Any]
    inner: tuple[tuple[Block, ...], ...] = ()

    def build(self) -> nn.Module:
        """The module; it knows its kind."""
        if self.kind == "branches":
            module = KINDS[self.kind]([nn.Sequential(*(b.build() for b in way)) for way in self.inner], **self.options)
        elif self.inner:
            module = KINDS[self.kind]([block.build() for block in self.inner[0]], **self.options)
        else:
            module = KINDS[self.kind](**self.options)
        module.kind = self.kind  # type: ignore[assignment]
        return module


@dataclass(frozen=True)
class Program:
    """A network, and how it is to be pruned.

    Attributes:
        side: of the square input images.
        blocks: one after the other.
        ranking, criterion, ratio, head_ratio, round_to: of the plan.
        seed: of weights, images and random scores.
    """

    side: int
    blocks: tuple[Block, ...]
    ranking: str = "local"
    criterion: str = "l2"
    ratio: float = 0.5
    head_ratio: float = 0.0
    round_to: int = 1
    seed: int = 0

    def build(self) -> tuple[nn.Module, Tensor]:
        """The network with generic weights, in eval mode, and images (2, 3, side, side)."""
        generator = torch.Generator().manual_seed(self.seed)
        model = nn.Sequential(*(block.build() for block in self.blocks)).double()
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if tensor.is_floating_point():
                    _randomize(name, tensor, generator)
        images = torch.randn(2, 3, self.side, self.side, generator=generator, dtype=torch.float64)
        return model.eval(), images

    def kinds(self) -> Iterator[str]:
        """The kinds of all blocks, inner ones too."""
        yield from (kind for block in self.blocks for kind in _kinds(block))


def _kinds(block: Block) -> Iterator[str]:
    yield block.kind
    for way in block.inner:
        for inner in way:
            yield from _kinds(inner)


def _randomize(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    """No zeros, no ones, and statistics as after a training."""
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    if name.endswith("running_var"):
        tensor.copy_(0.5 + noise.abs())
    elif tensor.dim() < 2 or tensor.numel() == tensor.shape[0]:
        tensor.copy_(torch.where(noise > 0, 0.5, -0.5) + 0.3 * noise)
    else:
        tensor.copy_(noise * (1.5 / tensor[0].numel()) ** 0.5)


@dataclass
class _Signal:
    """What a block is given: the kind of activation, its channels, and the side of a map or the number of tokens."""

    space: str
    width: int
    size: int


@dataclass
class _Drawer:
    """Draws block after block; `choose` takes one of several options, `signal` is what the next block will see."""

    choose: Callable[[Sequence[Any]], Any]
    signal: _Signal
    depth: int = 0
    blocks: list[Block] = field(default_factory=list)

    def pick(self, *options: Any) -> Any:
        return self.choose(options)

    def flag(self) -> bool:
        return self.pick(False, True)

    def width(self) -> int:
        return self.pick(*WIDTHS)

    def divisor(self, *candidates: int, of: int) -> int:
        return self.pick(*(c for c in candidates if of % c == 0))

    def add(self, kind: str, outputs: int, /, *, spaced: bool = True, inner: Any = (), **options: Any) -> None:
        options = {"inputs": self.signal.width, "outputs": outputs} | options
        if spaced:
            options["space"] = self.signal.space
        self.blocks.append(Block(kind, options, inner))
        self.signal.width = outputs

    def nested(self, count: int, *, keeps_tokens: bool) -> _Drawer:
        """Draws inner blocks, from a copy of the signal."""
        inner = _Drawer(self.choose, _Signal(**vars(self.signal)), self.depth + 1)
        for _ in range(count):
            inner.any_block(movers=False, keeps_tokens=keeps_tokens)
        return inner

    def any_block(self, *, movers: bool = True, keeps_tokens: bool = False) -> None:
        kinds = list(_ANYWHERE)
        kinds += {"map": _ON_MAPS, "tokens": _ON_TOKENS, "vector": ()}[self.signal.space]
        kinds += _NESTING if self.depth < 2 else ()
        kinds += ("windows",) if self.depth == 0 and self.signal.space == "map" and self.signal.size % 4 == 0 else ()
        if keeps_tokens and "class_token" in kinds:
            kinds.remove("class_token")
        if movers:
            kinds += {
                "map": ("to_tokens", "to_tokens", "flatten", "pool"),
                "tokens": ("pool",),
                "vector": ("decoder",),
            }[self.signal.space]
            if self.signal.space == "tokens" and round(self.signal.size**0.5) ** 2 == self.signal.size:
                kinds += ("to_map",)
        getattr(self, self.pick(*kinds))()

    # Blocks for every space.

    def layer(self) -> None:
        kernel = self.pick(1, 3) if self.signal.space == "map" else 1
        activation = self.pick(*blocks.ACTIVATIONS, *(("prelu",) if self.signal.space != "tokens" else ()))
        self.add("layer", self.width(), kernel=kernel, bias=self.flag(), activation=activation)

    def normed(self) -> None:
        style = self.pick(
            "batch", "batch, plain", "group", "layer", "layer, plain", "layer, all axes", "rms", "one group", "by hand",
            "functional",
        )  # fmt: skip
        channels_last = self.signal.space != "vector"
        if not channels_last and style in ("group", "one group"):
            style = "batch"
        first, outputs = self.flag() or style == "layer, plain", self.width()
        groups = self.divisor(2, 3, 4, 1, of=self.signal.width if first else outputs)
        self.add("normed", outputs, size=self.signal.size, style=style, groups=groups, first=first)

    def gate(self) -> None:
        style = self.pick("keepdim", "view", "broadcast", "film", "position")
        self.add("gate", self.width(), style=style, hidden=self.pick(2, 3, 4, 6))

    def glu(self) -> None:
        style = self.pick("F.glu", "split", "half", "narrow", "index", "unflatten", "chunk")
        self.add("glu", self.width(), style=style, hidden=self.width())

    def split(self) -> None:
        style = self.pick("attribute", "attribute", "rest", "tensor_split", "constant")
        sizes = {
            "attribute": lambda: [self.pick(2, 3, 4, 5, 8) for _ in range(self.pick(2, 3))],
            "constant": lambda: [4] * self.pick(2, 3),
        }.get(style, lambda: [self.pick(2, 4, 6), self.pick(3, 4, 8)])()
        join = self.flag()
        outputs = self.width() if join else sum(sizes)
        self.add("split", outputs, sizes=tuple(sizes), plain=self.pick(-1, 0, 1), style=style, join=join)

    def chunk(self) -> None:
        style = self.pick("sum", "product", "cascade")
        self.add("chunk", self.width(), pieces=self.pick(2, 3, 4), width=self.pick(2, 3, 4, 6), style=style)

    def dense(self) -> None:
        growth = tuple(self.pick(2, 4, 5, 8) for _ in range(self.pick(1, 2)))
        self.add("dense", self.signal.width + sum(growth), growth=growth, first=self.flag())

    def shuffle(self) -> None:
        groups, style = self.pick(2, 3, 4), self.pick("flatten", "spell out", "library")
        outputs = groups * self.pick(2, 3, 4)
        self.add("shuffle", outputs, groups=groups, width=self.pick(2, 3, 4), style=style, conv=self.flag())

    def slice(self) -> None:
        width = self.width()
        style, part = self.pick("first", "last", "partial", "add"), self.pick(2, 3, width // 2)
        self.add("slice", self.width(), width=width, part=part, style=style)

    def stack(self) -> None:
        style, dim = self.pick("sum", "mean", "weighted"), self.pick(0, 1, -1)
        self.add("stack", self.width(), ways=self.pick(2, 3), dim=dim, style=style)

    def scaled(self) -> None:
        self.add("scaled", self.width(), style=self.pick("view", "last", "shaped", "broadcast"))

    def tied(self) -> None:
        self.add("tied", self.width(), style=self.pick("recurrent", "two layers", "transposed"))

    def bottleneck(self) -> None:
        self.add("bottleneck", self.width(), hidden=self.width())

    def reordered(self) -> None:
        self.add("reordered", self.width(), width=self.width(), style=self.pick("flip", "roll", "index"))

    def copies(self) -> None:
        style = self.pick("repeat", "interleave", "expand", "cat")
        self.add("copies", self.width(), width=self.pick(2, 3, 4), times=self.pick(2, 3), style=style)

    def maxout(self) -> None:
        style = self.pick("max", "mean", "outer", "radix")
        self.add("maxout", self.width(), width=self.pick(3, 4, 6), pieces=self.pick(2, 3, 4), style=style)

    def experts(self) -> None:
        self.add("experts", self.width(), experts=self.pick(2, 3, 4), style=self.pick("einsum", "view"))

    def standardized(self) -> None:
        self.add("standardized", self.width(), style=self.pick("batch_norm", "var_mean", "normalize"))

    def outer(self) -> None:
        one, two, style = self.pick(2, 3, 4), self.pick(2, 3, 4), self.pick("einsum", "product")
        self.add("outer", self.width(), one=one, two=two, style=style)

    def in_place(self) -> None:
        width, style = self.width(), self.pick("assign", "add", "fill", "copy")
        self.add("in_place", self.width(), width=width, part=self.pick(2, 3, width // 2), style=style)

    def positional(self) -> None:
        style = self.pick("linspace", "arange", "buffer", "ones", "eye", "width")
        self.add("positional", self.width(), width=self.width(), style=style)

    def constant(self) -> None:
        self.add("constant", self.width(), width=self.width(), style=self.pick("attribute", "list", "dict"))

    def highway(self) -> None:
        self.add("highway", self.width(), style=self.pick("lerp", "maximum", "where", "gated"))

    # Blocks around others.

    def residual(self) -> None:
        before = self.signal.width
        inner = self.nested(self.pick(1, 2), keeps_tokens=True)
        after = inner.signal.width
        styles = ["project"]
        if after == before:
            styles = ["identity"]
        elif after > before:
            styles += ["pad", "pad both", "zeros"] + (["pad to fit"] if self.signal.space == "map" else [])
        else:
            styles += ["slice", "slice"]
        if after != before and self.flag():  # most people's residual streams are of one width
            inner.layer_to(before)
            after, styles = before, ["identity"]
        options = {"style": self.pick(*styles), "in_place": self.flag()}
        self.add("residual", after, inner=(tuple(inner.blocks),), **options)

    def layer_to(self, width: int) -> None:
        self.add("layer", width, kernel=1, bias=True, activation="none")

    def branches(self) -> None:
        ways = [self.nested(1, keeps_tokens=True) for _ in range(self.pick(2, 3))]
        pool = self.signal.space == "map" and self.flag()
        width = sum(way.signal.width for way in ways) + pool * self.signal.width
        self.add("branches", width, inner=tuple(tuple(way.blocks) for way in ways), pool=pool)

    def windows(self) -> None:
        inner = _Drawer(self.choose, _Signal("tokens", self.signal.width, 16), self.depth + 1)
        for _ in range(self.pick(1, 2)):
            inner.any_block(movers=False, keeps_tokens=True)
        inner_blocks = (tuple(inner.blocks),)
        self.add("windows", inner.signal.width, spaced=False, inner=inner_blocks, shift=self.flag())

    # Blocks for maps.

    def grouped(self) -> None:
        groups = self.pick(2, 3, 4)
        kernel = self.pick(1, 3)
        self.add("grouped", groups * self.pick(1, 2, 3), groups=groups, width=self.pick(2, 3, 4), kernel=kernel)

    def depthwise(self) -> None:
        multiplier, pointwise = self.pick(1, 1, 2, 3), self.flag()
        width = self.width() if pointwise else self.signal.width * multiplier
        self.add("depthwise", width, multiplier=multiplier, kernel=self.pick(3, 5), pointwise=pointwise)

    def pixels(self) -> None:
        style = self.pick("up", "down", "focus", "merge", "down and up")
        self.add("pixels", self.width(), style=style, hidden=self.pick(2, 3, 4))

    def modulated(self) -> None:
        self.add("modulated", self.width(), demodulate=self.flag())

    def resampled(self) -> None:
        groups, style = self.pick(1, 2, 3), self.pick("transposed", "bilinear", "size")
        self.add("resampled", groups * self.pick(2, 4), groups=groups, width=self.pick(2, 3, 4), style=style)

    # Blocks for tokens.

    def query_pool(self) -> None:
        options = {"heads": self.pick(1, 2, 3), "head_dim": self.pick(2, 3, 4), "queries": self.pick(1, 3)}
        self.add("query_pool", self.width(), spaced=False, style=self.pick("scaled", "plain"), **options)

    def rotary(self) -> None:
        style = self.pick("half", "index", "shape")
        options = {"heads": self.pick(1, 2, 3), "head_dim": self.pick(2, 4, 6), "tokens": self.signal.size}
        self.add("rotary", self.width(), spaced=False, style=style, **options)

    def sinusoids(self) -> None:
        self.add("sinusoids", self.width(), spaced=False, width=self.width(), style=self.pick("cat", "stack"))

    def channel_attention(self) -> None:
        heads, style = self.pick(1, 2, 3), self.pick("fused", "spelled out")
        self.add("channel_attention", self.width(), hidden=self.pick(2, 3, 4), heads=heads, style=style)

    def token_mixer(self) -> None:
        options = {"tokens": self.signal.size, "hidden": self.width(), "style": self.pick("transpose", "einsum")}
        self.add("token_mixer", self.width(), **options)

    def attention(self) -> None:
        layout = self.pick(
            "separate", "separate, inferred", "separate, by dim", "joint", "joint, C // heads", "joint, inner first",
            "joint, split", "joint, heads first", "joint, chunk",
        )  # fmt: skip
        heads, head_dim = self.pick(1, 2, 3, 4), self.pick(2, 3, 4, 6)
        if layout == "joint, C // heads":
            heads = self.divisor(2, 3, 4, 1, of=self.signal.width)
            head_dim = self.signal.width // heads
        options = {
            "layout": layout,
            "product": self.pick("fused", "spelled out", "einsum"),
            "scale_by": self.pick("attribute", "head_dim", "shape", "sqrt", "none"),
            "join": self.pick("flatten", "inner", "product", "concat", "einsum", "inferred"),
            "norm": self.pick("", "", "layer", "rms"),
            "bias": self.flag(),
            "tokens": self.signal.size,
        }
        self.add("attention", self.width(), spaced=False, heads=heads, head_dim=head_dim, **options)

    def grouped_query_attention(self) -> None:
        options = {"kv_heads": self.pick(1, 2, 3), "repeat": self.pick(1, 2, 3), "head_dim": self.pick(2, 3, 4)}
        style = self.pick("repeat_interleave", "expand", "enable_gqa")
        self.add("grouped_query_attention", self.width(), spaced=False, style=style, **options)

    def multi_head(self) -> None:
        heads = self.divisor(1, 2, 3, 4, of=self.signal.width)
        options = {"heads": heads, "bias": self.flag(), "need_weights": self.flag()}
        self.add("multi_head", self.width(), spaced=False, **options)

    def class_token(self) -> None:
        self.add("class_token", self.width(), spaced=False, style=self.pick("expand", "sizes", "repeat"))
        self.signal.size += 1

    def position_embedding(self) -> None:
        style = self.pick("parameter", "sliced", "lookup", "buffer")
        self.add("position_embedding", self.width(), spaced=False, tokens=self.signal.size, style=style)

    def memoised(self) -> None:
        options = {"tokens": self.signal.size, "width": self.width(), "style": self.pick("shape", "halves", "places")}
        self.add("memoised", self.width(), spaced=False, **options)

    def masked(self) -> None:
        style = self.pick("assigned", "filled", "chosen", "added", "scattered")
        self.add("masked", self.width(), spaced=False, tokens=self.signal.size, width=self.width(), style=style)

    def number_tables(self) -> None:
        styles = ("heads in a mapping", "width in a mapping", "heads in pairs", "dims in pairs")
        options = {"heads": self.pick(1, 2, 3), "head_dim": self.pick(2, 3, 4), "style": self.pick(*styles)}
        self.add("number_tables", self.width(), spaced=False, **options)

    # From one space to another.

    def to_tokens(self) -> None:
        style = self.pick("flatten", "permute", "view", "unfold")
        self.add("to_tokens", self.width(), spaced=False, style=style)
        self.signal.space, self.signal.size = "tokens", (self.signal.size // 2) ** 2

    def to_map(self) -> None:
        self.add("to_map", self.width(), spaced=False, style=self.pick("transpose", "unflatten", "reshape"))
        self.signal.space, self.signal.size = "map", round(self.signal.size**0.5)

    def flatten(self) -> None:
        self.add("flatten", self.width(), spaced=False, style=self.pick("view", "size", "channels last", "torch"))
        self.signal.space, self.signal.size = "vector", 1

    def pool(self) -> None:
        self.add("pool", self.width(), style=self.pick("mean", "pool", "norm", "first"))
        self.signal.space, self.signal.size = "vector", 1

    def decoder(self) -> None:
        style = self.pick("view", "inferred", "unflatten", "channels last")
        self.add("decoder", self.width(), spaced=False, width=self.pick(2, 3, 4, 6), side=4, style=style)
        self.signal.space, self.signal.size = "map", 4

    # The whole network.

    def supervised(self) -> None:
        """All blocks so far, the first of which gives a map and the last a vector, with two classifiers."""
        stem, inner = self.blocks[0], (tuple(self.blocks),)
        self.blocks = []
        options = {"first": stem.options["outputs"], "style": self.pick("tuple", "dict")}
        self.add("supervised", CLASSES, spaced=False, inner=inner, **options)


_ANYWHERE = (
    "layer", "normed", "gate", "glu", "split", "chunk", "dense", "shuffle", "slice", "stack", "scaled", "tied",
    "bottleneck", "reordered", "copies", "maxout", "experts", "standardized", "in_place", "positional", "highway",
    "constant",
)  # fmt: skip
_ON_MAPS = ("grouped", "depthwise", "pixels", "grouped", "depthwise", "modulated", "resampled")
_ON_TOKENS = (
    "attention", "attention", "attention", "grouped_query_attention", "multi_head", "channel_attention", "token_mixer",
    "class_token", "position_embedding", "query_pool", "rotary", "sinusoids", "outer", "memoised", "masked",
    "number_tables",
)  # fmt: skip
_ONLY_MAPS = (*_ON_MAPS, "windows", "to_tokens", "flatten")
_NESTING = ("residual", "residual", "residual", "residual", "branches")


def draw_program(choose: Callable[[Sequence[Any]], Any], kind: str) -> Program:
    """A network of 1 to 6 blocks between a stem and a classifier, one of them of this kind, and how to prune it.

    Args:
        choose: takes one of several options.
        kind: a key of `KINDS`.
    """
    side = choose((8, 16))
    drawer = _Drawer(choose, _Signal("map", 3, side))
    drawer.layer()
    if kind in _ON_TOKENS or kind == "to_map" or (kind not in _ONLY_MAPS and drawer.flag()):
        drawer.to_tokens()
    for _ in range(choose((0, 1, 2))):
        drawer.any_block(movers=False, keeps_tokens=True)
    if kind == "decoder" and drawer.signal.space != "vector":
        drawer.pool()
    getattr(drawer, kind if kind != "supervised" else "any_block")()
    for _ in range(choose((0, 1, 2, 3))):
        drawer.any_block()
    if drawer.signal.space != "vector":
        drawer.pool()
    drawer.supervised() if kind == "supervised" else drawer.layer_to(CLASSES)
    return Program(
        side,
        tuple(drawer.blocks),
        ranking=choose(("isomorphic", "local", "global")),
        criterion=choose(("l2", "random")),
        ratio=choose((0.5, 0.25, 0.4, 0.7)),
        head_ratio=choose((0.0, 0.5, 0.3)),
        round_to=choose((1, 1, 2)),
        seed=choose(range(10)),
    )


@st.composite
def programs(draw: Callable[[Any], Any], kind: str) -> Program:
    """The strategy: hypothesis chooses, and shrinks towards few blocks and first options."""
    return draw_program(lambda options: draw(st.sampled_from(options)), kind)
