"""The dense models of studies.claim: four small ones trained on digits made hard, and real ones.

A small model is trained for its seed. Real ones are EfficientNet-Lite0 with the ImageNet weights that
scripts/real_weights.sh installs, and whatever checkpoints are given; their seed draws the crops of the unlabelled
images that they are scored and recovered on, and their own answers are the labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isomorphic.checkpoints.open import open_model
from isomorphic.measure.accuracy import top1_of
from isomorphic.pruning.gradients import own_answer_loss
from isomorphic.pruning.planning import Calibration
from studies import hard_digits
from studies.depgraph.models import BATCH, FAMILIES, INPUTS, top1, train
from studies.real_weights.images import crops_of, find_images
from studies.real_weights.weights import install_weights

CALIBRATION_IMAGES = 256
FINETUNING_EPOCHS = 5
EFFICIENTNET = "efficientnet_lite0"
JUDGED_CROPS = 3  # of each image; always the same ones


@dataclass(frozen=True)
class Judged:
    """How a model does: top-1 in percent, of the labels or of agreement with the dense model, and mean KL in nats."""

    top1: float
    kl: float


@dataclass(frozen=True)
class Subject:
    """A dense model with all that a run needs.

    Attributes:
        model, inputs: what is pruned, and an example of what it takes.
        data: batches to score on.
        loss: of these; None: cross entropy of their labels.
        calibration: images to recover on, and labels for the search for an allocation.
        judge: says how a model does on other images.
        finetune: trains in place; None where that is not to be had.
        max_ratio: the largest share that a group loses.
    """

    model: nn.Module
    inputs: Tensor
    data: Sequence[tuple[Tensor, ...]]
    loss: Callable[..., Tensor] | None
    calibration: Calibration
    judge: Callable[[nn.Module], Judged]
    finetune: Callable[[nn.Module], None] | None
    max_ratio: float


@dataclass(frozen=True)
class Sources:
    """Where real models and their images come from.

    Attributes:
        images, judged_on: folders of unlabelled images.
        checkpoints: files by a name of the user's.
    """

    images: str | None = None
    judged_on: str | None = None
    checkpoints: tuple[tuple[str, str], ...] = ()


def open_subject(name: str, seed: int, folder: Path, sources: Sources) -> Subject:
    """Returns the subject of a family, of `EFFICIENTNET`, or of a checkpoint's name.

    Args:
        name: which.
        seed: of the training and of all that is drawn.
        folder: dense models that were trained before lie there.
        sources: of real ones.
    """
    return _digits(name, seed, folder) if name in FAMILIES else _real(name, seed, sources)


def _digits(name: str, seed: int, folder: Path) -> Subject:
    dense = trained(name, seed, folder)
    generator = torch.Generator().manual_seed(seed + 2)
    data = list(hard_digits.epoch(generator, BATCH))
    images, labels = (torch.cat(parts)[:CALIBRATION_IMAGES] for parts in zip(*data, strict=True))
    validation, _ = hard_digits.validation()
    expected = _answers(dense, validation)

    def judge(model: nn.Module) -> Judged:
        return Judged(top1(model), _kl(expected, _answers(model, validation)))

    finetune = partial(train, family=FAMILIES[name], epochs=FINETUNING_EPOCHS, seed=seed + 3)
    return Subject(dense, INPUTS, data, None, Calibration(images, labels), judge, finetune, max_ratio=0.95)


def trained(name: str, seed: int, folder: Path) -> nn.Module:
    """A family's dense model; its weights are kept in `folder`, and used again."""
    torch.manual_seed(seed)
    model = FAMILIES[name].build()
    file = folder / "dense" / f"{name}-{seed}.pt"
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
    else:
        train(model, FAMILIES[name], FAMILIES[name].dense_epochs, seed=seed, first_phase=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file.with_suffix(".new"))
        file.with_suffix(".new").rename(file)
    return model.eval()


def _real(name: str, seed: int, sources: Sources) -> Subject:
    if name == EFFICIENTNET:
        dense, preprocessing = install_weights()
    else:
        dense, spec = open_model(dict(sources.checkpoints)[name])
        preprocessing = spec.preprocessing
    dense = dense.eval()
    fitted, judged = find_images(sources.images), find_images(sources.judged_on)
    images = crops_of(fitted, preprocessing, -(-CALIBRATION_IMAGES // len(fitted)), seed)[:CALIBRATION_IMAGES]
    others = crops_of(judged, preprocessing, JUDGED_CROPS, 1000)
    expected = _answers(dense, others)

    def judge(model: nn.Module) -> Judged:
        found = _answers(model, others)
        agreement = 100 * (found.argmax(1) == expected.argmax(1)).float().mean().item()
        return Judged(agreement, _kl(expected, found))

    data: list[tuple[Any, ...]] = [(part,) for part in images.split(32)]
    calibration = Calibration(images, top1_of(dense, images))
    return Subject(dense, images[:1], data, own_answer_loss, calibration, judge, None, max_ratio=0.9)


@torch.no_grad()
def _answers(model: nn.Module, images: Tensor) -> Tensor:
    """Log-probabilities (N, C)."""
    model.eval()
    return torch.cat([F.log_softmax(model(part), dim=1) for part in images.split(64)])


def _kl(expected: Tensor, found: Tensor) -> float:
    return F.kl_div(found, expected, reduction="batchmean", log_target=True).item()
