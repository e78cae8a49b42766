"""Does a model do something in training that it does not do in eval mode? Then it has to be traced in training, too.

Auxiliary heads and deep supervision return, or add, in training what eval mode computes in vain: classes that nothing
in eval mode keeps in place.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Iterable, Sequence
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from isomorphic.inputs import Inputs, call, map_tensors
from isomorphic.measure.meta_outputs import ShapeKernels
from isomorphic.pruning.grouping.memory import remembering_nothing
from isomorphic.pruning.grouping.trial import is_watched, shapes_of

# Stochastic depth, which timm and torchvision spell out: noise.bernoulli_(p).div_(p), times a block's output. What is
# returned is the same in eval mode.
_OF_DROPPED_PATHS = frozenset({"new_empty", "empty", "bernoulli_", "div_", "mul", "__mul__"})

_DROPPED_PATHS = frozenset({"DropPath", "StochasticDepth"})


def doubled(inputs: Inputs) -> Inputs:
    """Returns the inputs twice, one after the other: batch norms want more than one value in training."""
    return map_tensors(inputs, lambda tensor: tensor.repeat(2, *[1] * (tensor.dim() - 1)) if tensor.dim() else tensor)


def may_do_more_in_training(model: nn.Module) -> bool:
    """Returns True if some module's code asks whether it is trained, beside dropped paths and batch norms of any kind.

    torch's own modules return the same kind of thing in either mode. A run in training costs as much as one in eval
    mode, and a recurrent net's runs of shapes alone take seconds.
    """
    modules = [module for module in model.modules() if not isinstance(module, _BatchNorm)]
    if any("forward" in vars(module) for module in modules):  # one of its own, whatever that is
        return True
    return any(_asks_for_mode(kind) for kind in {type(module) for module in modules})


@functools.cache
def _asks_for_mode(kind: type[nn.Module]) -> bool:
    """Whether forward, or a method or function that it names, reads an attribute that is called training.

    Code that cannot be seen may do so.
    """
    if kind.__name__ in _DROPPED_PATHS:
        return False
    methods: dict[str, list[Any]] = {}  # of one name several, where super() is called
    for each in kind.__mro__:
        for name, value in vars(each).items() if not each.__module__.startswith("torch.") else ():
            methods.setdefault(name, []).append(value)
    if any(_function_of(forward) is None for forward in methods.get("forward", [])):
        return True
    waiting, reached = ["forward"], {"forward"}
    while waiting:
        called = methods.get(waiting.pop(), [])
        names = set().union(*map(_names_reached, called))
        if "training" in names:
            return True
        new = (names & methods.keys()) - reached
        reached |= new
        waiting += sorted(new)
    return False


def _function_of(value: Any) -> FunctionType | None:
    """The function of a method, a property or what a decorator wraps; None where its code cannot be seen."""
    value = getattr(value, "fget", getattr(value, "__func__", value))
    function = inspect.unwrap(value) if callable(value) else None
    return function if isinstance(function, FunctionType) else None


def _names_reached(value: Any) -> set[str]:
    """The names in a method's code, and in the functions beside it that it names."""
    function = _function_of(value)
    if function is None:
        return set()
    names = _names_in(function.__code__)
    beside = [function.__globals__.get(name) for name in names]
    functions = [one for one in beside if isinstance(one, FunctionType) and not one.__module__.startswith("torch.")]
    return names.union(*(_names_in(one.__code__) for one in functions))


def _names_in(code: CodeType) -> set[str]:
    """The global names and attributes that a function's code mentions, those of functions inside it, too."""
    inner = [_names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)


def does_more_in_training(
    model: nn.Module, inputs: Inputs, eval_calls: Iterable[Any], eval_shapes: Sequence[torch.Size]
) -> bool:
    """Returns True where training calls what eval mode does not, or returns something else; the mode stays training.

    It takes a few percent of a trace. A batch norm that counts its batches is no difference.

    Args:
        model: run once.
        inputs: of a batch that it can be trained on.
        eval_calls: torch functions that it called in eval mode.
        eval_shapes: of its outputs there, for a batch of another size.
    """
    calls = Counter[Any]()

    def note(func: Any, arguments: Sequence[Any]) -> None:
        counts_batches = func is Tensor.add_ and not arguments[0].is_floating_point()
        if is_watched(func) and not counts_batches:
            calls[func] += 1

    with torch.inference_mode(), ShapeKernels(), remembering_nothing(model, before=note) as memory:
        memory.outputs = call(model.train(), inputs)
    more = calls - Counter(eval_calls)
    dropped = sum(count for func, count in more.items() if func.__name__ == "bernoulli_")
    more -= Counter({func: dropped for func in more if func.__name__ in _OF_DROPPED_PATHS})
    return bool(more) or [shape[1:] for shape in shapes_of(memory.outputs)] != [shape[1:] for shape in eval_shapes]
