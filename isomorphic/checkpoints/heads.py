"""A new head: the last layers of a classifier, whose width is the number of classes, for another number of them.

Which layers these are is not looked up but tried: the builder makes the model, without data, for two numbers of
classes, and what differs is the head. That finds both heads of a distilled DeiT, the auxiliary ones of an Inception and
the convolution of a SqueezeNet, of timm's, torchvision's and users' models alike. A pruned model's layers are narrower
than the builder's; a new layer takes the width of its inputs from the layer that it replaces.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from isomorphic.checkpoints.structure import changed_attributes, tensor_shapes
from isomorphic.errors import UserError
from isomorphic.models import ModelSpec, build_skeleton, with_classes

# Layers whose outputs may be classes.
WIDE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# A number of classes that no model has: a builder that is asked for it shows which tensors depend on it.
PROBE = 1009


def head_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Returns the tensors of the dense model's head and the shape of one class in each: {"fc.weight": (512,), …}.

    Empty where the builder takes no number of classes, or where it shapes something else than last layers.
    """
    try:
        before, after = build_skeleton(spec), build_skeleton(with_classes(spec, PROBE))
    except UserError:
        return {}
    heads = _differing(before, after)
    shapes = {name: tuple(shape) for name, shape in tensor_shapes(after).items() if name in heads}
    if any(not shape or shape[0] != PROBE for shape in shapes.values()):
        return {}
    return {name: shape[1:] for name, shape in shapes.items()}


def new_head(model: nn.Module, spec: ModelSpec, classes: int) -> ModelSpec:
    """Gives a model another head, in place, with random weights of torch's own initialisation.

    Args:
        model: a model of the spec, perhaps pruned.
        spec: what the model was built or cut from.
        classes: number of classes of the new head.

    Returns:
        The spec of the model as it is now.

    Raises:
        UserError: the builder takes no number of classes, or its head is not made of linear layers or convolutions.
    """
    after_spec = with_classes(spec, classes)
    before, after = build_skeleton(spec), build_skeleton(after_spec)
    heads = _differing(before, after)
    layers = sorted({name.rpartition(".")[0] for name in heads})
    if not layers:
        raise UserError(f"{spec.name} has no head whose width is its number of classes")
    there = dict(model.named_modules())  # a published GoogLeNet has no auxiliary heads, which its builder makes
    for name in layers:
        if name in there:
            _renew(model, name, before, after, spec)
    for name, module in before.named_modules():
        if name in there:
            _set_attributes(there[name], module, after.get_submodule(name))
    kept = tuple(name for name in spec.masked if name not in heads)
    return dataclasses.replace(after_spec, masked=kept)


def _differing(before: nn.Module, after: nn.Module) -> set[str]:
    """Returns the names of tensors that two skeletons have in other shapes, or that only one of them has."""
    one, other = tensor_shapes(before), tensor_shapes(after)
    return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}


def _renew(model: nn.Module, name: str, before: nn.Module, after: nn.Module, spec: ModelSpec) -> None:
    """Replaces the weights of one layer of the head, or puts one where the model had none."""
    twin, layer = after.get_submodule(name), model.get_submodule(name)
    if not isinstance(twin, WIDE):
        raise UserError(f"{spec.name} cannot get a new head: {name or 'it'} is a {type(twin).__name__}")
    if type(layer) is not type(twin):
        if tensor_shapes(model) != tensor_shapes(before):
            raise UserError(f"{spec.name} cannot get a head: it was pruned without one, so build it with num_classes")
        example = next(model.parameters())
        layer = twin.to_empty(device=example.device).to(example.dtype).train(model.training)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
    _widen(layer, twin.weight.shape[0])


def _widen(layer: Any, width: int) -> None:
    """Gives a linear layer or a convolution `width` outputs, with fresh weights for the inputs that it has."""
    shape = (width, *layer.weight.shape[1:])
    layer.weight = nn.Parameter(layer.weight.new_empty(shape), layer.weight.requires_grad)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.new_empty(width), layer.bias.requires_grad)
    names = ("out_features", "in_features") if isinstance(layer, nn.Linear) else ("out_channels", None)
    for attribute, size in zip(names, shape[:2], strict=True):
        if attribute:
            setattr(layer, attribute, size)
    with torch.no_grad():
        layer.reset_parameters()


def _set_attributes(module: nn.Module, before: nn.Module, after: nn.Module) -> None:
    """Sets what the number of classes changes in a module's attributes, such as `num_classes`."""
    for attribute, value in changed_attributes(after, before).items():
        if getattr(module, attribute, None) == getattr(before, attribute):
            setattr(module, attribute, value)
