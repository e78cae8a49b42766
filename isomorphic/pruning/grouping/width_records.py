"""Integers by which a model tells others how wide it is: timm's `num_features`, `head_hidden_size` and alike.

No forward code reads them, so that no equation finds them; `reset_classifier` builds a new head from them. They follow
the layers that read what they count: `num_features` the first layer behind `forward_features`, `head_hidden_size` the
classifier. In MobileNetV3 these are two layers:

    forward_features -> 960 channels -> pool -> conv_head (960 -> 1280) -> classifier (1280 -> 1000)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from isomorphic.inputs import Inputs, call, map_tensors
from isomorphic.observe import module_calls
from isomorphic.pruning.cutting.records import input_width
from isomorphic.pruning.expressions import Attribute
from isomorphic.pruning.grouping.exact import ASKS_FOR_DATA, undisturbed
from isomorphic.pruning.grouping.trial import Trial
from isomorphic.pruning.groups import WidthRecord
from isomorphic.skeletons import shape_copy


def find_records(model: Any, inputs: Inputs) -> tuple[WidthRecord, ...]:
    """Finds the records of a model that has timm's `get_classifier`, and the layers that each follows.

    Args:
        model, inputs: as for `trace_groups`; the model is left as it was.
    """
    classifiers = _classifiers(model) if hasattr(model, "get_classifier") else []
    if not classifiers:
        return ()
    layers, behind = _called_layers(model, inputs)
    return tuple(_records(model, classifiers, layers, behind or classifiers))


def _classifiers(model: Any) -> list[str]:
    """Returns the name of the first layer with weights in each classifier, of which a distilled DeiT has two."""
    names = {module: name for name, module in model.named_modules()}
    found = model.get_classifier()
    several = found if isinstance(found, (tuple, list, nn.ModuleList)) else [found]
    layers = [next(filter(_has_weight, one.modules()), None) for one in several if isinstance(one, nn.Module)]
    return [names[layer] for layer in layers if layer in names]


def _has_weight(module: nn.Module) -> bool:
    return isinstance(getattr(module, "weight", None), Tensor)


def _called_layers(model: nn.Module, inputs: Inputs) -> tuple[list[str], list[str]]:
    """Returns the layers with weights in the order in which they are called, and the one that reads the features.

    The second list is empty where the model has no `forward_features`, or one that returns several tensors.
    """
    skeleton = shape_copy(model)
    try:
        with torch.random.fork_rng(devices=[]):
            return _watched(skeleton, Trial(skeleton, inputs).run_dense)
    except ASKS_FOR_DATA:  # which the model itself has
        with undisturbed(model), torch.no_grad():
            return _watched(model.eval(), lambda: call(model, map_tensors(inputs, torch.clone)))


def _watched(model: nn.Module, run: Callable[[], Any]) -> tuple[list[str], list[str]]:
    """Runs a model by `run` and returns what `_called_layers` does."""
    called: list[str] = []
    features_end: list[int] = []
    layers = {name: module for name, module in model.named_modules() if _has_weight(module)}

    def note_end(features: Any) -> None:
        if isinstance(features, Tensor):
            features_end.append(len(called))

    with (
        _method_calls(model, "forward_features", after=note_end),
        module_calls(layers, before=lambda name, positional, keyword: called.append(name)),
    ):
        run()
    behind = called[features_end[0] :][:1] if features_end else []
    return called, behind


@contextlib.contextmanager
def _method_calls(model: nn.Module, name: str, after: Callable[[Any], None]) -> Iterator[None]:
    """Inside, what a method of the model returns is told of, if there is such a method."""
    method = getattr(model, name, None)
    if method is None:
        yield
        return
    own = vars(model).get(name)

    def told(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        after(result)
        return result

    setattr(model, name, told)
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
    if dims == getattr(model, "num_features", None):  # of a ViT; a Swin's is the width of its first stage
        yield from _following("", model, ("embed_dim",), behind)
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
