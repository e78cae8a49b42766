"""Modules of older versions of timm have all that the installed one expects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torchvision
from timm.models.convnext import ConvNeXt
from torch import nn

from isomorphic.checkpoints.open import load_model
from tests.unit.checkpoints.released.test_legacy import released


def fresh_twin(path: Path) -> nn.Module:
    """A new model of the kind that a released file holds, before pruning."""
    kwargs: dict[str, Any]
    if path.stem.startswith("deit"):
        kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4}
        return timm.create_model("deit_tiny_distilled_patch16_224", num_classes=10, **kwargs)
    if path.stem.startswith("convnext"):
        return ConvNeXt(depths=(1, 1, 2, 1), dims=(16, 24, 32, 48), drop_path_rate=0.1, num_classes=10)
    if path.stem == "swin":
        kwargs = {"img_size": 56, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
        return timm.create_model("swin_tiny_patch4_window7_224", num_classes=10, **kwargs)
    return torchvision.models.mobilenet_v2(width_mult=0.25, num_classes=10)


@released
def test_no_module_lacks_what_a_fresh_one_has(path: Path):
    twins = dict(fresh_twin(path).named_modules())
    modules = dict(load_model(path).named_modules())
    assert modules.keys() == twins.keys()
    factory_notes = {"_model_args", "_traits", "pretrained_model_args", "pretrained_cfg", "default_cfg"}
    for name, module in modules.items():
        twin = twins[name]
        assert isinstance(twin, type(module))  # timm has its own LayerNorm now
        if type(module) is type(twin):
            assert vars(twin).keys() - vars(module).keys() <= factory_notes, name
        for tensors in ("_parameters", "_buffers", "_modules"):
            assert getattr(module, tensors).keys() == getattr(twin, tensors).keys(), name
        assert module._non_persistent_buffers_set == twin._non_persistent_buffers_set, name
        for key, value in vars(module).items():
            if isinstance(value, (int, tuple)) and key in vars(twin):
                assert type(value) is type(vars(twin)[key]), (name, key)
