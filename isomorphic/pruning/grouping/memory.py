"""What the process remembers: functions behind `functools.lru_cache`, and tables that forward code keeps elsewhere.

A trace must find the same groups whatever the process has done before, and leave nothing behind.

- A memoised function that is asked for a traced integer may answer with what it has computed from a plain one before:
  48 without a memory for a width of 48. Such functions are found by their counters, and called without their memory
  when the model is traced again.
- A tensor that is still alive after a run and belongs neither to its outputs nor to the model lies in somebody's table.
  It is on the meta device perhaps, and would meet real tensors there. It is taken out again.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import types
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from isomorphic.inputs import tensors_in
from isomorphic.observe import FunctionCalls
from isomorphic.pruning.grouping.integers import traced_hashes

_Memoised = type(functools.lru_cache(len))
_DEPTH = 4  # from a memoised function to a tensor in a tuple that it has returned


class Memory:
    """What one run of a model has left in the process.

    Attributes:
        outputs: of the run, which may stay; to be set by whoever runs it.
        asked: memoised functions that were asked for traced integers.
    """

    def __init__(self) -> None:
        self.outputs: Any = None
        self.asked: list[Any] = []
        self._counts: dict[Any, tuple[int, int]] = {}
        self._made: list[weakref.ref[Tensor]] = []

    def note(self, func: Any, arguments: Sequence[Any], output: Any) -> None:
        """Notes a tensor that a torch function has made, or several; what it hands on as it got it is none of them."""
        given = {id(one) for one in _flat(arguments)}
        self._made += [weakref.ref(one) for one in _flat([output]) if isinstance(one, Tensor) and id(one) not in given]

    def count(self) -> None:
        """Reads the memoised functions' counters, before a traced integer is looked for."""
        self._counts = {one: one.cache_info()[:2] for one in _memoised()}

    def forget(self, model: nn.Module) -> None:
        """Takes out of tables and memoised functions what the run has left there."""
        self.asked = [one for one, count in self._counts.items() if one.cache_info()[:2] != count]
        for memoised in self.asked:
            memoised.cache_clear()
        kept = {id(tensor) for tensor in [*tensors_in(self.outputs), *model.parameters(), *model.buffers()]}
        left = [tensor for ref in self._made if (tensor := ref()) is not None and id(tensor) not in kept]
        if left:
            kept = {id(tensor) for tensor in tensors_in([vars(module) for module in model.modules()])}
            left = [tensor for tensor in left if id(tensor) not in kept]
        if left:
            _take_out(left)


@contextlib.contextmanager
def remembering_nothing(model: nn.Module) -> Iterator[Memory]:
    """Watches a run of `model`; afterwards what it has left in the process, but for its outputs, is gone."""
    memory = Memory()
    try:
        with FunctionCalls(after=memory.note), traced_hashes(memory.count):
            yield memory
    finally:
        memory.forget(model)


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """Yields some values, and the entries of tuples and lists among them."""
    for value in values:
        yield from value if isinstance(value, (tuple, list)) else (value,)


def _memoised() -> list[Any]:
    return [one for one in gc.get_objects() if type(one) is _Memoised]


def _take_out(tensors: Sequence[Tensor]) -> None:
    """Clears the memoised functions and the entries of tables that hold some tensors."""
    wanted = {id(tensor) for tensor in tensors}
    for memoised in _memoised():
        if memoised.cache_info().currsize and _holds(memoised, wanted):
            memoised.cache_clear()
    for holder in gc.get_referrers(*tensors):
        if type(holder) is dict and not _is_namespace(holder):
            for key in [key for key, value in holder.items() if id(value) in wanted]:
                del holder[key]


def _holds(memoised: Any, wanted: set[int]) -> bool:
    """Whether a memoised function remembers one of some tensors, in a tuple perhaps."""
    level: list[Any] = [memoised]
    for _ in range(_DEPTH):
        level = [one for one in gc.get_referents(*level) if not isinstance(one, (type, types.ModuleType, nn.Module))]
        if any(id(one) in wanted for one in level):
            return True
        level = [one for one in level if not isinstance(one, (Tensor, types.FunctionType))]
    return False


def _is_namespace(holder: dict[Any, Any]) -> bool:
    """Whether a dict holds the names of a module, class, object or frame, which may not just disappear."""
    return "__name__" in holder or any(getattr(one, "__dict__", None) is holder for one in gc.get_referrers(holder))


@contextlib.contextmanager
def without_memory(functions: Iterable[Any]) -> Iterator[None]:
    """Inside, memoised functions compute each answer anew, wherever they are known by name."""
    places = [place for function in functions for place in _places_of(function)]
    for owner, name, function in places:
        _put(owner, name, function.__wrapped__)
    try:
        yield
    finally:
        for owner, name, function in places:
            _put(owner, name, function)


def _places_of(function: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Where a function is known: (class, table of names, or cell of a closure; its name there; the function)."""
    for holder in gc.get_referrers(function):
        if type(holder) is types.CellType:
            yield holder, "", function
        elif isinstance(holder, type):
            yield from ((holder, name, function) for name, one in vars(holder).items() if one is function)
        else:
            names = holder if type(holder) is dict else getattr(holder, "__dict__", {})
            classes = [one for one in gc.get_referrers(names) if isinstance(one, type)]
            owner = classes[0] if classes else names
            yield from ((owner, name, function) for name, one in names.items() if one is function)


def _put(owner: Any, name: Any, function: Any) -> None:
    if type(owner) is types.CellType:
        owner.cell_contents = function
    elif isinstance(owner, type):
        setattr(owner, name, function)
    else:
        owner[name] = function
