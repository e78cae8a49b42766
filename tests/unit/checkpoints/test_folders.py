"""Folders as hubs have them: timm's own exports open alike, and a config is data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import _hub

from isomorphic.checkpoints.folders import describe_folder
from isomorphic.checkpoints.open import load_model, open_model
from isomorphic.errors import UserError
from tests.faults import one_line

VIT: dict[str, Any] = {"embed_dim": 24, "depth": 1, "num_heads": 3, "img_size": 32}


def exported(folder: Path, name: str = "test_resnet", *, safe: bool = True, **kwargs: Any) -> Any:
    """Returns the model that timm has written to a folder."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    _hub.save_for_hf(model, str(folder), safe_serialization=safe, model_args=kwargs)
    return model


def logits(model: Any, size: int = 32) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.ones(1, 3, size, size))


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_a_folder_that_timm_wrote(safe: bool, prefix: str, tmp_path: Path):
    model = exported(tmp_path, safe=safe, num_classes=7)
    opened, spec = open_model(f"{prefix}{tmp_path}")
    assert torch.equal(logits(opened), logits(model)) and spec.name == "test_resnet"
    assert spec.kwargs["num_classes"] == 7


def test_arguments_and_preprocessing_of_the_folder_are_kept(tmp_path: Path):
    model = exported(tmp_path, "vit_base_patch16_224", num_classes=3, **VIT)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"] |= {"mean": [0.1, 0.2, 0.3], "interpolation": "bilinear"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    opened, spec = open_model(tmp_path)
    assert torch.equal(logits(opened), logits(model))
    assert spec.kwargs.items() >= {**VIT, "num_classes": 3}.items()
    p = spec.preprocessing
    assert (p.input_size, p.mean, p.interpolation) == (32, (0.1, 0.2, 0.3), "bilinear")
    larger, spec = open_model(tmp_path, input_size=64, num_classes=5)
    assert logits(larger, 64).shape == (1, 5) and spec.kwargs["img_size"] == spec.preprocessing.input_size == 64


def test_names_of_transformers_wrapper_for_timm_and_the_older_config(tmp_path: Path):
    model = exported(tmp_path, num_classes=7)
    config = json.loads((tmp_path / "config.json").read_text())
    state = {f"timm_model.{name}": tensor for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    older = config["pretrained_cfg"] | {"architecture": config["architecture"], "num_classes": 7}
    for written in (config | {"model_type": "timm_wrapper"}, older):
        (tmp_path / "config.json").write_text(json.dumps(written))
        assert torch.equal(logits(load_model(tmp_path)), logits(model))


def test_weights_of_a_folder_for_a_model_by_name(tmp_path: Path):
    model = exported(tmp_path, num_classes=7)
    opened, spec = open_model("test_resnet", weights=tmp_path)
    assert torch.equal(logits(opened), logits(model)) and spec.kwargs == {"num_classes": 7}


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a model of transformers": (
        lambda config: config.update(architecture=None, architectures=["ViTForImageClassification"]),
        "holds a ViTForImageClassification of transformers: load that in Python",
    ),
    "no name": (lambda config: config.pop("architecture") and None, "holds not a model of timm"),
    "unknown name": (lambda config: config.update(architecture="hf-hub:x/y"), "unknown timm model: hf-hub:x/y"),
    "pickle to open": (
        lambda config: config.update(model_args={"checkpoint_path": "x.pth"}), "checkpoint_path is not an argument",
    ),
    "huge model": (lambda config: config.update(model_args={"channels": [10**9]}), "with channels beyond 100000"),
    "arguments of another type": (lambda config: config.update(model_args=3), "is not a whole file of JSON"),
    "seven means": (
        lambda config: config["pretrained_cfg"].update(mean=[0.5] * 7), "does not say how images are prepared",
    ),
    "another model": (lambda config: config.update(architecture="test_vit"), "does not fit the model"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_cannot_be_followed(case: str, tmp_path: Path):
    exported(tmp_path, num_classes=7)
    change, message = CONFIGS[case]
    config = json.loads((tmp_path / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as error:
        open_model(tmp_path)
    one_line(error)


def test_folders_without_a_config_and_with_a_damaged_one(tmp_path: Path):
    with pytest.raises(UserError, match=r"no config.json in the folder .*, which would say"):
        describe_folder(f"local-dir:{tmp_path}")
    for content in ("{", "[1]", "3"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match="is not a whole file of JSON with a model's name"):
            describe_folder(tmp_path)
