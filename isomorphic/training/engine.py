"""The training loop, for every recipe and any number of processes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from isomorphic.data.skipping import STAND_IN, SkippedImages, describe_unreadable
from isomorphic.data.workers import naming_dead_workers
from isomorphic.errors import UserError
from isomorphic.measure.accuracy import Accuracy, measure_accuracy
from isomorphic.processes import distributed
from isomorphic.progress import Bar
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
    """Everything that does not change during training.

    Attributes:
        network: the state's model, possibly wrapped: in DDP, compiled, or both.
        objective: the loss.
        teacher: gives the logits for distillation; None without it.
        prepare: turns a loaded batch into training images and labels, on the device.
        train_loader, val_loader: loaders of this process's share of the images. With `skipped`, batches of the first
            are pairs that name images which others take the place of.
        skipped, val_skipped: collect the images that cannot be read and may be left out; None if none may.
        regularize: is called with the epoch, from 0, before each optimizer step, and adds to the gradients of the
            state's model, which are whole then: of all batches and processes, unscaled and clipped.
        weak_half: gives the share of the units' norms that the weaker halves of groups hold, for the epoch's row.
    """

    network: nn.Module
    objective: Objective
    teacher: Teacher | None
    prepare: Callable[[RawBatch], tuple[Tensor, Tensor]]
    train_loader: DataLoader[RawBatch]
    val_loader: DataLoader[tuple[Tensor, Tensor]]
    device: torch.device
    recipe: Recipe
    skipped: SkippedImages | None = None
    val_skipped: SkippedImages | None = None
    regularize: Callable[[int], object] | None = None
    weak_half: Callable[[], float] | None = None


@dataclass(frozen=True)
class Observers:
    """Callbacks: `row` after every epoch, `step` (step, mean loss of the last steps, lr) every `log_every` steps.

    `note` gets lines for the user, on images that were left out.
    """

    row: Callable[[EpochRow], None] = lambda row: None
    step: Callable[[int, float, float], None] = lambda step, loss, lr: None
    note: Callable[[str], None] = lambda text: None


def fit(job: Job, state: TrainState, folder: RunFolder, observers: Observers = Observers()) -> None:
    """Trains until `state` is finished; after every epoch it validates, writes into `folder` and reports.

    The training state is written within and after the training part of an epoch, as the recipe says, and once more at
    the end. A resumed run repeats everything that came after its state in that epoch, including validation.

    Raises:
        UserError: a loss is not finite; every process stops.
        Stopped: a signal asked for it; the training state is written.
    """
    if not folder.file("best").is_file():
        state.best_top1 = -1.0  # a run resumed in another folder does not have its best checkpoint there
    with Signals() as signals, naming_dead_workers():
        checkpointer = Checkpointer(job.recipe.loop, state, folder, signals, job.device)
        while not state.is_finished(job.recipe.loop):
            observers.row(run_epoch(job, state, checkpointer, observers))
            checkpointer.after_epoch()


def run_epoch(job: Job, state: TrainState, checkpointer: Checkpointer, observers: Observers = Observers()) -> EpochRow:
    """Trains the rest of an epoch, validates the model, records both in the run's folder and returns the row."""
    begin = time.perf_counter()
    lr = learning_rate(job.recipe.schedule, state.epoch)
    set_learning_rate(state.optimizer, lr)
    with separate_heads(state.model, job.recipe.loss.distillation != "none"):
        images = train_one_epoch(job, state, checkpointer, lambda step, loss: observers.step(step, loss, lr))
    speed = images / (time.perf_counter() - begin)
    tell_skipped(job.skipped, STAND_IN, observers)
    for model in state.models():
        share_running_statistics(model)
    checkpointer.before_validation()
    raw = validate(job, state.model)
    result = validate(job, state.ema.module) if state.ema else raw
    train_loss = state.loss_sum / max(state.images, 1)
    tell_skipped(job.val_skipped, "validation is of the other images", observers)
    state.end_epoch(result.top1, result.loss)
    seconds = time.perf_counter() - begin
    row = EpochRow(
        state.epoch,
        lr,
        train_loss,
        result.loss,
        result.top1,
        result.top5,
        raw.top1,
        round(seconds, 3),
        round(speed, 2),
        weak_half=round(job.weak_half(), 6) if job.weak_half else None,
    )
    checkpointer.folder.keep(state, row)
    return row


