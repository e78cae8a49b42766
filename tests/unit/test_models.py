"""Model specs: what a name and its flags come to, and what is said where a builder refuses."""

from __future__ import annotations

import dataclasses
import json
import logging
import urllib.error
from pathlib import Path
from typing import Any, NoReturn

import huggingface_hub.constants
import pytest
import torch
import torch.hub
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_INCEPTION_MEAN

from isomorphic.errors import UserError
from isomorphic.models import (
    ModelSpec,
    at_most,
    build_model,
    build_skeleton,
    check_input_size,
    check_logits,
    describe_model,
    example_inputs,
    num_classes,
)
from isomorphic.provenance import file_sha256
from tests.faults import one_line

DEIT = "deit_tiny_distilled_patch16_224.fb_in1k"
SMALL = {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 3}
OWN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=5):
        super().__init__()
        self.head = nn.Linear(3, num_classes)

    def forward(self, x):
        return self.head(x.mean((2, 3)))

def plain(): return Net()
def classes(num_classes=5): return Net(num_classes)
def sized(img_size=48, input_size=64, num_classes=5): return Net(num_classes)
def input_sized(input_size): return Net()
def unsized(img_size=None, **kwargs): return Net(**kwargs)
def told(pretrained=True): return Net(7 if pretrained else 6)

def announced(num_classes=5, claim=9):
    net = Net(num_classes)
    net.num_classes = claim
    return net

def spatial(): return nn.Conv2d(3, 5, 1)

class Several(Net):
    def forward(self, x):
        return {"logits": super().forward(x)}

class Fixed(Net):
    def forward(self, x):
        return self.head(x.flatten(1))
