"""What is left of a masked model: counted by hand, and in sum as the counters count."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from isomorphic.measure.complexity import count_complexity
from isomorphic.measure.sparsity import (
    count_sparsity,
    nonzero_change_lines,
    nonzero_line,
    sparsity_results,
    sparsity_table,
)


@pytest.fixture
def network() -> nn.Sequential:
    """A convolution with half of its filters at zero, a linear layer with a third of its weights at zero."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 6),
    )  # fmt: skip
    with torch.no_grad():
        model[0].weight[:4] = 0
        model[5].weight[:2] = 0
        model[5].bias[:] = 0
    return model


IMAGE = torch.zeros(1, 3, 10, 10)


def test_a_small_network_by_hand(network: nn.Sequential):
    sparsity = count_sparsity(network, IMAGE, ["0.weight", "5.weight"])
    conv, norm, linear = sparsity.layers
    assert (conv.name, conv.params, conv.nonzero_params) == ("0", 216, 108)
    assert (conv.macs, conv.nonzero_macs) == (21600, 10800)
    assert (norm.name, norm.params, norm.nonzero_params, norm.macs, norm.nonzero_macs) == ("1", 16, 16, 1600, 1600)
    assert (linear.name, linear.params, linear.nonzero_params) == ("5", 54, 38)  # its zero biases were not pruned
    assert (linear.macs, linear.nonzero_macs) == (54, pytest.approx(36))  # 48 products and 6 for the bias
    others = 800 + 800  # ReLU and pooling
    assert sparsity.dense == count_complexity(network, IMAGE)
    assert sparsity.dense.macs_paper == 21600 + 1600 + 54 + others
    assert sparsity.nonzero.macs_paper == 10800 + 1600 + 36 + others
    assert (sparsity.dense.params, sparsity.nonzero.params) == (286, 162)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_atto", "resnet18", "vit_tiny_patch16_224"])
def test_without_masks_it_is_what_the_counters_say(name: str):
    torch.manual_seed(0)
    model = timm.create_model(name)
    image = torch.zeros(1, 3, 224, 224)
    sparsity = count_sparsity(model, image, [])
    assert sparsity.dense == sparsity.nonzero == count_complexity(model, image)
    assert sum(layer.params for layer in sparsity.layers) == sparsity.dense.params
    assert sum(layer.macs for layer in sparsity.layers) <= sparsity.dense.macs_paper
    assert "all others" in sparsity_table(sparsity)


def test_an_attention_is_charged_by_the_layer():
    """Half of qkv at zero halves the MACs of its projection, and nothing else of the block's."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[:288] = 0  # pyright: ignore
    sparsity = count_sparsity(model, torch.zeros(1, 3, 224, 224), ["blocks.0.attn.qkv.weight"])
    saved = sparsity.dense.macs_paper - sparsity.nonzero.macs_paper
    assert saved == pytest.approx(197 * 192 * 576 / 2, rel=0.01)  # counters spread the biases over a block
    assert sparsity.dense.macs_exact - sparsity.nonzero.macs_exact == pytest.approx(197 * 192 * 576 / 2, rel=0.01)
    changed = [layer.name for layer in sparsity.layers if layer.nonzero_macs < layer.macs]
    assert changed == ["blocks.0.attn.qkv"]


def test_lines_and_results(network: nn.Sequential):
    sparsity = count_sparsity(network, IMAGE, ["0.weight", "5.weight"])
    assert nonzero_line(sparsity).startswith("Non-zero MACs: 14.0360 K, Params: 0.1620 K")
    macs, params = nonzero_change_lines(sparsity).splitlines()
    assert macs == "MACs: 24.85 K => 14.04 K (non-zero)"
    assert params == "Params: 0.29 K => 0.16 K (non-zero)"
    assert sparsity_results(sparsity) == {"macs_nonzero": 14036, "params_nonzero": 162}


def test_where_the_counters_differ_both_are_said():
    model = timm.create_model("convnext_atto")
    lines = nonzero_change_lines(count_sparsity(model, torch.zeros(1, 3, 224, 224), []))
    assert "(non-zero; paper counter; exact: " in lines.splitlines()[0]
    assert lines.splitlines()[1].endswith(" (non-zero)")


def test_the_table_names_the_layers_that_lost_weights_and_adds_up(network: nn.Sequential):
    header, *rows = sparsity_table(count_sparsity(network, IMAGE, ["0.weight", "5.weight"])).splitlines()
    assert [row.split()[0] for row in rows] == ["0", "5", "all", "sum"]
    assert header.split() == ["layer", "params", "non-zero", "MACs", "non-zero"]
    assert rows[0].split() == ["0", "0.22", "K", "0.11", "K", "50.0%", "21.60", "K", "10.80", "K", "50.0%"]
    assert rows[-1].split()[1:6] == ["0.29", "K", "0.16", "K", "56.6%"]
    assert len({len(row) for row in (header, *rows)}) == 1
