"""What recoveries look at: images, or whatever else the model takes, checked before anything is cut."""

from __future__ import annotations

import torch
from torch import nn

from isomorphic.errors import UserError, first_line
from isomorphic.inputs import Inputs, call, items_of, num_items, tensors_in, told
from isomorphic.models import REFUSALS
from isomorphic.observe import eval_mode
from isomorphic.pruning.report import listed


def check_calibration(model: nn.Module, images: Inputs) -> None:
    """Tries the first of the calibration images on a model that is not cut yet.

    Args:
        model: left as it was.
        images: what it takes: a tensor (N, …), a tuple of positional or a mapping of keyword arguments.

    Raises:
        UserError: there are none, they are not finite, or the model does not take them, or has weights that are not
            finite.
    """
    if not num_items(images):
        raise UserError("there are no calibration images: give a tensor (N, …) of at least one")
    if not all(bool(tensor.isfinite().all()) for tensor in tensors_in(images)):
        raise UserError("the calibration images hold numbers that are not finite: check how they are made")
    try:
        with eval_mode(model), torch.no_grad():
            outputs = tensors_in(call(model, items_of(images, slice(1))))
    except REFUSALS as error:
        raise UserError(
            f"the model does not take the calibration images, {told(images)}, as they are: {first_line(error)} "
            "(several inputs are a mapping of keyword arguments, images of the model's shape and dtype a tensor)"
        ) from error
    spoilt = [name for name, tensor in model.named_parameters() if not bool(tensor.isfinite().all())]
    if spoilt and not all(bool(tensor.isfinite().all()) for tensor in outputs):
        raise UserError(
            f"the dense model gives numbers that are not finite, and {listed(spoilt)} hold some: there is nothing to "
            "recover towards"
        )


def with_mirror_images(images: Inputs) -> Inputs:
    """Returns images (2N, C, H, W): each is followed by its mirror image, so that halves share none of them.

    Raises:
        UserError: it is something else than images.
    """
    if not isinstance(images, torch.Tensor) or images.dim() != 4:
        raise UserError(f"mirror images are of images (N, C, H, W), and the calibration has {told(images)}")
    return torch.stack([images, images.flip(-1)], dim=1).flatten(0, 1)


def not_finite(model: nn.Module) -> set[str]:
    """Returns the names of the parameters and buffers with numbers that are not finite."""
    return {name for name, tensor in model.state_dict().items() if not bool(torch.as_tensor(tensor).isfinite().all())}
