"""One safe file for a pruned model: tensors, and the structure that they no longer share with its builder.

A checkpoint is a `.safetensors` file. Its metadata holds one JSON string, under the key `isomorphic`:

    format          1
    builder, name, kwargs, preprocessing    the `ModelSpec` that builds the dense model
    kept_blocks     the blocks of it that are still there, where some are not: {module: [index, ...]}
    class_names     what the logits stand for, [name, ...] in their order; left out where nobody knows
    sha256          of the user's file, where builder is "file"
    dense           where builder is "none" or "file": the dense model's tensors by name and shape, {name: [size, ...]}
    structure       what differs from the dense model:
        attributes  {module: {attribute: value}}    ints, floats, bools, lists of them and mappings to them, that a
                    forward reads
        gained      tensors that the builder leaves as None (a bias that recovery added)
        lost        tensors of the builder that are gone
        plain       tensors that modules hold as plain attributes and that were cut; left out where there are none. Of
                    builder "none" all of them, since nobody knows whether building the model again makes the same
        masked      parameters whose zeros are pruned weights and stay zero in training; left out where there are none
    averaged        true where the weights are a moving average over training; left out where they are not
    provenance      command, arguments, versions, commit, hardware, parent checksum, measured MACs and params

Loading builds the dense model by name, resizes each layer to its tensors' shapes, restores the attributes and
loads strictly. Nothing in a file is ever executed. The code of a model of the user's own is not in there: whoever
loads it names the Python file again, and its checksum must be the one that the checkpoint was written with.

Builder "none" stands for a model that only its user can build: `name` is its class, for messages, and whoever loads the
file hands over the dense model, whose names and shapes must be those of `dense`. So may whoever has the dense model of
another builder; then no file of a user's is imported.

The `.pth` files of others are read, too (see `released/legacy.py`), but never written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from isomorphic.errors import UserError
from isomorphic.number_tables import set_number_table
from isomorphic.plain_tensors import named_plain_tensors

FORMAT = 1
METADATA_KEY = "isomorphic"
_SCALARS = (bool, int, float)


def describe_structure(model: nn.Module, dense: nn.Module) -> dict[str, Any]:
    """What `model` has that its freshly built twin `dense` has not (see the module's docstring).

    Raises:
        UserError: modules or tensors that loading could not put into, or leave out of, what the builder makes.
    """
    twins = dict(dense.named_modules())
    strangers = [name for name, _ in model.named_modules() if name not in twins]
    if strangers:
        raise UserError(f"cannot save modules that the builder does not make: {', '.join(strangers[:3])}")
    attributes = {
        name: changed for name, module in model.named_modules() if (changed := changed_attributes(module, twins[name]))
    }
    strange = [
        f"{key!r} of {name or 'the model'}"
        for name, changed in attributes.items()
        for key, value in changed.items()
        if not _is_alike(_numbers(getattr(twins[name], key)), value)
    ]
    if strange:
        raise UserError(f"cannot save attributes of another kind than the builder's: {', '.join(strange[:3])}")
    ours, theirs = set(tensor_shapes(model)), set(tensor_shapes(dense))
    gained, lost = sorted((ours - theirs) & model.state_dict().keys()), sorted(theirs - ours)
    misfits = [name for name in gained if not is_vacant(dense, name)] + [n for n in lost if not is_vacant(model, n)]
    if misfits:
        raise UserError(f"cannot save layers that are not the builder's any more: see {', '.join(misfits[:3])}")
    return {"attributes": attributes, "gained": gained, "lost": lost}


def named_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Returns all parameters and buffers by name; a tied one stands under each of its names."""
    buffers = model.named_buffers(remove_duplicate=False)
    return [*model.named_parameters(remove_duplicate=False), *buffers]


def tensor_shapes(model: nn.Module) -> dict[str, list[int]]:
    """Returns the shapes of all parameters and buffers by name; a tied one stands under each of its names."""
    return {name: list(tensor.shape) for name, tensor in named_tensors(model)}


def is_vacant(model: nn.Module, name: str, *, cache: bool = False) -> bool:
    """Says whether a module of `model` has a place for this tensor and nothing in it.

    With `cache` the place has to be one of a buffer outside the state dict.
    """
    prefix, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(prefix)
    except AttributeError:
        return False
    places = {**module._parameters, **module._buffers}
    is_cache = leaf in module._buffers and leaf in module._non_persistent_buffers_set
    return leaf in places and places[leaf] is None and (is_cache or not cache)


def set_tensor(model: nn.Module, name: str, tensor: torch.Tensor | None) -> None:
    """Puts a tensor, or nothing, into the place that a module of `model` has for it."""
    prefix, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(prefix), leaf, tensor)


