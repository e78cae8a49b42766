"""How much of what a dense classifier says a pruned one still says, on images that need no labels.

agreement         of the top-1, a share of the images
KL(dense‖pruned)  mean of Σ_c p_c (log p_c − log q_c) in nats; p is the dense model's softmax, q the pruned one's
relative error    ‖a − b‖ / ‖b‖ over the logits of all images at once, a the pruned model's, b the dense one's
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isomorphic.data.loaders import Batch
from isomorphic.data.skipping import describe_unreadable
from isomorphic.data.workers import naming_dead_workers
from isomorphic.errors import UserError
from isomorphic.measure.accuracy import with_bar
from isomorphic.observe import eval_mode
from isomorphic.processes import distributed


@dataclass(frozen=True)
class Fidelity:
    """How near a pruned classifier is to the dense one.

    Attributes:
        agreement: share of the images, 0..1, for which both have the same top-1.
        kl: mean KL(dense‖pruned), in nats.
        logits_error: ‖a − b‖ / ‖b‖ over all logits, b the dense model's.
        num_images: of all processes.
        unreadable: names of the images that could not be read, with the reasons; no figure includes them.
    """

    agreement: float
    kl: float
    logits_error: float
    num_images: int
    unreadable: tuple[str, ...] = ()


@torch.no_grad()
def measure_fidelity(
    model: nn.Module,
    dense: nn.Module,
    batches: Iterable[Any],
    device: torch.device | str = "cpu",
    *,
    amp_dtype: torch.dtype | None = None,
    channels_last: bool = False,
    progress: str | None = None,
) -> Fidelity:
    """Compares two classifiers, in eval mode, on this process's batches, and adds up over all processes.

    Args:
        model: the pruned one; gives logits (N, C).
        dense: the one that it was; gives logits of the same shape.
        batches: tensors of images (N, …), or tuples that begin with one, or with a pair of them where each model has a
            preprocessing of its own: the pruned one's first. The shards of all processes are disjoint.
        device: where both models live.
        amp_dtype: run both under autocast in this type; None is their own precision.
        channels_last: hand images over in that memory format.
        progress: title of a progress bar on the first process; None shows none.

    Raises:
        UserError: there is no image, or none that can be read; the models have other classes; a worker process died.
    """
    device = torch.device(device)
    memory_format = torch.channels_last if channels_last else torch.preserve_format
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    unreadable: list[str] = []
    with eval_mode(model), eval_mode(dense), naming_dead_workers():
        for batch in with_bar(batches, progress):
            unreadable += batch.unreadable if isinstance(batch, Batch) else ()
            pair = _image_pair(batch)
            if not len(pair[0]):
                continue
            first, second = (images.to(device, non_blocking=True, memory_format=memory_format) for images in pair)
            with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
                logits, dense_logits = model(first), dense(second)
            _check_logits(logits, dense_logits)
            sums += _compare(logits.double(), dense_logits.double())
    same, kl, error, norm, num_images = distributed.all_reduce_sum(sums).tolist()
    names = sorted(name for names in distributed.gather_objects(unreadable) for name in names)
    if not num_images:
        reason = f"cannot read {describe_unreadable(names)}" if names else "there are none"
        raise UserError(f"there are no images to compare the models on: {reason}")
    logits_error = math.sqrt(error / norm) if norm else math.inf
    return Fidelity(same / num_images, kl / num_images, logits_error, int(num_images), tuple(names))


def _image_pair(batch: Any) -> tuple[Tensor, Tensor]:
    """The images for the pruned and for the dense model: the same ones, unless the batch begins with a pair."""
    images = batch if isinstance(batch, Tensor) else batch[0]
    return (images, images) if isinstance(images, Tensor) else tuple(images)


def _check_logits(logits: Any, dense_logits: Any) -> None:
    both = (logits, dense_logits)
    told = [tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__ for output in both]
    if told[0] != told[1] or not isinstance(logits, Tensor) or logits.dim() != 2:
        raise UserError(
            f"the models give {told[0]} and {told[1]}: to be compared, both have to give logits (images, classes) of "
            "the same classes"
        )


def _compare(logits: Tensor, dense_logits: Tensor) -> Tensor:
    """(same top-1, summed KL, ‖a − b‖², ‖b‖², images) of one batch, from logits (N, C) as float64."""
    same = (logits.argmax(dim=1) == dense_logits.argmax(dim=1)).sum()
    log_p, log_q = dense_logits.log_softmax(dim=1), logits.log_softmax(dim=1)
    kl = (log_p.exp() * (log_p - log_q)).sum()
    error, norm = (logits - dense_logits).square().sum(), dense_logits.square().sum()
    return torch.stack([same.double(), kl, error, norm, logits.new_tensor(len(logits))])
