"""Dropout and stochastic depth of a model that is already there, pruned perhaps: the rates that its builder would give.

A builder makes the dense model twice, without weights: with the rate that is asked for and with another. Where the two
differ is what the rate decides, and there the model gets what the first one has. So nothing here knows any
architecture, and the spec says what it would have said had the model been built with the new rate.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from torch import nn

from isomorphic.drop_path import drop_path_blocks, is_drop_path, scale_drop_path, space_drop_path
from isomorphic.errors import UserError
from isomorphic.models import ModelSpec, build_skeleton, keep_blocks

DROP, DROP_PATH = "--drop", "--drop-path"
# What the builders call the rates. A builder that takes none of the names has its models' modules set instead, if any.
ARGUMENTS = {
    (DROP, "timm"): ("drop_rate",),
    (DROP, "torchvision"): ("dropout", "drop_rate"),
    (DROP_PATH, "timm"): ("drop_path_rate",),
    (DROP_PATH, "torchvision"): ("stochastic_depth_prob",),
}


def with_drop_rates(
    model: nn.Module, spec: ModelSpec, drop: float | None, drop_path: float | None
) -> tuple[nn.Module, ModelSpec]:
    """Gives `model`, in place, the rates that a freshly built one has; None leaves them as they are.

    Weights and answers in eval mode stay as they were.

    Args:
        model: what is left of the spec's model after pruning.
        spec: how its dense model is built.
        drop: rate of dropout, wherever the builder applies it (mostly before the classifier).
        drop_path: rate of stochastic depth at the last block; from 0 at the first it grows over the blocks that are
            left, as in a model that was built with that depth.

    Returns:
        The model, and the spec to save it with.

    Raises:
        UserError: a rate outside [0, 1); the model has no such thing, or is built by the user's own code.
    """
    for flag, rate in ((DROP, drop), (DROP_PATH, drop_path)):
        if rate is not None:
            spec = _with_rate(model, spec, flag, rate)
    return model, spec


def _with_rate(model: nn.Module, spec: ModelSpec, flag: str, rate: float) -> ModelSpec:
    if not 0 <= rate < 1:
        raise UserError(f"{flag} {rate}: must be at least 0 and below 1")
    if spec.builder == "file":
        raise UserError(f"{flag} {rate}: {spec.name} is code of your own: set the rate there, or with --model-kwargs")
    other = 0.0 if rate else 0.5
    for argument in ARGUMENTS[flag, spec.builder]:
        wanted_spec, other_spec = (
            dataclasses.replace(spec, kwargs=spec.kwargs | {argument: value}) for value in (rate, other)
        )
        try:
            wanted, contrast = _fresh(wanted_spec), _fresh(other_spec)
        except UserError:  # it does not take the argument
            continue
        if _transfer(model, wanted, contrast, flag, rate):
            return wanted_spec
    # torchvision's Swin takes none, because its builders write the rate down themselves
    if flag == DROP_PATH and _transfer(model, _fresh(spec, rate), _fresh(spec, other), flag, rate):
        return spec
    what = "dropout" if flag == DROP else "stochastic depth"
    raise UserError(f"{flag} {rate}: {spec.name} has no {what} that {spec.builder} could set: leave it out")


def _fresh(spec: ModelSpec, drop_path: float | None = None) -> nn.Module:
    """The spec's model without weights, with drop-path rates of a model of its depth, up to `drop_path` if given."""
    model = build_skeleton(dataclasses.replace(spec, kept_blocks={}))
    scheduled = drop_path_blocks(model)
    if drop_path is not None:
        scale_drop_path(model, drop_path)
    if spec.kept_blocks:
        keep_blocks(model, spec.kept_blocks)
        left = set(model.modules())
        space_drop_path(scheduled, [block for block in scheduled if block in left])
    return model


def _transfer(model: nn.Module, wanted: nn.Module, contrast: nn.Module, flag: str, rate: float) -> bool:
    """Puts into `model` what `wanted` has where `contrast` has something else; whether there is such a place."""
    ours, theirs, others = (dict(one.named_modules()) for one in (model, wanted, contrast))
    if strange := [name for name in theirs.keys() & others.keys() if name not in ours]:
        raise UserError(f"{flag} {rate}: this model is not what its builder makes (no {min(strange)})")
    changed = False
    for name in theirs | others:
        module, other = theirs.get(name), others.get(name)
        if type(module) is not type(other):
            _replace(ours, name, module, flag, rate)
            changed = True
            continue
        assert module is not None and other is not None
        rates = _differing(module, other)
        changed |= bool(rates)
        if flag == DROP_PATH and is_drop_path(module):  # the first block's rate is 0 in both, but perhaps not in ours
            rates |= _differing(module, ours[name])
        for attribute, value in rates.items():
            setattr(ours[name], attribute, value)
    return changed


def _replace(ours: dict[str, nn.Module], name: str, module: nn.Module | None, flag: str, rate: float) -> None:
    """Puts a copy of `module`, which has no weights, or none at all, into the place of that name.

    Raises:
        UserError: the place is in a list, whose other members would change their names, or holds weights.
    """
    holder_name, _, leaf = name.rpartition(".")
    holder, present = ours.get(holder_name), ours.get(name)
    if module is None and present is None:
        return
    listed = isinstance(holder, (nn.Sequential, nn.ModuleList)) and (module is None or present is None)
    weighty = any(one is not None and one.state_dict() for one in (module, present))
    if holder is None or listed or weighty:
        raise UserError(f"{flag} {rate}: {name} cannot be changed in a model that is already built: leave it out")
    setattr(holder, leaf, copy.deepcopy(module).train(holder.training) if module is not None else None)


def _differing(module: nn.Module, other: nn.Module) -> dict[str, Any]:
    """The numbers that a module has as attributes, where another of its type has other ones."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and _is_number(value) and vars(other).get(name) != value
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, (list, tuple)) and all(map(_is_number, value)))
