"""Dropout and stochastic depth of pruned models: the rates that their builders give a model of that depth."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from isomorphic.checkpoints.open import open_model
from isomorphic.checkpoints.save import save_model
from isomorphic.errors import UserError
from isomorphic.models import ModelSpec, build_model, describe_model, example_inputs, keep_blocks
from isomorphic.pruning.blocks.depth import remove_blocks
from isomorphic.pruning.cutting.cut import cut
from isomorphic.pruning.grouping.trace import trace_groups
from isomorphic.pruning.ranking.ranker import Ranker, RankingRules, Ratios
from isomorphic.training.drop import with_drop_rates

VIT: dict[str, Any] = {"patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 10}
CONVNEXT: dict[str, Any] = {"depths": [1, 2, 6, 2], "dims": [8, 16, 24, 32], "num_classes": 10}
RESNET: dict[str, Any] = {"layers": [2, 2, 2, 2], "channels": [8, 8, 8, 8], "stem_width": 8, "num_classes": 10}


def rates(model: nn.Module) -> dict[str, float]:
    """Of everything that drops something, by name; what never does is left out."""
    found = {name: _rate(module) for name, module in model.named_modules()}
    return {name: rate for name, rate in found.items() if rate}


def _rate(module: nn.Module) -> float:
    if isinstance(module, DropPath):
        return module.drop_prob or 0.0
    if isinstance(module, (nn.Dropout, StochasticDepth)):
        return module.p
    return getattr(module, "drop_rate", 0.0)  # read by the forwards of timm's convolutional networks


def halve(model: nn.Module, spec: ModelSpec) -> None:
    graph = trace_groups(model, example_inputs(spec))
    scores = {group.name: torch.rand(group.num_units) for group in graph.groups}
    ranker = Ranker(graph, scores, dict.fromkeys(scores, 0), RankingRules())
    cut(model, graph, ranker.plan(Ratios(0.5)))


def pruned(spec: ModelSpec, kept: dict[str, tuple[int, ...]]) -> tuple[nn.Module, ModelSpec]:
    """The spec's model with some of its blocks and half of its channels."""
    torch.manual_seed(0)
    model = build_model(spec)
    remove_blocks(model, kept, example_inputs(spec))
    halve(model, spec)
    return model, spec.keeping(kept)


@pytest.fixture(scope="module")
def convnext_with_rates() -> tuple[nn.Module, ModelSpec]:
    """A pruned ConvNeXt, built with dropout 0.3 and drop path 0.2: 6 of its 7 blocks that drop anything are left."""
    kwargs = CONVNEXT | {"drop_rate": 0.3, "drop_path_rate": 0.2}
    return pruned(describe_model("convnext_atto", kwargs=kwargs, input_size=32), {"stages.2.blocks": (2, 5)})


def check(
    model: nn.Module, spec: ModelSpec, drop: float | None, drop_path: float | None, path: Path
) -> tuple[nn.Module, ModelSpec]:
    """Gives the rates, and finds weights and answers as before, in the file as well, which has the same rates."""
    images, before = example_inputs(spec), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        logits = model.eval()(images)
        model, spec = with_drop_rates(model, spec, drop, drop_path)
        assert torch.equal(model(images), logits)
        save_model(path, model, spec, provenance={})
        reloaded, same_spec = open_model(path)
        assert torch.equal(reloaded(images), logits)
    assert same_spec == spec and rates(reloaded) == rates(model)
    state = model.state_dict()
    assert list(state) == list(before) and all(torch.equal(tensor, before[name]) for name, tensor in state.items())
    torch.manual_seed(1)
    answer = model.train()(images.repeat(8, 1, 1, 1))
    torch.manual_seed(1)
    assert torch.equal(reloaded.train()(images.repeat(8, 1, 1, 1)), answer), "the same rates at the same places"
    return model, spec


@pytest.mark.parametrize("dense_rate", [0.0, 0.1])
def test_a_convnext_that_lost_blocks_gets_the_rates_of_its_depth(tmp_path: Path, dense_rate: float):
    dense = describe_model("convnext_atto", kwargs=CONVNEXT | {"drop_path_rate": dense_rate}, input_size=32)
    model, spec = pruned(dense, {"stages.2.blocks": (1, 2, 4), "stages.3.blocks": (0,)})
    model, spec = check(model, spec, 0.25, 0.4, tmp_path / "a.safetensors")
    builder = timm.create_model(
        "convnext_atto", drop_rate=0.25, drop_path_rate=0.4, **dict(CONVNEXT, depths=[1, 2, 3, 1])
    )
    assert rates(model) == pytest.approx(rates(builder))
    assert rates(model)["head.drop"] == 0.25
    assert [module.drop_prob for module in model.modules() if isinstance(module, DropPath)] == pytest.approx(
        [0.4 * n / 6 for n in range(1, 7)]
    )
    assert spec.kwargs["drop_rate"] == 0.25 and spec.kwargs["drop_path_rate"] == 0.4


