"""DepGraph's adapter: what it freezes, and why."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers.mlp import SwiGLUPacked
from timm.layers.norm import RmsNorm
from timm.models.vision_transformer import ParallelScalingBlock
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from isomorphic.errors import UserError
from isomorphic.pruning.cutting.cut import cut
from isomorphic.pruning.grouping import trace as tracing
from isomorphic.pruning.plan import PruningPlan

IMAGE = torch.zeros(1, 3, 16, 16)


def trace_groups(model, inputs):
    return tracing.trace_groups(model, inputs, "depgraph")


class Scaled(nn.Module):
    """Multiplies channels by a buffer, which no tracer of parameters sees."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(1, 8, 1, 1))

    def forward(self, x):
        return x * self.scale


class Pair(nn.Module):
    """Two convolutions with a module in between, a third one, and a classifier."""

    def __init__(self, between: nn.Module, groups: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.between = between
        self.second = nn.Conv2d(8, 4, 3, padding=1, groups=groups)
        self.last = nn.Conv2d(4, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = F.relu(self.second(self.between(self.first(x))))
        return self.head(F.relu(self.last(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("between", "groups", "reason", "prunable"),
    [
        (nn.PReLU(8), 1, "no rule for PReLU (between)", ["second", "last"]),
        (nn.GroupNorm(2, 8), 1, "no rule for GroupNorm (between)", ["second", "last"]),
        (nn.LayerNorm([8, 16, 16]), 1, "a norm over several dims (between)", ["second", "last"]),
        (nn.LayerNorm(16, elementwise_affine=False), 1, "no weight of its own to cut (between)", ["second", "last"]),
        (nn.ConvTranspose2d(8, 8, 1), 1, "transposed convolution (between)", ["second", "last"]),
        (weight_norm(nn.Conv2d(8, 8, 1)), 1, "no weight of its own to cut (between)", ["second", "last"]),
        (Scaled(), 1, "the model does not run without some of it", ["second", "last"]),
        (nn.Identity(), 2, "grouped convolution (second)", ["last"]),
    ],
)
def test_layers_without_a_rule_freeze_their_group(between, groups, reason, prunable):
    graph = trace_groups(Pair(between, groups).eval(), IMAGE)
    assert str(graph.frozen["first.weight:0"]) == reason
    assert [group.name for group in graph.groups] == [f"{name}.weight:0" for name in prunable]


def test_unequal_use_of_channels_freezes_the_group():
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 1)
            self.left, self.right = nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 1)
            self.head = nn.Linear(6, 5)

        def forward(self, x):
            left, right = self.first(x).chunk(2, dim=1)
            return self.head((self.left(left) * self.right(right)).mean((2, 3)))

    graph = trace_groups(Split().eval(), IMAGE)
    assert "do not map one to one" in graph.frozen["first.weight:0"].reason
    assert [group.name for group in graph.groups] == ["left.weight:0"]


@pytest.mark.parametrize(("option", "reason"), [("qk_norm", "q_norm, k_norm"), ("scale_attn_norm", "norm")])
def test_attention_with_weights_shared_between_heads_is_frozen(option, reason):
    kwargs = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, option: True}
    graph = trace_groups(timm.create_model("vit_tiny_patch16_224", **kwargs).eval(), IMAGE)
    expected = f"attention with {reason} shares weights between its heads"
    assert str(graph.frozen["blocks.0.attn.qkv.weight:0"]) == expected
    assert "blocks.0.mlp.fc1.weight:0" in {group.name for group in graph.groups}


@pytest.mark.parametrize(
    ("kwargs", "frozen", "prunable"),
    [
        ({"norm_layer": RmsNorm}, set(), {"patch_embed.proj", "blocks.0.attn.qkv", "blocks.0.mlp.fc1"}),
        ({"mlp_layer": SwiGLUPacked}, {"blocks.0.mlp.fc1"}, {"patch_embed.proj", "blocks.0.attn.qkv"}),
        ({"global_pool": "map", "class_token": False}, {"patch_embed.proj"}, {"blocks.0.attn.qkv", "blocks.0.mlp.fc1"}),
        ({"block_fn": ParallelScalingBlock}, {"blocks.0.in_proj"}, set()),
    ],
    ids=["rms norm", "gated MLP", "attention pooling", "parallel block"],
)
def test_what_breaks_a_cut_is_frozen_and_the_rest_runs(kwargs, frozen, prunable):
    """Layers that DepGraph maps wrongly, or whose forward needs the dense width."""
    small = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **small, **kwargs).eval()
    if not prunable:
        with pytest.raises(UserError, match="blocks.0.in_proj.weight:0: its units do not map"):
            trace_groups(model, IMAGE)
        return
    graph = trace_groups(model, IMAGE)
    assert {f"{name}.weight:0" for name in frozen} <= graph.frozen.keys()
    assert {f"{name}.weight:0" for name in prunable} <= {group.name for group in graph.groups}
    assert not graph.frozen.keys() & {group.name for group in graph.groups}
    kept = {
        g.name: tuple(u for u in range(g.num_units) if u % g.section_size < g.section_size // 2) for g in graph.groups
    }
    cut(model, graph, PruningPlan(kept))
    assert model(IMAGE).shape == (1, 5)


def test_groups_that_share_a_tied_weight_are_frozen():
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(3 if not i else 8, 8, 1) for i in range(4))
            self.layers[2].weight = self.layers[1].weight
            self.head = nn.Linear(8, 5)

        def forward(self, x):
            for layer in self.layers:
                x = F.relu(layer(x))
            return self.head(x.mean((2, 3)))

    graph = trace_groups(Chain().eval(), IMAGE)
    assert [group.name for group in graph.groups] == ["layers.3.weight:0"]
    tied = {f"layers.{number}.weight:0" for number in range(3)}
    assert {name for name, frozen in graph.frozen.items() if "tied weight" in frozen.reason} == tied


def test_groups_of_one_unit_are_found():
    model = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 4, 1), nn.Flatten(), nn.Linear(4 * 256, 5)).eval()
    assert [group.num_units for group in trace_groups(model, IMAGE).groups] == [1, 4]
