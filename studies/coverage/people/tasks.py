"""Detection, segmentation and video of torchvision, YOLO, and the segmentation networks of one library of these."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from studies.coverage.example import Example
from studies.coverage.people.entry import Entry, entry, images, library


def _targets(size: int, masks: bool, keypoints: int) -> list[dict[str, Tensor]]:
    """One object on each of two images."""
    target = {"boxes": torch.tensor([[4.0, 4.0, size / 2, size / 2]]), "labels": torch.tensor([1])}
    if masks:
        target["masks"] = torch.zeros(1, size, size, dtype=torch.uint8)
        target["masks"][:, 4 : size // 2, 4 : size // 2] = 1
    if keypoints:
        target["keypoints"] = torch.cat([torch.rand(1, keypoints, 2) * size / 2, torch.ones(1, keypoints, 1)], dim=2)
    return [target, dict(target)]


def _detector(name: str, size: int = 96, masks: bool = False, keypoints: int = 0, **options: Any) -> Entry:
    """A detector of torchvision: a list of images, and in train mode their objects."""

    def example() -> Example:
        import torchvision

        build = getattr(torchvision.models.detection, name)
        fixed = name.startswith("ssd")  # which resizes to its own size
        sizes = {} if fixed else {"min_size": size, "max_size": size}
        model = build(weights=None, weights_backbone=None, num_classes=5, **sizes, **options)
        both = [*images(size)]
        return Example(model, (both[:1],), training=(both, _targets(size, masks, keypoints)))

    return entry("torchvision", name, example)


def _segmenter(name: str) -> Entry:
    def example() -> Example:
        import torchvision

        build = getattr(torchvision.models.segmentation, name)
        more = {} if name.startswith("lraspp") else {"aux_loss": True}
        return Example(build(weights=None, weights_backbone=None, num_classes=5, **more), images(64))

    return entry("torchvision", name, example)


def _video(name: str, frames: int, size: int, **options: Any) -> Entry:
    def example() -> Example:
        import torchvision

        model = getattr(torchvision.models.video, name)(weights=None, num_classes=10, **options)
        return Example(model, torch.randn(2, 3, frames, size, size))

    return entry("torchvision", name, example)


def _raft() -> Example:
    import torchvision

    model = torchvision.models.optical_flow.raft_small(weights=None)
    return Example(model, {"image1": images(128), "image2": images(128), "num_flow_updates": 2})


def _yolo(file: str, kind: str = "DetectionModel", size: int = 64, **options: Any) -> Entry:
    """A model of ultralytics by its configuration, which names the smallest of a family."""

    def example() -> Example:
        os.environ.setdefault("YOLO_OFFLINE", "true")
        tasks = library("ultralytics.nn.tasks")

        return Example(getattr(tasks, kind)(f"{file}.yaml", verbose=False, **options), images(size))

    return entry("ultralytics", file, example)


def _smp(kind: str, encoder: str, name: str = "", size: int = 64, **options: Any) -> Entry:
    """A network of segmentation-models-pytorch."""

    def example() -> Example:
        smp = library("segmentation_models_pytorch")

        model = getattr(smp, kind)(encoder_name=encoder, encoder_weights=None, classes=3, **options)
        return Example(model, images(size))

    return entry("segmentation-models-pytorch", name or f"{kind}-{encoder}", example)


_CLASSIFIED: dict[str, Any] = {"aux_params": {"classes": 4, "dropout": 0.1}}

ENTRIES = [
    _detector("fasterrcnn_resnet50_fpn"),
    _detector("fasterrcnn_resnet50_fpn_v2"),
    _detector("fasterrcnn_mobilenet_v3_large_320_fpn"),
    _detector("maskrcnn_resnet50_fpn", masks=True),
    _detector("keypointrcnn_resnet50_fpn", keypoints=17),
    _detector("retinanet_resnet50_fpn"),
    _detector("fcos_resnet50_fpn"),
    _detector("ssd300_vgg16"),
    _detector("ssdlite320_mobilenet_v3_large"),
    _segmenter("fcn_resnet50"),
    _segmenter("deeplabv3_resnet50"),
    _segmenter("deeplabv3_mobilenet_v3_large"),
    _segmenter("lraspp_mobilenet_v3_large"),
    _video("r3d_18", 8, 32),
    _video("mc3_18", 8, 32),
    _video("r2plus1d_18", 8, 32),
    _video("s3d", 16, 224),
    _video("mvit_v1_b", 16, 224),
    _video("swin3d_t", 4, 64),
    entry("torchvision", "raft_small", _raft),
    _yolo("yolov5n"),
    _yolo("yolov8n"),
    _yolo("yolov8n-seg", "SegmentationModel"),
    _yolo("yolov8n-pose", "PoseModel"),
    _yolo("yolov8n-obb", "OBBModel"),
    _yolo("yolov8n-cls", "ClassificationModel"),
    _yolo("yolov8n-ghost"),
    _yolo("yolov9t"),
    _yolo("yolov10n"),
    _yolo("yolo11n"),
    _yolo("yolo11n-seg", "SegmentationModel"),
    _yolo("yolo11n-cls", "ClassificationModel"),
    _yolo("yolo12n"),
    _yolo("yolo26n"),
    _smp("Unet", "resnet18"),
    _smp("Unet", "mit_b0"),
    _smp("Unet", "efficientnet-b0"),
    _smp("Unet", "mobilenet_v2", name="Unet-scse", decoder_attention_type="scse", **_CLASSIFIED),
    _smp("UnetPlusPlus", "resnet18"),
    _smp("MAnet", "resnet18"),
    _smp("Linknet", "resnet18"),
    _smp("FPN", "resnet34"),
    _smp("FPN", "mit_b0"),
    _smp("PSPNet", "resnet18"),
    _smp("PAN", "resnet18", size=128),
    _smp("DeepLabV3", "resnet18"),
    _smp("DeepLabV3Plus", "resnet18"),
    _smp("DeepLabV3Plus", "tu-mobilenetv3_small_100"),
    _smp("UPerNet", "resnet18"),
    _smp("UPerNet", "tu-convnext_atto"),
    _smp("Segformer", "mit_b0"),
    _smp("DPT", "tu-vit_tiny_patch16_224", dynamic_img_size=True),
]
