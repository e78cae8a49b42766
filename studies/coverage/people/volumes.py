"""Networks of MONAI, most of them for volumes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from isomorphic.inputs import Inputs
from studies.coverage.example import Example
from studies.coverage.people.entry import Entry, entry, images, library


def _volume(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 1, size, size, size)


def _monai(
    name: str, kind: str, options: Mapping[str, Any], inputs: Callable[[], Inputs] = _volume, heads: int | None = None
) -> Entry:
    def example() -> Example:
        nets = library("monai.networks.nets")

        return Example(getattr(nets, kind)(**options), inputs(), heads=heads)

    return entry("monai", name, example)


_3D: dict[str, Any] = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}
_DYN: dict[str, Any] = {
    **_3D,
    "kernel_size": [3, 3, 3, 3],
    "strides": [1, 2, 2, 2],
    "upsample_kernel_size": [2, 2, 2],
    "filters": [8, 16, 24, 32],
}

ENTRIES = [
    _monai("unet", "UNet", {**_3D, "channels": (8, 16, 32), "strides": (2, 2), "num_res_units": 2}),
    _monai("unet-plain", "UNet", {**_3D, "channels": (8, 16, 32), "strides": (2, 2), "norm": "batch"}),
    _monai("attention-unet", "AttentionUnet", {**_3D, "channels": (8, 16, 32), "strides": (2, 2)}),
    _monai("basic-unet", "BasicUNet", {**_3D, "features": (8, 8, 16, 32, 32, 8)}),
    _monai("basic-unet++", "BasicUNetPlusPlus", {**_3D, "features": (8, 8, 16, 32, 32, 8)}),
    _monai("dynunet", "DynUNet", _DYN),
    _monai("dynunet-supervised", "DynUNet", {**_DYN, "deep_supervision": True, "deep_supr_num": 2}),
    _monai("dynunet-residual", "DynUNet", {**_DYN, "res_block": True}),
    _monai("segresnet", "SegResNet", {**_3D, "init_filters": 8}),
    _monai("segresnet-ds", "SegResNetDS", {**_3D, "init_filters": 8, "blocks_down": (1, 2, 2), "dsdepth": 2}),
    _monai("vnet", "VNet", {**_3D, "dropout_dim": 3}),
    _monai("unetr", "UNETR",
           {"in_channels": 1, "out_channels": 2, "img_size": (32, 32, 32), "feature_size": 8, "hidden_size": 48,
            "mlp_dim": 96, "num_heads": 4}),
    _monai("swin-unetr", "SwinUNETR", {"in_channels": 1, "out_channels": 2, "feature_size": 12},
           lambda: _volume(64)),
    _monai("mednext", "MedNeXt", {**_3D, "init_filters": 8}),
    _monai("vit", "ViT",
           {"in_channels": 1, "img_size": (32, 32, 32), "patch_size": (16, 16, 16), "hidden_size": 48, "mlp_dim": 96,
            "num_layers": 2, "num_heads": 4, "classification": True}),
    _monai("densenet", "DenseNet", {"spatial_dims": 3, "in_channels": 1, "out_channels": 3, "init_features": 16,
                                    "growth_rate": 8, "block_config": (2, 2, 2)}),
    _monai("resnet", "ResNet",
           {"block": "basic", "layers": [1, 1, 1, 1], "block_inplanes": [8, 16, 24, 32], "n_input_channels": 1,
            "num_classes": 3}),
    _monai("seresnet", "SEResNet50", {"spatial_dims": 2, "in_channels": 3, "num_classes": 3}, lambda: images(64)),
    _monai("efficientnet-b0", "EfficientNetBN", {"model_name": "efficientnet-b0", "pretrained": False,
                                                 "num_classes": 3}, lambda: images(64)),
    _monai("flexible-unet", "FlexibleUNet",
           {"in_channels": 3, "out_channels": 2, "backbone": "efficientnet-b0", "pretrained": False},
           lambda: images(64)),
    _monai("highresnet", "HighResNet", _3D),
    _monai("autoencoder-kl", "AutoencoderKL",
           {"spatial_dims": 2, "in_channels": 1, "out_channels": 1, "num_res_blocks": 1, "channels": (8, 16, 16),
            "attention_levels": (False, False, True), "latent_channels": 4, "norm_num_groups": 4},
           lambda: images(32, 1)),
    _monai("diffusion-unet", "DiffusionModelUNet",
           {"spatial_dims": 2, "in_channels": 1, "out_channels": 1, "num_res_blocks": 1, "channels": (16, 16, 32),
            "attention_levels": (False, False, True), "norm_num_groups": 8, "num_head_channels": 8},
           lambda: {"x": images(32, 1), "timesteps": torch.tensor([3, 7])}),
    _monai("vqvae", "VQVAE",
           {**_3D, "out_channels": 1, "channels": (16, 16), "num_res_layers": 1, "num_res_channels": (16, 16),
            "downsample_parameters": ((2, 4, 1, 1), (2, 4, 1, 1)),
            "upsample_parameters": ((2, 4, 1, 1, 0), (2, 4, 1, 1, 0)), "num_embeddings": 16, "embedding_dim": 8}),
]  # fmt: skip
