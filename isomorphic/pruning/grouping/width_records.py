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

from isomorphic.inputs import Inputs, call, map_tensors, tensors_in
from isomorphic.observe import module_calls
from isomorphic.pruning.cutting.records import input_width
from isomorphic.pruning.expressions import Attribute
from isomorphic.pruning.grouping.exact import ASKS_FOR_DATA, undisturbed
from isomorphic.pruning.grouping.trial import Trial
from isomorphic.pruning.groups import WidthRecord
from isomorphic.skeletons import shape_copy

_Call = tuple[str, list[torch.Size]]  # a layer, and the sizes of its inputs


def find_records(model: Any, inputs: Inputs) -> tuple[WidthRecord, ...]:
    """Finds the records of a model that has timm's `get_classifier`, and the layers that each follows.

    Args:
        model, inputs: as for `trace_groups`; the model is left as it was.
    """
    if not hasattr(model, "get_classifier"):
        return ()
    classifiers = _classifiers(model)
    called, behind = _called_layers(model, inputs)
    return tuple(_records(model, classifiers, called, behind or classifiers))


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


def _watched(model: Any, run: Callable[[], Any]) -> tuple[list[str], list[str]]:
    """Runs a model by `run` and returns what `_called_layers` does."""
    features: list[tuple[Any, int]] = []  # and how many layers were called before
    calls: list[_Call] = []
    whole = getattr(model, "forward_features", None)

    def forward_features(*args: Any, **kwargs: Any) -> Any:
        features.append((whole(*args, **kwargs), len(calls)))  # type: ignore[misc]
        return features[-1][0]

    with _calls_noted(model, calls), _method_replaced(model, "forward_features", whole and forward_features):
        run()
    called = [name for name, _ in calls]
    if not features or not isinstance(features[0][0], Tensor):
        return called, []
    result, start = features[0]
    return called, _reader(model, run, result, calls[start:])


def _reader(model: Any, run: Callable[[], Any], features: Tensor, behind: Sequence[_Call]) -> list[str]:
    """Returns the first layer that reads the features, which is not always the first that is called behind them.

    Attention pooling calls that of its learnt query first. So the features are handed on with one channel more,
    (1, 961, 7, 7) for (1, 960, 7, 7): the first layer that is called with other sizes than before is the one.
    """
    dim = next((d for d in range(1, features.dim()) if features.shape[d] == getattr(model, "num_features", 0)), None)
    if dim is None:
        return [name for name, _ in behind[:1]]
    wider = torch.cat([features, features.narrow(dim, 0, 1)], dim)
    calls: list[_Call] = []
    failed = False
    with _calls_noted(model, calls), _method_replaced(model, "forward_features", lambda *args, **kwargs: wider):
        try:
            run()
        except ASKS_FOR_DATA:  # what one more channel is likely to end in
            failed = True
    differs = [name for (name, sizes), (_, old) in zip(calls, behind, strict=False) if sizes != old]
    return (differs or [name for name, _ in behind if failed])[:1]


@contextlib.contextmanager
def _calls_noted(model: nn.Module, calls: list[_Call]) -> Iterator[None]:
    """Inside, each call of a layer with weights is added to `calls`."""

    def note(name: str, positional: tuple[Any, ...], keyword: dict[str, Any]) -> None:
        calls.append((name, [tensor.shape for tensor in tensors_in([positional, keyword])]))

    with module_calls({name: one for name, one in model.named_modules() if _has_weight(one)}, before=note):
        yield


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
