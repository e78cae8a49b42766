"""Which of a file's tensors are which of a model's: weights as other trainers, wrappers and repositories name them.

A file is read in several ways, and the first that leaves nothing over and nothing out is taken:

    conv1.weight                            as it is
    module._orig_mod.conv1.weight           without what wrappers add, wherever that stands in a name
    model.conv1.weight, loss.weight         without the prefix under which all of the model's tensors lie
    downsample_layers.0.0.weight            through the function by which timm reads the original authors' files, which
                                            renames, reshapes, and resamples positions to the model's input size
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import io
import math
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from isomorphic.checkpoints.heads import head_shapes
from isomorphic.checkpoints.released.weight_sets import AVERAGED_WORD, is_state_dict
from isomorphic.checkpoints.structure import tensor_shapes
from isomorphic.checkpoints.tensors import misfit_error, misfits
from isomorphic.errors import UserError
from isomorphic.kinds import library
from isomorphic.models import REFUSALS, ModelSpec

# What wrappers for several processes, compilation, FSDP and activation checkpointing put into names.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# What averaging adds, and what only pretraining without labels uses: MAE's decoder and the token of what it hides.
NO_PART = re.compile(r"(^|\.)(n_averaged|mask_token)$|^decoder[_.]")
# How timm names the functions that read original files, in the files of its models.
FILTERS = ("checkpoint_filter_fn", "_filter_fn", "_filter_torchvision_pretrained")
MOST_PREFIXES = 6
# Tokens before those of patches: of the class, and of distillation.
MOST_PREFIX_TOKENS = 3


class Target:
    """The tensors that a model has places for.

    Attributes:
        places: shapes of its parameters and buffers, by name.
        needed: names of those in its state dict.
    """

    def __init__(self, model: nn.Module, spec: ModelSpec | None) -> None:
        self.model, self.spec = model, spec
        self.places = {name: tuple(shape) for name, shape in tensor_shapes(model).items()}
        self.needed = [name for name, value in model.state_dict().items() if isinstance(value, Tensor)]

    @functools.cached_property
    def head(self) -> dict[str, tuple[int, ...]]:
        """The tensors of its head and the shape of one class in each, inputs as the model has them."""
        shapes = head_shapes(self.spec) if self.spec else {}
        return {name: self.places[name][1:] if name in self.places else shape for name, shape in shapes.items()}

    @functools.cached_property
    def filters(self) -> list[Callable[..., Any]]:
        """timm's functions (state dict, model) -> state dict for files of this model."""
        if not self.spec or self.spec.builder != "timm" or not library("timm").is_model(self.spec.name):
            return []
        home = vars(sys.modules[library("timm").model_entrypoint(self.spec.name.partition(".")[0]).__module__])
        return [*(home[name] for name in FILTERS if name in home), _resample_positions]


