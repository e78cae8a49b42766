"""Learning rates against torch's own schedulers; parameter groups and optimizers by what they hold."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.optim._param_groups import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    ExponentialLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    SequentialLR,
    StepLR,
)

from isomorphic.errors import UserError
from isomorphic.models import keep_blocks
from isomorphic.training.optim import build_optimizer, learning_rate, parameter_groups, set_learning_rate
from isomorphic.training.recipe import OptimizerRecipe, ScheduleRecipe

EPOCHS = 12
MILESTONES = (4, 7, 8)  # of the run, warm-up included


def main_schedule(name: str, optimizer: Optimizer, epochs: int) -> LRScheduler:
    if name == "cosineannealinglr":
        return CosineAnnealingLR(optimizer, T_max=epochs, eta_min=0.01)
    if name == "multisteplr":
        return MultiStepLR(optimizer, [milestone - (EPOCHS - epochs) for milestone in MILESTONES], 0.3)
    return StepLR(optimizer, 4, 0.3) if name == "steplr" else ExponentialLR(optimizer, 0.3)


@pytest.mark.parametrize("name", ["steplr", "multisteplr", "cosineannealinglr", "exponentiallr"])
@pytest.mark.parametrize(("warmup", "method"), [(0, "constant"), (3, "constant"), (3, "linear")])
def test_learning_rate_is_that_of_torch_schedulers_stepped_once_an_epoch(name: str, warmup: int, method: str):
    milestones = MILESTONES if name == "multisteplr" else ()
    recipe = ScheduleRecipe(0.2, EPOCHS, name, warmup, method, 0.05, 4, 0.3, 0.01, milestones)
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.2)
    schedule = main_schedule(name, optimizer, EPOCHS - warmup)
    if warmup:
        start = LinearLR if method == "linear" else ConstantLR
        first = start(optimizer, 0.05, total_iters=warmup)
        schedule = SequentialLR(optimizer, [first, schedule], milestones=[warmup])
    for epoch in range(EPOCHS):
        assert learning_rate(recipe, epoch) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        schedule.step()


def test_milestones_of_cifar():
    recipe = ScheduleRecipe(0.1, 200, "multisteplr", lr_milestones=(120, 150, 180))
    rates = [learning_rate(recipe, epoch) for epoch in (0, 119, 120, 149, 150, 179, 180, 199)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001])


def test_published_deit_schedule_at_its_ends():
    recipe = ScheduleRecipe(lr=5e-4, epochs=300, lr_scheduler="cosineannealinglr")
    assert learning_rate(recipe, 0) == 5e-4
    assert learning_rate(recipe, 150) == pytest.approx(2.5e-4)
    assert 0 < learning_rate(recipe, 299) < 2e-8


def test_a_warm_up_that_leaves_no_epoch_is_refused():
    with pytest.raises(UserError, match="--lr-warmup-epochs 5 .*--epochs 5"):
        ScheduleRecipe(epochs=5, lr_warmup_epochs=5)


def names_by_decay(model: nn.Module, **decays: Any) -> dict[float, set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, OptimizerRecipe(weight_decay=0.05, **decays))
    assert sum(len(group["params"]) for group in groups) == len(names)  # each once
    return {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in groups}


@pytest.fixture(scope="module")
def deit() -> nn.Module:
    kwargs: dict[str, Any] = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 1, "num_classes": 3}
    kwargs["img_size"] = 16
    return timm.create_model("deit_tiny_distilled_patch16_224", **kwargs)


def test_everything_decays_by_default(deit: nn.Module):
    assert names_by_decay(deit) == {0.05: {name for name, _ in deit.named_parameters()}}


def test_norms_biases_and_embeddings_decay_as_their_flags_say(deit: nn.Module):
    groups = names_by_decay(deit, norm_weight_decay=0.1, bias_weight_decay=0.2, transformer_embedding_decay=0.3)
    assert groups[0.3] == {"cls_token", "dist_token", "pos_embed"}
    assert groups[0.1] == {"norm.weight", "blocks.0.norm1.weight", "blocks.0.norm2.weight"}
    assert groups[0.2] == {name for name, _ in deit.named_parameters() if name.endswith(".bias")}
    assert "head_dist.weight" in groups[0.05] and "blocks.0.attn.qkv.weight" in groups[0.05]


def test_norm_decay_covers_norm_biases_where_biases_have_none_of_their_own(deit: nn.Module):
    groups = names_by_decay(deit, norm_weight_decay=0.0)
    norms = ("norm", "blocks.0.norm1", "blocks.0.norm2")
    assert groups[0.0] == {f"{name}.{leaf}" for name in norms for leaf in ("weight", "bias")}


def test_norm_decay_covers_timms_norms_and_batch_norms():
    model = timm.create_model("convnext_atto", depths=[1, 1, 1, 1], dims=[8, 8, 8, 8], num_classes=2)
    groups = names_by_decay(model, norm_weight_decay=0.0)
    assert {"stem.1.weight", "stages.1.downsample.0.bias", "head.norm.weight"} <= groups[0.0]
    assert not any("gamma" in name or "conv" in name for name in groups[0.0])
    batch_norm = names_by_decay(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)), norm_weight_decay=0.0)
    assert batch_norm == {0.05: {"0.weight"}, 0.0: {"1.weight", "1.bias"}}


def names_of(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Weight decay and scale of the learning rate, by the parameter's name."""
    found = {
        id(parameter): (group["weight_decay"], group.get("lr_scale", 1.0))
        for group in groups
        for parameter in group["params"]
    }
    return {name: found.pop(id(parameter)) for name, parameter in model.named_parameters()}