def train_one_epoch(
    job: Job, state: TrainState, checkpointer: Checkpointer, report: Callable[[int, float], None]
) -> int:
    """Trains on the rest of the epoch's images and returns their number, over all processes.

    The sums of the epoch go into `state`. `report` gets the step and the mean loss since its last call, every
    `log_every` steps.
    """
    loop, before = job.recipe.loop, state.images
    job.network.train()
    meter = LossMeter(state.epoch, job.device, images=state.images, loss_sum=state.loss_sum)
    steps_left = None if loop.max_steps is None else max(loop.max_steps - state.step, 0)
    start_epoch(job.train_loader, state.epoch, skip=images_done(job, state))
    with closing(prefetch(readable_batches(job), job.device)) as batches, progress_bar(job, state) as bar:
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
    """Returns the number of images that are done in this process's share of the epoch.

    If fewer images are left than there are processes, the epoch counts as done.
    """
    share, world = len(cast(Sized, job.train_loader.sampler)), distributed.world_size()
    return share if share * world - state.images < world else -(-state.images // world)


def train_step(job: Job, state: TrainState, batches: list[RawBatch]) -> Tensor:
    """Does one optimizer step on the gradients of all batches and returns the mean loss of their images.

    Each image has the same weight, so that n batches of b images give the gradients of one batch of n · b. Masked
    weights are set to zero afterwards, in the model and in its moving average. The loss stays on the device.
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
    if clip_grad_norm is not None or job.regularize:
        state.scaler.unscale_(state.optimizer)
    if clip_grad_norm is not None:
        nn.utils.clip_grad_norm_(state.model.parameters(), clip_grad_norm)
    if job.regularize:
        job.regularize(state.epoch)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.masks.apply(state.model)
    updates, rest = divmod(state.step, job.recipe.ema.model_ema_steps)
    if state.ema and rest == 0:
        state.ema.update(state.model, step=updates + 1)  # the first one, after the first step, copies the model
        state.masks.apply(state.ema.module)
    return torch.stack(losses).sum()


def batch_loss(job: Job, batch: RawBatch) -> Tensor:
    """Returns the mean loss of a batch, with its graph; on a GPU, teacher and student run concurrently."""
    images, labels = job.prepare(batch)
    answer = job.teacher.ask(images) if job.teacher else None
    amp_dtype = job.recipe.loop.amp_dtype
    with torch.autocast(job.device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
        with _naming_single_images(len(labels)):
            outputs = job.network(images)
        return job.objective(outputs, labels, answer() if answer else None)


@contextlib.contextmanager
def _naming_single_images(count: int) -> Iterator[None]:
    """Turns torch's refusal of batch norms with one value a channel into a UserError, where one image is the reason."""
    try:
        yield
    except ValueError as error:
        if count > 1 or "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            "batch norms cannot be trained on one image at a time: take --batch-size 2 or more, and as many images"
        ) from error


def validate(job: Job, model: nn.Module) -> Accuracy:
    """Returns the accuracy on the validation images, computed in fp32.

    Raises:
        UserError: images cannot be read and may not be left out; in every process.
    """
    with gathered(model):
        channels_last = job.recipe.network.channels_last
        result = measure_accuracy(model, job.val_loader, job.device, channels_last=channels_last, progress="validation")
    if job.val_skipped:
        job.val_skipped.add(result.unreadable)
    return result


def readable_batches(job: Job) -> Iterable[RawBatch]:
    """Returns the batches of the training loader, without the names of images that others take the place of."""
    return job.skipped.strip(cast(Any, job.train_loader)) if job.skipped else job.train_loader


def tell_skipped(skipped: SkippedImages | None, instead: str, observers: Observers) -> None:
    """Tells the observers which images were left out for the first time. Every process calls this.

    Raises:
        UserError: all processes together have left out too many.
    """
    names = skipped.news() if skipped and skipped.share else []
    if names:
        observers.note(f"Skipped {describe_unreadable(names)}; {instead}")


def share_running_statistics(model: nn.Module) -> None:
    """Gives all processes the buffers of the first one, which training states hold, so that all have the same model."""
    if not distributed.is_distributed():
        return
    for buffer in model.buffers():
        if buffer.is_floating_point():
            distributed.all_reduce_sum(buffer if distributed.is_main() else buffer.zero_())


def progress_bar(job: Job, state: TrainState) -> Bar:
    """Returns a progress bar over the steps of an epoch."""
    loop, loader = job.recipe.loop, job.train_loader
    assert loader.batch_size is not None
    batches_done = state.images // (loader.batch_size * distributed.world_size())
    return Bar(
        desc=f"epoch {state.epoch + 1}/{loop.epochs}",
        total=-(-len(loader) // loop.accumulate),
        initial=batches_done // loop.accumulate,
        leave=False,
    )


def in_groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Returns an iterator over lists of `size` consecutive items; the last list may be shorter."""
    iterator = iter(items)
    return iter(lambda: list(islice(iterator, size)), [])
