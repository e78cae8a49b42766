"""A new head: fresh layers of the asked width, the rest untouched, and a file of it that loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from isomorphic import pretrained
from isomorphic.checkpoints import open as opening
from isomorphic.checkpoints.heads import head_shapes, new_head
from isomorphic.checkpoints.open import load_model, open_model, read_header
from isomorphic.checkpoints.save import save_model
from isomorphic.errors import UserError
from isomorphic.models import ModelSpec, build_model, describe_model, example_inputs
from tests.faults import one_line
from tests.unit.checkpoints.conftest import CONVNEXT, VIT, masked_vit, pruned

SQUEEZE = describe_model("squeezenet1_1", builder="torchvision", input_size=64)
RESNET = describe_model("resnet10t", input_size=32)
SWIN = describe_model("swin_tiny_patch4_window7_224", input_size=56,
                      kwargs={"embed_dim": 12, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 3, 6]})  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "heads"),
    [
        (VIT, {"head": (24,), "head_dist": (24,)}),
        (CONVNEXT, {"head.fc": (32,)}),
        (RESNET, {"fc": (512,)}),
        (SQUEEZE, {"classifier.1": (512, 1, 1)}),
        (describe_model("test_vit", kwargs={"num_classes": 0}), {"head": (64,)}),
        (ModelSpec("none", "mine"), {}),
    ],
    ids=lambda value: value.name if isinstance(value, ModelSpec) else "",
)
def test_which_tensors_are_the_head(spec: ModelSpec, heads: dict[str, tuple[int, ...]]):
    expected = {f"{layer}.weight": shape for layer, shape in heads.items()} | {f"{layer}.bias": () for layer in heads}
    assert head_shapes(spec) == expected


@pytest.mark.parametrize("spec", [VIT, CONVNEXT, RESNET, SQUEEZE, SWIN], ids=lambda spec: spec.name)
def test_a_pruned_model_gets_a_new_head_and_keeps_the_rest(spec: ModelSpec, tmp_path: Path):
    model = pruned(spec)
    save_model(tmp_path / "pruned.safetensors", model, spec, provenance={})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    heads = set(head_shapes(spec))
    lines: list[str] = []
    torch.manual_seed(5)
    opened, after = open_model(tmp_path / "pruned.safetensors", num_classes=3, tell=lines.append)
    state = opened.state_dict()
    assert all(torch.equal(state[name], before[name]) for name in state.keys() - heads)
    assert {state[name].shape[0] for name in heads} == {3}
    assert all(state[name].shape[1:] == before[name].shape[1:] for name in heads)
    assert lines == [f"New head for 3 classes in place of {spec.kwargs.get('num_classes', 1000)}: {spec.name} keeps "
                     "its other weights, these are random"]  # fmt: skip
    save_model(tmp_path / "new.safetensors", opened, after, provenance={})
    assert read_header(tmp_path / "new.safetensors")["kwargs"]["num_classes"] == 3
    image = example_inputs(spec)
    with torch.no_grad():
        answer = opened(image)
        assert answer.shape == (1, 3) and torch.equal(load_model(tmp_path / "new.safetensors")(image), answer)
    torch.manual_seed(5)
    again = open_model(tmp_path / "pruned.safetensors", num_classes=3)[0].state_dict()
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_a_head_of_the_same_width_stays(tmp_path: Path):
    save_model(tmp_path / "m.safetensors", pruned(VIT), VIT, provenance={})
    lines: list[str] = []
    opened, spec = open_model(tmp_path / "m.safetensors", num_classes=10, tell=lines.append)
    assert spec == VIT and lines == []
    expected = load_model(tmp_path / "m.safetensors").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in opened.state_dict().items())


def test_number_of_classes_among_a_checkpoints_arguments_asks_for_a_head(tmp_path: Path):
    save_model(tmp_path / "m.safetensors", pruned(VIT), VIT, provenance={})
    opened, spec = open_model(tmp_path / "m.safetensors", kwargs={"num_classes": 4})
    assert spec.kwargs["num_classes"] == 4 and opened.get_parameter("head_dist.bias").shape == (4,)
    with pytest.raises(UserError, match="knows its model.*leave out"):
        open_model(tmp_path / "m.safetensors", kwargs={"num_classes": 4, "depth": 1})


def test_masks_of_the_old_head_go_with_it():
    model, spec = masked_vit()
    spec = spec.masking(["head.weight"])
    assert new_head(model, spec, 4).masked == tuple(name for name in spec.masked if not name.startswith("head."))


def test_what_the_number_of_classes_changes_beside_the_layers_follows():
    model: Any = build_model(SQUEEZE)
    spec = new_head(model, SQUEEZE, 7)
    assert (model.num_classes, model.classifier[1].out_channels) == (7, 7) and spec.kwargs == {"num_classes": 7}
    model = pruned(CONVNEXT)
    new_head(model, CONVNEXT, 7)
    layer = model.head.fc
    assert (model.num_classes, layer.out_features) == (7, 7) and layer.in_features == layer.weight.shape[1]


def test_a_model_that_was_built_without_a_head_gets_one_unless_it_was_pruned():
    spec = describe_model("test_vit", kwargs={"num_classes": 0})
    model: Any = build_model(spec)
    assert new_head(model, spec, 3).kwargs == {"num_classes": 3}
    assert model(torch.zeros(1, 3, 160, 160)).shape == (1, 3)
    model = build_model(spec)
    model.norm = nn.LayerNorm(32)
    with pytest.raises(UserError, match="test_vit cannot get a head: it was pruned without one") as error:
        new_head(model, spec, 3)
    one_line(error)


OWN = """
from torch import nn
def fixed():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 7))
def build(num_classes=7, **more):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes))
class Odd(nn.Module):
    def __init__(self, num_classes=7):
        super().__init__()
        self.num_classes, self.table = num_classes, nn.Embedding(num_classes, 12)
    def forward(self, x):
        return x.flatten(1) @ self.table.weight.T
