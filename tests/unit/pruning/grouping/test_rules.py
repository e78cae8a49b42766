"""Rules of operations: for each line of the table, which channels are coupled, and that what is cut is exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import isomorphic as iso
from isomorphic.pruning.grouping import exact
from isomorphic.pruning.grouping.rules.table import RULES, find_rule
from tests.unit.pruning.grouping.cutting import error_of_random_cut, randomized, why_frozen
from tests.unit.pruning.grouping.operations import OPERATIONS, WIDTH, Through
from tests.unit.pruning.grouping.watch import watch

IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
WORDS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])


def traced(model, inputs):
    """The graph of a model with generic parameters."""
    return exact.trace(randomized(model), inputs)


def sizes(graph):
    """By group: units, and blocks where there are several."""
    return {g.name: g.num_units if g.num_sections == 1 else (g.num_units, g.num_sections) for g in graph.groups}


# --- the table ----------------------------------------------------------------------------------------------


@pytest.fixture
def checked(monkeypatch):
    """Holds the axes that every rule gives against the shapes of its results."""

    def find_checked(func):
        rule = find_rule(func)

        def checking(call):
            assert rule is not None
            found: Any = rule(call)
            outputs = [tensor for tensor in tree_leaves(call.out) if isinstance(tensor, Tensor)]
            lists = found if found and isinstance(found[0], list) else [found] * len(outputs)
            assert [len(axes) for axes in lists] == [tensor.dim() for tensor in outputs], call.name
            for axes, tensor in zip(lists, outputs, strict=True):
                for dim, axis in enumerate(axes):
                    if axis is not None:
                        expected = [tensor.shape[row] for row in (*axis.rows, dim)]
                        assert list(axis.ids.shape) == expected and dim not in axis.rows, call.name
            return found

        return None if rule is None else checking

    monkeypatch.setattr(exact, "find_rule", find_checked)


@pytest.mark.filterwarnings("ignore:index_reduce.*beta")
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_what_happens_to_channels(checked, operation):
    model, inputs = randomized(Through(operation)), operation.inputs()
    graph = exact.trace(model, inputs)
    if isinstance(operation.expected, int):
        assert {group.name: group.num_units for group in graph.groups}["one.weight:0"] == operation.expected
        assert "one.weight:0" not in graph.frozen
    else:
        assert graph.frozen["one.weight:0"].reason.startswith(operation.expected)
    if graph.groups and not operation.random:
        assert error_of_random_cut(model, graph, inputs) < 1e-9


@pytest.mark.filterwarnings("ignore:index_reduce.*beta")
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_what_no_layer_makes_runs_through_every_rule(operation):
    """Without units there is nothing to say, and nothing to stumble over."""
    values = torch.randn(WIDTH, *operation.inputs().movedim(operation.channels, 0).shape[1:]).movedim(
        0, operation.channels
    )
    found = watch(lambda m: operation.code(m, values), dict(operation.extra))
    assert operation.extra or all(axis is None or axis.startswith("new") for axis in found.axes())


class Names(TorchDispatchMode):
    """Notes which lines of the table are looked up, taking apart what has none."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        self.seen |= {name, name.rstrip("_")}
        composite = func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
        if find_rule(func) is None and composite:
            with self:
                return func.decompose(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def test_every_line_of_the_table_exists_and_is_exercised():
    names = Names()
    for operation in OPERATIONS:
        model = Through(operation).eval()
        with torch.inference_mode(), names:
            model(operation.inputs())
    for model in (embedded(nn.Embedding(11, 8)), embedded(nn.EmbeddingBag(11, 8))):
        with torch.inference_mode(), names:
            model(WORDS)
    with torch.inference_mode(), names:
        Experts("grouped" if HAS_GROUPED else "one by one")(torch.randn(2, 5, 3))
        torch.einsum("bi,gio->bgo", torch.ones(2, 3), torch.ones(4, 3, 5))  # see test_batched_weights.py
    assert {name for name in RULES if hasattr(torch.ops.aten, name)} - names.seen == set()


# --- layers -------------------------------------------------------------------------------------------------


class Around(nn.Module):
    """A layer between two pointwise convolutions, eight channels wide."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.one, self.layer = nn.Conv2d(3, 8, 1), layer
        with torch.no_grad():
            self.two = nn.Conv2d(layer(torch.zeros(2, 8, 6, 6)).shape[1], 4, 1)

    def forward(self, x):
        return self.two(F.relu(self.layer(self.one(x))))


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Conv2d(8, 6, 3), {"one.weight:0": 8, "layer.weight:0": 6}),
        (nn.Conv2d(8, 6, 3, groups=2), {"one.weight:0": 4, "layer.weight:0": (6, 2)}),
        (nn.Conv2d(8, 8, 3, groups=8), {"one.weight:0": 8}),
        (nn.Conv2d(8, 16, 3, groups=8, bias=False), {"one.weight:0": 8}),
        (nn.ConvTranspose2d(8, 6, 2), {"one.weight:0": 8, "layer.weight:1": 6}),
        (nn.ConvTranspose2d(8, 6, 2, groups=2), {"one.weight:0": (8, 2), "layer.weight:1": 3}),
        (nn.ConvTranspose2d(8, 8, 2, groups=8), {"one.weight:0": 8}),
        (nn.BatchNorm2d(8), {"one.weight:0": 8}),
        (nn.BatchNorm2d(8, affine=False), {"one.weight:0": 8}),
        (nn.InstanceNorm2d(8, affine=True, track_running_stats=True), {"one.weight:0": 8}),
        (nn.GroupNorm(2, 8), {"one.weight:0": (8, 2)}),
        (nn.GroupNorm(1, 8), {"one.weight:0": 8}),
        (nn.GroupNorm(8, 8), {"one.weight:0": 8}),
        (nn.PReLU(8), {"one.weight:0": 8}),
        (nn.PReLU(), {"one.weight:0": 8}),
        (nn.PixelShuffle(2), {"one.weight:0": 2}),
        (
            nn.Sequential(nn.ChannelShuffle(2), nn.Conv2d(8, 8, 1, groups=2)),
            {"one.weight:0": 2, "layer.1.weight:0": (8, 2)},
        ),
    ],
    ids=repr,
)
def test_layers_couple_what_they_must(checked, layer, expected):
    model = Around(layer)
    graph = traced(model, IMAGES)
    assert sizes(graph) == expected
    assert why_frozen(graph) == {"two.weight:0": "it reaches the model's output"}
    for seed in range(3):
        assert error_of_random_cut(model, graph, IMAGES, seed) < 1e-9


def test_one_output_channel_for_several_input_channels_of_a_transposed_convolution_has_no_rule():
    graph = traced(Around(nn.ConvTranspose2d(8, 4, 2, groups=4)), IMAGES)
    assert str(graph.frozen["one.weight:0"]) == "no rule for this grouped transposed convolution"
    assert not graph.groups


def test_positions_of_a_grouped_convolution():
    """Its inputs are tied over its groups; its filters come group by group."""
    graph = traced(Around(nn.Conv2d(8, 6, 3, groups=2)), IMAGES)
    inputs, filters = graph.groups
    assert {m.name: m.index.tolist() for m in inputs.members if m.dim == 0} == {
        "one.weight": [[0, 4], [1, 5], [2, 6], [3, 7]],
        "one.bias": [[0, 4], [1, 5], [2, 6], [3, 7]],
    }
    assert {m.name: m.index.flatten().tolist() for m in inputs.members if m.dim == 1} == {"layer.weight": [0, 1, 2, 3]}
    assert (filters.num_sections, filters.section_size, filters.heads) == (2, 3, None)


def test_a_depthwise_convolution_passes_its_channels_through():
    (group,) = traced(Around(nn.Conv2d(8, 16, 3, groups=8)), IMAGES).groups
    found = {(m.name, m.dim): m.index.tolist() for m in group.members}
    pairs = [[2 * n, 2 * n + 1] for n in range(8)]
    assert found["layer.weight", 0] == found["layer.bias", 0] == found["two.weight", 1] == pairs
    node = next(node for node in group.nodes if node.module == "layer")
    assert (node.kind, node.side, node.detail) == ("depthwise_conv", "both", "3×3 kernel, 8 groups")


def test_a_convolution_over_channels_freezes_them():
    """Efficient channel attention: a kernel slides over the channels."""

    class Eca(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Conv1d(1, 1, 3, padding=1)

        def forward(self, x):
            return x * self.mix(x.mean((2, 3))[:, None, :]).mT[..., None].sigmoid()

    assert traced(Around(Eca()), IMAGES).frozen["one.weight:0"].reason == "a convolution runs over it"


def test_a_kernel_of_one_leaves_the_channels_that_it_runs_over():
    """A mixer's tokens are mixed by pointwise convolutions whose pixels are channels; a bias would run along them."""

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Conv1d(36, 36, 1, bias=False)

        def forward(self, x):
            return self.mix(x.flatten(2).mT).mT.unflatten(2, (6, 6))

    graph = traced(Around(Mixer()), IMAGES)
    assert sizes(graph) == {"one.weight:0": 8}
    assert graph.frozen["layer.mix.weight:0"].reason


def embedded(layer):
    """Words through an embedding of eight dims, or a bag of them, and a linear layer."""
    return nn.Sequential(layer, nn.Linear(8, 4))


class Experts(nn.Module):
    """A mixture of four experts with gated hidden dims, each of which has ten tokens' rows in turn, or all of them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.embed, self.head = kind, nn.Linear(3, 32), nn.Linear(32, 4)
        self.up, self.down = nn.Parameter(torch.randn(4, 128, 32) / 6), nn.Parameter(torch.randn(4, 32, 64) / 8)

    def forward(self, x):
        x = self.embed(x).flatten(0, 1)
        if self.kind == "grouped":
            ends = torch.tensor([2, 4, 6, 10], dtype=torch.int32, device=x.device)
            gate, up = torch.ops.aten._grouped_mm(x, self.up.transpose(1, 2), offs=ends).chunk(2, -1)
            return self.head(x + torch.ops.aten._grouped_mm(F.silu(gate) * up, self.down.transpose(1, 2), offs=ends))
        out = x
        for number in range(4):
            gate, up = F.linear(x, self.up[number]).chunk(2, -1)
            out = out + F.linear(F.silu(gate) * up, self.down[number])
        return self.head(out)


HAS_GROUPED = hasattr(torch.ops.aten, "_grouped_mm")
GROUPED = pytest.param(
    "grouped", 8, 4, marks=pytest.mark.skipif(not HAS_GROUPED, reason="this torch has no _grouped_mm")
)


@pytest.mark.parametrize(("kind", "hidden", "stream"), [GROUPED, ("one by one", 64, 32)])
def test_experts_lose_the_same_hidden_dims(kind, hidden, stream):
    """The grouped product takes rows of a multiple of 16 bytes: eight channels are one unit."""
    model, x = Experts(kind).eval(), torch.randn(2, 5, 3)
    done = iso.prune(model, x, ratio=0.5, criterion="l2", self_check=True)
    assert {g.name: g.num_units for g in done.plan.graph.groups} == {"up:1": hidden, "down:1": stream}
    assert done.model.up.shape == (4, 64, 16) and done.model.down.shape == (4, 16, 32)
    assert set(done.plan.graph.frozen) == {"head.weight:0"}


@pytest.mark.parametrize("layer", [nn.Embedding(11, 8), nn.EmbeddingBag(11, 8)], ids=repr)
def test_embeddings_are_layers(checked, layer):
    model = embedded(layer)
    graph = traced(model, WORDS)
    assert sizes(graph) == {"0.weight:1": 8}
    assert [(node.kind, node.side) for node in graph.groups[0].nodes] == [("embedding", "out"), ("linear", "in")]
    assert error_of_random_cut(model, graph, WORDS) < 1e-9


# --- what has no rule ---------------------------------------------------------------------------------------


@torch.library.custom_op("isomorphic_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return 2 * x


@doubled.register_fake
def _(x):
    return torch.empty_like(x)


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (doubled, "doubled"),
        (lambda x: x * x.kthvalue(2, 1, True)[0], "kthvalue"),
        (lambda x: x @ torch.linalg.inv(x.mT @ x), "linalg_inv_ex"),
        (lambda x: x * torch.bincount(WORDS.flatten(), minlength=8)[:8], None),
    ],
)
def test_an_operation_without_a_rule_freezes_what_it_touches_and_is_named(code, name):
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.one, self.two = nn.Linear(3, 7), nn.Linear(7, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.two(code(self.one(F.relu(self.before(x)))))

    graph = traced(Unknown(), torch.randn(2, 5, 3))
    assert sizes(graph) == {"before.weight:0": 7}, "what it does not touch is free"
    assert str(graph.frozen["one.weight:0"]) == (f"no rule for {name}" if name else "it meets a fixed axis in mul")
