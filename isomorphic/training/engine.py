"""The training loop, for every recipe and any number of processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from isomorphic import distributed
from isomorphic.errors import UserError
from isomorphic.measure.accuracy import measure_accuracy
from isomorphic.training.augment import Mixer
from isomorphic.training.losses import Objective, separate_heads
from isomorphic.training.optim import learning_rate, set_learning_rate
from isomorphic.training.recipe import Recipe
from isomorphic.training.resume import TrainState
from isomorphic.training.sampling import start_epoch
from isomorphic.training.tracking import EpochRow, RunFolder


@dataclass(frozen=True)
class Job:
    """What stays the same while a model trains.

    Attributes:
        network: the state's model, or its wrapper that adds up gradients over processes.
        objective: the loss, teacher included.
        mixer: what makes training batches of loaded ones.
        train_loader, val_loader: this process's share of the images.
    """

    network: nn.Module
    objective: Objective
    mixer: Mixer
    train_loader: DataLoader[tuple[Tensor, Tensor]]
    val_loader: DataLoader[tuple[Tensor, Tensor]]
    device: torch.device
    recipe: Recipe


def over_processes(model: nn.Module, device: torch.device) -> nn.Module:
    """The model whose backward pass averages gradients over all processes; itself where there is only one."""
    if not distributed.is_distributed():
        return model
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def fit(job: Job, state: TrainState, folder: RunFolder, report: Callable[[EpochRow], None]) -> None:
    """Trains until `state` is finished; after every epoch it validates, writes into `folder` and reports.

    Raises:
        UserError: a loss that is not finite; every process stops.
    """
    folder.prepare(state.epoch)
    if not folder.file("best").is_file():
        state.best_top1 = -1.0  # where a run goes on in another folder, its best checkpoint stayed behind
    while not state.is_finished(job.recipe.loop):
        row = run_epoch(job, state)
        is_best = state.note_result(row.top1, row.val_loss)
        folder.keep(state, row, is_best, job.device)
        report(row)


def run_epoch(job: Job, state: TrainState) -> EpochRow:
    """Trains one epoch and validates the model as it then is."""
    begin = time.perf_counter()
    lr = learning_rate(job.recipe.schedule, state.epoch)
    set_learning_rate(state.optimizer, lr)
    start_epoch(job.train_loader, state.epoch)
    with separate_heads(state.model, job.recipe.loss.distillation != "none"):
        train_loss, images = train_one_epoch(job, state)
    train_seconds = time.perf_counter() - begin
    average_running_statistics(state.model)
    result = measure_accuracy(state.model, job.val_loader, job.device, progress="validation")
    state.epoch += 1
    seconds = time.perf_counter() - begin
    speed = images / train_seconds
    return EpochRow(state.epoch, lr, train_loss, result.loss, result.top1, result.top5, seconds, speed)


def train_one_epoch(job: Job, state: TrainState) -> tuple[float, int]:
    """One pass over the training images; (mean loss, images), over all processes."""
    job.network.train()
    meter = LossMeter(state.epoch, job.device)
    title = f"epoch {state.epoch + 1}/{job.recipe.loop.epochs}"
    bar = tqdm(job.train_loader, title, leave=False, disable=None if distributed.is_main() else True)
    for images, labels in bar:
        loss = train_step(job, state, images, labels)
        state.step += 1
        meter.add(loss, len(images), state.step)
        if len(meter) == job.recipe.loop.log_every:
            bar.set_postfix(loss=f"{meter.settle():.4f}")
        if state.step == job.recipe.loop.max_steps:
            break
    bar.close()
    meter.settle()
    return meter.mean, meter.images


def train_step(job: Job, state: TrainState, images: Tensor, labels: Tensor) -> Tensor:
    """Forward, backward and update on one batch; its loss, detached and still on the device."""
    images = images.to(job.device, non_blocking=True)
    labels = labels.to(job.device, non_blocking=True)
    images, labels = job.mixer(images, labels)
    amp_dtype = job.recipe.loop.amp_dtype
    with torch.autocast(job.device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
        loss = job.objective(images, job.network(images), labels)
    state.optimizer.zero_grad(set_to_none=True)
    state.scaler.scale(loss).backward()
    if job.recipe.loop.clip_grad_norm is not None:
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(state.model.parameters(), job.recipe.loop.clip_grad_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    return loss.detach()


def average_running_statistics(model: nn.Module) -> None:
    """Makes the running mean and variance of batch norms the processes' average: all then hold one model."""
    if not distributed.is_distributed():
        return
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
            for statistic in (module.running_mean, module.running_var):
                distributed.all_reduce_sum(statistic).div_(distributed.world_size())


class LossMeter:
    """The mean loss of an epoch over all processes, added up on the device: looking at it makes the device wait.

    All processes must `settle` at the same steps.
    """

    def __init__(self, epoch: int, device: torch.device) -> None:
        self.epoch = epoch
        self.device = device
        self.total = 0.0
        self.images = 0
        self._losses: list[Tensor] = []
        self._sizes: list[int] = []
        self._last_step = 0

    def __len__(self) -> int:
        """Losses since the last `settle`."""
        return len(self._losses)

    @property
    def mean(self) -> float:
        """Mean over the images settled so far."""
        return self.total / max(self.images, 1)

    def add(self, loss: Tensor, size: int, step: int) -> None:
        """Takes the mean loss of `size` images at optimizer step `step`, a scalar on the device."""
        self._losses.append(loss)
        self._sizes.append(size)
        self._last_step = step

    def settle(self) -> float:
        """Adds up over processes what came since the last call, and returns the mean of the epoch so far.

        Raises:
            UserError: one of the losses is not finite; names the first such step.
        """
        if self._losses:
            losses = torch.stack(self._losses).double()
            sizes = torch.tensor(self._sizes, dtype=torch.float64, device=self.device)
            sums = torch.stack([(losses * sizes).sum(), sizes.sum()])
            total, images = distributed.all_reduce_sum(sums).tolist()
            if not abs(total) < float("inf"):
                self._stop(losses)
            self.total, self.images = self.total + total, self.images + int(images)
            self._losses, self._sizes = [], []
        return self.mean

    def _stop(self, losses: Tensor) -> None:
        """All processes come here together, since they share the sum; not all need have a bad loss."""
        finite = losses.isfinite().tolist()
        first_here = self._last_step - len(finite) + 1 + (finite.index(False) if False in finite else len(finite))
        raise UserError(
            f"the loss is not finite at epoch {self.epoch + 1}, step {min(distributed.gather_objects(first_here))}: "
            "lower --lr or set --clip-grad-norm (nothing of this epoch was saved)"
        )
