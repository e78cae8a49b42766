"""Model specs: what a name and its flags come to, and what is said where a builder refuses."""

from __future__ import annotations

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
from isomorphic.models import ModelSpec, build_model, describe_model, example_inputs, num_classes

DEIT = "deit_tiny_distilled_patch16_224.fb_in1k"
SMALL = {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 3}


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
        ("resnet18", {"builder": "file"}, "unknown model builder 'file'"),
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
    assert "'weights'" in refusal("resnet18", builder="torchvision", kwargs={"weights": "DEFAULT"})


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
