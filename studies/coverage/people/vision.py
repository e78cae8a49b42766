"""Vision models of transformers: classifiers, detectors, segmentation, depth, poses, videos, images with text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from isomorphic.inputs import Inputs
from studies.coverage.example import Example
from studies.coverage.people.entry import ENCODER_DECODER, Entry, entry, library, pixels, tokens

# The usual names of the sizes of a transformer, small.
SMALL: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
VIT: dict[str, Any] = {**SMALL, "image_size": 64, "patch_size": 16}
RESNET: dict[str, Any] = {"embedding_size": 16, "hidden_sizes": [32, 48, 64, 96], "depths": [1, 1, 1, 1]}
PYRAMID: dict[str, Any] = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 64, 96]}
DETR: dict[str, Any] = {**ENCODER_DECODER, "num_queries": 10}


def of_transformers(
    name: str, kind: str, config: dict[str, Any], inputs: Callable[[], Inputs], heads: int | None = None
) -> Entry:
    """Returns an entry of the class `kind` of transformers, built from keyword arguments of its configuration.

    Values that are ("ConfigClass", {…}) become configurations.
    """

    def example() -> Example:
        transformers = library("transformers")

        def made(value: Any) -> Any:
            if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], dict):
                return getattr(transformers, value[0])(**{key: made(part) for key, part in value[1].items()})
            return value

        model_class = getattr(transformers, kind)
        model = model_class(model_class.config_class(**{key: made(value) for key, value in config.items()}))
        return Example(model, inputs(), heads=heads)

    return entry("transformers", name, example)


def _frames() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 4, 3, 32, 32)}


_VIDEO: dict[str, Any] = {**SMALL, "image_size": 32, "num_frames": 4}
_CLIP_TEXT: dict[str, Any] = {**SMALL, "vocab_size": 100, "max_position_embeddings": 16}
_CLIP: dict[str, Any] = {"text_config": _CLIP_TEXT, "vision_config": VIT}
_SWIN: dict[str, Any] = {"image_size": 64, "embed_dim": 24, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4}
_DETR_BACKBONE = {
    "backbone_config": ("ResNetConfig", {**RESNET, "out_features": ["stage4"]}),
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
}
_RT_BACKBONE = (
    "RTDetrResNetConfig",
    {**RESNET, "layer_type": "bottleneck", "out_features": ["stage2", "stage3", "stage4"]},
)
_RT: dict[str, Any] = {
    "backbone_config": _RT_BACKBONE,
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [48, 64, 96],
    "encoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "d_model": 32,
    "decoder_in_channels": [32, 32, 32],
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64,
    "num_queries": 10,
    "num_denoising": 0,
    "anchor_image_size": None,
    "eval_size": None,
}
_DINO_BACKBONE = (
    "Dinov2Config",
    {
        **SMALL,
        "num_hidden_layers": 4,
        "image_size": 56,
        "patch_size": 14,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
        "reshape_hidden_states": False,
    },
)
_SWIN_BACKBONE = (
    "SwinConfig",
    {
        "image_size": 64,
        "embed_dim": 16,
        "depths": [1, 1, 1, 1],
        "num_heads": [2, 2, 4, 4],
        "window_size": 4,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    },
)

ENTRIES = [
    of_transformers("vit", "ViTForImageClassification", VIT, lambda: pixels(64)),
    of_transformers("deit", "DeiTForImageClassificationWithTeacher", VIT, lambda: pixels(64)),
    of_transformers("swin", "SwinForImageClassification", _SWIN, lambda: pixels(64)),
    of_transformers("swinv2", "Swinv2ForImageClassification", _SWIN, lambda: pixels(64)),
    of_transformers("convnext", "ConvNextForImageClassification", PYRAMID, lambda: pixels(64)),
    of_transformers("convnextv2", "ConvNextV2ForImageClassification", PYRAMID, lambda: pixels(64)),
    of_transformers("beit", "BeitForImageClassification", {**VIT, "vocab_size": 100}, lambda: pixels(64)),
    of_transformers(
        "data2vec-vision",
        "Data2VecVisionForImageClassification",
        {**VIT, "use_relative_position_bias": True},
        lambda: pixels(64),
    ),
    of_transformers("dinov2", "Dinov2ForImageClassification", VIT, lambda: pixels(64)),
    of_transformers("dinov2-registers", "Dinov2WithRegistersForImageClassification", VIT, lambda: pixels(64)),
    of_transformers("dinov3-vit", "DINOv3ViTModel", {**VIT, "num_register_tokens": 2}, lambda: pixels(64)),
    of_transformers("dinov3-convnext", "DINOv3ConvNextModel", PYRAMID, lambda: pixels(64)),
    of_transformers("ijepa", "IJepaForImageClassification", VIT, lambda: pixels(64)),
    of_transformers("vit-mae", "ViTMAEForPreTraining",
                    {**VIT, "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1,
                     "decoder_num_attention_heads": 4, "decoder_intermediate_size": 64},
                    lambda: pixels(64, noise=torch.rand(2, 16))),
    of_transformers("pvt", "PvtForImageClassification",
                    {"image_size": 64, "depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 64, 64],
                     "num_attention_heads": [1, 2, 4, 4], "mlp_ratios": [2, 2, 2, 2], "num_labels": 10},
                    lambda: pixels(64)),
    of_transformers("pvtv2", "PvtV2ForImageClassification",
                    {"image_size": 64, "depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 64, 64],
                     "num_attention_heads": [1, 2, 4, 4], "mlp_ratios": [2, 2, 2, 2]}, lambda: pixels(64)),
    of_transformers("mobilevit", "MobileViTForImageClassification",
                    {"image_size": 64, "hidden_sizes": [48, 64, 80], "neck_hidden_sizes": [8, 16, 24, 32, 48, 64, 96]},
                    lambda: pixels(64)),
    of_transformers("mobilevitv2", "MobileViTV2ForImageClassification",
                    {"image_size": 64, "width_multiplier": 0.5, "n_attn_blocks": [1, 1, 1]}, lambda: pixels(64)),
    of_transformers("mobilenet-v1", "MobileNetV1ForImageClassification", {"depth_multiplier": 0.25},
                    lambda: pixels(64)),
    of_transformers("mobilenet-v2", "MobileNetV2ForImageClassification", {"depth_multiplier": 0.35},
                    lambda: pixels(64)),
    of_transformers("resnet", "ResNetForImageClassification", RESNET, lambda: pixels(64)),
    of_transformers("regnet", "RegNetForImageClassification", {**RESNET, "groups_width": 16}, lambda: pixels(64)),
    of_transformers("bit", "BitForImageClassification", {**RESNET, "hidden_sizes": [32, 64, 64, 128], "num_groups": 8},
                    lambda: pixels(64)),
    of_transformers("efficientnet", "EfficientNetForImageClassification",
                    {"width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640}, lambda: pixels(64)),
    of_transformers("hgnetv2", "HGNetV2ForImageClassification", {}, lambda: pixels(64)),
    of_transformers("textnet", "TextNetForImageClassification", {}, lambda: pixels(64)),
    of_transformers("levit", "LevitForImageClassificationWithTeacher",
                    {"image_size": 64, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4],
                     "depths": [1, 1, 1], "key_dim": [8, 8, 8]}, lambda: pixels(64)),
    of_transformers("hiera", "HieraForImageClassification",
                    {"image_size": [64, 64], "embed_dim": 32, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8],
                     "masked_unit_size": [8, 8]}, lambda: pixels(64)),
    of_transformers("poolformer", "PoolFormerForImageClassification",
                    {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 64, 96]}, lambda: pixels(64)),
    of_transformers("focalnet", "FocalNetForImageClassification",
                    {"image_size": 64, "embed_dim": 24, "depths": [1, 1, 1, 1]}, lambda: pixels(64)),
    of_transformers("cvt", "CvtForImageClassification",
                    {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 2, 3]}, lambda: pixels(64)),
    of_transformers("swiftformer", "SwiftFormerForImageClassification", {}, lambda: pixels(64)),
    of_transformers("segformer", "SegformerForSemanticSegmentation",
                    {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 64, 64], "num_attention_heads": [1, 2, 4, 4],
                     "decoder_hidden_size": 32}, lambda: pixels(64)),
    of_transformers("mobilevit-deeplab", "MobileViTForSemanticSegmentation",
                    {"image_size": 64, "hidden_sizes": [48, 64, 80], "neck_hidden_sizes": [8, 16, 24, 32, 48, 64, 96],
                     "output_stride": 16, "aspp_out_channels": 32}, lambda: pixels(64)),
    of_transformers("upernet", "UperNetForSemanticSegmentation",
                    {"backbone_config": _SWIN_BACKBONE, "hidden_size": 32, "auxiliary_in_channels": 64,
                     "auxiliary_channels": 32, "use_auxiliary_head": True}, lambda: pixels(64)),
    of_transformers("maskformer", "MaskFormerForInstanceSegmentation",
                    {"backbone_config": _SWIN_BACKBONE, "fpn_feature_size": 32, "mask_feature_size": 32,
                     "decoder_config": ("DetrConfig", {**DETR, "d_model": 32})}, lambda: pixels(64)),
    of_transformers("mask2former", "Mask2FormerForUniversalSegmentation",
                    {"backbone_config": _SWIN_BACKBONE, "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32,
                     "encoder_feedforward_dim": 64, "dim_feedforward": 64, "encoder_layers": 2, "decoder_layers": 3,
                     "num_attention_heads": 4, "num_queries": 10}, lambda: pixels(64), heads=28),
    of_transformers("eomt", "EomtForUniversalSegmentation",
                    {**VIT, "num_hidden_layers": 4, "num_blocks": 2, "num_queries": 10, "num_upscale_blocks": 1,
                     "num_register_tokens": 0}, lambda: pixels(64)),
    of_transformers("detr", "DetrForObjectDetection", {**DETR, **_DETR_BACKBONE}, lambda: pixels(64)),
    of_transformers("conditional-detr", "ConditionalDetrForObjectDetection", {**DETR, **_DETR_BACKBONE},
                    lambda: pixels(64)),
    of_transformers("deformable-detr", "DeformableDetrForObjectDetection",
                    {**DETR, **_DETR_BACKBONE, "num_feature_levels": 3,
                     "backbone_config": ("ResNetConfig", {**RESNET, "out_features": ["stage2", "stage3", "stage4"]})},
                    lambda: pixels(64), heads=24),
    of_transformers("table-transformer", "TableTransformerForObjectDetection", {**DETR, **_DETR_BACKBONE},
                    lambda: pixels(64)),
    of_transformers("rt-detr", "RTDetrForObjectDetection", _RT, lambda: pixels(64), heads=20),
    of_transformers("rt-detr-v2", "RTDetrV2ForObjectDetection", _RT, lambda: pixels(64), heads=20),
    of_transformers("d-fine", "DFineForObjectDetection", _RT, lambda: pixels(64), heads=20),
    of_transformers("yolos", "YolosForObjectDetection",
                    {**SMALL, "image_size": [64, 64], "patch_size": 16, "num_detection_tokens": 10},
                    lambda: pixels(64)),
    of_transformers("owlvit", "OwlViTForObjectDetection",
                    {"text_config": _CLIP_TEXT, "vision_config": VIT, "projection_dim": 64},
                    lambda: pixels(64, **tokens())),
    of_transformers("dpt", "DPTForDepthEstimation",
                    {**VIT, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3],
                     "neck_hidden_sizes": [16, 32, 64, 64], "fusion_hidden_size": 32}, lambda: pixels(64)),
    of_transformers("glpn", "GLPNForDepthEstimation",
                    {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 64, 64], "num_attention_heads": [1, 2, 4, 4],
                     "decoder_hidden_size": 32}, lambda: pixels(64)),
    of_transformers("depth-anything", "DepthAnythingForDepthEstimation",
                    {"backbone_config": _DINO_BACKBONE, "patch_size": 14, "reassemble_hidden_size": 64,
                     "neck_hidden_sizes": [16, 32, 48, 64], "fusion_hidden_size": 32, "head_hidden_size": 16},
                    lambda: pixels(56)),
    of_transformers("vitpose", "VitPoseForPoseEstimation",
                    {"backbone_config": ("VitPoseBackboneConfig",
                                         {**SMALL, "image_size": [64, 48], "patch_size": [16, 16],
                                          "out_features": ["stage2"]}), "num_labels": 17},
                    lambda: {"pixel_values": torch.randn(2, 3, 64, 48)}),
    of_transformers("superpoint", "SuperPointForKeypointDetection",
                    {"encoder_hidden_sizes": [16, 16, 32, 32], "decoder_hidden_size": 32,
                     "keypoint_decoder_dim": 65, "descriptor_decoder_dim": 32}, lambda: pixels(64)),
    of_transformers("vitmatte", "VitMatteForImageMatting",
                    {"backbone_config": ("VitDetConfig", {**SMALL, "image_size": 64, "num_channels": 4,
                                                          "out_features": ["stage2"]}),
                     "hidden_size": 64, "convstream_hidden_sizes": [16, 32, 48],
                     "fusion_hidden_sizes": [64, 32, 16, 16]},
                    lambda: {"pixel_values": torch.randn(2, 4, 64, 64)}),
    of_transformers("swin2sr", "Swin2SRForImageSuperResolution",
                    {"image_size": 32, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4},
                    lambda: pixels(32)),
    of_transformers("videomae", "VideoMAEForVideoClassification", {**_VIDEO, "patch_size": 8}, _frames),
    of_transformers("timesformer", "TimesformerForVideoClassification", {**_VIDEO, "patch_size": 8}, _frames),
    of_transformers("vivit", "VivitForVideoClassification", {**_VIDEO, "tubelet_size": [2, 8, 8]}, _frames),
    of_transformers("clip", "CLIPModel", {**_CLIP, "projection_dim": 32}, lambda: pixels(64, **tokens())),
    of_transformers("siglip", "SiglipModel", _CLIP, lambda: pixels(64, input_ids=tokens()["input_ids"])),
    of_transformers("groupvit", "GroupViTModel",
                    {"text_config": _CLIP_TEXT,
                     "vision_config": {**VIT, "depths": [1, 1, 1], "num_group_tokens": [8, 4, 0],
                                       "num_output_groups": [8, 4, 0]},
                     "projection_dim": 32, "projection_intermediate_dim": 64}, lambda: pixels(64, **tokens())),
    of_transformers("vilt", "ViltForQuestionAnswering",
                    {**VIT, "vocab_size": 100, "num_labels": 10},
                    lambda: pixels(64, **tokens(), pixel_mask=torch.ones(2, 64, 64, dtype=torch.long))),
    of_transformers("blip", "BlipForConditionalGeneration",
                    {"text_config": {**_CLIP_TEXT, "encoder_hidden_size": 64, "bos_token_id": 1, "eos_token_id": 2,
                                     "pad_token_id": 0, "sep_token_id": 2},
                     "vision_config": VIT, "projection_dim": 32}, lambda: pixels(64, **tokens())),
]  # fmt: skip
