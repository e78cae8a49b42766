"""A trace depends on nothing that its process did before: models of many libraries, several times in one process."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from isomorphic.inputs import call
from isomorphic.pruning.grouping.trace import trace_groups
from isomorphic.pruning.groups import ChannelGraph
from studies.coverage.model import Family
from studies.coverage.people import ENTRIES
from studies.coverage.people.entry import IMPORTED_AS

FAMILIES = [
    Family("timm", "deit_tiny_patch16_224", {"depth": 2, "embed_dim": 48, "num_heads": 3}, 32),
    Family("timm", "swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": (1, 1, 1, 1), "window_size": 4}, 128),
    Family("timm", "convnext_atto", {}, 32),
    Family("torchvision", "vit_b_16", {}, 224, "torchvision"),
]
NAMES = (
    "transformers/beit", "transformers/dinov3-vit", "transformers/swinv2", "transformers/segformer",
    "torchvision/lraspp_mobilenet_v3_large", "torchvision/ssdlite320_mobilenet_v3_large",
    "ultralytics/yolov8n", "ultralytics/yolo12n", "segmentation-models-pytorch/Unet-resnet18",
    "monai/dynunet-supervised", "monai/vit", "vit-pytorch/simple-vit", "vit-pytorch/max-vit", "open-clip/vit",
    "diffusers/dit", "pyg/gat",
    "plain/vae", "plain/transformer", "einops/mixer", "einops/attentive-unet", "peft/bert-lora",
)  # fmt: skip
PEOPLE = [entry for entry in ENTRIES if entry.model in NAMES]
QUICK = {"plain/vae", "plain/transformer", "deit_tiny_patch16_224"}  # of the small ones, that need no library


def groups(graph: ChannelGraph) -> list[Any]:
    """All that a plan and a cut would be made of."""
    found: list[Any] = [
        (group.name, group.num_units, [(member.name, member.dim, member.index.tolist()) for member in group.members])
        for group in graph.groups
    ]
    return [*found, sorted(graph.frozen), [group.name for group in graph.attention]]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.model, marks=() if case.model in QUICK else pytest.mark.slow)
     for case in (*FAMILIES, *PEOPLE)],
)  # fmt: skip
def test_a_trace_repeats_itself_after_traces_and_forwards(case: Any):
    library: str = IMPORTED_AS.get(case.set) or case.set
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{case.set} is not installed (studies/coverage/requirements.txt)")
    torch.manual_seed(0)
    example = case.example()
    model = example.model.eval()
    first = groups(trace_groups(model, example.inputs))
    assert len(first) > 2
    assert groups(trace_groups(model, example.inputs)) == first
    call(model, example.inputs)
    assert groups(trace_groups(model, example.inputs)) == first, "after a forward in eval mode"
    call(model.train(), example.training_inputs)
    assert groups(trace_groups(model.eval(), example.inputs)) == first, "after a forward in train mode"


def test_all_names_are_in_the_list():
    assert {entry.model for entry in PEOPLE} == set(NAMES) and len(NAMES) >= 20
