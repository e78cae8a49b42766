"""Networks of diffusers: noise predictors and autoencoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from isomorphic.inputs import Inputs
from studies.coverage.example import Example
from studies.coverage.people.entry import Entry, entry, images, library


def _diffusers(name: str, kind: str, config: Mapping[str, Any], inputs: Callable[[], Inputs]) -> Entry:
    def example() -> Example:
        diffusers = library("diffusers")

        return Example(getattr(diffusers, kind)(**config), inputs())

    return entry("diffusers", name, example)


def _noisy(channels: int, size: int = 16, **others: Any) -> dict[str, Any]:
    return {"sample": images(size, channels), "timestep": torch.tensor([3, 7]), **others}


def _told(**others: Any) -> dict[str, Any]:
    """Latents and a text for a transformer."""
    return {
        "hidden_states": images(16, 4),
        "encoder_hidden_states": torch.randn(2, 6, 32),
        "timestep": torch.tensor([3, 7]),
        **others,
    }


_BLOCKS: dict[str, Any] = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
_DIT: dict[str, Any] = {"sample_size": 16, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4}

ENTRIES = [
    _diffusers("unet2d", "UNet2DModel",
               {**_BLOCKS, "sample_size": 16, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 8}, lambda: _noisy(3)),
    _diffusers("unet2d-condition", "UNet2DConditionModel",
               {**_BLOCKS, "sample_size": 16, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 32,
                "attention_head_dim": 4},
               lambda: _noisy(4, encoder_hidden_states=torch.randn(2, 6, 32))),
    _diffusers("unet2d-condition-xl", "UNet2DConditionModel",
               {**_BLOCKS, "sample_size": 16, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 32,
                "attention_head_dim": (2, 4), "use_linear_projection": True, "transformer_layers_per_block": (1, 2),
                "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 80},
               lambda: _noisy(4, encoder_hidden_states=torch.randn(2, 6, 32),
                              added_cond_kwargs={"text_embeds": torch.randn(2, 32), "time_ids": torch.rand(2, 6)})),
    _diffusers("unet3d-condition", "UNet3DConditionModel",
               {**_BLOCKS, "sample_size": 16, "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
                "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"), "cross_attention_dim": 32,
                "attention_head_dim": 8},
               lambda: {"sample": torch.randn(2, 4, 3, 16, 16), "timestep": torch.tensor([3, 7]),
                        "encoder_hidden_states": torch.randn(2, 6, 32)}),
    _diffusers("autoencoder-kl", "AutoencoderKL",
               {**_BLOCKS, "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
                "latent_channels": 4}, lambda: {"sample": images(32)}),
    _diffusers("autoencoder-tiny", "AutoencoderTiny",
               {"encoder_block_out_channels": (16, 16), "decoder_block_out_channels": (16, 16),
                "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}, lambda: {"sample": images(32)}),
    _diffusers("vq-model", "VQModel",
               {**_BLOCKS, "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
                "latent_channels": 4, "num_vq_embeddings": 16}, lambda: {"sample": images(32)}),
    _diffusers("controlnet", "ControlNetModel",
               {**_BLOCKS, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 32,
                "attention_head_dim": 4, "conditioning_embedding_out_channels": (8, 16)},
               lambda: _noisy(4, encoder_hidden_states=torch.randn(2, 6, 32), controlnet_cond=images(32))),
    _diffusers("dit", "DiTTransformer2DModel",
               {**_DIT, "in_channels": 4, "num_embeds_ada_norm": 10},
               lambda: {"hidden_states": images(16, 4), "timestep": torch.tensor([3, 7]),
                        "class_labels": torch.tensor([1, 2])}),
    _diffusers("pixart", "PixArtTransformer2DModel",
               {**_DIT, "in_channels": 4, "out_channels": 8, "cross_attention_dim": 64, "caption_channels": 32,
                "use_additional_conditions": False},
               lambda: _told(added_cond_kwargs={"resolution": None, "aspect_ratio": None})),
    _diffusers("sd3", "SD3Transformer2DModel",
               {**_DIT, "in_channels": 4, "out_channels": 4, "caption_projection_dim": 64, "joint_attention_dim": 32,
                "pooled_projection_dim": 32, "pos_embed_max_size": 16},
               lambda: _told(pooled_projections=torch.randn(2, 32))),
    _diffusers("flux", "FluxTransformer2DModel",
               {"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
                "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32,
                "axes_dims_rope": [4, 4, 8], "guidance_embeds": True},
               lambda: {"hidden_states": torch.randn(2, 16, 4), "encoder_hidden_states": torch.randn(2, 6, 32),
                        "pooled_projections": torch.randn(2, 32), "timestep": torch.tensor([0.3, 0.7]),
                        "guidance": torch.tensor([1.0, 1.0]),
                        "img_ids": torch.stack([torch.arange(16.0)] * 3, 1), "txt_ids": torch.zeros(6, 3)}),
    _diffusers("sana", "SanaTransformer2DModel",
               {"sample_size": 16, "in_channels": 4, "out_channels": 4, "patch_size": 1, "num_layers": 2,
                "attention_head_dim": 16, "num_attention_heads": 4, "cross_attention_dim": 64,
                "num_cross_attention_heads": 4, "cross_attention_head_dim": 16, "caption_channels": 32}, _told),
    _diffusers("auraflow", "AuraFlowTransformer2DModel",
               {"sample_size": 16, "attention_head_dim": 16, "num_attention_heads": 4, "in_channels": 4,
                "num_mmdit_layers": 1, "num_single_dit_layers": 1, "joint_attention_dim": 32,
                "caption_projection_dim": 64, "out_channels": 4, "pos_embed_max_size": 64}, _told),
    _diffusers("prior", "PriorTransformer",
               {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2, "embedding_dim": 32,
                "num_embeddings": 6},
               lambda: {"hidden_states": torch.randn(2, 32), "timestep": torch.tensor([3, 7]),
                        "proj_embedding": torch.randn(2, 32), "encoder_hidden_states": torch.randn(2, 6, 32)}),
]  # fmt: skip
