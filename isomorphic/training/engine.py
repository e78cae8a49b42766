"""The training loop, for every recipe and any number of processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from isomorphic.data.workers import naming_dead_workers
from isomorphic.measure.accuracy import Accuracy, measure_accuracy
from isomorphic.processes import distributed
from isomorphic.training.checkpointer import Checkpointer
from isomorphic.training.loading import prefetch
from isomorphic.training.losses import Objective, separate_heads
from isomorphic.training.meter import LossMeter
from isomorphic.training.optim import learning_rate, set_learning_rate
from isomorphic.training.parallel import gathered, gradient_sync
from isomorphic.training.recipe import Recipe
from isomorphic.training.resume import TrainState
from isomorphic.training.sampling import RawBatch, start_epoch
from isomorphic.training.signals import Signals
from isomorphic.training.teacher import Teacher
from isomorphic.training.tracking import EpochRow, RunFolder

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """What stays the same while a model trains.

    Attributes:
        network: the state's model, or what wraps it: adds up gradients over processes, is compiled.
        objective: the loss.
        teacher: whom the objective listens to, if anybody.
        prepare: makes training images and labels of a loaded batch, on the device.
        train_loader, val_loader: this process's share of the images.
    """

    network: nn.Module
    objective: Objective
    teacher: Teacher | None
    prepare: Callable[[RawBatch], tuple[Tensor, Tensor]]
    train_loader: DataLoader[RawBatch]
    val_loader: DataLoader[tuple[Tensor, Tensor]]
    device: torch.device
    recipe: Recipe


@dataclass(frozen=True)
class Observers:
    """Who hears of the run: `row` after every epoch, `step` (step, mean loss of the last steps, lr) in between."""

    row: Callable[[EpochRow], None] = lambda row: None
    step: Callable[[int, float, float], None] = lambda step, loss, lr: None


def fit(job: Job, state: TrainState, folder: RunFolder, observers: Observers = Observers()) -> None:
    """Trains until `state` is finished; after every epoch it validates, writes into `folder` and reports.

    The training state is written within and after the training part of an epoch, as the recipe says, and once more at
    the end: what comes after a state in its epoch, validation included, is done again when a run goes on from it.

    Raises:
        UserError: a loss that is not finite; every process stops.
        Stopped: SIGTERM came; the training state is written.
    """
    if not folder.file("best").is_file():
        state.best_top1 = -1.0  # where a run goes on in another folder, its best checkpoint stayed behind
    with Signals() as signals, naming_dead_workers():
        checkpointer = Checkpointer(job.recipe.loop, state, folder, signals, job.device)
        while not state.is_finished(job.recipe.loop):
            observers.row(run_epoch(job, state, checkpointer, observers))
            checkpointer.after_epoch()


def run_epoch(job: Job, state: TrainState, checkpointer: Checkpointer, observers: Observers = Observers()) -> EpochRow:
    """Trains what is left of an epoch, validates the model as it then is, and writes down both."""
    begin = time.perf_counter()
    lr = learning_rate(job.recipe.schedule, state.epoch)
    set_learning_rate(state.optimizer, lr)
    with separate_heads(state.model, job.recipe.loss.distillation != "none"):
        images = train_one_epoch(job, state, checkpointer, lambda step, loss: observers.step(step, loss, lr))
    speed = images / (time.perf_counter() - begin)
    for model in state.models():
        share_running_statistics(model)
    checkpointer.before_validation()
    raw = validate(job, state.model)
    result = validate(job, state.ema.module) if state.ema else raw
    train_loss = state.loss_sum / max(state.images, 1)
    state.end_epoch(result.top1, result.loss)
    seconds = time.perf_counter() - begin
    row = EpochRow(
        state.epoch, lr, train_loss, result.loss, result.top1, result.top5, raw.top1, round(seconds, 3), round(speed, 2)
    )
    checkpointer.folder.keep(state, row)
    return row


def train_one_epoch(
    job: Job, state: TrainState, checkpointer: Checkpointer, report: Callable[[int, float], None]
) -> int:
    """The rest of a pass over the training images; how many images that was, over all processes.

    The sums of the epoch go into `state`. `report` hears every `log_every` steps of the step and the mean loss since.
    """
    loop, before = job.recipe.loop, state.images
    job.network.train()
    meter = LossMeter(state.epoch, job.device, images=state.images, loss_sum=state.loss_sum)
    steps_left = None if loop.max_steps is None else max(loop.max_steps - state.step, 0)
    start_epoch(job.train_loader, state.epoch, skip=images_done(job, state))
    with closing(prefetch(job.train_loader, job.device)) as batches, progress_bar(job, state) as bar:
        for group in islice(in_groups(batches, loop.accumulate), steps_left):
            loss = train_step(job, state, group)
            state.step += 1
            bar.update()
            meter.add(loss, sum(len(batch.labels) for batch in group), state.step)
            if state.step % loop.log_every == 0:
                recent = meter.recent_mean()
                bar.set_postfix(loss=f"{recent:.4f}")
                report(state.step, recent)
            checkpointer.after_step(meter)
    meter.settle()
    state.take_sums(meter)
    return meter.images - before


def images_done(job: Job, state: TrainState) -> int:
    """Of this process's share of the epoch: all of it where what is left would not go round the processes."""
    share, world = len(cast(Sized, job.train_loader.sampler)), distributed.world_size()
    return share if share * world - state.images < world else -(-state.images // world)


def train_step(job: Job, state: TrainState, batches: list[RawBatch]) -> Tensor:
    """Forward and backward on each batch, one update; the mean loss of their images, still on the device.

    Each image weighs the same, so that n batches of b images are one of n · b: gradients add up to the mean over all.
    What was pruned by a mask is zero again afterwards, in the model and in its moving average.
    """
    total = sum(len(batch.labels) for batch in batches)
    state.optimizer.zero_grad(set_to_none=True)
    losses = []
    for number, batch in enumerate(batches, start=1):
        with gradient_sync(job.network, enabled=number == len(batches)):
            loss = batch_loss(job, batch) * (len(batch.labels) / total)
            state.scaler.scale(loss).backward()
        losses.append(loss.detach())
    clip_grad_norm = job.recipe.loop.clip_grad_norm
    if clip_grad_norm is not None:
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(state.model.parameters(), clip_grad_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.masks.apply(state.model)
    updates, rest = divmod(state.step, job.recipe.ema.model_ema_steps)
    if state.ema and rest == 0:
        state.ema.update(state.model, step=updates + 1)  # the first one, after the first step, copies the model
        state.masks.apply(state.ema.module)
    return torch.stack(losses).sum()


def batch_loss(job: Job, batch: RawBatch) -> Tensor:
    """Mean loss of a batch, with its graph; the teacher thinks while the student does."""
    images, labels = job.prepare(batch)
    answer = job.teacher.ask(images) if job.teacher else None
    amp_dtype = job.recipe.loop.amp_dtype
    with torch.autocast(job.device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
        outputs = job.network(images)
        return job.objective(outputs, labels, answer() if answer else None)


def validate(job: Job, model: nn.Module) -> Accuracy:
    """Accuracy on the validation images, in fp32."""
    with gathered(model):
        channels_last = job.recipe.network.channels_last
        return measure_accuracy(model, job.val_loader, job.device, channels_last=channels_last, progress="validation")


def share_running_statistics(model: nn.Module) -> None:
    """Gives all processes the first one's buffers, which are what training states hold: all then hold one model."""
    if not distributed.is_distributed():
        return
    for buffer in model.buffers():
        if buffer.is_floating_point():
            distributed.all_reduce_sum(buffer if distributed.is_main() else buffer.zero_())


def progress_bar(job: Job, state: TrainState) -> tqdm:
    """Of the steps of an epoch, in the first process, where somebody watches."""
    loop, loader = job.recipe.loop, job.train_loader
    assert loader.batch_size is not None
    batches_done = state.images // (loader.batch_size * distributed.world_size())
    return tqdm(
        desc=f"epoch {state.epoch + 1}/{loop.epochs}",
        total=-(-len(loader) // loop.accumulate),
        initial=batches_done // loop.accumulate,
        leave=False,
        disable=None if distributed.is_main() else True,
    )


def in_groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items in a row, the last one shorter where they do not come out even."""
    iterator = iter(items)
    return iter(lambda: list(islice(iterator, size)), [])
