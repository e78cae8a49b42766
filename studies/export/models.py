"""The models that are pruned and exported: the paper's, the quickstart's, and ten and more of other libraries."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isomorphic.checkpoints.open import load_model
from isomorphic.commands.prune_flags import plan_options
from isomorphic.inputs import Inputs
from isomorphic.models import build_model, describe_model, example_inputs
from studies.coverage.example import Example
from studies.coverage.people import ENTRIES
from studies.speed.script_flags import PRUNING_SCRIPTS, read_pruning_script

SCRIPTS = ("deit_4.2G", "swin_4.5G", "convnext_4.2G", "resnet50_2.0G", "mobilenet_v2_0.15G")
# The quickstart's ConvNeXt, which it trains itself; its DeiT is in pretrained/.
QUICKSTART_CONVNEXT: dict[str, Any] = {"depths": [1, 1, 3, 1], "dims": [24, 48, 96, 192], "patch_size": 2}
HALF: dict[str, Any] = {"ratio": 0.5, "criterion": "l2"}
# Of studies/coverage/people; the outputs of transformers' and ultralytics' detectors are raw as they come.
OF_PEOPLE = (
    "torchvision/fcn_resnet50",
    "torchvision/deeplabv3_mobilenet_v3_large",
    "torchvision/lraspp_mobilenet_v3_large",
    "torchvision/r3d_18",
    "torchvision/swin3d_t",
    "transformers/vit",
    "transformers/dinov2",
    "transformers/segformer",
    "transformers/mask2former",
    "transformers/detr",
    "transformers/rt-detr",
    "transformers/clip",
    "transformers/bert",
    "ultralytics/yolov8n",
    "ultralytics/yolov8n-seg",
    "ultralytics/yolo11n",
    "segmentation-models-pytorch/Unet-resnet18",
    "segmentation-models-pytorch/DeepLabV3Plus-resnet18",
    "monai/unet",
    "vit-pytorch/simple-vit",
    "open-clip/vit",
    "diffusers/unet2d-condition",
)
DETECTORS = (
    "torchvision/fasterrcnn_resnet50_fpn",
    "torchvision/maskrcnn_resnet50_fpn",
    "torchvision/retinanet_resnet50_fpn",
    "torchvision/fcos_resnet50_fpn",
    "torchvision/ssd300_vgg16",
    "torchvision/ssdlite320_mobilenet_v3_large",
)


class RawOutputs(nn.Module):
    """A detector of torchvision up to what its heads say of every anchor, and without what it does to images before."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        parts: Any = detector
        self.backbone = parts.backbone
        self.head = parts.rpn.head if hasattr(parts, "rpn") else parts.head

    def forward(self, images: Tensor) -> Any:
        """Returns the heads' tensors for images (N, 3, H, W)."""
        return self.head(list(self.backbone(images).values()))


@dataclass(frozen=True)
class Case:
    """One model: how it is built, pruned and exported.

    Attributes:
        set: "paper", "quickstart", or the library.
        model: its name, which is told once.
        build: returns the dense model with its inputs.
        asked: of `iso.prune`.
        exported: pruned model -> what is exported of it, with its inputs; None: all of it.
        is_trained: it comes with weights that are kept.
    """

    set: str
    model: str
    build: Callable[[], Example]
    asked: Callable[[], dict[str, Any]]
    exported: Callable[[nn.Module], tuple[nn.Module, Inputs]] | None = None
    is_trained: bool = False

    def __reduce__(self) -> tuple[Any, ...]:  # another process finds it by its name: functions cannot be sent
        return find, (self.model,)


def find(model: str) -> Case:
    """Returns the case of a name."""
    return next(case for case in CASES if case.model == model)


def _of_script(name: str) -> Case:
    """A model as scripts/pruning/NAME.sh prunes it, with random weights and L1 scores."""
    script = PRUNING_SCRIPTS / f"{name}.sh"

    def build() -> Example:
        args = read_pruning_script(script)
        builder = "torchvision" if args.is_torchvision else "timm"
        spec = describe_model(args.model, builder=builder, kwargs=dict(args.model_kwargs))
        image = example_inputs(spec)
        return Example(build_model(spec), image, statistics=torch.randn(2, *image.shape[1:]))

    def asked() -> dict[str, Any]:
        options = dataclasses.replace(plan_options(read_pruning_script(script), None), criterion="l1")
        return {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}

    return Case("paper", name, build, asked)


def _quickstart_convnext() -> Example:
    spec = describe_model("convnext_atto", kwargs={**QUICKSTART_CONVNEXT, "num_classes": 10}, input_size=32)
    return Example(build_model(spec), example_inputs(spec))


def _quickstart_deit() -> Example:
    return Example(load_model("pretrained/digits_deit.safetensors"), torch.randn(1, 3, 32, 32))


def _of_quickstart(family: str, build: Callable[[], Example], share: int) -> Case:
    asked = {"macs": f"{share}%", "criterion": "l1"}
    return Case("quickstart", f"{family}-{share}%", build, lambda: asked, is_trained=family == "deit")


def _of_people(name: str, exported: Callable[[nn.Module], tuple[nn.Module, Inputs]] | None = None) -> Case:
    entry = next(entry for entry in ENTRIES if entry.model == name)
    return Case(entry.set, name, entry.example, lambda: HALF, exported)


def _raw(detector: nn.Module) -> tuple[nn.Module, Inputs]:
    size = 320 if "SSD" in type(detector).__name__ else 96
    return RawOutputs(detector), torch.randn(2, 3, size, size)


CASES: tuple[Case, ...] = (
    *(_of_script(name) for name in SCRIPTS),
    *(_of_quickstart("convnext", _quickstart_convnext, share) for share in (50, 25)),
    *(_of_quickstart("deit", _quickstart_deit, share) for share in (50, 25)),
    *(_of_people(name, _raw) for name in DETECTORS),
    *(_of_people(name) for name in OF_PEOPLE),
)
