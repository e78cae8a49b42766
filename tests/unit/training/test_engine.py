"""The loop: what a step does, what an epoch counts, when it stops."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isomorphic.errors import UserError
from isomorphic.models import ModelSpec, describe_model
from isomorphic.processes import distributed
from isomorphic.training.checkpointer import Checkpointer
from isomorphic.training.engine import (
    Job,
    Observers,
    fit,
    in_groups,
    run_epoch,
    share_running_statistics,
    train_one_epoch,
    train_step,
)
from isomorphic.training.optim import set_learning_rate
from isomorphic.training.recipe import Recipe
from isomorphic.training.resume import TrainState
from isomorphic.training.sampling import RawBatch
from isomorphic.training.signals import Signals
from isomorphic.training.tracking import EpochRow

CPU = torch.device("cpu")
PIXELS = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
BATCH = RawBatch(PIXELS, torch.arange(8), torch.zeros(8, 4, dtype=torch.long))


@pytest.fixture
def epoch_of(make_folder: Callable, vit_spec: ModelSpec) -> Callable[..., EpochRow]:
    """Trains and validates one epoch."""

    def run(job: Job, state: TrainState, spec: ModelSpec = vit_spec) -> EpochRow:
        folder = make_folder(job.recipe, spec=spec)
        with Signals() as signals:
            return run_epoch(job, state, Checkpointer(job.recipe.loop, state, folder, signals, CPU))

    return run


def test_training_learns(
    make_recipe: Callable[..., Recipe], make_job: Callable, vit_spec: ModelSpec, epoch_of: Callable
):
    spec = dataclasses.replace(vit_spec, kwargs=vit_spec.kwargs | {"weight_init": "jax"})  # starts faster
    job, state = make_job(make_recipe(epochs=3, scale=(0.9, 1.0)), spec, images=1437)
    rows = [epoch_of(job, state) for _ in range(3)]
    assert rows[0].train_loss > rows[1].train_loss > rows[2].train_loss
    assert rows[2].top1 > 0.25 and rows[2].val_loss < 2.0  # chance is 0.1 and log 10 = 2.30


def test_one_epoch_repeats_bit_for_bit(make_recipe: Callable[..., Recipe], make_job: Callable, epoch_of: Callable):
    runs = []
    for _ in range(2):
        job, state = make_job(make_recipe(mixup_alpha=0.2, lr=4e-3))
        runs.append((epoch_of(job, state), state))
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
    loss = train_step(job, state, [BATCH])
    images, labels = job.prepare(BATCH)
    expected = F.cross_entropy(twin(images), labels)
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
        train_step(job, state, [BATCH])
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
    train_step(job, state, [BATCH])
    moved = torch.stack([(p - b).norm() for p, b in zip(state.model.parameters(), before, strict=True)]).norm()
    assert moved.item() == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize(("scale", "clip_grad_norm"), [(None, None), (1024.0, None), (1024.0, 1e-3)])
def test_a_regularizer_adds_to_whole_unscaled_clipped_gradients(
    make_recipe: Callable[..., Recipe], make_job: Callable, scale: float | None, clip_grad_norm: float | None
):
    recipe = make_recipe(opt="sgd", momentum=0.0, weight_decay=0.0, clip_grad_norm=clip_grad_norm)
    plain_job, plain = make_job(recipe)
    job, state = make_job(recipe)
    epochs, bias = [], state.model.head.bias

    def regularize(epoch: int) -> None:
        epochs.append(epoch)
        bias.grad += 3.0

    job = dataclasses.replace(job, regularize=regularize)
    state.epoch = 7
    for each in (plain, state):
        if scale:
            each.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        set_learning_rate(each.optimizer, 0.1)
    train_step(plain_job, plain, [BATCH, BATCH])
    train_step(job, state, [BATCH, BATCH])
    assert epochs == [7]  # once a step, whatever the number of batches
    torch.testing.assert_close(bias, plain.model.head.bias - 0.3, atol=1e-6, rtol=0)
    torch.testing.assert_close(state.model.head.weight, plain.model.head.weight)


def test_bf16_runs_the_network_in_bf16_and_keeps_the_weights_in_fp32(
    make_recipe: Callable[..., Recipe], make_job: Callable
):
    job, state = make_job(make_recipe(amp_dtype=torch.bfloat16))
    set_learning_rate(state.optimizer, 1e-3)
    seen = []
    state.model.head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    loss = train_step(job, state, [BATCH])
    assert seen == [torch.bfloat16] and loss.dtype == torch.float32
    assert {parameter.dtype for parameter in state.model.parameters()} == {torch.float32}


def test_max_steps_ends_a_run_within_an_epoch(
    make_recipe: Callable[..., Recipe], make_job: Callable, make_folder: Callable
):
    recipe = make_recipe(max_steps=17, opt="sgd", lr=0.01)
    job, state = make_job(recipe)
    rows: list[EpochRow] = []
    fit(job, state, make_folder(recipe), Observers(row=rows.append))
    assert state.step == 17 and [row.epoch for row in rows] == [1, 2]  # 15 steps an epoch


def test_train_loss_is_the_mean_over_images(
    make_recipe: Callable[..., Recipe], make_job: Callable, make_folder: Callable
):
    recipe = make_recipe(opt="sgd", log_every=4, checkpoint_hist=1, checkpoint_steps=3)
    job, state = make_job(recipe)
    set_learning_rate(state.optimizer, 0.0)
    heard = []
    with Signals() as signals:
        checkpointer = Checkpointer(recipe.loop, state, make_folder(recipe), signals, CPU)
        images = train_one_epoch(job, state, checkpointer, lambda step, loss: heard.append((step, loss)))
    losses = []
    with torch.no_grad():
        for batch in job.train_loader:
            inputs, labels = job.prepare(batch)
            losses.append(F.cross_entropy(state.model(inputs), labels, reduction="none"))
    assert images == state.images == 479
    assert state.loss_sum / 479 == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert [step for step, _ in heard] == [4, 8, 12]
    assert heard[1][1] == pytest.approx(torch.cat(losses[4:8]).mean().item(), rel=1e-5)


def test_two_processes_find_nothing_to_do_in_an_epoch_that_one_has_finished(
    make_recipe: Callable[..., Recipe], make_job: Callable, make_folder: Callable, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    recipe = make_recipe(batch_size=16)
    job, state = make_job(recipe)
    state.images, state.step = 479, 15  # an odd number of images, which two processes make even
    with Signals() as signals:
        checkpointer = Checkpointer(recipe.loop, state, make_folder(recipe), signals, CPU)
        assert train_one_epoch(job, state, checkpointer, lambda step, loss: None) == 0
    assert (state.step, state.images) == (15, 479)


@pytest.mark.parametrize(("log_every", "noticed"), [(1, 3), (4, 4), (50, 15)])  # 15 steps an epoch
def test_a_loss_that_is_not_finite_names_its_epoch_and_step(
    make_recipe: Callable[..., Recipe], make_job: Callable, make_folder: Callable, log_every: int, noticed: int
):
    recipe = make_recipe(log_every=log_every)
    job, state = make_job(recipe, objective=(diverging := Diverging(at=3)))
    folder = make_folder(recipe)
    with pytest.raises(UserError, match="not finite at epoch 1, step 3: lower --lr"):
        fit(job, state, folder)
    assert not list(folder.path.glob("*.safetensors")) and not list(folder.path.glob("state*"))
    assert diverging.steps == noticed


def test_a_state_is_never_written_of_a_model_that_has_diverged(
    make_recipe: Callable[..., Recipe], make_job: Callable, make_folder: Callable
):
    """The loss of step 4 is fine, its update is not: the states of steps 1 to 3 stay."""
    recipe = make_recipe(checkpoint_steps=1, checkpoint_hist=9)
    job, state = make_job(recipe, objective=Diverging(at=4, gradient_only=True))
    folder = make_folder(recipe)
    with pytest.raises(UserError, match="the weights are not finite after step 4"):
        fit(job, state, folder)
    assert sorted(path.name for path in folder.path.iterdir()) == ["state.1.pt", "state.2.pt", "state.pt"]


class Diverging:
    """A loss that is not a number from step `at` on, or has a gradient that is none."""

    def __init__(self, at: int, gradient_only: bool = False) -> None:
        self.at, self.gradient_only, self.steps = at, gradient_only, 0

    def __call__(self, outputs: Tensor, labels: Tensor, taught: Tensor | None) -> Tensor:
        self.steps += 1
        loss = outputs.mean()
        if self.steps < self.at:
            return loss
        if self.gradient_only:
            loss.register_hook(lambda gradient: gradient * float("nan"))
            return loss
        return loss * float("nan")


@pytest.mark.parametrize("sizes", [(4, 4), (3, 3, 2)])  # the last of an epoch may come out shorter
def test_accumulated_batches_are_one_batch(
    make_recipe: Callable[..., Recipe], make_job: Callable, sizes: tuple[int, ...]
):
    weights, losses = [], []
    for batches in (
        [BATCH],
        [RawBatch(*parts) for parts in zip(*(field.split(sizes) for field in BATCH), strict=True)],
    ):
        job, state = make_job(make_recipe(opt="sgd", momentum=0.9))
        set_learning_rate(state.optimizer, 0.1)
        losses.append(train_step(job, state, batches).item())
        weights.append(torch.cat([parameter.detach().flatten() for parameter in state.model.parameters()]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert torch.allclose(*weights, rtol=0, atol=1e-6)


def test_an_epoch_of_accumulated_batches(make_recipe: Callable[..., Recipe], make_job: Callable, epoch_of: Callable):
    job, state = make_job(make_recipe(accumulate=2))
    row = epoch_of(job, state)
    assert state.step == 8 and row.epoch == 1  # 15 batches


def test_items_come_in_groups():
    assert list(in_groups(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(in_groups([], 3)) == []


def test_the_moving_average_is_the_result(make_recipe: Callable[..., Recipe], make_job: Callable, epoch_of: Callable):
    """Of every second step, from a copy of the model after the first on."""
    recipe = make_recipe(model_ema=True, model_ema_decay=0.5, model_ema_steps=2, max_steps=5)
    job, state = make_job(recipe)
    assert state.ema and state.result is state.ema.module
    set_learning_rate(state.optimizer, 2e-3)
    expected, name = None, "blocks.0.mlp.fc1.weight"
    for step in range(1, 6):
        train_step(job, state, [BATCH])
        state.step += 1
        weight = state.model.state_dict()[name]
        if step % 2 == 1:
            expected = weight.clone() if expected is None else 0.5 * expected + 0.5 * weight
    assert expected is not None and torch.allclose(state.ema.module.state_dict()[name], expected, atol=1e-7)

    job, state = make_job(make_recipe(model_ema=True, model_ema_decay=0.999, model_ema_steps=1))
    row = epoch_of(job, state)
    assert row.top1 != row.raw_top1 and f"(raw {row.raw_top1:.4f})" in str(row)
    assert state.best_top1 == row.top1


def test_distillation_trains_both_heads_and_leaves_them_together(
    make_recipe: Callable[..., Recipe], make_job: Callable, epoch_of: Callable
):
    kwargs = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 10}
    spec = describe_model("deit_tiny_distilled_patch16_224", kwargs=kwargs, input_size=32)

    class Teacher:
        def ask(self, images: Tensor) -> Callable[[], Tensor]:
            return lambda: F.one_hot(torch.full((len(images),), 7), 10).float()

    recipe = make_recipe(distillation="hard", lr=4e-3, max_steps=15, batch_size=96)
    job, state = make_job(recipe, spec, images=1437, teacher=Teacher())
    epoch_of(job, state, spec)
    student = state.model.train()
    assert isinstance(student(job.prepare(BATCH)[0]), Tensor)
    student.eval()
    features = student.forward_features(torch.cat([batch for batch, _ in job.val_loader]))
    answers = student.head_dist(features[:, 1]).argmax(dim=1)
    assert (answers == 7).all()  # what the teacher always says
    assert (student.head(features[:, 0]).argmax(dim=1) != 7).float().mean() > 0.5  # what the labels say


@pytest.mark.parametrize("main", [True, False])
def test_the_first_process_s_running_statistics_become_all_s(monkeypatch: pytest.MonkeyPatch, main: bool):
    conv, norm = nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)
    assert norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None
    nn.init.constant_(norm.running_mean, 3.0 if main else float("nan"))
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(distributed, "is_main", lambda: main)
    others = 0.0 if main else 5.0  # what the other processes send: nothing, or the first one's
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda tensor: tensor.add_(others))
    weight = conv.weight.clone()
    share_running_statistics(nn.Sequential(conv, norm, nn.BatchNorm2d(2, track_running_stats=False)))
    assert norm.running_mean.tolist() == ([3.0, 3.0] if main else [5.0, 5.0])
    assert norm.running_var.tolist() == ([1.0, 1.0] if main else [5.0, 5.0])
    assert torch.equal(conv.weight, weight) and norm.num_batches_tracked == 0