def test_a_vit_that_lost_its_first_block_and_then_another(tmp_path: Path):
    dense = describe_model("vit_tiny_patch16_224", kwargs=VIT, input_size=32)
    model, spec = pruned(dense, {"blocks": (1, 2, 3)})
    model, spec = check(model, spec, None, 0.2, tmp_path / "a.safetensors")
    expected = {f"blocks.{n}.drop_path{i}": 0.1 * n for n in (1, 2) for i in (1, 2)}
    assert rates(model) == pytest.approx(expected)

    reloaded, spec = open_model(tmp_path / "a.safetensors")  # which is pruned once more
    kept = {"blocks": (0, 2)}
    remove_blocks(reloaded, kept, example_inputs(spec))
    assert rates(reloaded) == pytest.approx({"blocks.1.drop_path1": 0.2, "blocks.1.drop_path2": 0.2})
    model, spec = check(reloaded, spec.keeping(kept), 0.5, 0.3, tmp_path / "b.safetensors")
    assert rates(model) == pytest.approx({"blocks.1.drop_path1": 0.3, "blocks.1.drop_path2": 0.3, "head_drop": 0.5})


def test_rates_of_zero_drop_nothing(tmp_path: Path, convnext_with_rates: tuple[nn.Module, ModelSpec]):
    model, spec = copy.deepcopy(convnext_with_rates)
    assert len(rates(model)) == 8  # 6 blocks of 7, the head's module, and the number that the model keeps of it
    model, _ = check(model, spec, 0.0, 0.0, tmp_path / "a.safetensors")
    assert rates(model) == {}
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(model.train()(images), model.eval()(images))


def test_one_flag_leaves_the_others_rate_alone(tmp_path: Path, convnext_with_rates: tuple[nn.Module, ModelSpec]):
    model, spec = copy.deepcopy(convnext_with_rates)
    before = rates(model)
    assert with_drop_rates(model, spec, None, None) == (model, spec) and rates(model) == before
    model, spec = check(model, spec, 0.1, None, tmp_path / "a.safetensors")
    assert rates(model) == before | {"": 0.1, "head.drop": 0.1}
    model, spec = check(model, spec, None, 0.0, tmp_path / "b.safetensors")
    assert rates(model) == {"": 0.1, "head.drop": 0.1}


def test_numbers_in_place_of_modules_and_modules_in_place_of_none(tmp_path: Path):
    spec = describe_model("resnet10t", kwargs=RESNET, input_size=32)
    model, spec = check(*pruned(spec, {"layer2": (0,)}), 0.2, 0.3, tmp_path / "a.safetensors")
    builder = timm.create_model("resnet10t", drop_rate=0.2, drop_path_rate=0.3, **dict(RESNET, layers=[2, 1, 2, 2]))
    assert rates(model) == pytest.approx(rates(builder)) and rates(model)[""] == 0.2 and len(rates(model)) == 7
    model, _ = check(model, spec, 0.0, 0.0, tmp_path / "b.safetensors")
    assert rates(model) == {}


def torchvision_model(name: str, **kwargs: Any) -> tuple[nn.Module, ModelSpec]:
    spec = describe_model(name, builder="torchvision", kwargs={"num_classes": 4} | kwargs, input_size=64)
    torch.manual_seed(0)
    return build_model(spec), spec


def test_torchvisions_convnext(tmp_path: Path):
    model, spec = torchvision_model("convnext_tiny")
    kept = {"features.5": (0, 1, 2, 3, 8)}
    keep_blocks(model, kept)
    model, spec = check(model, spec.keeping(kept), None, 0.3, tmp_path / "a.safetensors")
    found = [module.p for module in model.modules() if isinstance(module, StochasticDepth)]
    assert found == pytest.approx([0.3 * n / 13 for n in range(14)])
    assert spec.kwargs["stochastic_depth_prob"] == 0.3


