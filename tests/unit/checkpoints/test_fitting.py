"""Weights fit a model under whatever names trainers and repositories give them, or are refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isomorphic.checkpoints.fitting import Fit, Target, fit_tensors
from isomorphic.errors import UserError
from isomorphic.models import ModelSpec, build_model, describe_model
from tests.faults import one_line
from tests.unit.checkpoints.conftest import VIT, pruned

RESNET = describe_model("resnet10t", kwargs={"num_classes": 5})
TINY_VIT = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3}
SWIN = {"img_size": 56, "embed_dim": 12, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 3, 6], "num_classes": 7}
PATH = Path("x.pth")


def build(name: str, **kwargs: Any) -> tuple[nn.Module, ModelSpec]:
    """A model with random numbers everywhere, and its spec."""
    spec = describe_model(name, kwargs=kwargs)
    torch.manual_seed(0)
    model = build_model(spec)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model, spec


def fit(tensors: Mapping[str, Tensor], spec: ModelSpec, **options: Any) -> Fit:
    return fit_tensors(tensors, Target(build_model(spec), spec), PATH, **options)


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def resnet() -> dict[str, Tensor]:
    return build("resnet10t", num_classes=5)[0].state_dict()


Rename = Callable[[str], str]
NAMES: dict[str, Rename] = {
    "as they are": lambda name: name,
    "several processes, compiled": lambda name: f"_orig_mod.module.{name}",
    "a compiled block": lambda name: name.replace("layer1.0.", "layer1.0._orig_mod."),
    "sharded, with checkpoints": lambda name: (
        "_fsdp_wrapped_module." + name.replace("layer2.", "layer2._checkpoint_wrapped_module.")
    ),
    "Lightning": lambda name: f"model.{name}",
    "any attribute": lambda name: f"my_net.backbone.{name}",
    "all of it": lambda name: f"module.net._orig_mod.{name.replace('layer1.', 'layer1.module.')}",
}


@pytest.mark.parametrize("case", NAMES)
def test_names_of_wrappers_and_prefixes(case: str, resnet: dict[str, Tensor]):
    found = fit({NAMES[case](name): tensor for name, tensor in resnet.items()}, RESNET)
    assert same(found.tensors, resnet) and found.notes == ()


def test_what_lies_outside_of_the_prefix_is_left_out_and_told(resnet: dict[str, Tensor]):
    beside = {"criterion.weight": torch.ones(5), "accuracy.total": torch.ones(1)}
    found = fit({**{f"model.{name}": tensor for name, tensor in resnet.items()}, **beside}, RESNET)
    assert same(found.tensors, resnet)
    assert found.notes == ("taken from model.*, without criterion.weight, accuracy.total",)


def test_averaged_names_are_preferred_and_can_be_asked_for(resnet: dict[str, Tensor]):
    other = {name: tensor + 1 for name, tensor in resnet.items()}
    both = {f"net.{name}": tensor for name, tensor in resnet.items()}
    both |= {f"ema_net.module.{name}": tensor for name, tensor in other.items()}
    for use_ema, expected in ((None, other), (True, other), (False, resnet)):
        assert same(fit(both, RESNET, use_ema=use_ema).tensors, expected)


def test_averaged_names_beside_bare_ones(resnet: dict[str, Tensor]):
    other = {name: tensor + 1 for name, tensor in resnet.items()}
    both = resnet | {f"ema.{name}": tensor for name, tensor in other.items()}
    for use_ema, expected in ((None, other), (True, other), (False, resnet)):
        assert same(fit(both, RESNET, use_ema=use_ema).tensors, expected)


def test_a_head_of_the_models_width_is_no_other_one_for_what_lies_beside_it(resnet: dict[str, Tensor]):
    found = fit(resnet | {"n_averaged": torch.tensor(3)}, RESNET)
    assert (found.classes, found.headless, found.notes) == (None, False, ()) and same(found.tensors, resnet)


def test_two_sets_that_fit_are_refused(resnet: dict[str, Tensor]):
    both = {f"{key}.{name}": tensor for key in ("left", "right") for name, tensor in resnet.items()}
    with pytest.raises(
        UserError, match=r"several sets of weights that fit, left\.\* and right\.\*: keep one alone"
    ) as error:
        fit(both, RESNET)
    one_line(error)


def test_a_name_that_matches_nothing_is_named_with_the_others_like_it(resnet: dict[str, Tensor]):
    strange = {name.replace("conv1", "konv1"): tensor for name, tensor in resnet.items()}
    with pytest.raises(UserError, match="x.pth does not fit the model: conv1.0.weight is missing") as error:
        fit(strange, RESNET)
    missing = sum("conv1" in name for name in resnet)
    expected = rf"{missing} missing \(conv1.0.weight, .*\); {missing} unknown \(konv1.0.weight, "
    assert re.search(expected, one_line(error))
    with pytest.raises(UserError, match="x.pth does not fit the model"):
        fit({f"model.{name}": tensor for name, tensor in resnet.items()} | {"model.x": torch.ones(1)}, RESNET)


# --- heads ---


def test_the_width_of_another_head_is_told(resnet: dict[str, Tensor]):
    found = fit(resnet, describe_model("resnet10t"))
    assert (found.classes, found.headless) == (5, False) and same(found.tensors, resnet)
    assert fit(resnet, RESNET).classes is None


def test_a_missing_head_is_told_and_half_of_one_is_not_taken(resnet: dict[str, Tensor]):
    without = {name: tensor for name, tensor in resnet.items() if not name.startswith("fc.")}
    found = fit(without, RESNET)
    assert found.headless and same(found.tensors, without)
    with pytest.raises(UserError, match="does not fit the model: fc.bias is missing"):
        fit({**without, "fc.weight": resnet["fc.weight"]}, RESNET)
    with pytest.raises(UserError, match=r"fc.weight is \(5, 3\), not \(5, 512\)"):
        fit({**without, "fc.weight": torch.ones(5, 3), "fc.bias": torch.ones(5)}, RESNET)


def test_both_heads_of_a_pruned_distilled_model_count():
    model = pruned(VIT)
    state = model.state_dict()
    wide = {**state, "head.weight": torch.ones(3, state["head.weight"].shape[1]), "head.bias": torch.ones(3)}
    with pytest.raises(UserError, match="head.bias|head.weight"):
        fit_tensors(wide, Target(model, VIT), PATH)
    wide |= {f"head_dist.{name}": wide[f"head.{name}"] for name in ("weight", "bias")}
    assert fit_tensors(wide, Target(model, VIT), PATH).classes == 3


def test_without_a_spec_there_is_no_head_to_set_apart(resnet: dict[str, Tensor]):
    model = build_model(RESNET)
    with pytest.raises(UserError, match="fc.bias is missing"):
        fit_tensors({name: resnet[name] for name in resnet if name != "fc.bias"}, Target(model, None), PATH)


# --- the original authors' files ---


def convnext_names(name: str) -> str:
    rules = (
        (r"^stem\.", "downsample_layers.0."), (r"^stages\.(\d)\.downsample", r"downsample_layers.\1"),
        (r"\.blocks\.", "."), ("conv_dw", "dwconv"), (r"mlp\.fc1", "pwconv1"), (r"mlp\.fc2", "pwconv2"),
        (r"^head\.fc", "head"), (r"^head\.norm", "norm"),
    )  # fmt: skip
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def swin_names(name: str) -> str:
    name = re.sub(r"^layers\.(\d)\.downsample", lambda match: f"layers.{int(match[1]) - 1}.downsample", name)
    return name.replace("head.fc.", "head.")


def deit3_names(name: str) -> str:
    return re.sub(r"ls([12])\.gamma", r"gamma_\1", name)


CONVNEXT = {"dims": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_classes": 7, "conv_mlp": False}
OFFICIAL: dict[str, tuple[str, dict[str, Any], Rename]] = {
    "ConvNeXt": ("convnext_atto", CONVNEXT, convnext_names),
    "Swin": ("swin_tiny_patch4_window7_224", SWIN, swin_names),
    "DeiT III": ("deit3_small_patch16_224", {**TINY_VIT, "num_classes": 7}, deit3_names),
    "DeiT": ("deit_tiny_distilled_patch16_224", {**TINY_VIT, "num_classes": 7}, lambda name: name),
}


@pytest.mark.parametrize("prefix", ["", "module.", "model.encoder."])
@pytest.mark.parametrize("case", OFFICIAL)
def test_files_of_the_original_repositories(case: str, prefix: str):
    name, kwargs, rename = OFFICIAL[case]
    model, spec = build(name, **kwargs)
    expected = model.state_dict()
    found = fit({prefix + rename(name): tensor for name, tensor in expected.items()}, spec)
    assert same(found.tensors, expected) and found.classes is None and found.notes == ()


def test_the_width_of_an_original_files_head_is_told_too():
    model, _ = build("swin_tiny_patch4_window7_224", **SWIN)
    state = {swin_names(name): tensor for name, tensor in model.state_dict().items()}
    spec = describe_model("swin_tiny_patch4_window7_224", kwargs={**SWIN, "num_classes": 1000})
    assert fit(state, spec).classes == 7


def test_files_of_pretraining_without_labels():
    model, spec = build("vit_base_patch16_224", **TINY_VIT)
    backbone = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")}
    mae = {"mask_token": torch.ones(1), "decoder_embed.weight": torch.ones(1), "decoder_blocks.0.mlp": torch.ones(1)}
    found = fit(backbone | mae, spec)
    assert found.headless and same(found.tensors, backbone)
    assert found.notes == (f"left out what only pretraining needs: {', '.join(mae)}",)
    dino = {f"backbone.{name}": tensor for name, tensor in backbone.items()} | {"head.mlp.0.weight": torch.ones(1)}
    found = fit(dino, spec)
    assert found.headless and same(found.tensors, backbone)
    moco = {f"momentum_encoder.{name}": tensor for name, tensor in backbone.items()}
    moco |= {"momentum_encoder.head.0.weight": torch.ones(1), "predictor.0.weight": torch.ones(1)}
    found = fit(moco, spec)
    assert found.headless and same(found.tensors, backbone)


def test_an_older_torchvision_file_for_timms_model_of_that_name():
    """Of before torch 0.4.1: without counters, and with dots in names."""
    torch.manual_seed(0)
    model, spec = build("densenet121", num_classes=3)
    state = {name: tensor for name, tensor in model.state_dict().items() if "num_batches" not in name}
    older = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", name): tensor for name, tensor in state.items()}
    assert older.keys() != state.keys()
    for file in (older, state):
        found = fit(file, spec).tensors
        assert found.keys() == model.state_dict().keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


# --- another input size ---


@pytest.mark.parametrize(
    ("name", "kwargs", "table", "shape"),
    [
        ("vit_base_patch16_224", TINY_VIT, "pos_embed", (1, 17, 24)),
        ("deit_tiny_distilled_patch16_224", TINY_VIT, "pos_embed", (1, 18, 24)),
        ("cait_xxs24_224", TINY_VIT, "pos_embed", (1, 16, 24)),
        ("swin_tiny_patch4_window7_224", SWIN, "layers.2.blocks.0.attn.relative_position_bias_table", (169, 3)),
    ],
)
def test_positions_are_resampled(name: str, kwargs: dict[str, Any], table: str, shape: tuple[int, ...]):
    model, _ = build(name, **kwargs)
    state = model.state_dict()
    for tensor in state.values():
        tensor.fill_(3)
    spec = describe_model(name, kwargs={**kwargs, "img_size": 2 * kwargs["img_size"]})
    found = fit(state, spec)
    assert found.tensors[table].shape == shape
    assert torch.allclose(found.tensors[table], torch.full(shape, 3.0), atol=1e-4)
    assert any(note.startswith(f"resampled to the model's input size: {table}") for note in found.notes)
