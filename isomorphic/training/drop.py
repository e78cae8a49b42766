"""Sets the rates of dropout and stochastic depth of a model that is already built, and perhaps pruned.

The model's builder makes the dense model twice, without weights: with the requested rate and with another one. Whatever
differs between the two depends on the rate, and is copied from the first one into the model. So this needs no
knowledge of architectures, and the spec becomes that of a model built with the new rate.
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
# The builders' names for the rates. If a builder takes none of them, the rate is set in the model's modules.
ARGUMENTS = {
    (DROP, "timm"): ("drop_rate",),
    (DROP, "torchvision"): ("dropout", "drop_rate"),
    (DROP_PATH, "timm"): ("drop_path_rate",),
    (DROP_PATH, "torchvision"): ("stochastic_depth_prob",),
}


def with_drop_rates(
    model: nn.Module, spec: ModelSpec, drop: float | None, drop_path: float | None
) -> tuple[nn.Module, ModelSpec]:
    """Returns `model`, changed in place to the given rates, and the spec to save it with.

    None leaves a rate as it is. Weights, and outputs in eval mode, do not change.

    Args:
        model: the spec's model, possibly pruned.
        spec: how its dense model is built.
        drop: rate of dropout, wherever the builder applies it (usually before the classifier).
        drop_path: rate of stochastic depth at the last block. Rates grow from 0 at the first block over the remaining
            blocks, as in a model that was built with that depth.

    Raises:
        UserError: a rate outside [0, 1); the model has no dropout or stochastic depth, or is the user's own code.
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
    # torchvision's Swin takes no such argument: its builders set the rate themselves
    if flag == DROP_PATH and _transfer(model, _fresh(spec, rate), _fresh(spec, other), flag, rate):
        return spec
    what = "dropout" if flag == DROP else "stochastic depth"
    raise UserError(f"{flag} {rate}: {spec.name} has no {what} that {spec.builder} could set: leave it out")


def _fresh(spec: ModelSpec, drop_path: float | None = None) -> nn.Module:
    """Returns the spec's model without weights; its drop-path rates grow over its own blocks, up to `drop_path`."""
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
    """Copies into `model` everything in which `wanted` differs from `contrast`; returns True if they differ."""
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
    """Replaces the module of that name by a copy of `module`, or removes it if `module` is None.

    Raises:
        UserError: a module with weights is involved, or one in a list is added or removed, which would rename others.
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
    """Returns the numeric attributes of `module` whose values differ in `other`, a module of the same type."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and _is_number(value) and vars(other).get(name) != value
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, (list, tuple)) and all(map(_is_number, value)))