def test_torchvisions_swin_whose_builder_takes_no_rate_of_stochastic_depth(tmp_path: Path):
    model, spec = torchvision_model("swin_t")
    kept = {"features.5": (0, 1, 4, 5)}
    keep_blocks(model, kept)
    model, spec = check(model, spec.keeping(kept), 0.1, 0.3, tmp_path / "a.safetensors")
    found = [module.p for module in model.modules() if isinstance(module, StochasticDepth)]
    assert found == pytest.approx([0.3 * n / 9 for n in range(10)])
    dropouts = {module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    attention = {module.dropout for module in model.modules() if "Attention" in type(module).__name__}
    assert dropouts == attention == {0.1}


def test_a_schedule_that_the_builder_writes_down_keeps_its_shape():
    """MaxViT's is over blocks of three layers each, which share a rate."""
    with torch.device("meta"):
        model, spec = torchvision_model("maxvit_t")
    before = rates(model)
    with_drop_rates(model, spec, None, 0.1)
    assert max(before.values()) == 0.2 and rates(model) == pytest.approx({name: r / 2 for name, r in before.items()})


@pytest.mark.parametrize(
    ("name", "drop", "drop_path", "expected"),
    [
        ("mobilenet_v2", 0.4, None, {"classifier.0": 0.4}),
        ("squeezenet1_1", 0.4, None, {"classifier.0": 0.4}),
        ("efficientnet_b0", 0.4, 0.32, {"classifier.0": 0.4, "features.7.0.stochastic_depth": 0.3}),
    ],
)
def test_other_models_of_torchvision(
    tmp_path: Path, name: str, drop: float, drop_path: float | None, expected: dict[str, float]
):
    model, spec = torchvision_model(name)
    model, _ = check(model, spec, drop, drop_path, tmp_path / "a.safetensors")
    found = rates(model)
    assert {place: found[place] for place in expected} == pytest.approx(expected)
    builder = getattr(torchvision.models, name)(
        dropout=drop, **{} if drop_path is None else {"stochastic_depth_prob": drop_path}
    )
    assert found == rates(builder)


def user_model(tmp_path: Path) -> tuple[nn.Module, ModelSpec]:
    body = "return nn.Sequential(nn.Linear(2, 2), nn.Dropout(drop_rate))"
    code = f"from torch import nn\ndef make(drop_rate=0.0):\n    {body}\n"
    (tmp_path / "mine.py").write_text(code)
    spec = describe_model(f"{tmp_path / 'mine.py'}:make", builder="file")
    return build_model(spec), spec


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("resnet18", (0.1, None), "--drop 0.1: resnet18 has no dropout"),
        ("resnet18", (None, 0.1), "--drop-path 0.1: resnet18 has no stochastic depth"),
        ("convnext_tiny", (0.1, None), "--drop 0.1: convnext_tiny has no dropout"),
        ("mobilenet_v2", (1.0, None), "--drop 1.0: must be at least 0 and below 1"),
        ("mobilenet_v2", (None, -0.1), "--drop-path -0.1: must be at least 0 and below 1"),
        ("mine.py", (0.1, None), "--drop 0.1: mine.py:make is code of your own"),
    ],
)
def test_rates_that_cannot_be_set(tmp_path: Path, name: str, flags: tuple[Any, Any], message: str):
    with torch.device("meta"):
        model, spec = user_model(tmp_path) if name == "mine.py" else torchvision_model(name)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        with_drop_rates(model, spec, *flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fresh", "message"),
    [
        (lambda rate: nn.Sequential(*[nn.Dropout(rate)] * (rate > 0), nn.ReLU()), "1 cannot be changed in a model"),
        (lambda rate: nn.Sequential(nn.Linear(2, 2) if rate else nn.Identity()), "0 cannot be changed in a model"),
        (lambda rate: nn.ModuleDict({"more": nn.Dropout(rate)}), "this model is not what its builder makes (no more)"),
    ],
)
def test_a_rate_that_would_rename_or_add_weights_is_refused(
    monkeypatch: pytest.MonkeyPatch, fresh: Callable[[float], nn.Module], message: str
):
    monkeypatch.setattr("isomorphic.training.drop.build_skeleton", lambda spec: fresh(spec.kwargs["drop_rate"]))
    model = nn.Sequential(nn.ReLU())
    with pytest.raises(UserError, match=re.escape(f"--drop 0.2: {message}")):
        with_drop_rates(model, ModelSpec("timm", "resnet18"), 0.2, None)


def test_blocks_are_dropped_as_often_as_the_rate_says():
    spec = describe_model("vit_tiny_patch16_224", kwargs=VIT | {"depth": 2}, input_size=32)
    model, _ = with_drop_rates(build_model(spec), spec, None, 0.5)
    block: Any = model.blocks[1]  # type: ignore[index]
    x: Tensor = torch.ones(4000, 1, 1)
    torch.manual_seed(0)
    kept = block.drop_path1.train()(x)
    assert set(kept.flatten().tolist()) == {0.0, 2.0} and kept.mean().item() == pytest.approx(1.0, abs=0.05)
