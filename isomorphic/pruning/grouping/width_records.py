"""Integers by which a model tells others how wide it is: timm's `num_features`, `head_hidden_size` and alike.

No forward code reads them, so that no equation finds them; `reset_classifier` builds a new head from them. They follow
the layers that read what they count: `num_features` the first layer behind `forward_features`, `head_hidden_size` the
classifier. In MobileNetV3 these are two layers:

    forward_features -> 960 channels -> pool -> conv_head (960 -> 1280) -> classifier (1280 -> 1000)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from isomorphic.inputs import tensors_in
from isomorphic.observe import module_calls
from isomorphic.pruning.cutting.records import input_width
from isomorphic.pruning.expressions import Attribute
from isomorphic.pruning.grouping.units import Ids
from isomorphic.pruning.groups import WidthRecord

# Which units a tensor carries, on any of its axes; none where the tracer does not know.
UnitsOf = Callable[[Tensor], Ids]


@dataclass
class HeadCalls:
    """What was called in one forward pass of a model that has timm's `get_classifier`.

    Attributes:
        layers: names of the layers with weights, in the order in which they are called.
        inputs: units of what each of them was given.
        features: units of the tensor that `forward_features` returned; None where it is not there, or returned several.
        start: how many layers were called before it returned.
    """

    layers: list[str] = field(default_factory=list)
    inputs: list[Ids] = field(default_factory=list)
    features: Ids | None = None
    start: int = 0

    @property
    def readers(self) -> list[str]:
        """The first layer that reads the features; attention pooling calls that of its learnt query before."""
        if self.features is None:
            return []
        behind = self.layers[self.start :]
        reading = [
            name
            for name, units in zip(behind, self.inputs[self.start :], strict=True)
            if np.isin(units, self.features).any()
        ]
        return (reading or behind)[:1]


@contextlib.contextmanager
def head_calls(model: Any, units_of: UnitsOf) -> Iterator[HeadCalls]:
    """Inside, a run of the model is noted; nothing is where it has no `get_classifier`."""
    calls = HeadCalls()
    if not hasattr(model, "get_classifier"):
        yield calls
        return
    whole = getattr(model, "forward_features", None)

    def forward_features(*args: Any, **kwargs: Any) -> Any:
        result = whole(*args, **kwargs)  # type: ignore[misc]
        if isinstance(result, Tensor):
            calls.features, calls.start = units_of(result), len(calls.layers)
        return result

    def note(name: str, positional: tuple[Any, ...], keyword: dict[str, Any]) -> None:
        calls.layers.append(name)
        units = [units_of(tensor) for tensor in tensors_in([positional, keyword])]
        calls.inputs.append(np.concatenate([np.zeros(0, np.int64), *units]))

    layers = {name: module for name, module in model.named_modules() if _has_weight(module)}
    with module_calls(layers, before=note), _method_replaced(model, "forward_features", whole and forward_features):
        yield calls


def find_records(model: Any, calls: HeadCalls) -> tuple[WidthRecord, ...]:
    """Finds the records of a model that has timm's `get_classifier`, and the layers that each follows.

    Args:
        model: the model.
        calls: of a run of it, or of its copy.
    """
    if not hasattr(model, "get_classifier"):
        return ()
    classifiers = _classifiers(model)
    return tuple(_records(model, classifiers, calls.layers, calls.readers or classifiers))


def _classifiers(model: Any) -> list[str]:
    """Returns the name of the first layer with weights in each classifier, of which a distilled DeiT has two."""
    names = {module: name for name, module in model.named_modules()}
    found = model.get_classifier()
    several = found if isinstance(found, (tuple, list, nn.ModuleList)) else [found]
    layers = [next(filter(_has_weight, one.modules()), None) for one in several if isinstance(one, nn.Module)]
    return [names[layer] for layer in layers if layer in names]


def _has_weight(module: nn.Module) -> bool:
    return isinstance(getattr(module, "weight", None), Tensor)


@contextlib.contextmanager
def _method_replaced(model: nn.Module, name: str, method: Callable[..., Any] | None) -> Iterator[None]:
    """Inside, the model has another method; the same one where none is given."""
    if method is None:
        yield
        return
    own = vars(model).get(name)
    setattr(model, name, method)
    try:
        yield
    finally:
        delattr(model, name)
        if own is not None:
            setattr(model, name, own)


def _records(
    model: Any, classifiers: Sequence[str], called: Sequence[str], behind: Sequence[str]
) -> Iterator[WidthRecord]:
    """Yields the records of the model, and of the modules around its classifiers.

    Args:
        classifiers, called: names of layers.
        behind: those that read the features.
    """
    widths = {name: input_width(model.get_submodule(name)) for name in classifiers}
    yield from _following("", model, ("num_features",), behind)
    yield from _following("", model, ("head_hidden_size",), classifiers)
    dims = getattr(model, "embed_dim", None)
    if dims == getattr(model, "head_hidden_size", None):  # a ViT's head; a Swin's is the width of its first stage
        yield from _following("", model, ("embed_dim",), classifiers)
    elif isinstance(dims, (tuple, list)):  # of branches or stages with a classifier each
        for entry, (name, dim) in enumerate(zip(classifiers, dims, strict=False)):
            if dim == widths[name]:
                yield WidthRecord(Attribute("", "embed_dim", entry), (name,))
    for holder in _around(classifiers):
        inside = [name for name in called if name.startswith(f"{holder}.")]
        module = model.get_submodule(holder)
        yield from _following(holder, module, ("in_features",), inside[:1])
        yield from _following(holder, module, ("num_features", "hidden_size"), inside[-1:])


def _following(holder: str, module: Any, attributes: Sequence[str], layers: Sequence[str]) -> Iterator[WidthRecord]:
    """Yields the records for those of some attributes that are integers of the module itself."""
    for attribute in attributes:
        if layers and isinstance(vars(module).get(attribute), int):
            yield WidthRecord(Attribute(holder, attribute), tuple(layers))


def _around(layers: Sequence[str]) -> list[str]:
    """Returns the names of the modules between the model and some layers: "head" of "head.fc"."""
    found: dict[str, None] = {}
    for layer in layers:
        parts = layer.split(".")
        found |= dict.fromkeys(".".join(parts[:count]) for count in range(1, len(parts)))
    return list(found)
