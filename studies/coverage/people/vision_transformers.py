"""vit-pytorch, whose models are written with einops, and the pairs of towers of open_clip."""

from __future__ import annotations

from typing import Any

import torch

from studies.coverage.example import Example
from studies.coverage.people.entry import Entry, entry, images, library


def _vit(name: str, module: str, kind: str, size: int = 64, **options: Any) -> Entry:
    def example() -> Example:
        model_class = getattr(library(f"vit_pytorch.{module}"), kind)
        return Example(model_class(num_classes=10, **options), images(size))

    return entry("vit-pytorch", name, example)


def _plain(name: str, module: str, kind: str, **options: Any) -> Entry:
    sizes = {"image_size": 64, "patch_size": 16, "dim": 64, "depth": 2, "heads": 4, "mlp_dim": 128}
    return _vit(name, module, kind, **sizes, **options)


def _open_clip(name: str, **vision: Any) -> Entry:
    def example() -> Example:
        open_clip = library("open_clip")

        text = {"context_length": 12, "vocab_size": 100, "width": 64, "heads": 4, "layers": 2}
        model_class = open_clip.CustomTextCLIP if "timm_model_name" in vision else open_clip.CLIP
        model = model_class(embed_dim=32, vision_cfg={"image_size": 64, **vision}, text_cfg=text)
        return Example(model, {"image": images(64), "text": torch.randint(3, 100, (2, 12))})

    return entry("open-clip", name, example)


def _coca() -> Example:
    open_clip = library("open_clip")

    vision = {"image_size": 64, "patch_size": 16, "width": 64, "layers": 2, "head_width": 16,
              "attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True}  # fmt: skip
    text = {"context_length": 12, "vocab_size": 100, "width": 64, "heads": 4, "layers": 2, "embed_cls": True,
            "output_tokens": True}  # fmt: skip
    decoder = {"context_length": 12, "vocab_size": 100, "width": 64, "heads": 4, "layers": 2,
               "attn_pooler_heads": 4}  # fmt: skip
    model = open_clip.CoCa(embed_dim=64, multimodal_cfg=decoder, text_cfg=text, vision_cfg=vision)
    return Example(model, {"image": images(64), "text": torch.randint(3, 100, (2, 12))})


_STAGES = {"s1_emb_dim": 16, "s2_emb_dim": 32, "s3_emb_dim": 64}

ENTRIES = [
    _plain("vit", "vit", "ViT"),
    _plain("simple-vit", "simple_vit", "SimpleViT"),
    _plain("simple-vit-qk-norm", "simple_vit_with_qk_norm", "SimpleViT"),
    _plain("simple-vit-registers", "simple_vit_with_register_tokens", "SimpleViT"),
    _plain("simple-vit-value-residual", "simple_vit_with_value_residual", "SimpleViT"),
    _plain("deepvit", "deepvit", "DeepViT"),
    _plain("cait", "cait", "CaiT", cls_depth=1),
    _plain("rvt", "rvt", "RvT"),
    _plain("parallel-vit", "parallel_vit", "ViT"),
    _plain("small-dataset", "vit_for_small_dataset", "ViT"),
    _plain("patch-merger", "vit_with_patch_merger", "ViT", patch_merge_layer=1, patch_merge_num_tokens=8),
    _plain("xcit", "xcit", "XCiT", cls_depth=1),
    _plain("jumbo-vit", "jumbo_vit", "JumboViT", num_jumbo_cls=1, jumbo_cls_k=2, jumbo_ff_mult=2),
    _vit("pit", "pit", "PiT", image_size=70, patch_size=14, dim=64, depth=(1, 1, 1), heads=4, mlp_dim=128, size=70),
    _vit("t2t", "t2t", "T2TViT", image_size=64, dim=64, depth=2, heads=4, mlp_dim=128, t2t_layers=((7, 4), (3, 2))),
    _vit("cct", "cct", "CCT", img_size=64, embedding_dim=64, n_conv_layers=2, num_layers=2, num_heads=4, mlp_ratio=2.0),
    _vit("cross-vit", "cross_vit", "CrossViT", image_size=64, sm_dim=32, lg_dim=64, depth=1, sm_enc_heads=4,
         lg_enc_heads=4, sm_enc_mlp_dim=64, lg_enc_mlp_dim=128, cross_attn_heads=4, sm_patch_size=16,
         lg_patch_size=32),
    _vit("cvt", "cvt", "CvT", s1_depth=1, s2_depth=1, s3_depth=2, s2_heads=2, s3_heads=4, **_STAGES),
    _vit("twins-svt", "twins_svt", "TwinsSVT", **_STAGES, s4_emb_dim=64, s1_local_patch_size=4,
         s2_local_patch_size=4, s3_local_patch_size=4, s4_local_patch_size=4, s3_depth=2, s4_depth=1, peg_kernel_size=3,
         s1_global_k=4, s2_global_k=4, s3_global_k=4, s4_global_k=2, size=128),
    _vit("max-vit", "max_vit", "MaxViT", dim=32, dim_conv_stem=16, depth=(1, 1), dim_head=16, window_size=4),
    _vit("nest", "nest", "NesT", image_size=64, patch_size=4, dim=32, heads=2, num_hierarchies=3,
         block_repeats=(1, 1, 1)),
    _vit("levit", "levit", "LeViT", image_size=64, dim=(32, 48, 64), depth=1, heads=(2, 3, 4), mlp_mult=2),
    _vit("mobile-vit", "mobile_vit", "MobileViT", image_size=(64, 64), dims=[48, 64, 80],
         channels=[8, 16, 24, 24, 32, 32, 48, 48, 64, 64, 160]),
    _vit("crossformer", "crossformer", "CrossFormer", dim=(64, 64, 64, 128), depth=(1, 1, 1, 1),
         global_window_size=(4, 2, 2, 1), local_window_size=2),
    _vit("regionvit", "regionvit", "RegionViT", dim=(16, 32, 64, 64), depth=(1, 1, 1, 1), window_size=4,
         tokenize_local_3_conv=False, size=128),
    _vit("scalable-vit", "scalable_vit", "ScalableViT", dim=16, heads=(1, 2, 4, 4), depth=(1, 1, 1, 1),
         ssa_dim_key=(8, 8, 8, 8), reduction_factor=(8, 4, 2, 1), window_size=(16, None, None, None)),
    _open_clip("vit", patch_size=16, width=64, layers=2, head_width=16),
    _open_clip("resnet", layers=[1, 1, 1, 1], width=16, head_width=16),
    _open_clip("timm-resnet10t", timm_model_name="resnet10t", timm_model_pretrained=False, timm_pool="",
               timm_proj="linear"),
    _open_clip("vit-pooled", patch_size=16, width=64, layers=2, head_width=16, attentional_pool=True,
               attn_pooler_heads=4),
    entry("open-clip", "coca", _coca),
]  # fmt: skip
