"""One forward pass, watched: in which order layers run, which batch norm follows which layer, what is multiplied.

Nothing here reads a model's code. Tensors are followed by identity, operation by operation: a batch norm follows a
layer only if it reads the very tensor that the layer returned, and nothing else reads that tensor.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from isomorphic.inputs import Inputs, call, no_fast_path, tensors_in
from isomorphic.kinds import kind_names
from isomorphic.observe import EagerMode, eval_mode, module_calls

PlainLayer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
BatchNorm = nn.modules.batchnorm._BatchNorm
# Layers that compute y = W * x + b of the weight that they store: others standardise or mask it on the way.
_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PLAIN_OF_TIMM = ("timm.layers.linear.Linear", "timm.layers.conv2d_same.Conv2dSame")
_PRODUCTS = {torch.ops.aten.mul, torch.ops.aten.mul_}
_Layers = frozenset[str]


@dataclass(frozen=True)
class Watched:
    """What one forward pass showed.

    Attributes:
        last_call: when each module ran for the last time, by name: 0, 1, 2 …; modules that did not are missing.
        pairs: for each plain layer that a batch norm of its own follows, the batch norm: names.
        products: two sets of layers for each product of two activations, those that each factor was made from.
    """

    last_call: Mapping[str, int]
    pairs: Mapping[str, str]
    products: frozenset[tuple[_Layers, _Layers]]


def is_plain_layer(module: nn.Module) -> bool:
    """Whether `module` is a linear or a convolution that uses the weight just as it stores it."""
    return (
        isinstance(module, PlainLayer)
        and _has_plain_forward(type(module))
        and module._parameters.get("weight") is not None
        and "bias" in module._parameters
    )


def _has_plain_forward(kind: type) -> bool:
    """Whether `forward` is that of one of the plain classes, rather than one of a subclass."""
    owner = next(parent for parent in kind.__mro__ if "forward" in vars(parent))
    return owner in _PLAIN or next(kind_names(owner)) in _PLAIN_OF_TIMM


def tied_parameters(model: nn.Module) -> set[int]:
    """The identities of the parameters that several modules hold."""
    holders = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return {parameter for parameter, count in holders.items() if count > 1}


def watch(model: nn.Module, inputs: Inputs) -> Watched:
    """Runs `model` once, in eval mode and without gradients.

    Args:
        model: left as it is.
        inputs: what it runs on: a batch, or a tuple of positional arguments.
    """
    watcher = _Watcher(model)
    calls = module_calls(watcher.modules, before=watcher.enter, after=watcher.leave)
    with calls, eval_mode(model), torch.no_grad(), no_fast_path(), watcher:
        outputs = call(model, inputs)
    watcher.consumed_by_others(tensors_in(outputs))
    return Watched(watcher.last_call, watcher.pairs(), frozenset(watcher.products))


class _Watcher(EagerMode):
    """Sees every module's call and every operation on tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.last_call: dict[str, int] = {}
        self.products: set[tuple[_Layers, _Layers]] = set()
        self.modules = {name: module for name, module in model.named_modules() if name}
        self._tied = tied_parameters(model)
        self._calls: Counter[str] = Counter()
        self._clock = itertools.count()
        self._made_by: WeakIdKeyDictionary = WeakIdKeyDictionary()  # a layer's very output -> the layer
        self._made_from: WeakIdKeyDictionary = WeakIdKeyDictionary()  # a tensor -> the last layers on the way to it
        self._consumers: dict[str, list[str | None]] = {}  # by layer: batch norms, and None for whatever else
        self._batch_norm: str | None = None  # the one that runs now

    def enter(self, name: str, positional: tuple[Any, ...], keyword: dict[str, Any]) -> None:
        """A module is called: a batch norm may follow the layer that made its input."""
        if isinstance(self.modules[name], BatchNorm):
            self._batch_norm = name
            if positional and isinstance(positional[0], Tensor) and positional[0] in self._made_by:
                self._consumers.setdefault(self._made_by[positional[0]], []).append(name)

    def leave(self, name: str, outputs: Any) -> None:
        """A module has returned."""
        module = self.modules[name]
        self._calls[name] += 1
        self.last_call[name] = next(self._clock)
        if self._batch_norm == name:
            self._batch_norm = None
        if isinstance(outputs, Tensor) and isinstance(module, PlainLayer):
            self._made_from[outputs] = frozenset([name])
            if is_plain_layer(module) and (outputs.dim() == 2 or not isinstance(module, nn.Linear)):
                self._made_by[outputs] = name

    def pairs(self) -> dict[str, str]:
        """See `Watched.pairs`."""
        alone = {layer: names[0] for layer, names in self._consumers.items() if len(names) == 1}
        return {layer: norm for layer, norm in alone.items() if norm and self._may_fold(layer, norm)}

    def consumed_by_others(self, tensors: list[Tensor]) -> None:
        """Notes that something other than a batch norm takes these tensors."""
        for tensor in tensors:
            if tensor in self._made_by:
                self._consumers.setdefault(self._made_by[tensor], []).append(None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = tensors_in([args, kwargs or {}])
        if self._batch_norm is None:
            self.consumed_by_others(inputs)
        made_from = [self._made_from[tensor] for tensor in inputs if tensor in self._made_from]
        if func.overloadpacket in _PRODUCTS and len(made_from) == 2 and made_from[0] != made_from[1]:
            self.products.add((made_from[0], made_from[1]))
        outputs = func(*args, **(kwargs or {}))
        if made_from:
            self._made_from.update({tensor: frozenset().union(*made_from) for tensor in tensors_in(outputs)})
        return outputs

    def _may_fold(self, layer_name: str, norm_name: str) -> bool:
        """Both run once, share nothing with other modules, and the batch norm has statistics of its own."""
        layer, norm = self.modules[layer_name], self.modules[norm_name]
        parameters = [*layer.parameters(recurse=False), *norm.parameters(recurse=False)]
        return (
            self._calls[layer_name] == self._calls[norm_name] == 1
            and isinstance(norm, BatchNorm)
            and norm.running_mean is not None
            and norm.running_var is not None
            and not any(id(parameter) in self._tied for parameter in parameters)
        )
