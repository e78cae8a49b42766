"""The loop: what a step does, what an epoch counts, when it stops."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isomorphic import distributed
from isomorphic.errors import UserError
from isomorphic.models import ModelSpec, describe_model
from isomorphic.training.engine import (
    LossMeter,
    average_running_statistics,
    fit,
    over_processes,
    run_epoch,
    train_one_epoch,
    train_step,
)
from isomorphic.training.optim import set_learning_rate
from isomorphic.training.recipe import Recipe
from isomorphic.training.tracking import EpochRow

CPU = torch.device("cpu")
IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8)


def test_training_learns(make_recipe: Callable[..., Recipe], make_job: Callable, vit_spec: ModelSpec):
    spec = dataclasses.replace(vit_spec, kwargs=vit_spec.kwargs | {"weight_init": "jax"})  # starts faster
    job, state = make_job(make_recipe(batch_size=32, epochs=3, scale=(0.9, 1.0)), spec)
    rows = [run_epoch(job, state) for _ in range(3)]
    assert rows[0].train_loss > rows[1].train_loss > rows[2].train_loss
    assert rows[2].top1 > 0.25 and rows[2].val_loss < 2.0  # chance is 0.1 and log 10 = 2.30


def test_one_epoch_repeats_bit_for_bit(make_recipe: Callable[..., Recipe], make_job: Callable):
    runs = []
    for _ in range(2):
        job, state = make_job(make_recipe(mixup_alpha=0.2, lr=4e-3))
        runs.append((run_epoch(job, state), state))
    (first, state), (second, twin) = runs
    for name, tensor in state.model.state_dict().items():
        assert torch.equal(tensor, twin.model.state_dict()[name]), name
    assert dataclasses.replace(first, seconds=0, images_per_second=0) == dataclasses.replace(
        second, seconds=0, images_per_second=0
    )
    assert (first.epoch, first.lr, state.step) == (1, 4e-3, 15)


def test_a_step_is_the_optimizers_on_the_mean_loss(make_recipe: Callable[..., Recipe], make_job: Callable):
    job, state = make_job(make_recipe(opt="sgd", momentum=0.0, weight_decay=0.0))
    twin = copy.deepcopy(state.model)
    set_learning_rate(state.optimizer, 0.1)
    loss = train_step(job, state, IMAGES, LABELS)
    expected = F.cross_entropy(twin(IMAGES), LABELS)
    expected.backward()
    assert loss.item() == expected.item() and not loss.requires_grad
    for mine, theirs in zip(state.model.parameters(), twin.parameters(), strict=True):
        assert theirs.grad is not None
        assert torch.allclose(mine, theirs - 0.1 * theirs.grad, atol=1e-7)


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_a_scaled_loss_takes_the_same_step(make_recipe: Callable[..., Recipe], make_job: Callable, opt: str):
    weights = []
    for scale in (None, 1024.0):
        job, state = make_job(make_recipe(opt=opt))
        if scale:
            state.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        set_learning_rate(state.optimizer, 0.01)
        train_step(job, state, IMAGES, LABELS)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in state.model.parameters()]))
    assert torch.allclose(*weights, atol=1e-5)


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_clipping_bounds_the_step(make_recipe: Callable[..., Recipe], make_job: Callable, scale: float | None):
    recipe = make_recipe(opt="sgd", momentum=0.0, weight_decay=0.0, clip_grad_norm=1e-3)
    job, state = make_job(recipe)
    if scale:
        state.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    before = [p.clone() for p in state.model.parameters()]
    set_learning_rate(state.optimizer, 1.0)
    train_step(job, state, IMAGES, LABELS)
    moved = torch.stack([(p - b).norm() for p, b in zip(state.model.parameters(), before, strict=True)]).norm()
    assert moved.item() == pytest.approx(1e-3, rel=1e-2)


def test_bf16_runs_the_network_in_bf16_and_keeps_the_weights_in_fp32(
    make_recipe: Callable[..., Recipe], make_job: Callable
):
    job, state = make_job(make_recipe(amp_dtype=torch.bfloat16))
    set_learning_rate(state.optimizer, 1e-3)
    seen = []
    state.model.head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    loss = train_step(job, state, IMAGES, LABELS)
    assert seen == [torch.bfloat16] and loss.dtype == torch.float32
    assert {parameter.dtype for parameter in state.model.parameters()} == {torch.float32}


def test_max_steps_ends_a_run_within_an_epoch(
    make_recipe: Callable[..., Recipe], make_job: Callable, make_folder: Callable
):
    recipe = make_recipe(max_steps=17, opt="sgd", lr=0.01)
    job, state = make_job(recipe)
    rows: list[EpochRow] = []
    fit(job, state, make_folder(recipe), rows.append)
    assert state.step == 17 and [row.epoch for row in rows] == [1, 2]  # 15 steps an epoch


def test_train_loss_is_the_mean_over_images(make_recipe: Callable[..., Recipe], make_job: Callable):
    job, state = make_job(make_recipe(opt="sgd", log_every=4))
    set_learning_rate(state.optimizer, 0.0)
    loss, images = train_one_epoch(job, state)
    with torch.no_grad():
        sums = [
            F.cross_entropy(state.model(batch), labels, reduction="sum").item() for batch, labels in job.train_loader
        ]
    assert images == 1437
    assert loss == pytest.approx(sum(sums) / 1437, rel=1e-5)


@pytest.mark.parametrize(("log_every", "noticed"), [(1, 3), (4, 4), (50, 15)])  # 15 steps an epoch
def test_a_loss_that_is_not_finite_names_its_epoch_and_step(
    make_recipe: Callable[..., Recipe], make_job: Callable, make_folder: Callable, log_every: int, noticed: int
):
    recipe = make_recipe(log_every=log_every)
    steps = []

    def diverging(images: Tensor, outputs: Tensor, labels: Tensor) -> Tensor:
        steps.append(1)
        return outputs.mean() * (float("nan") if len(steps) >= 3 else 1.0)

    job, state = make_job(recipe, objective=diverging)
    folder = make_folder(recipe)
    with pytest.raises(UserError, match="not finite at epoch 1, step 3: lower --lr"):
        fit(job, state, folder, lambda row: None)
    assert not list(folder.path.glob("*.safetensors")) and not (folder.path / "state.pt").exists()
    assert len(steps) == noticed


def test_meter_adds_up_by_images():
    meter = LossMeter(0, CPU)
    assert meter.settle() == 0.0
    meter.add(torch.tensor(2.0), 3, 1)
    meter.add(torch.tensor(4.0), 1, 2)
    assert (len(meter), meter.settle(), len(meter)) == (2, 2.5, 0)
    meter.add(torch.tensor(0.0), 4, 3)
    assert (meter.settle(), meter.images) == (1.25, 8)


def test_an_infinite_loss_is_not_finite_either():
    meter = LossMeter(4, CPU)
    meter.add(torch.tensor(1.0), 1, 41)
    meter.add(torch.tensor(float("inf")), 1, 42)
    meter.add(torch.tensor(float("-inf")), 1, 43)
    with pytest.raises(UserError, match="epoch 5, step 42"):
        meter.settle()


def test_distillation_trains_both_heads_and_leaves_them_together(
    make_recipe: Callable[..., Recipe], make_job: Callable
):
    kwargs = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 10}
    spec = describe_model("deit_tiny_distilled_patch16_224", kwargs=kwargs, input_size=32)

    def teacher(images: Tensor) -> Tensor:
        return F.one_hot(torch.full((len(images),), 7), 10).float()

    recipe = make_recipe(distillation="hard", lr=4e-3, max_steps=15)
    job, state = make_job(recipe, spec, teacher=teacher)
    run_epoch(job, state)
    student = state.model.train()
    assert isinstance(student(IMAGES), Tensor)
    student.eval()
    features = student.forward_features(torch.cat([batch for batch, _ in job.val_loader]))
    answers = student.head_dist(features[:, 1]).argmax(dim=1)
    assert (answers == 7).all()  # what the teacher always says
    assert (student.head(features[:, 0]).argmax(dim=1) != 7).float().mean() > 0.5  # what the labels say


def test_batch_norm_statistics_become_the_processes_mean(monkeypatch: pytest.MonkeyPatch):
    conv, norm = nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)
    assert norm.running_mean is not None and norm.running_var is not None
    nn.init.constant_(norm.running_mean, 3.0)
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda tensor: tensor.add_(5.0))  # the other process's
    weight = conv.weight.clone()
    average_running_statistics(nn.Sequential(conv, norm, nn.BatchNorm2d(2, track_running_stats=False)))
    assert norm.running_mean.tolist() == [4.0, 4.0] and norm.running_var.tolist() == [3.0, 3.0]
    assert torch.equal(conv.weight, weight)


def test_one_process_needs_no_wrapper():
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=1)
    assert over_processes(model, CPU) is model
