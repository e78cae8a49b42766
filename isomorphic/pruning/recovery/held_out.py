"""Held-out images: has a step of the recovery brought the pruned model nearer to the dense one, on images beyond it?

Every fifth of the calibration images is held out: no step fits it. A step that takes the pruned model away from the
dense one there is undone. Batch norms that are given the statistics of unusual images are such a step, and so are least
squares on too few of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from isomorphic.inputs import Inputs, call, device_of, floats_in, items_of, num_items, tensors_in
from isomorphic.observe import eval_mode
from isomorphic.processes import distributed

T = TypeVar("T")

EVERY = 5  # of so many images one is held out
BATCH = 64  # images at once
KL, ERROR = "mean KL to the dense model", "relative error to the dense model"


def item_keys(images: Inputs) -> Tensor:
    """Returns the sum over each item's numbers (n,), float64: an order that does not depend on who holds which item."""
    length = num_items(images)
    own = [tensor for tensor in tensors_in(images) if tensor.dim() and len(tensor) == length]
    return torch.stack([tensor.reshape(length, -1).sum(1, dtype=torch.float64) for tensor in own]).sum(0).cpu()


def held_out_mask(images: Inputs) -> Tensor:
    """Returns which of this process's items are held out (n,): True for every fifth.

    All processes' items are put in the order of their keys and every fifth is held out, of two to four the last one: of
    keys 3, 1, 4, 1.5, 9, 2.6 that is the item of key 4. Several processes hold out the items that one would.
    """
    own = item_keys(images)
    counts = distributed.gather_objects(len(own))
    begin = sum(counts[: distributed.rank()])
    order = torch.cat(distributed.gather_objects(own)).argsort(stable=True)
    is_held_out = torch.zeros(len(order), dtype=torch.bool)
    is_held_out[order[EVERY - 1 :: EVERY]] = True
    if 1 < len(order) < EVERY:
        is_held_out[order[-1]] = True
    mine = is_held_out[begin : begin + len(own)]
    return mine.to(device_of(images))


def hold_out(dense: nn.Module, images: Inputs) -> tuple[Inputs, Judge | None]:
    """Returns this process's images to fit, and the judge of the others; None where it could tell nothing."""
    mask = held_out_mask(images)
    if not all(distributed.gather_objects(bool((~mask).any()))):  # some process would have nothing to fit
        return images, None
    judge = Judge(dense, items_of(images, mask))
    return items_of(images, ~mask), judge if judge.works else None


class Judge:
    """How far a pruned model is from the dense one on held-out images, over all processes.

    Classifiers, which return logits (N, C) and nothing else, are judged by the mean KL(dense‖pruned) in nats. Others
    are judged by their relative error: of each floating-point output a, which is b in the dense model, ‖a − b‖² / ‖b‖²,
    the root of the mean over the outputs.

    Args:
        dense: what the pruned model should do; it is run now, and not kept.
        images: this process's held-out items; some process has one.

    Attributes:
        measure: `KL` or `ERROR`.
        num_images: of all processes.
        works: False where the dense outputs are no numbers that a pruned model's could be held against.
    """

    def __init__(self, dense: nn.Module, images: Inputs) -> None:
        self._parts = list(parts_of(images))
        self._targets = [_outputs(dense, part) for part in self._parts]
        self.num_images = sum(distributed.gather_objects(num_items(images)))
        is_logits = [are_logits(outputs) for outputs in self._targets]
        self._is_classifier = all(part for parts in distributed.gather_objects(is_logits) for part in parts)
        self.measure = KL if self._is_classifier else ERROR
        there = [bool(outputs) and all(bool(t.isfinite().all()) for t in outputs) for outputs in self._targets]
        self.works = self.num_images > 0 and all(part for parts in distributed.gather_objects(there) for part in parts)

    def loss_of(self, model: nn.Module) -> float:
        """Returns how far `model` is from the dense one; infinity where that is no number."""
        outputs = [_outputs(model, part) for part in self._parts]
        alike = all(
            [a.shape for a in mine] == [b.shape for b in targets]
            for mine, targets in zip(outputs, self._targets, strict=True)
        )
        if not all(distributed.gather_objects(alike)):
            return math.inf
        loss = self._mean_kl(outputs) if self._is_classifier else self._relative_error(outputs)
        return loss if math.isfinite(loss) else math.inf

    def compare(self, step: str, without: nn.Module, model: nn.Module) -> Judged:
        """Returns how `model` does beside the same one without a step."""
        before, after = self.loss_of(without), self.loss_of(model)
        return Judged(step, before, after, after <= before)

    def _mean_kl(self, outputs: Sequence[Sequence[Tensor]]) -> float:
        total = torch.zeros((), dtype=torch.float64)
        for (logits,), (dense,) in zip(outputs, self._targets, strict=True):
            log_p, log_q = dense.double().log_softmax(1), logits.double().log_softmax(1)
            total += (log_p.exp() * (log_p - log_q)).sum().cpu()
        return float(distributed.all_reduce_sum(total)) / self.num_images

    def _relative_error(self, outputs: Sequence[Sequence[Tensor]]) -> float:
        """Sums ‖a − b‖² and ‖b‖² of each output apart, so that large numbers in one do not hide the others."""
        count = max(distributed.gather_objects(max((len(targets) for targets in self._targets), default=0)))
        sums = torch.zeros(2, count, dtype=torch.float64)
        for mine, targets in zip(outputs, self._targets, strict=True):
            for place, (a, b) in enumerate(zip(mine, targets, strict=True)):
                sums[0, place] += (a.double() - b.double()).square().sum().cpu()
                sums[1, place] += b.double().square().sum().cpu()
        errors, squares = distributed.all_reduce_sum(sums)
        return float((errors[squares > 0] / squares[squares > 0]).mean().sqrt())


