"""Learning rates against torch's own schedulers; parameter groups and optimizers by what they hold."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    ExponentialLR,
    LinearLR,
    LRScheduler,
    SequentialLR,
    StepLR,
)

from isomorphic.errors import UserError
from isomorphic.training.optim import build_optimizer, learning_rate, parameter_groups, set_learning_rate
from isomorphic.training.recipe import OptimizerRecipe, ScheduleRecipe

EPOCHS = 12


def main_schedule(name: str, optimizer: Optimizer, epochs: int) -> LRScheduler:
    if name == "cosineannealinglr":
        return CosineAnnealingLR(optimizer, T_max=epochs, eta_min=0.01)
    return StepLR(optimizer, 4, 0.3) if name == "steplr" else ExponentialLR(optimizer, 0.3)


@pytest.mark.parametrize("name", ["steplr", "cosineannealinglr", "exponentiallr"])
@pytest.mark.parametrize(("warmup", "method"), [(0, "constant"), (3, "constant"), (3, "linear")])
def test_learning_rate_is_that_of_torch_schedulers_stepped_once_an_epoch(name: str, warmup: int, method: str):
    recipe = ScheduleRecipe(0.2, EPOCHS, name, warmup, method, 0.05, 4, 0.3, 0.01)
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