def parameter_names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


def plain_to_save(model: nn.Module, dense: nn.Module, *, all_of_them: bool) -> dict[str, torch.Tensor]:
    """Returns the plain tensors that a checkpoint holds, by name: those that were cut, or all."""
    before = dict(named_plain_tensors(dense))
    return {
        name: tensor
        for name, tensor in named_plain_tensors(model)
        if name in before and (all_of_them or tensor.shape != before[name].shape)
    }


def changed_attributes(module: nn.Module, twin: nn.Module) -> dict[str, Any]:
    """Returns the plain attributes of a module that its twin, a freshly built one, has with other values."""
    changed = {}
    for name, value in vars(module).items():
        if name.startswith("_") or name == "training" or name not in vars(twin):
            continue
        value, built = _numbers(value), _numbers(vars(twin)[name])
        if not (_is_plain(value) and _is_plain(built)) or value == built:
            continue
        if isinstance(value, dict) and not _is_alike(built, value):
            continue  # a table that forward passes fill
        changed[name] = value
    return changed


def restore_structure(model: nn.Module, structure: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Gives the dense model the structure of another, in place; its tensors have the right shapes then, but no values.

    Plain tensors have their values, too, and are gone from `tensors`.

    Raises:
        LookupError, AttributeError, RuntimeError, TypeError, ValueError: it is no structure, or not one of this model.
    """
    _check_structure(structure)
    for name in structure["lost"]:
        if not _has_place(model, name):
            raise ValueError(f"{name:.80} is not a tensor that could be left out")
        set_tensor(model, name, None)
    _restore_plain(model, structure.get("plain", []), tensors)
    absent = [name for name in structure["gained"] if name not in tensors]
    if absent:
        raise ValueError(f"{absent[0]:.80} is missing")
    _make_shapes(model, set(structure["gained"]), tensors)
    for name, attributes in structure["attributes"].items():
        module = model.get_submodule(name)
        for attribute, value in attributes.items():
            _set_attribute(module, name or "the model", attribute, value)


def _restore_plain(model: nn.Module, names: list[str], tensors: dict[str, torch.Tensor]) -> None:
    places = dict(named_plain_tensors(model))
    for name in names:
        tensor = tensors.pop(name, None)
        if tensor is None:
            raise ValueError(f"{name:.80} is missing")
        place = places.get(name)
        if place is None or place.ndim != tensor.ndim:
            continue  # what a forward pass has left there, such as a detector's anchors, and will make again
        if place.is_floating_point() != tensor.is_floating_point():
            raise ValueError(f"{name:.80} is {tensor.dtype}, not {place.dtype}")
        set_tensor(model, name, tensor.to("cpu" if place.is_meta else place.device))


def _check_structure(structure: Any) -> None:
    if not isinstance(structure, dict):
        raise ValueError("its header has no structure")
    for key in ("gained", "lost", "plain"):
        names = structure.get(key, [] if key == "plain" else None)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"the structure in its header has no list of names for {key!r}")
    attributes = structure.get("attributes")
    if not isinstance(attributes, dict) or not all(isinstance(values, dict) for values in attributes.values()):
        raise ValueError("the structure in its header has no attributes by module")


def _make_shapes(model: nn.Module, gained: set[str], tensors: dict[str, torch.Tensor]) -> None:
    """Puts empty tensors of the file's shapes where the model's are of others, and where it gained some."""
    device = next((tensor.device for _, tensor in named_tensors(model) if not tensor.is_meta), torch.device("cpu"))
    before = dict(named_tensors(model))  # keeps them all alive, so that an id stands for one tensor
    resized: dict[int, torch.Tensor] = {}  # a tied parameter stays tied
    for name, tensor in tensors.items():
        if not _has_place(model, name):
            raise ValueError(f"its layers have no place for {name:.80}")
        if name not in before:
            if name not in gained and not is_vacant(model, name, cache=True):
                raise ValueError(f"its layers have no place for {name:.80}")
            set_tensor(model, name, _gained(model, name, tensor, device))
            continue
        current = before[name]
        if current.ndim != tensor.ndim or current.is_floating_point() != tensor.is_floating_point():
            shapes = f"{tuple(tensor.shape)} {tensor.dtype}, not like {tuple(current.shape)}"
            raise ValueError(f"{name} is {shapes}")
        if current.shape != tensor.shape:
            resized[id(current)] = resized.get(id(current), _empty_like(current, tensor))
            set_tensor(model, name, resized[id(current)])


def _gained(model: nn.Module, name: str, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    prefix, _, leaf = name.rpartition(".")
    if leaf in model.get_submodule(prefix)._buffers:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    return nn.Parameter(torch.empty(tensor.shape, device=device))


def _set_attribute(module: nn.Module, name: str, attribute: str, value: Any) -> None:
    whole = module.__dict__.get(attribute)
    current = _numbers(whole)
    is_hidden = attribute.startswith("_") or attribute == "training"
    if not is_hidden and _is_empty(module, attribute):
        return  # what a forward pass has noted there, such as the shape that a detector's anchors are for
    if is_hidden or not _is_plain(current):
        raise ValueError(f"a checkpoint may not set {attribute!r:.80} of {name:.80}")
    if not _is_alike(current, value):
        raise ValueError(f"a checkpoint may not set {attribute!r:.80} of {name:.80} to {value!r:.80}")
    if isinstance(value, dict) and isinstance(whole, dict):
        set_number_table(module, attribute, {**whole, **value})
    else:
        setattr(module, attribute, _like(current, value))


def _is_empty(module: nn.Module, attribute: str) -> bool:
    """Says whether a module, or its class, has an attribute and nothing in it: None, or no entries."""
    places = [names for names in (vars(module), *map(vars, type(module).__mro__)) if attribute in names]
    value = places[0][attribute] if places else 0
    return value is None or (isinstance(value, (list, tuple, dict)) and not value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) and not isinstance(item, dict) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and isinstance(number, _SCALARS) for key, number in value.items())
    return isinstance(value, _SCALARS)


def _numbers(value: Any) -> Any:
    """Returns the numbers of a mapping by name, without whatever else it holds; anything but a mapping as it is."""
    if not isinstance(value, dict):
        return value
    return {key: number for key, number in value.items() if isinstance(key, str) and isinstance(number, _SCALARS)}


def _is_alike(current: Any, value: Any) -> bool:
    """Whether a value is of the type and length of another; whole numbers may stand for fractions, not vice versa."""
    if isinstance(current, (list, tuple)):
        return isinstance(value, (list, tuple)) and len(current) == len(value) and all(map(_is_alike, current, value))
    if isinstance(current, dict):
        is_same = isinstance(value, dict) and current.keys() == value.keys()
        return is_same and all(_is_alike(current[key], value[key]) for key in current)
    return type(value) is type(current) or (type(current) is float and type(value) is int)


def _like(current: Any, value: Any) -> Any:
    """A value from JSON, which has no tuples, with tuples where the builder sets them."""
    if not isinstance(value, list):
        return value
    items = [_like(example, item) for example, item in zip(current, value, strict=True)]
    return tuple(items) if isinstance(current, tuple) else items


def _has_place(model: nn.Module, name: str) -> bool:
    prefix, _, leaf = name.rpartition(".")
    module = model.get_submodule(prefix)
    return leaf in {*module._parameters, *module._buffers}


def _empty_like(current: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    device = "cpu" if current.is_meta else current.device
    empty = torch.empty(tensor.shape, dtype=current.dtype, device=device)
    if isinstance(current, nn.Parameter):
        return nn.Parameter(empty, requires_grad=current.requires_grad)
    return empty