def parts_of(images: Inputs, size: int = BATCH) -> Iterator[Inputs]:
    """Yields batches of at most `size` items."""
    for start in range(0, num_items(images), size):
        yield items_of(images, slice(start, start + size))


def are_logits(outputs: Sequence[Tensor]) -> bool:
    """Returns True for one output (N, C), of more classes than one."""
    return len(outputs) == 1 and outputs[0].dim() == 2 and outputs[0].shape[1] > 1


@torch.no_grad()
def _outputs(model: nn.Module, images: Inputs) -> list[Tensor]:
    """The floating-point tensors that a model returns, in eval mode."""
    with eval_mode(model):
        return floats_in(call(model, images))


class Kept:
    """A model's parameters and buffers, to be put back as they were: the very same objects, with their old values."""

    def __init__(self, model: nn.Module) -> None:
        self._tables: list[tuple[dict[str, Any], dict[str, Tensor | None]]] = [
            (table, dict(table)) for module in model.modules() for table in (module._parameters, module._buffers)
        ]
        tensors = {id(tensor): tensor for _, own in self._tables for tensor in own.values() if tensor is not None}
        self._values = [(tensor, tensor.detach().clone()) for tensor in tensors.values()]

    @torch.no_grad()
    def restore(self) -> None:
        """Puts everything back; what was added since, such as a bias, is gone."""
        for table, own in self._tables:
            table.clear()
            table.update(own)
        for tensor, values in self._values:
            tensor.copy_(values)


@dataclass(frozen=True)
class Judged:
    """One step of a recovery, as held-out images see it.

    Attributes:
        step: its name.
        before, after: what the judge said, without and with it.
        stays: False where it was undone.
        how: what of it stays.
    """

    step: str
    before: float
    after: float
    stays: bool
    how: str = ""

    def line(self, width: int = 0) -> str:
        """What a person reads, the step's name padded: "bn  0.9651 => 0.9312 (25% of the new statistics)"."""
        how = f" ({self.how})" if self.how else ""
        return f"{self.step.ljust(width)}  {self.before:.4f} => {self.after:.4f}{how if self.stays else ', undone'}"


class Trials:
    """Steps of a recovery, each of which stays only if it brings the model nearer to the dense one.

    Args:
        model: the pruned model.
        judge: None where nothing can be held against the dense model: every step stays.
        plain_state: the tensors that the first step is held against and undone to, where they are not the model's.

    Attributes:
        judged: the steps so far.
        loss: of the model as it stands; NaN without a judge.
    """

    def __init__(
        self, model: nn.Module, judge: Judge | None, *, plain_state: Mapping[str, Tensor] | None = None
    ) -> None:
        self.model, self.judge, self._plain = model, judge, plain_state
        self.judged: list[Judged] = []
        now = Kept(model) if plain_state else None
        if plain_state:
            model.load_state_dict(plain_state)
        self.loss = judge.loss_of(model) if judge else math.nan
        if now:
            now.restore()

    def take(self, step: str, change: Callable[[], T]) -> tuple[T, bool]:
        """Changes the model; returns what `change` returned, and True if the change stayed."""
        if self.judge is None:
            return change(), True
        before = Kept(self.model)
        found = change()
        after = self.judge.loss_of(self.model)
        stays = after <= self.loss
        if not stays:
            before.restore()
            if self._plain:
                self.model.load_state_dict(self._plain)
        self._plain = None
        self.note(step, after, stays)
        return found, stays

    def note(self, step: str, after: float, stays: bool, how: str = "") -> None:
        """Notes a step that was judged: what it came to, and whether the model is left with it."""
        self.judged.append(Judged(step, self.loss, after, stays, how))
        self.loss = after if stays else self.loss
