"""Weights alone: reading them from whatever file they are in, and filling a model that is built already."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from isomorphic.checkpoints.fitting import Fit, Target, fit_tensors
from isomorphic.checkpoints.headers import (
    has_header,
    is_averaged,
    open_tensors,
    parse_masked,
    read_header,
    stored_class_names,
)
from isomorphic.checkpoints.heads import new_head
from isomorphic.checkpoints.sources import is_checkpoint, is_pth, weights_file
from isomorphic.checkpoints.tensors import load_tensors
from isomorphic.errors import UserError
from isomorphic.models import ModelSpec

Tell = Callable[[str], object]


@dataclass(frozen=True)
class Weights:
    """What a file of weights holds.

    Attributes:
        path: the file.
        tensors: by their names in the file.
        structure: of a checkpoint of this project, what its header says of the pruned model.
        class_names: of such a checkpoint, what the logits stand for, where it says so.
    """

    path: Path
    tensors: dict[str, Tensor]
    structure: Any = None
    class_names: tuple[str, ...] = ()

    def fitted(self, target: Target, *, use_ema: bool | None) -> Fit:
        """Returns the reading of the file that fits a model; raises a UserError if none does."""
        hint = ": it is a checkpoint of this project, maybe pruned, and shapes its model itself: give it as --model"
        return fit_tensors(self.tensors, target, self.path, use_ema=use_ema, hint=hint if self.structure else "")


def read_weights(source: str | Path, *, use_ema: bool | None = None, trust: bool = False) -> Weights:
    """Reads tensors by name.

    Args:
        source: a `.safetensors` file, a file of torch.save with a state dict or a whole model, or a folder with one.
        use_ema: insist on averaged weights, or on raw ones; None takes the averaged ones where a file has both.
        trust: load a file of torch.save even if it names things that may run code.

    Raises:
        UserError: the file cannot be read, is of a newer format, or does not hold such weights.
    """
    path = weights_file(source)
    if is_pth(path):
        from isomorphic.checkpoints.released.legacy import read_pth  # timm, for these files alone

        weights = read_pth(path, use_ema=use_ema, trust=trust).weights
        return Weights(path, weights.state_dict() if isinstance(weights, nn.Module) else weights)
    check_averaged(path, use_ema)
    structure = read_header(path).get("structure") if has_header(path) else None
    with open_tensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    return Weights(path, tensors, structure, stored_class_names(path))


def check_averaged(source: str | Path, use_ema: bool | None) -> None:
    """Raises a UserError if a checkpoint, or else a model by name, has not the kind of weights that is asked for."""
    if use_ema is None:
        return
    averaged = is_checkpoint(source) and Path(source).is_file() and is_averaged(Path(source))
    if use_ema and not averaged:
        raise UserError(f"{source} holds no averaged weights: leave out --use-ema")
    if averaged and not use_ema:
        raise UserError(f"{source} holds averaged weights only: leave out --no-use-ema")


def fill(
    model: nn.Module,
    spec: ModelSpec,
    weights: Weights,
    *,
    other_head: str = "",
    keep_classes: bool = False,
    use_ema: bool | None = None,
    tell: Tell = lambda line: None,
) -> ModelSpec:
    """Puts weights into a model, in place: every one, with its shape. The head gets the width of the file's.

    Args:
        model: a model of the spec, perhaps pruned.
        spec: what it was built or cut from.
        weights: of this model, under any names that `fitting.py` makes sense of.
        other_head: whose the head's weights are ("random") where the file has none; empty if it must have one.
        keep_classes: the file's head must have the model's width.
        use_ema: of names that say so, take the averaged ones (None: as well), or the raw ones.
        tell: is called with each line about what was not simply taken as it is.

    Returns:
        The spec of the model as it is now, with its classes and what the file says of their names and of masked
        parameters.

    Raises:
        UserError: the weights are not the model's.
    """
    fit = weights.fitted(Target(model, spec), use_ema=use_ema)
    if fit.headless and not other_head:
        raise UserError(
            f"{weights.path} has no head for {spec.name}, whose {_head(fit, model)} would stay random: "
            "--num-classes N gives the model a new head (auto: as many classes as the data; in Python num_classes=N)"
        )
    if fit.classes is not None:
        if keep_classes:
            raise UserError(
                f"{weights.path} has a head for {fit.classes} classes, and the model was asked for with "
                f"num_classes={spec.kwargs.get('num_classes')}: leave that out (--num-classes N makes a new head)"
            )
        spec = new_head(model, spec, fit.classes)
    if fit.headless:
        tell(f"{weights.path} has no head: {_head(fit, model)} are {other_head}")
    for note in fit.notes:
        tell(f"{weights.path}: {note}")
    head = {name: tensor for name, tensor in model.state_dict().items() if fit.headless and name not in fit.tensors}
    load_tensors(model, {**head, **fit.tensors}, weights.path)
    if not fit.headless:
        spec = dataclasses.replace(spec, class_names=weights.class_names)
    return spec.masking(parse_masked(weights.path, weights.structure, model) if weights.structure else ())


def load_weights(
    model: nn.Module, path: str | Path, *, use_ema: bool | None = None, trust: bool = False
) -> tuple[str, ...]:
    """Loads the tensors of a file into a model that is already built, strictly: every one, with its shape.

    Args:
        model: the model, which keeps its structure and its precision.
        path: as in `read_weights`.
        use_ema: insist on averaged weights, or on raw ones; None takes the averaged ones where a file has both.
        trust: load a file of torch.save even if it names things that may run code.

    Returns:
        Names of the parameters whose zeros are pruned weights, where the file is a checkpoint that says so.

    Raises:
        UserError: the file cannot be read or is of a newer format, or its tensors are not the model's.
    """
    weights = read_weights(path, use_ema=use_ema, trust=trust)
    fit = weights.fitted(Target(model, None), use_ema=use_ema)
    load_tensors(model, fit.tensors, weights.path)
    return tuple(parse_masked(weights.path, weights.structure, model)) if weights.structure else ()


def _head(fit: Fit, model: nn.Module) -> str:
    return ", ".join(name for name in model.state_dict() if name not in fit.tensors)
