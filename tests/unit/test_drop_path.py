"""Drop-path rates after blocks are gone: those that a builder gives a model of that depth."""

from __future__ import annotations

import pytest
import timm
import torchvision
from timm.layers.drop import DropPath
from torch import nn
from torchvision.ops import StochasticDepth

from isomorphic.drop_path import drop_path_blocks, space_drop_path
from isomorphic.models import keep_blocks


def rates(model: nn.Module) -> list[float]:
    """Of every block of the schedule; 0 where a block has no module for it."""
    found = [
        [m for m in block.modules() if isinstance(m, (DropPath, StochasticDepth))] for block in drop_path_blocks(model)
    ]
    return [getattr(m[0], "drop_prob", getattr(m[0], "p", None)) if m else 0.0 for m in found]  # type: ignore[misc]


def shorten(model: nn.Module, kept: dict[str, tuple[int, ...]]) -> nn.Module:
    blocks = drop_path_blocks(model)
    keep_blocks(model, kept)
    left = set(model.modules())
    space_drop_path(blocks, [block for block in blocks if block in left])
    return model


def test_convnext_gets_the_rates_of_a_convnext_of_its_depth():
    arguments = {"dims": (8, 8, 8, 8), "drop_path_rate": 0.4, "num_classes": 4}
    model = timm.create_model("convnext_tiny", depths=(3, 3, 27, 3), **arguments)
    shorten(model, {"stages.2.blocks": (0, 2, 3, 7, 8, 11, 16, 21, 26)})
    builder = timm.create_model("convnext_tiny", depths=(3, 3, 9, 3), **arguments)
    assert rates(model) == pytest.approx(rates(builder)) and max(rates(model)) == pytest.approx(0.4)


def test_both_drop_paths_of_a_swin_block():
    arguments = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "num_heads": (2, 4)}
    model = timm.create_model("swin_tiny_patch4_window7_224", depths=(2, 6), drop_path_rate=0.3, **arguments)
    shorten(model, {"layers.1.blocks": (0, 1, 4, 5)})
    builder = timm.create_model("swin_tiny_patch4_window7_224", depths=(2, 4), drop_path_rate=0.3, **arguments)
    found, expected = ([m.drop_prob for m in one.modules() if isinstance(m, DropPath)] for one in (model, builder))
    assert found == pytest.approx(expected) and len(found) == 10


def test_a_first_block_without_a_rate_may_be_the_one_that_goes():
    model = timm.create_model("vit_tiny_patch16_224", depth=5, embed_dim=12, num_heads=3, drop_path_rate=0.4)
    assert rates(model) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert rates(shorten(model, {"blocks": (1, 3, 4)})) == pytest.approx([0, 0.2, 0.4])


def test_torchvision_calls_it_stochastic_depth():
    model = torchvision.models.swin_t()  # 0.2 at the last of 12 blocks
    assert rates(model) == pytest.approx([0.2 * n / 11 for n in range(12)])
    shorten(model, {"features.5": (0, 1, 2, 3, 4)})
    assert rates(model) == pytest.approx([0.02 * n for n in range(11)])


def test_rates_of_zero_and_models_without_any_stay_as_they_are():
    model = timm.create_model("vit_tiny_patch16_224", depth=3, embed_dim=12, num_heads=3)
    assert drop_path_blocks(model) == []
    assert rates(shorten(model, {"blocks": (0, 2)})) == []
