"""Which layers of a network are an attention's, an MLP's, a convolution, or stay: across libraries' structures."""

from __future__ import annotations

from collections import Counter

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from isomorphic.pruning.weights.layer_roles import assign_roles

SWIN_T = {"QKV": 6_469_632, "PRJ": 2_156_544, "MLP": 17_252_352}
VIT_B = {"QKV": 21_233_664, "PRJ": 7_077_888, "MLP": 56_623_104}
CONVNEXT_T = {"MLP": 25_878_528}
RESNET50 = {"CONV 1×1": 9_359_360, "CONV 3×3": 11_317_248}  # less the shortcuts, which are named downsample


def weights_by_role(model: nn.Module, size: int = 224) -> tuple[dict[str, str], dict[str, int]]:
    """The roles, and the weights of each that is pruned."""
    device = next(model.parameters()).device
    roles = assign_roles(model, torch.zeros(1, 3, size, size, device=device))
    assert list(roles) == [name for name, _ in model.named_parameters()]
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[roles[name]] += parameter.numel()
    return roles, {role: count for role, count in counts.items() if role != "AUX"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("timm:swin_tiny_patch4_window7_224", SWIN_T),
        ("swin_t", SWIN_T),
        ("swin_v2_t", SWIN_T),  # without the MLPs of its position biases
        ("timm:deit_base_distilled_patch16_224", VIT_B),
        ("timm:beit_base_patch16_224", VIT_B),
        ("vit_b_16", VIT_B),
        ("timm:convnext_tiny", CONVNEXT_T),
        ("convnext_tiny", CONVNEXT_T),
        ("timm:resnet50", RESNET50),
        ("resnet50", RESNET50),
        ("timm:resnetv2_50", RESNET50),
    ],
)
def test_libraries_agree_on_what_is_pruned(name: str, expected: dict[str, int]):
    library, _, model_name = name.rpartition(":")
    with torch.device("meta"):
        model = timm.create_model(model_name) if library else torchvision.models.get_model(model_name)
    assert weights_by_role(model)[1] == expected


def test_what_stays_in_a_swin():
    with torch.device("meta"):
        roles, _ = weights_by_role(timm.create_model("swin_tiny_patch4_window7_224"))
    stays = {name for name, role in roles.items() if role == "AUX"}
    matrices = {name for name in stays if name.endswith("weight") and "norm" not in name}
    assert matrices == {
        "patch_embed.proj.weight",
        *(f"layers.{stage}.downsample.reduction.weight" for stage in (1, 2, 3)),
        "head.fc.weight",
    }
    assert all(name in stays for name in roles if "bias" in name or "norm" in name)


def test_a_distilled_model_keeps_both_heads():
    with torch.device("meta"):
        roles, _ = weights_by_role(timm.create_model("deit_tiny_distilled_patch16_224"))
    assert {roles[name] for name in ("head.weight", "head_dist.weight", "cls_token", "pos_embed")} == {"AUX"}


@pytest.mark.parametrize("conv_mlp", [False, True])
def test_convnexts_mlp_of_linears_or_of_1x1_convolutions(conv_mlp: bool):
    with torch.device("meta"):
        roles, counts = weights_by_role(timm.create_model("convnext_atto", conv_mlp=conv_mlp))
    assert counts == {"MLP": 2_995_200}
    assert {roles[f"stages.1.{name}.weight"] for name in ("downsample.1", "blocks.0.conv_dw")} == {"AUX"}


def test_depthwise_filters_stay_and_squeezed_channels_go_through_an_mlp():
    with torch.device("meta"):
        roles, counts = weights_by_role(timm.create_model("efficientnet_b0"))
    assert counts == {"CONV 1×1": 3_146_112, "MLP": 627_200}
    assert roles["blocks.1.0.conv_dw.weight"] == roles["conv_stem.weight"] == roles["classifier.weight"] == "AUX"
    assert roles["blocks.1.0.se.conv_reduce.weight"] == "MLP"


def test_weights_that_are_standardised_before_use_stay():
    """A zero among them is no zero in the product."""
    with torch.device("meta"):
        model = timm.create_model("resnetv2_50x1_bit")
    assert weights_by_role(model)[1] == {}


class Own(nn.Module):
    """Names of the user's: separate projections, an MLP that is called nothing, a tied pair, an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Conv2d(3, 8, 1)
        self.attention = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("to_q", "to_k", "to_v", "to_out", "gate")})
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.twin = nn.Linear(8, 16)
        self.twin.weight = self.up.weight
        self.unused = nn.Linear(8, 8)
        self.answer = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embedding(images).flatten(2).mT  # (N, H·W, 8)
        q, k, v = (self.attention[name](x) for name in ("to_q", "to_k", "to_v"))
        x = self.attention["to_out"]((q @ k.mT).softmax(-1) @ v) * self.attention["gate"](x)
        x = self.down(self.up(x).relu() + self.twin(x))
        return self.answer(x.mean(1))


def test_a_model_of_ones_own():
    model = Own().train()
    roles, _ = weights_by_role(model, 4)
    assert {name.removesuffix(".weight"): role for name, role in roles.items() if role != "AUX"} == {
        "attention.to_q": "QKV",
        "attention.to_k": "QKV",
        "attention.to_v": "QKV",
        "attention.to_out": "PRJ",
        "up": "MLP",
        "down": "MLP",
    }
    assert model.training


def test_a_backbone_without_a_classifier_has_no_layer_to_spare():
    roles, counts = weights_by_role(timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0))
    assert roles["blocks.0.mlp.fc2.weight"] == "MLP" and counts["MLP"] == 2 * 192 * 768
