"""Filling what is built: with the file's head, with what a name may stand for, and with nothing left random unasked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from isomorphic.checkpoints.open import load_model, open_model
from isomorphic.checkpoints.save import save_model
from isomorphic.errors import UserError
from isomorphic.models import build_model, describe_model
from tests.faults import one_line
from tests.unit.checkpoints.conftest import VIT, masked_vit, pruned

TINY_VIT: dict[str, Any] = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3}


def random_model(name: str, builder: str = "timm", **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(describe_model(name, builder=builder, kwargs=kwargs))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def logits(model: nn.Module, size: int = 32) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.ones(1, 3, size, size))


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize("suffix", ["pth", "ckpt", "bin", "safetensors"])
def test_files_of_every_ending(suffix: str, tmp_path: Path):
    model = random_model("test_resnet", num_classes=5)
    path = tmp_path / f"w.{suffix}"
    state = {f"model.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    if suffix == "safetensors":
        save_file(state, path)
    else:
        saved({"state_dict": state, "best": np.float64(1), "hyper_parameters": {"lr": 0.1}}, path)
    for options in ({"source": "test_resnet", "weights": path}, {"source": path, "name": "test_resnet"}):
        opened, spec = open_model(**options)  # type: ignore[arg-type]
        assert torch.equal(logits(opened), logits(model)) and spec.kwargs == {"num_classes": 5}


def test_tensors_alone_need_the_name_of_their_model(tmp_path: Path):
    save_file(random_model("test_resnet").state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="holds tensors but no model structure: .*--model NAME --checkpoint"):
        load_model(tmp_path / "w.safetensors")


def test_a_head_that_the_file_has_not_is_an_error_unless_a_new_one_is_asked_for(tmp_path: Path):
    model = random_model("test_resnet", num_classes=5)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("fc.")}
    path, lines = saved(state, tmp_path / "w.pth"), []
    with pytest.raises(
        UserError, match="w.pth has no head for test_resnet, whose fc.weight, .*--num-classes N"
    ) as error:
        open_model("test_resnet", weights=path)
    one_line(error)
    opened, spec = open_model("test_resnet", weights=path, num_classes=3, tell=lines.append)
    assert lines == [f"{path} has no head: fc.weight, fc.bias are random"] and spec.kwargs == {"num_classes": 3}
    assert torch.equal(opened.get_parameter("conv1.0.weight"), model.get_parameter("conv1.0.weight"))


def test_a_head_of_another_width_is_the_files_unless_another_is_asked_for(tmp_path: Path):
    path = saved(random_model("test_resnet", num_classes=5).state_dict(), tmp_path / "w.pth")
    lines: list[str] = []
    assert open_model("test_resnet", weights=path, num_classes=5, tell=lines.append)[1].kwargs == {"num_classes": 5}
    assert lines == []
    assert open_model("test_resnet", weights=path, num_classes=3, tell=lines.append)[1].kwargs == {"num_classes": 3}
    assert lines == ["New head for 3 classes in place of 5: test_resnet keeps its other weights, these are random"]
    with pytest.raises(UserError, match="has a head for 5 classes, .*num_classes=3: leave that out") as error:
        open_model("test_resnet", weights=path, kwargs={"num_classes": 3})
    one_line(error)


def test_weights_for_a_pruned_model_of_a_checkpoint(tmp_path: Path):
    save_model(tmp_path / "pruned.safetensors", pruned(VIT), VIT, provenance={})
    other = pruned(VIT)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    path = saved({"model": {f"module.{name}": value for name, value in other.state_dict().items()}}, tmp_path / "w.pth")
    opened, spec = open_model(tmp_path / "pruned.safetensors", weights=path)
    assert spec == VIT and torch.equal(logits(opened, 16), logits(other, 16))
    opened, spec = open_model(tmp_path / "pruned.safetensors", weights=path, num_classes=3)
    assert logits(opened, 16).shape == (1, 3) and spec.kwargs["num_classes"] == 3


def test_masks_of_the_file_come_along(tmp_path: Path):
    model, masked = masked_vit()
    save_model(tmp_path / "masked.safetensors", model, masked, provenance={})
    _, spec = open_model(VIT.name, kwargs=VIT.kwargs, weights=tmp_path / "masked.safetensors")
    assert spec.masked == masked.masked and spec.masked


def test_what_else_a_name_may_stand_for(tmp_path: Path):
    """torchvision's model of that name, and MAE's finetuned ViT, which pools the mean of all patches."""
    published = random_model("efficientnet_b0", "torchvision", num_classes=3)
    lines: list[str] = []
    path = saved({"model": published.state_dict()}, tmp_path / "tv.pth")
    opened, spec = open_model("efficientnet_b0", weights=path, tell=lines.append)
    assert spec.builder == "torchvision" and torch.equal(logits(opened), logits(published))
    assert isinstance(opened, torchvision.models.EfficientNet)
    mae = random_model("vit_base_patch16_224", **TINY_VIT, global_pool="avg", num_classes=3)
    path = saved({"model": mae.state_dict()}, tmp_path / "mae.pth")
    opened, spec = open_model("vit_base_patch16_224", kwargs=TINY_VIT, weights=path, tell=lines.append)
    assert spec.kwargs == {**TINY_VIT, "global_pool": "avg", "num_classes": 3}
    assert torch.equal(logits(opened), logits(mae))
    assert [line.partition(" is of ")[2] for line in lines] == [
        "torchvision's efficientnet_b0, which is what is built",
        "timm's vit_base_patch16_224 with global_pool=avg, which is what is built",
    ]
    with pytest.raises(UserError, match="does not fit the model: conv1.weight is missing"):
        open_model("resnet18", weights=path)


@pytest.mark.parametrize("where", ["arch", "args", "hyper_parameters"])
def test_a_file_may_tell_its_model(where: str, tmp_path: Path):
    from argparse import Namespace

    told: dict[str, Any] = {"arch": "test_resnet", "args": Namespace(model="test_resnet"), "hyper_parameters": {}}
    told["hyper_parameters"] = {"model_name": "test_resnet"}
    model = random_model("test_resnet", num_classes=5)
    path = saved({"state_dict": model.state_dict(), where: told[where]}, tmp_path / "w.pth")
    assert torch.equal(logits(load_model(path)), logits(model))
    tv = random_model("squeezenet1_1", "torchvision", num_classes=3)
    path = saved({"model": tv.state_dict(), "args": Namespace(model="squeezenet1_1")}, tmp_path / "tv.pth")
    opened, spec = open_model(path)
    assert (spec.builder, spec.kwargs) == ("torchvision", {"num_classes": 3})
    assert torch.equal(logits(opened, 64), logits(tv, 64))


def test_a_users_own_model_takes_the_files_width(tmp_path: Path):
    file = tmp_path / "own.py"
    file.write_text(
        "from torch import nn\n"
        "def build(num_classes=7):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes))\n"
    )
    state = {"net.1.weight": torch.randn(3, 12), "net.1.bias": torch.randn(3)}
    path = saved({"model": state}, tmp_path / "w.pth")
    opened, spec = open_model(f"{file}:build", weights=path, input_size=2)
    assert torch.equal(opened.get_parameter("1.weight"), state["net.1.weight"]) and spec.kwargs == {"num_classes": 3}


def test_a_dense_model_that_its_user_builds_takes_no_other_arguments(tmp_path: Path):
    save_model(tmp_path / "m.safetensors", pruned(VIT), VIT, provenance={})
    options: list[dict[str, Any]] = [{"num_classes": 3}, {"weights": "w.pth"}, {"input_size": 32}]
    for option in options:
        with pytest.raises(UserError, match="model= is filled as the checkpoint says: leave out") as error:
            load_model(tmp_path / "m.safetensors", model=build_model(VIT), **option)
        one_line(error)