"""


def refusal(name: str, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        spec = describe_model(name, **options)
        build_model(spec)
    message = str(error.value)
    assert message and "\n" not in message
    return message


# --- specs ---


@pytest.mark.parametrize(
    ("name", "builder", "interpolation"),
    [
        (DEIT, "timm", "bicubic"),
        ("convnext_base.fb_in1k", "timm", "bicubic"),
        ("swin_base_patch4_window7_224.ms_in1k", "timm", "bicubic"),
        ("resnet101.tv_in1k", "timm", "bilinear"),
        ("mobilenet_v2", "torchvision", "bilinear"),
    ],
)
def test_the_papers_models_are_evaluated_at_224_after_resizing_to_256(name: str, builder: str, interpolation: str):
    preprocessing = describe_model(name, builder=builder).preprocessing
    assert (preprocessing.input_size, preprocessing.resize_size) == (224, 256)
    assert preprocessing.interpolation == interpolation
    assert preprocessing.mean == IMAGENET_DEFAULT_MEAN


def test_other_means_are_the_models_own():
    assert describe_model("vit_base_patch16_224.augreg_in21k").preprocessing.mean == IMAGENET_INCEPTION_MEAN


def test_an_input_size_reaches_the_builders_that_fix_it():
    vit = describe_model("deit_tiny_patch16_224", input_size=112)
    assert vit.kwargs == {"img_size": 112}
    assert (vit.preprocessing.input_size, vit.preprocessing.resize_size) == (112, 128)
    assert build_model(vit)(torch.zeros(1, 3, 112, 112)).shape == (1, 1000)
    assert describe_model("deit_tiny_patch16_224", input_size=224).kwargs == {}
    convnext = describe_model("convnext_atto", input_size=112)
    assert convnext.kwargs == {} and convnext.preprocessing.resize_size == 128
    assert describe_model("mobilenet_v2", builder="torchvision", input_size=112).preprocessing.input_size == 112


def test_an_img_size_argument_sets_the_input_size():
    spec = describe_model("deit_tiny_patch16_224", kwargs={"img_size": 32})
    assert (spec.preprocessing.input_size, spec.preprocessing.resize_size) == (32, 37)
    assert example_inputs(spec).shape == (1, 3, 32, 32)


def test_classes_are_an_argument_that_explicit_arguments_override():
    assert describe_model("resnet18", num_classes=7).kwargs == {"num_classes": 7}
    assert describe_model("resnet18", kwargs={"num_classes": 5}, num_classes=7).kwargs == {"num_classes": 5}
    given = {"in_chans": 3}
    describe_model("resnet18", kwargs=given, num_classes=7)
    assert given == {"in_chans": 3}


def test_specs_survive_json():
    spec = describe_model("convnext_atto", kwargs={"depths": [1, 1, 2, 1], "drop_path_rate": 0.1}, input_size=64)
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


# --- blocks that are gone ---


SHORT = {"depths": [1, 1, 3, 1], "dims": [8, 8, 8, 8]}


def test_kept_blocks_are_part_of_the_spec_and_count_in_the_dense_model():
    spec = describe_model("convnext_atto", kwargs=SHORT).keeping({"stages.2.blocks": (0, 2)})
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert [name for name, _ in build_model(spec).get_submodule("stages.2.blocks").named_children()] == ["0", "1"]
    shorter = spec.keeping({"stages.2.blocks": [1], "stages.3.blocks": [0]})
    assert shorter.kept_blocks == {"stages.2.blocks": (2,), "stages.3.blocks": (0,)}
    assert "kept_blocks" not in describe_model("convnext_atto").to_dict()


@pytest.mark.parametrize(
    "kept",
    [
        {"stages.2.blocks": (0, 3)},
        {"stages.2.blocks": (1, 0)},
        {"stages.2.blocks": (-1,)},
        {"stem.0": (0,)},
        {"x": (0,)},
    ],
)
def test_blocks_that_the_model_does_not_have(kept: dict[str, tuple[int, ...]]):
    spec = dataclasses.replace(describe_model("convnext_atto", kwargs=SHORT), kept_blocks=kept)
    with pytest.raises(UserError, match="convnext_atto does not have the blocks that are to be kept"):
        build_model(spec)


# --- masked parameters ---


def test_masked_parameters_are_named_as_in_the_model_that_is_left():
    spec = describe_model("convnext_atto", kwargs=SHORT).masking(["stages.2.blocks.1.mlp.fc1.weight", "head.fc.weight"])
    again = spec.masking(["head.fc.weight", "stages.2.blocks.2.mlp.fc1.weight"])
    assert again.masked == (*spec.masked, "stages.2.blocks.2.mlp.fc1.weight")
    left = again.keeping({"stages.2.blocks": (0, 2), "stages.3.blocks": (0,)})
    assert left.masked == ("head.fc.weight", "stages.2.blocks.1.mlp.fc1.weight")
    assert left.keeping({"stages.2.blocks": (1,)}).masked == ("head.fc.weight", "stages.2.blocks.0.mlp.fc1.weight")
    assert "masked" not in spec.to_dict()


def test_lists_within_lists_lose_blocks_under_their_old_names():
    spec = ModelSpec("timm", "any", masked=("a.2.b.3.weight", "a.0.b.3.weight", "a.2.b.0.weight", "a.2.weight"))
    assert spec.keeping({"a.2.b": (1, 3), "a": (1, 2)}).masked == ("a.1.b.1.weight", "a.1.weight")


def test_masks_in_blocks_without_numbers_are_refused():
    spec = describe_model("vit_b_16", builder="torchvision")
    masked = spec.masking(["encoder.layers.encoder_layer_3.mlp.0.weight"])
    with pytest.raises(UserError, match="cannot remove blocks around encoder.layers.encoder_layer_3.mlp.0.weight"):
        masked.keeping({"encoder.layers": tuple(range(11))})


# --- a user's own file ---


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "own.py").write_text(OWN)
    return str(tmp_path / "own.py")


def test_a_file_is_described_without_its_folder_and_prepared_as_torchvisions_models(own: str):
    spec = describe_model(f"{own}:plain", builder="file")
    assert (spec.builder, spec.name, spec.kwargs, spec.sha256) == ("file", "own.py:plain", {}, file_sha256(own))
    assert spec.preprocessing == describe_model("mobilenet_v2", builder="torchvision").preprocessing
    assert not build_model(spec).training
    stored = json.loads(json.dumps(spec.to_dict()))
    assert stored.keys() == {"builder", "name", "kwargs", "preprocessing", "sha256"} and own not in json.dumps(stored)
    again = ModelSpec.from_dict(stored)
    assert again == spec and again.factory is None
    with pytest.raises(UserError, match="own.py:plain is code of its user's, who has to name the file"):
        build_model(again)


@pytest.mark.parametrize(
    ("factory", "options", "kwargs", "size"),
    [
        ("plain", {}, {}, 224),
        ("plain", {"input_size": 32, "num_classes": 7}, {}, 32),
        ("classes", {"input_size": 32, "num_classes": 7}, {"num_classes": 7}, 32),
        ("classes", {"num_classes": 7, "kwargs": {"num_classes": 8}}, {"num_classes": 8}, 224),
        ("sized", {}, {}, 48),
        ("sized", {"input_size": 32}, {"img_size": 32}, 32),
        ("sized", {"kwargs": {"img_size": 96}}, {"img_size": 96}, 96),
        ("input_sized", {}, {}, 224),
        ("input_sized", {"input_size": 32}, {"input_size": 32}, 32),
        ("unsized", {"num_classes": 7}, {}, 224),
    ],
)
def test_a_factory_gets_the_size_and_the_classes_where_it_names_them(
    factory: str, options: dict[str, Any], kwargs: dict[str, Any], size: int, own: str
):
    spec = describe_model(f"{own}:{factory}", builder="file", **options)
    assert spec.kwargs == kwargs
    assert (spec.preprocessing.input_size, spec.preprocessing.resize_size) == (size, round(size * 256 / 224))


def test_a_factory_hears_whether_weights_are_wanted(own: str):
    spec = describe_model(f"{own}:told", builder="file")
    assert spec.kwargs == {}
    assert num_classes(build_model(spec, pretrained=True), spec) == 7
    assert num_classes(build_model(spec), spec) == 6


def test_the_classes_of_a_users_model_are_its_own_word_or_its_logits(own: str):
    def classes(factory: str, **kwargs: int) -> int:
        spec = describe_model(f"{own}:{factory}", builder="file", kwargs=kwargs)
        model = build_model(spec).train()
        count = num_classes(model, spec)
        assert model.training
        return count

    assert classes("Net") == 5 and classes("classes", num_classes=7) == 7
    assert classes("announced") == 9 and classes("announced", num_classes=7) == 9


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("spatial", r"own.py:spatial is no classifier: for one image it returns \(1, 5, 224, 224\), not logits"),
        ("Several", "own.py:Several is no classifier: for one image it returns dict, not logits"),
        ("Fixed", "own.py:Fixed does not take images of 224×224 pixels: .*shapes cannot be multiplied"),
    ],
)
def test_users_models_that_are_no_classifiers(factory: str, message: str, own: str):
    spec = describe_model(f"{own}:{factory}", builder="file")
    with pytest.raises(UserError, match=message) as error:
        num_classes(build_model(spec), spec)
    one_line(error)


@pytest.mark.parametrize(
    ("factory", "kwargs", "message"),
    [
        ("sized", {"img_size": [32, 48]}, "img_size=[32, 48]: give one whole number"),
        ("plain", {"colour": 3}, "cannot build own.py:plain with {'colour': 3}: TypeError: plain() got an unexpected"),
        ("told", {"pretrained": True}, "pretrained is no argument to give (see --no-pretrained)"),
        ("plain", {"checkpoint_path": "weights.pth"}, "checkpoint_path is not an argument"),
        ("nonesuch", {}, "'nonesuch' is not in it"),
    ],
)
def test_arguments_that_a_users_file_refuses(factory: str, kwargs: dict[str, Any], message: str, own: str):
    assert message in refusal(f"{own}:{factory}", builder="file", kwargs=kwargs)


# --- building ---


def test_models_come_in_eval_mode_with_their_classes():
    spec = describe_model(DEIT, kwargs=SMALL, num_classes=7)
    model = build_model(spec)
    assert not model.training and num_classes(model, spec) == 7
    assert model(example_inputs(spec)).shape == (1, 7)


def test_torchvision_models_have_the_classes_of_their_spec():
    spec = describe_model("mobilenet_v2", builder="torchvision", num_classes=7)
    model = build_model(spec)
    assert num_classes(model, spec) == 7 == model(example_inputs(spec)).shape[1]
    assert num_classes(model, describe_model("mobilenet_v2", builder="torchvision")) == 1000


def test_example_inputs_are_the_same_each_time_and_leave_the_random_state_alone():
    spec, before = describe_model("resnet18", input_size=32), torch.get_rng_state()
    assert torch.equal(example_inputs(spec), example_inputs(spec))
    assert torch.equal(torch.get_rng_state(), before)
    assert example_inputs(spec, "meta").shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nonesuch", {}, "unknown timm model: nonesuch "),
        ("resnet18.nonesuch", {}, "unknown timm model: resnet18.nonesuch "),
        ("", {}, "unknown timm model"),
        ("hf-hub:somebody/model", {}, "unknown timm model: hf-hub:somebody/model"),
        ("local-dir:/somewhere", {}, "unknown timm model: local-dir:/somewhere"),
        ("deit_tiny_patch16_224", {"builder": "torchvision"}, "unknown torchvision model: deit_tiny_patch16_224"),
        ("resnet18", {"builder": "pickle"}, "unknown model builder 'pickle': one of timm, torchvision, file"),
        ("resnet18", {"builder": "file"}, "resnet18 is not path/to/file.py:factory"),
    ],
)
def test_unknown_models(name: str, options: dict[str, Any], message: str):
    assert message in refusal(name, **options)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        (DEIT, {"colour": 3}, "unexpected keyword argument 'colour'"),
        (DEIT, {"num_heads": 5}, "divisible"),
        (DEIT, {"patch_size": 0}, "zero"),
        (DEIT, {"norm_layer": "nonesuch"}, "nonesuch"),
        (DEIT, {"embed_dim": "wide"}, "'embed_dim': 'wide'"),
        (DEIT, {"img_size": [32, 48]}, "img_size=[32, 48]: give one whole number"),
        ("convnext_atto", {"depths": []}, "'depths': []"),
        ("convnext_atto", {"depths": 3}, "'depths': 3"),
        ("convnext_atto", {"dims": [10**14, 1, 1, 1]}, "'dims'"),
        (DEIT, {"pretrained": True}, "'pretrained'"),
        (DEIT, {"checkpoint_path": "weights.pth"}, "checkpoint_path is not an argument"),
    ],
    ids=str,
)
def test_arguments_that_the_builder_refuses(name: str, kwargs: dict[str, Any], message: str):
    said = refusal(name, kwargs=kwargs)
    assert name in said or "img_size" in said
    assert message in said


def test_torchvisions_refusals():
    assert "unexpected keyword argument" in refusal("resnet18", builder="torchvision", kwargs={"colour": 3})
    for key in ("weights", "weights_backbone"):
        said = refusal("resnet18", builder="torchvision", kwargs={key: "DEFAULT"})
        assert f"{key} is not an argument that a model may be built with" in said
    for name in ("fcn_resnet50", "fasterrcnn_resnet50_fpn", "quantized_mobilenet_v2", "r3d_18"):  # some fetch weights
        assert f"unknown torchvision model: {name}" in refusal(name, builder="torchvision")


# --- what a spec may say, and a model answer ---


@pytest.mark.parametrize(
    "change",
    [
        {"mean": [0, 0]}, {"mean": [0] * 7, "std": [1] * 7}, {"std": [0, 1, 1]}, {"std": [1, 1, float("inf")]},
        {"mean": [float("nan"), 0, 0]}, {"input_size": 0}, {"input_size": -5}, {"input_size": 10**6},
        {"input_size": float("inf")}, {"resize_size": 10**9}, {"resize_size": 0},
    ],
    ids=str,
)  # fmt: skip
def test_preprocessing_that_cannot_be(change: dict[str, Any]):
    stored = describe_model("resnet18").to_dict()
    ModelSpec.from_dict(stored)
    stored["preprocessing"] |= change
    with pytest.raises((ValueError, OverflowError)):
        ModelSpec.from_dict(stored)


def test_blocks_without_an_end():
    stored = describe_model("resnet18").to_dict() | {"kept_blocks": {"layer1": [float("inf")]}}
    with pytest.raises(OverflowError):
        ModelSpec.from_dict(stored)


@pytest.mark.parametrize(
    ("answer", "told"),
    [(torch.zeros(1, 9), r"\(1, 9\)"), (torch.zeros(1, 10, 2), r"\(1, 10, 2\)"), (None, "NoneType")],
    ids=["width", "shape", "type"],
)
def test_answers_that_are_no_logits(answer: Any, told: str):
    check_logits(torch.zeros(1, 10), 10, "it")
    with pytest.raises(UserError, match=f"it is no classifier of 10 classes: for one image it returns {told}, not"):
        check_logits(answer, 10, "it")


def test_a_model_without_parameters_takes_images():
    assert check_input_size(torch.nn.Flatten(), 2, "it").shape == (1, 12)


@pytest.mark.parametrize(("modules", "numbers"), [(5, 10**9), (10**5, 10**4)])
def test_building_stops_at_a_bound_and_the_bound_ends_with_it(modules: int, numbers: int):
    spec = describe_model("resnet18", kwargs={"channels": [4, 4, 8, 8]})
    with pytest.raises(UserError, match="^it: its dense model has more than") as error, at_most(modules, numbers, "it"):
        build_skeleton(spec)
    one_line(error)
    with at_most(10**5, 10**9, "it"):
        build_skeleton(spec)
    build_model(spec)


def test_a_hub_out_of_reach_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    level = logging.getLogger("huggingface_hub").level
    spec = describe_model(DEIT, kwargs={"cache_dir": str(tmp_path)})
    with pytest.raises(UserError, match=f"cannot get the pretrained weights of {DEIT}.*--no-pretrained") as error:
        build_model(spec, pretrained=True)
    assert "\n" not in str(error.value)
    assert logging.getLogger("huggingface_hub").level == level


def test_torchvisions_weights_out_of_reach_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unreachable(*_: Any, **__: Any) -> NoReturn:
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    with pytest.raises(UserError, match="cannot get the pretrained weights of resnet18") as error:
        build_model(describe_model("resnet18", builder="torchvision"), pretrained=True)
    assert "\n" not in str(error.value)


def test_models_without_pretrained_weights():
    with pytest.raises(UserError, match="cannot build convnext_atto_rms.*[Nn]o pretrained weights") as error:
        build_model(describe_model("convnext_atto_rms"), pretrained=True)
    assert "\n" not in str(error.value)