"""


def test_models_of_the_users_own(tmp_path: Path):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    model, spec = open_model(f"{file}:build", input_size=2)
    save_model(tmp_path / "own.safetensors", model, spec, provenance={})
    opened, spec = open_model(tmp_path / "own.safetensors", builder_file=file, num_classes=3)
    assert opened(torch.zeros(1, 3, 2, 2)).shape == (1, 3) and spec.kwargs["num_classes"] == 3
    model, spec = open_model(f"{file}:fixed", input_size=2)
    with pytest.raises(UserError, match="own.py:fixed takes no num_classes: give it that argument") as error:
        new_head(model, spec, 3)
    one_line(error)
    model, spec = open_model(f"{file}:Odd", input_size=2)
    with pytest.raises(UserError, match="own.py:Odd cannot get a new head: table is a Embedding") as error:
        new_head(model, spec, 3)
    one_line(error)


def test_heads_of_models_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The library's weights come from a file that stands in for the downloaded one."""
    import torchvision

    torch.manual_seed(0)
    published = torchvision.models.googlenet(init_weights=False)
    monkeypatch.setattr(pretrained, "check_within_reach", lambda *_: None)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: published.state_dict())
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *_, **__: published.state_dict())
    lines: list[str] = []
    model: Any
    model, spec = open_model("googlenet", builder="torchvision", num_classes=3, tell=lines.append)
    assert lines and lines[0].startswith("New head for 3 classes in place of 1000: googlenet keeps")
    assert model.transform_input and torch.equal(model.conv1.conv.weight, published.get_parameter("conv1.conv.weight"))
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3) and spec.kwargs == {"num_classes": 3}
    _, spec = open_model("resnet10t", pretrained=False, num_classes=3, tell=lines.append)
    assert len(lines) == 1 and spec.kwargs == {"num_classes": 3}
    monkeypatch.setattr(opening, "build_model", lambda spec, *, pretrained: build_model(spec))
    _, spec = open_model("resnet10t", num_classes=3, tell=lines.append)
    assert lines[1:] == ["New head for 3 classes in place of 1000: resnet10t keeps its other weights, these are random"]
    assert open_model("resnet10t", num_classes=1000, tell=lines.append)[1].kwargs == {"num_classes": 1000}
    assert len(lines) == 2


def test_a_released_file_gets_a_new_head(tmp_path: Path):
    model = timm.create_model("resnet18", num_classes=10, channels=(4, 4, 8, 8))
    torch.save(model, tmp_path / "model.pth")
    opened, spec = open_model(tmp_path / "model.pth", name="resnet18", kwargs={"channels": [4, 4, 8, 8]}, num_classes=3)
    assert opened(torch.zeros(1, 3, 32, 32)).shape == (1, 3) and spec.kwargs["num_classes"] == 3
    assert torch.equal(opened.get_parameter("conv1.weight"), model.get_parameter("conv1.weight"))