@dataclass
class Fit:
    """One reading of a file's tensors against a model.

    Attributes:
        tensors: by the model's names.
        prefix: what their names in the file begin with.
        averaged: the prefix says that they are a moving average.
        classes: width of the file's head, where that is not the model's.
        headless: the model has a head and the file has not.
        faults: what does not fit, by kind; nothing of the head.
        notes: what was done to make them fit.
    """

    tensors: dict[str, Tensor]
    prefix: str = ""
    averaged: bool = False
    classes: int | None = None
    headless: bool = False
    faults: Mapping[str, list[str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def cost(self) -> tuple[int, bool]:
        """How badly it fits."""
        return sum(map(len, self.faults.values())), self.headless


def fit_tensors(
    tensors: Mapping[str, Tensor], target: Target, path: Path, *, use_ema: bool | None = None, hint: str = ""
) -> Fit:
    """Returns the reading of a file's tensors that fits a model.

    Args:
        tensors: what the file holds, by its own names.
        target: the model's places.
        path: the file, for messages.
        use_ema: of names that say so, take the averaged ones (None: as well), or the raw ones.
        hint: ends the message where no reading fits.

    Raises:
        UserError: no reading fits, and the message is about the best; or several do.
    """
    readings = _readings(tensors, target)
    if use_ema is not None and any(reading.averaged for reading in readings):
        readings = [reading for reading in readings if reading.averaged == use_ema]
    direct = [_compare(reading, target) for reading in readings]
    best = min(direct, key=lambda fit: fit.cost)
    if any(best.cost):
        filtered = [_compare(made, target) for reading in readings for made in _through_filters(reading, target)]
        best = min([*direct, *filtered], key=lambda fit: fit.cost)
    rivals = {fit.prefix for fit in direct if (fit.cost, fit.averaged) == (best.cost, best.averaged)}
    if best.cost[0]:
        raise misfit_error(path, best.faults, hint)
    if len(rivals) > 1:
        names = " and ".join(f"{prefix}*" for prefix in sorted(rivals))
        raise UserError(f"{path} holds several sets of weights that fit, {names}: keep one alone in a file")
    return best


def _readings(tensors: Mapping[str, Tensor], target: Target) -> list[Fit]:
    """Returns the tensors as they are, if they fit, or else that and what lies under prefixes, averaged ones first."""
    own, plain = _by_plain_names({name: name for name in target.places}), _by_plain_names(tensors)
    whole = Fit({own.get(name, name): tensor for name, tensor in plain.items()})
    if not any(_compare(whole, target).cost):
        return [whole]
    readings = [whole, *_under_prefixes(plain, own)]
    if any(reading.averaged for reading in readings):
        raw = {name: tensor for name, tensor in whole.tensors.items() if not AVERAGED_WORD.search(name)}
        readings.append(Fit(raw, notes=("taken without what is averaged",)))
    return sorted(readings, key=lambda reading: not reading.averaged)


def _by_plain_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values by their names without what wrappers add; as they are if two would have one name."""
    plain = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in values}
    if len(set(plain.values())) < len(plain):
        return dict(values)
    return {plain[name]: value for name, value in values.items()}


def _under_prefixes(plain: Mapping[str, Tensor], own: Mapping[str, str]) -> Iterator[Fit]:
    """Yields the tensors under each prefix that may be the model's, by the model's names."""
    for prefix in _likely_prefixes(plain, own):
        inside = {name[len(prefix) :]: tensor for name, tensor in plain.items() if name.startswith(prefix)}
        outside = [name for name in plain if not name.startswith(prefix)]
        notes = (f"taken from {prefix}*, without {_some(outside)}",) if outside else ()
        tensors = {own.get(name, name): tensor for name, tensor in inside.items()}
        yield Fit(tensors, prefix, AVERAGED_WORD.search(prefix) is not None, notes=notes)


def _likely_prefixes(plain: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Returns prefixes of names ("model.") under which names of the model lie, or at least half of all tensors."""
    votes: Counter[str] = Counter()
    members: Counter[str] = Counter()
    for name in plain:
        parts = name.split(".")
        for length in range(1, len(parts)):
            prefix = ".".join(parts[:length]) + "."
            members[prefix] += 1
            votes[prefix] += name[len(prefix) :] in own
    voted = [prefix for prefix, count in votes.most_common(MOST_PREFIXES) if count]
    wide = [prefix for prefix, count in members.most_common(MOST_PREFIXES) if 2 * count >= len(plain)]
    return [*dict.fromkeys((*voted, *wide))]


def _through_filters(reading: Fit, target: Target) -> Iterator[Fit]:
    """Yields what timm's functions make of a reading."""
    for function in target.filters:
        made = _filtered(function, target.model, reading.tensors)
        if made is not None:
            notes = (*reading.notes, *_resampled(reading.tensors, made))
            yield dataclasses.replace(reading, tensors=made, notes=notes)


def _filtered(function: Callable[..., Any], model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Returns what a function of timm's makes of tensors; None if it does not understand them."""
    arguments = inspect.signature(function).parameters
    options = {"adapt_layer_scale": True} if "adapt_layer_scale" in arguments else {}  # as deit.py asks for
    places = (dict(tensors), model)[: len(arguments)]
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():  # one of them prints
            warnings.simplefilter("ignore")
            made = function(*places, **options)
    except REFUSALS:
        return None
    return made if is_state_dict(made) else None


def _resample_positions(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Resamples tables of absolute positions, for models whose own function at timm does not.

    A table of (1, 5, C) becomes one of (1, 17, C): the first token is a class's, the others lie on 2 × 2, now 4 × 4.
    """
    resample = library("timm.layers").resample_abs_pos_embed
    places = dict(model.named_parameters())
    for name, table in tensors.items():
        place = places.get(name)
        if "pos_embed" not in name or place is None or not table.ndim == place.ndim == 3:
            continue
        before, after = table.shape[1], place.shape[1]
        prefix = next((n for n in range(MOST_PREFIX_TOKENS) if _is_square(before - n) and _is_square(after - n)), None)
        if before != after and prefix is not None:
            side = math.isqrt(after - prefix)
            tensors[name] = resample(table, new_size=[side, side], num_prefix_tokens=prefix)
    return tensors


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number


def _resampled(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Returns a line about the tensors that have other numbers of positions now."""
    stored = {id(tensor) for tensor in before.values()}  # which may have got the name of another
    changed = [name for name in after if name in before and id(after[name]) not in stored]
    changed = [name for name in changed if after[name].numel() != before[name].numel()]
    if not changed:
        return ()
    first = f"{changed[0]}, {tuple(before[changed[0]].shape)}, is {tuple(after[changed[0]].shape)} now"
    more = f", and {len(changed) - 1} more are others" if len(changed) > 1 else ""
    return (f"resampled to the model's input size: {first}{more}",)


def _compare(reading: Fit, target: Target) -> Fit:
    """Returns a reading with its faults, and what is no part of the model set apart."""
    reading = _with_counters(reading, target)
    faults = misfits(target.places, target.needed, reading.tensors)
    if not any(faults.values()):
        return reading
    head = {name: reading.tensors[name] for name in target.head if name in reading.tensors}
    classes = _width(head, target)
    headless = not head and any(name in target.head for name in target.needed)
    apart = {*target.head} if headless or classes is not None else set()
    places = {name: shape for name, shape in target.places.items() if name not in apart}
    tensors, dropped = {}, []
    for name, tensor in reading.tensors.items():
        foreign = name not in target.places and name not in apart
        if foreign and (NO_PART.search(name) or (headless and _is_of_other_head(name, target))):
            dropped.append(name)
        else:
            tensors[name] = tensor
    rest = {name: tensor for name, tensor in tensors.items() if name not in apart}
    faults = misfits(places, [name for name in target.needed if name not in apart], rest)
    told = [name for name in dropped if not name.endswith("n_averaged")]
    notes = (*reading.notes, *([f"left out what only pretraining needs: {_some(told)}"] if told else []))
    return dataclasses.replace(reading, tensors=tensors, classes=classes, headless=headless, faults=faults, notes=notes)


def _with_counters(reading: Fit, target: Target) -> Fit:
    """Adds the model's own counters of batches to files of before torch 0.4.1, which had none; nothing reads them."""
    names = [name for name in target.needed if name.endswith("num_batches_tracked")]
    if not names or any(name.endswith("num_batches_tracked") for name in reading.tensors):
        return reading
    buffers = dict(target.model.named_buffers())
    return dataclasses.replace(reading, tensors={**reading.tensors, **{name: buffers[name] for name in names}})


def _width(head: Mapping[str, Tensor], target: Target) -> int | None:
    """Returns the width of a whole head whose inputs are the model's and whose width is not; None for any other."""
    if not head or len(head) < len(target.head):
        return None
    if all(tuple(tensor.shape) == target.places.get(name) for name, tensor in head.items()):
        return None
    widths = {tensor.shape[0] for tensor in head.values() if tensor.ndim}
    fits = all(tuple(tensor.shape[1:]) == target.head[name] for name, tensor in head.items())
    return widths.pop() if fits and len(widths) == 1 else None


def _is_of_other_head(name: str, target: Target) -> bool:
    """Says whether a tensor is of a head of another kind: "head.0.weight" beside the model's "head.weight"."""
    return name.startswith(tuple(head.rpartition(".")[0] + "." for head in target.head))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
