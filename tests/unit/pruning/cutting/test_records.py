"""Records of widths after a cut: timm builds a new head from them, so they must be those of the layers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.mobilenetv3 import MobileNetV3
from torch import Tensor, nn

import isomorphic as iso
from isomorphic.models import build_skeleton, describe_model, example_inputs
from isomorphic.pruning.cutting.cut import cut
from isomorphic.pruning.cutting.records import input_width
from isomorphic.pruning.grouping.trace import trace_groups
from isomorphic.pruning.grouping.trial import halved
from isomorphic.skeletons import shape_copy
from tests.versions import IS_NEWEST_TIMM, IS_NEWEST_TORCH

LISTS = json.loads((Path(__file__).resolve().parents[4] / "benchmarks/families.json").read_text())
FAMILIES = {
    entry["model"]: entry for families in LISTS.values() for entry in families if entry.get("builder", "timm") == "timm"
}
# One for each way from the features to the classifier, with few layers; the families repeat them.
KINDS: dict[str, dict[str, Any]] = {
    "mobilenetv3_small_050": {},  # pool, convolution, classifier
    "dla34": {"levels": (1, 1, 1, 1, 1, 1)},  # a classifier that is a convolution
    "efficientvit_b0": {"depths": (1, 1, 1, 1)},  # convolution, pool, MLP in a head that knows its widths, too
    "mambaout_femto": {"depths": (1, 1, 1, 1)},  # norm and MLP in a head of timm's own
    "vgg11": {},  # two convolutions, as layers of which timm's VGG has its MLP
    "repvit_m1": {"depth": (1, 1, 1, 1)},  # the classifiers have a batch norm before their linear layer
    "crossvit_tiny_240": {"depth": ((1, 1, 0),)},  # two maps of features, with a classifier each
    "efficientvim_m1": {"depths": (1, 1, 1)},  # four of them, of three stages
    "vit_base_patch16_siglip_224": {"embed_dim": 48, "num_heads": 3, "depth": 1, "num_classes": 9},  # attention pooling
    "deit_tiny_distilled_patch16_224": {"depth": 1},  # `embed_dim` is what the head reads
    "swin_tiny_patch4_window7_224": {"depths": (1, 1, 1, 1)},  # `embed_dim` is not
}


def feature_width(model: Any, image: Tensor, dense: Any) -> int:
    """Channels of what `forward_features` gives: the dim that is as long as `num_features` in the dense model."""
    before, after = dense.forward_features(image), model.forward_features(image)
    if not isinstance(after, Tensor):
        return sum(widths(model))
    return after.shape[before.shape.index(dense.num_features)]


def widths(model: Any) -> list[int]:
    """Channels that the first layer of each classifier reads."""
    found = model.get_classifier()
    several = found if isinstance(found, (tuple, list, nn.ModuleList)) else [found]
    layers = [next((layer for layer in module.modules() if hasattr(layer, "weight")), None) for module in several]
    return [input_width(layer) for layer in layers if layer is not None]


def logits(model: Any, image: Tensor) -> Tensor:
    output = model.eval()(image)
    return output[0] if isinstance(output, tuple) else output


def check_records(name: str, kwargs: dict[str, Any], input_size: int | None = None) -> tuple[int, int]:
    """Half of every other set of groups goes, or half of the rest: neighbouring layers lose different shares.

    Returns the least `num_features` after a cut, and that of the dense model.
    """
    spec = describe_model(name, kwargs=kwargs, input_size=input_size)
    dense: Any = build_skeleton(spec)
    image = example_inputs(spec, "meta")
    graph = trace_groups(dense, image)
    joined = {group for names in graph.shrink_together for group in names}
    sets = [*graph.shrink_together, *((group.name,) for group in graph.groups if group.name not in joined)]
    models: list[Any] = []
    for chosen in (sets[::2], sets[1::2]):
        models.append(shape_copy(dense))
        cut(models[-1], graph, halved(graph, [group for names in chosen for group in names]))
    for model in models:
        assert model.num_features == feature_width(model, image, dense)
        heads = widths(model)  # some encoders have none
        assert not heads or model.head_hidden_size in (heads[0], sum(heads))
        model.reset_classifier(7)
        model.to("meta")  # where older versions of timm do not make the new layer
        assert logits(model, image).shape == (1, 7)
    return min(model.num_features for model in models), dense.num_features


@pytest.mark.parametrize("name", KINDS)
def test_records_of_widths_follow_a_cut_and_a_new_head_fits(name: str):
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    if name == "efficientvit_b0" and not IS_NEWEST_TORCH:
        pytest.skip("its autocast takes no meta device in this torch")
    if name == "repvit_m1" and not IS_NEWEST_TIMM:
        pytest.skip("this timm makes its new head of another width than the one that num_features tells")
    after, before = check_records(name, KINDS[name])
    assert after < before


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_records_of_every_family_follow_a_cut(name: str):
    check_records(name, FAMILIES[name]["kwargs"], FAMILIES[name]["input_size"])


@pytest.fixture
def mobilenet() -> tuple[Any, Tensor]:
    """A MobileNetV3 with a stage of 2 blocks and a convolution between features and classifier, and an image."""
    arch = [["ds_r1_k3_s1_e1_c8"], ["ir_r1_k3_s2_e3_c16"], ["cn_r1_k1_s1_c24"]]
    kwargs = {"block_args": decode_arch_def(arch), "num_features": 40, "stem_size": 8, "num_classes": 5}
    return MobileNetV3(**kwargs).eval(), torch.randn(1, 3, 32, 32)


@pytest.mark.parametrize("tracer", ["exact", "depgraph"])
def test_both_tracers_find_the_records(mobilenet: tuple[Any, Tensor], tracer: str):
    model, image = mobilenet
    pruned: Any = iso.prune(model, image, ratio=0.25, criterion="l2", ranking="local", tracer=tracer).model
    assert (pruned.num_features, pruned.head_hidden_size) == (18, 30) == (pruned.conv_head.in_channels, 30)
    assert (model.num_features, model.head_hidden_size) == (24, 40)
    pruned.reset_classifier(7)
    assert pruned(image).shape == (1, 7)


def test_records_follow_a_second_cut_and_survive_a_file(mobilenet: tuple[Any, Tensor], tmp_path: Path):
    model, image = mobilenet
    once = iso.prune(model, image, ratio=0.25, criterion="l2", ranking="local").model
    twice = iso.prune(once, image, ratio=0.5, criterion="l2", ranking="local")
    twice.save(tmp_path / "twice.safetensors")
    loaded: Any = iso.load_model(tmp_path / "twice.safetensors", model=copy.deepcopy(model))
    assert (loaded.num_features, loaded.head_hidden_size) == (9, 15)
    loaded.reset_classifier(7)
    assert loaded(image).shape == (1, 7)


def test_records_of_a_model_whose_forward_asks_for_values(mobilenet: tuple[Any, Tensor]):
    class Gated(MobileNetV3):
        def forward_features(self, x: Tensor) -> Tensor:
            return super().forward_features(x if float(x.sum()) else x + 1)

    model, image = mobilenet
    model.__class__ = Gated
    modes = [module.training for module in model.train().modules()]
    pruned: Any = iso.prune(model, image, ratio=0.25, criterion="l2", ranking="local").model
    assert (pruned.num_features, pruned.head_hidden_size) == (18, 30)
    assert "forward_features" not in {**vars(model), **vars(pruned)} and [m.training for m in model.modules()] == modes


def test_a_record_that_the_forward_needs_is_left_to_its_equation():
    """Its forward splits the map into as many channels as `num_features` says, twice over."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_features, self.head_hidden_size = 8, 16
            self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Linear(16, 5)

        def get_classifier(self) -> nn.Module:
            return self.head

        def forward_features(self, x: Tensor) -> Tensor:
            return self.stem(x).mean((2, 3)).view(-1, self.num_features)

        def forward(self, x: Tensor) -> Tensor:
            x = self.forward_features(x)
            return self.head(torch.cat([x, x.relu()], 1))

    image = torch.randn(2, 3, 4, 4)
    pruned: Any = iso.prune(Halves(), image, ratio=0.25, criterion="l2").model
    assert (pruned.num_features, pruned.head_hidden_size) == (6, 12)
    assert pruned(image).shape == (2, 5)
