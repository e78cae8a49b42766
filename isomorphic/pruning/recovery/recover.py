"""What is done to a cut model, in one order; held-out images judge each step, and one that loses is undone.

1. compensate: layers learn in closed form to make what the dense ones made (`compensation.py`).
2. bn: batch norms get the statistics of what they now read, or a blend of old and new ones (`batch_norm.py`).
3. distill: some hundred steps towards the dense model's answers (`distillation.py`).

They look at calibration images, without labels: training images under the evaluation transform.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from isomorphic.inputs import Inputs, device_of, items_of, num_items
from isomorphic.progress import Bar, steps
from isomorphic.pruning.recovery.batch_norm import blend, recalibrate, statistics_of
from isomorphic.pruning.recovery.compensation import CutLayers, Reconstruction, compensate
from isomorphic.pruning.recovery.distillation import DistillationRules, Distilled, distill
from isomorphic.pruning.recovery.held_out import Judge, Judged, Kept, Trials

BATCH = 64  # images that a batch norm is recalibrated on at once
SHARES = (1.0, 0.5, 0.25, 0.1)  # of the new statistics in a batch norm's, that held-out images choose from


@dataclass(frozen=True)
class Recovered:
    """What was done to a cut model.

    Attributes:
        reconstructions: of the layers that were compensated; none where that was undone.
        batch_norms: how many were recalibrated; None if none were to be.
        distilled: how far that went; None if it was not to.
        judged: the steps as held-out images saw them.
    """

    reconstructions: Sequence[Reconstruction] = ()
    batch_norms: int | None = None
    distilled: Distilled | None = None
    judged: Sequence[Judged] = ()


@dataclass(frozen=True)
class Models:
    """A cut model and what it comes from.

    Attributes:
        model: the cut one.
        dense: as it was before the cut, with the cut model's blocks: for compensate.
        teacher: the dense model with all of its blocks: for distill; the very `dense` where none was removed.
        plain_state: the tensors of a plain cut, where `model` was rotated for compensate: what undoes that, too.
    """

    model: nn.Module
    dense: nn.Module | None = None
    teacher: nn.Module | None = None
    plain_state: Mapping[str, Tensor] | None = None


def recover(
    models: Models,
    images: Inputs,
    layers: CutLayers,
    wanted: frozenset[str],
    judge: Judge | None,
    rules: DistillationRules,
    *,
    stage: Callable[[str], None] = lambda doing: None,
) -> Recovered:
    """Recovers a cut model in place.

    Args:
        models: the cut model and its dense one.
        images: this process's images to fit.
        layers: what was cut of the dense one.
        wanted: some of "compensate", "bn" and "distill".
        judge: of the held-out images; None: every step stays.
        rules: of distill.
        stage: is called with the name of each step before it begins.
    """
    model, dense, teacher = models.model, models.dense, models.teacher
    trials = Trials(model, judge, plain_state=models.plain_state)
    reconstructions: Sequence[Reconstruction] = ()
    mixtures = layers.mixtures
    batch_norms, distilled = None, None
    if "compensate" in wanted and dense is not None:
        stage("compensating")
        found, stayed = trials.take("compensate", lambda: compensate(dense, model, images, layers))
        reconstructions = found if stayed else ()
        mixtures = mixtures if stayed or models.plain_state is None else {}  # its rotation is undone with it
    if "bn" in wanted:
        stage("recalibrating batch norms")
        batch_norms = _recalibrate(trials, images)
    if "distill" in wanted and teacher is not None:
        stage("distilling")
        columns = {**layers.columns, **mixtures} if teacher is dense else None  # other blocks have other names
        distilled = distill(teacher, model, images, rules, judge, columns=columns)
        if judge:
            how = f"{distilled.kept} of {distilled.steps} steps"
            trials.note("distill", distilled.after, distilled.kept > 0, how)
    return Recovered(reconstructions, batch_norms, distilled, tuple(trials.judged))


def _recalibrate(trials: Trials, images: Inputs) -> int:
    """Recalibrates, by the share that held-out images choose; returns how many batch norms have new statistics."""
    model, judge, before = trials.model, trials.judge, Kept(trials.model)
    old, parts = statistics_of(model), _equal_parts(images)
    with steps("recalibrating batch norms", len(parts), unit="batch") as bar:
        count = recalibrate(model, _pairs(parts, bar), device_of(images))
    if not count or judge is None:
        return count
    new, losses = statistics_of(model), {}
    for share in SHARES:
        blend(model, old, new, share)
        losses[share] = judge.loss_of(model)
    best = min(SHARES, key=lambda share: losses[share])
    stays = losses[best] <= trials.loss
    if stays:
        blend(model, old, new, best)
    else:
        before.restore()
    trials.note("bn", losses[best], stays, f"{best:.0%} of the new statistics")
    return count if stays else 0


def _equal_parts(images: Inputs) -> list[Inputs]:
    """Returns batches of at most `BATCH` items and nearly equal lengths: each counts alike."""
    count = num_items(images)
    parts = torch.arange(count).tensor_split(max(-(-count // BATCH), 1))
    return [items_of(images, slice(int(part[0]), int(part[-1]) + 1)) for part in parts if len(part)]


def _pairs(parts: Sequence[Inputs], bar: Bar) -> Iterator[tuple[Inputs, None]]:
    """Yields images as `recalibrate` takes them, without labels."""
    for part in parts:
        yield part, None
        bar.update()
