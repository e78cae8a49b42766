"""Modules that older versions of timm made, from 0.9.2 on, as the installed version expects them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from timm.layers.attention import Attention
from timm.layers.classifier import ClassifierHead
from timm.layers.conv_bn_act import ConvNormAct
from timm.layers.helpers import to_2tuple
from timm.layers.layer_scale import LayerScale
from timm.layers.patch_embed import PatchEmbed
from timm.models.convnext import ConvNeXt
from timm.models.regnet import RegNet
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.vision_transformer import VisionTransformer
from torch import nn


def bring_up_to_date(model: nn.Module) -> None:
    """Gives the modules of older versions of timm, in place, what today's version expects of them."""
    for module in list(model.modules()):
        if isinstance(module, SwinTransformerBlock):
            _pair_up(module)
        for kind, expected in EXPECTED.items():
            for name, value in expected.items() if isinstance(module, kind) else ():
                if not hasattr(module, name):
                    setattr(module, name, value(module))


def _pair_up(block: Any) -> None:
    """Swin blocks had one drop path for both branches, one number for both sides, and stored their masks."""
    if "drop_path" in block._modules:
        block.drop_path1 = block._modules.pop("drop_path")
        block.drop_path2 = copy.deepcopy(block.drop_path1)
    block.window_size, block.shift_size = to_2tuple(block.window_size), to_2tuple(block.shift_size)
    block._non_persistent_buffers_set.add("attn_mask")
    block.attn._non_persistent_buffers_set.add("relative_position_index")


def _features(vit: Any) -> list[dict[str, Any]]:
    width, reduction = vit.embed_dim, max(vit.patch_embed.patch_size)
    return [{"module": f"blocks.{i}", "num_chs": width, "reduction": reduction} for i in range(len(vit.blocks))]


def _input_channels(model: nn.Module) -> int:
    return next(module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))


# What modules of today have and older ones lack: where it is not the same for all, as a function of the module.
EXPECTED: Mapping[type | tuple[type, ...], Mapping[str, Callable[[Any], Any]]] = {
    Attention: {
        "attn_dim": lambda attention: attention.proj.in_features,
        "gate": lambda _: None,
        "norm": lambda _: nn.Identity(),
    },
    ClassifierHead: {"num_features": lambda head: head.in_features},
    ConvNormAct: {"aa": lambda _: None},
    LayerScale: {"init_values": lambda _: 1e-5},
    PatchEmbed: {"strict_img_size": lambda _: True, "dynamic_img_pad": lambda _: False},
    SwinTransformer: {
        "dynamic_img_size": lambda _: False,
        "weight_init_mode": lambda _: "",
        "_ref_grid_size": lambda swin: tuple(swin.patch_embed.grid_size),
        "_ref_window_sizes": lambda swin: tuple(stage.blocks[0].window_size for stage in swin.layers),
    },
    SwinTransformerBlock: {
        "always_partition": lambda _: False,
        "dynamic_mask": lambda _: False,
        "target_shift_size": lambda block: block.shift_size,
        "window_area": lambda block: block.window_size[0] * block.window_size[1],
    },
    VisionTransformer: {
        "attn_pool": lambda _: None,
        "dynamic_img_size": lambda _: False,
        "feature_info": _features,
        "fix_init": lambda _: False,
        "has_class_token": lambda vit: vit.cls_token is not None,
        "num_reg_tokens": lambda _: 0,
        "pool_include_prefix": lambda _: False,
        "reg_token": lambda _: None,
        "weight_init_mode": lambda _: "",
    },
    (ConvNeXt, RegNet, ResNet, SwinTransformer, VisionTransformer): {
        "head_hidden_size": lambda model: model.num_features,
        "in_chans": _input_channels,
    },
}