def test_no_decay_of_vectors_is_timms_rule():
    model = timm.create_model("convnext_atto")  # layer scales (gamma), norms, biases, weights
    groups = parameter_groups(model, OptimizerRecipe(weight_decay=0.05, vector_weight_decay=0.0))
    expected = names_of(model, param_groups_weight_decay(model, weight_decay=0.05))
    assert names_of(model, groups) == expected
    assert expected["stages.0.blocks.0.gamma"] == expected["stem.1.weight"] == (0.0, 1.0)
    assert {decay for decay, _ in expected.values()} == {0.0, 0.05}
    assert [sorted(group) for group in groups] == [["params", "weight_decay"]] * 2


def test_vectors_come_after_the_flags_of_their_own(deit: nn.Module):
    groups = names_by_decay(deit, vector_weight_decay=0.4, norm_weight_decay=0.1, bias_weight_decay=0.2)
    assert groups.keys() == {0.05, 0.1, 0.2}
    model = timm.create_model("convnext_atto", depths=[1, 1, 1, 1], dims=[8, 8, 8, 8], num_classes=2)
    groups = names_by_decay(model, vector_weight_decay=0.4, norm_weight_decay=0.1, bias_weight_decay=0.2)
    assert groups[0.4] == {f"stages.{n}.blocks.0.gamma" for n in range(4)}


VIT: dict[str, Any] = {"patch_size": 8, "embed_dim": 12, "num_heads": 3, "num_classes": 2}


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("convnext_atto", {}),
        ("convnext_atto", {"depths": [1, 2, 5, 1], "dims": [8, 8, 8, 8]}),
        ("vit_tiny_patch16_224", VIT | {"depth": 12}),
        ("vit_tiny_patch16_224", VIT | {"depth": 3}),
    ],
)
def test_layer_decay_is_timms(name: str, kwargs: dict[str, Any]):
    model = timm.create_model(name, **kwargs)
    recipe = OptimizerRecipe(weight_decay=0.05, vector_weight_decay=0.0, layer_decay=0.8)
    expected = names_of(model, param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.8))
    assert names_of(model, parameter_groups(model, recipe)) == expected


def test_layer_decay_by_hand_in_a_model_that_lost_a_block():
    model = timm.create_model("vit_tiny_patch16_224", depth=4, **VIT)
    keep_blocks(model, {"blocks": (0, 2, 3)})
    found = names_of(model, parameter_groups(model, OptimizerRecipe(layer_decay=0.5)))
    scales = {name: scale for name, (_, scale) in found.items()}
    assert scales["patch_embed.proj.weight"] == scales["cls_token"] == scales["pos_embed"] == 0.5**4
    assert [scales[f"blocks.{n}.attn.qkv.weight"] for n in range(3)] == [0.5**3, 0.5**2, 0.5]
    assert (scales["norm.weight"], scales["head.weight"]) == (0.5, 1.0)


def test_rates_are_scaled_by_layer():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, **VIT)
    optimizer = build_optimizer(model, OptimizerRecipe(opt="adamw", layer_decay=0.5))
    for lr in (0.4, 0.1):
        set_learning_rate(optimizer, lr)
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        found = [rates[id(model.get_parameter(n))] for n in ("cls_token", "blocks.0.mlp.fc1.weight", "head.weight")]
        assert found == pytest.approx([lr / 4, lr / 2, lr])
        assert all(type(rate) is float for rate in rates.values())  # a tensor on the device would have to be waited for
    head, block = model.get_parameter("head.bias"), model.get_parameter("blocks.0.attn.qkv.bias")
    before = head.detach().clone(), block.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # the first of Adam is as long as the learning rate
    steps = [
        (old * (1 - rate * 1e-4) - new).mean().item()
        for old, new, rate in zip(before, (head.detach(), block.detach()), (0.1, 0.05), strict=True)
    ]
    assert steps == pytest.approx([0.1, 0.05], rel=1e-4)


def test_layer_decay_needs_a_model_that_knows_its_layers():
    with pytest.raises(UserError, match="--layer-decay 0.9: ResNet does not say what its layers are") as error:
        parameter_groups(torchvision.models.resnet18(), OptimizerRecipe(layer_decay=0.9))
    assert "\n" not in str(error.value)


def test_frozen_and_shared_parameters():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    first.bias.requires_grad_(False)
    groups = parameter_groups(nn.Sequential(first, second), OptimizerRecipe())
    assert [p is q for p, q in zip(groups[0]["params"], [first.weight, second.bias], strict=True)] == [True, True]


@pytest.mark.parametrize(
    ("name", "kind", "constants"),
    [
        ("sgd", torch.optim.SGD, {"momentum": 0.8, "nesterov": False}),
        ("sgd_nesterov", torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
        ("rmsprop", torch.optim.RMSprop, {"momentum": 0.8, "alpha": 0.9, "eps": 0.0316}),
        ("adamw", torch.optim.AdamW, {"betas": (0.9, 0.999), "eps": 1e-8}),
    ],
)
def test_optimizers_are_the_reference_trainers(name: str, kind: type, constants: dict):
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model, OptimizerRecipe(opt=name, momentum=0.8, weight_decay=0.02))
    set_learning_rate(optimizer, 0.5)
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    assert {key: group[key] for key in constants} == constants
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.02)


def test_one_sgd_step_by_hand():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    optimizer = build_optimizer(model, OptimizerRecipe(opt="sgd", momentum=0.9, weight_decay=0.1))
    set_learning_rate(optimizer, 0.5)
    model(torch.tensor([[3.0]])).sum().backward()  # gradient 3, + 0.1 · 2
    optimizer.step()
    assert model.weight.item() == pytest.approx(2.0 - 0.5 * 3.2)
