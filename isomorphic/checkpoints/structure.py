"""One safe file for a pruned model: tensors, and the structure that they no longer share with its builder.

A checkpoint is a `.safetensors` file. Its metadata holds one JSON string, under the key `isomorphic`:

    format          1
    builder, name, kwargs, preprocessing    the `ModelSpec` that builds the dense model
    kept_blocks     the blocks of it that are still there, where some are not: {module: [index, ...]}
    sha256          of the user's file, where builder is "file"
    dense           where builder is "none": names and shapes of the dense model's tensors, {name: [size, ...]}
    structure       what differs from the dense model:
        attributes  {module: {attribute: value}}    ints, floats, bools, and lists of them, that a forward reads
        gained      tensors that the builder leaves as None (a bias that recovery added)
        lost        tensors of the builder that are gone
        masked      parameters whose zeros are pruned weights and stay zero in training; left out where there are none
    averaged        true where the weights are a moving average over training; left out where they are not
    provenance      command, arguments, versions, commit, hardware, parent checksum, measured MACs and params

Loading builds the dense model by name, resizes each layer to its tensors' shapes, restores the attributes and
loads strictly. Nothing in a file is ever executed. The code of a model of the user's own is not in there: whoever
loads it names the Python file again, and its checksum must be the one that the checkpoint was written with.

Builder "none" stands for a model that only its user can build: `name` is its class, for messages, and whoever loads the
file hands over the dense model, whose names and shapes must be those of `dense`.

The `.pth` files of others are read, too (see `released/legacy.py`), but never written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from isomorphic.errors import UserError

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
        name: changed for name, module in model.named_modules() if (changed := _changed_attributes(module, twins[name]))
    }
    strange = [
        f"{key!r} of {name or 'the model'}"
        for name, changed in attributes.items()
        for key, value in changed.items()
        if not _is_alike(getattr(twins[name], key), value)
    ]
    if strange:
        raise UserError(f"cannot save attributes of another kind than the builder's: {', '.join(strange[:3])}")
    ours, theirs = set(_named_tensors(model)), set(_named_tensors(dense))
    gained, lost = sorted((ours - theirs) & model.state_dict().keys()), sorted(theirs - ours)
    misfits = [name for name in gained if not _is_vacant(dense, name)] + [n for n in lost if not _is_vacant(model, n)]
    if misfits:
        raise UserError(f"cannot save layers that are not the builder's any more: see {', '.join(misfits[:3])}")
    return {"attributes": attributes, "gained": gained, "lost": lost}


def tensor_shapes(model: nn.Module) -> dict[str, list[int]]:
    """Returns the shapes of all parameters and buffers by name; a tied one stands under each of its names."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def check_dense(model: nn.Module, expected: dict[str, list[int]], path: str | Path) -> None:
    """Holds the dense model that a user has built against the one that a checkpoint was written with.

    Raises:
        UserError: a tensor is missing, unknown, or of another shape; the message names the first.
    """
    found = tensor_shapes(model)
    faults = [f"it has no {name}" for name in expected if name not in found]
    faults += [f"it has {name}, which the checkpoint's has not" for name in found if name not in expected]
    for name, shape in found.items():
        if expected.get(name, shape) != shape:
            faults.append(f"{name} is {tuple(shape)}, not {tuple(expected[name])}")
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise UserError(f"model= is not the dense model that {path} was cut from: {faults[0]}{more}")


def parameter_names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


def restore_structure(model: nn.Module, structure: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    for name in structure["lost"]:
        module, leaf = _locate(model, name)
        if leaf not in {*module._parameters, *module._buffers}:
            raise ValueError(f"{name} is not a tensor that could be left out")
        setattr(module, leaf, None)
    resized: dict[int, torch.Tensor] = {}  # a tied parameter stays tied
    for name, tensor in tensors.items():
        module, leaf = _locate(model, name)
        current = getattr(module, leaf)
        if current is None:
            if name not in structure["gained"]:
                raise ValueError(f"its layers have no place for {name}")
            module.register_parameter(leaf, nn.Parameter(torch.empty(tensor.shape)))
            continue
        if current.ndim != tensor.ndim or current.is_floating_point() != tensor.is_floating_point():
            raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, not like {tuple(current.shape)}")
        if current.shape != tensor.shape:
            resized[id(current)] = resized.get(id(current), _empty_like(current, tensor))
            setattr(module, leaf, resized[id(current)])
    for name, attributes in structure["attributes"].items():
        module = model.get_submodule(name)
        for attribute, value in attributes.items():
            current = module.__dict__.get(attribute)
            if attribute.startswith("_") or attribute == "training" or not _is_plain(current):
                raise ValueError(f"a checkpoint may not set {attribute!r} of {name or 'the model'}")
            if not _is_alike(current, value):
                raise ValueError(f"a checkpoint may not set {attribute!r} of {name or 'the model'} to {value!r:.80}")
            setattr(module, attribute, _like(current, value))


def _changed_attributes(module: nn.Module, twin: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in module.__dict__.items()
        if not name.startswith("_")
        and name != "training"
        and name in twin.__dict__
        and _is_plain(value)
        and _is_plain(twin.__dict__[name])
        and value != twin.__dict__[name]
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return isinstance(value, _SCALARS)


def _is_alike(current: Any, value: Any) -> bool:
    """Whether a value is of the type and length of another; whole numbers may stand for fractions, not vice versa."""
    if isinstance(current, (list, tuple)):
        return isinstance(value, (list, tuple)) and len(current) == len(value) and all(map(_is_alike, current, value))
    return type(value) is type(current) or (type(current) is float and type(value) is int)


def _like(current: Any, value: Any) -> Any:
    """A value from JSON, which has no tuples, with tuples where the builder sets them."""
    if not isinstance(value, list):
        return value
    items = [_like(example, item) for example, item in zip(current, value, strict=True)]
    return tuple(items) if isinstance(current, tuple) else items


def _named_tensors(model: nn.Module) -> list[str]:
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return names + [name for name, _ in model.named_buffers(remove_duplicate=False)]


def _locate(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    prefix, _, leaf = name.rpartition(".")
    return model.get_submodule(prefix), leaf


def _is_vacant(model: nn.Module, name: str) -> bool:
    """Whether a module of `model` has a place for this tensor and nothing in it."""
    prefix, _, leaf = name.rpartition(".")
    module = dict(model.named_modules()).get(prefix)
    return module is not None and leaf in {**module._parameters, **module._buffers} and getattr(module, leaf) is None


def _empty_like(current: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty(tensor.shape, dtype=current.dtype)
    if isinstance(current, nn.Parameter):
        return nn.Parameter(empty, requires_grad=current.requires_grad)
    return empty
