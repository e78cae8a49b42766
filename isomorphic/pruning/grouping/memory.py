"""What the process remembers: functions behind `functools.lru_cache`, and tables that forward code keeps elsewhere.

A trace must find the same groups whatever the process has done before, and leave nothing behind.

- A memoised function that is asked for a traced integer may answer with what it has computed from a plain one before:
  48 without a memory for a width of 48. Such functions are found by their counters, and called without their memory
  when the model is traced again.
- A tensor that is still alive after a run and belongs neither to its outputs nor to the model lies in somebody's table.
  It is on the meta device perhaps, and would meet real tensors there. It is taken out again.

To look through all objects of a process takes as long as to trace a model. So the likely places come first: see
`Functions` and `Memory.forget`.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import sys
import traceback
import types
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from isomorphic.inputs import tensors_in
from isomorphic.observe import FunctionCalls
from isomorphic.pruning.grouping.integers import traced_hashes

_Memoised = type(functools.lru_cache(len))
_DEPTH = 4  # from a memoised function to a tensor in a tuple that it has returned; from a module to such a function
_ELSEWHERE = (type, types.ModuleType, nn.Module, Tensor, str, int, float)  # what a module's attributes end with
_Place = tuple[Any, Any, Any]  # where a function is known: (class, table of names, or cell; its name there; it)


class Functions:
    """The memoised functions of the process.

    All objects are looked through where new ones are likely: after imports, and for a model of classes that were not
    seen before. Others that a model may call are among its attributes, or in the namespaces of its classes.
    """

    def __init__(self) -> None:
        self._found: weakref.WeakSet[Any] = weakref.WeakSet()
        self._classes: weakref.WeakSet[type] = weakref.WeakSet()
        self._num_modules = 0

    def for_model(self, model: nn.Module) -> list[Any]:
        """Returns all that `model` may call."""
        classes = {type(module) for module in model.modules()}
        if len(sys.modules) != self._num_modules or not all(one in self._classes for one in classes):
            self._num_modules = len(sys.modules)
            self._classes.update(classes)
            self.add(gc.get_referrers(_Memoised))
        self.add(_in_attributes(model))
        self.add(value for names in _namespaces(model) for value in names.values())
        return list(self._found)

    def add(self, objects: Iterable[Any]) -> None:
        """Takes note of the memoised functions among some objects."""
        self._found.update(one for one in objects if type(one) is _Memoised)


_functions = Functions()


class Memory:
    """What one run of a model has left in the process.

    Attributes:
        outputs: of the run, which may stay; to be set by whoever runs it.
        asked: memoised functions that were asked for traced integers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.outputs: Any = None
        self.asked: list[Any] = []
        self._model = model
        self._counts: dict[Any, tuple[int, int]] = {}
        self._made: list[weakref.ref[Tensor]] = []

    def note(self, func: Any, arguments: Sequence[Any], output: Any) -> None:
        """Notes a tensor that a torch function has made, or several; what it hands on as it got it is none of them."""
        for one in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(one, Tensor) and not _is_among(one, arguments):
                self._made.append(weakref.ref(one))

    def count(self) -> None:
        """Reads the memoised functions' counters, before a traced integer is looked for."""
        self._counts = {one: one.cache_info()[:2] for one in _functions.for_model(self._model)}

    def forget(self) -> None:
        """Takes out of tables and memoised functions what the run has left there."""
        self.asked = [one for one, count in self._counts.items() if one.cache_info()[:2] != count]
        for memoised in self.asked:
            memoised.cache_clear()
        left = self._left()
        if not left:
            return
        wanted = {id(ref()) for ref in left}
        _clear(_functions.for_model(self._model), wanted)
        _drop((value for names in _namespaces(self._model) for value in names.values()), wanted)
        tensors = [ref() for ref in left if ref() is not None]
        if tensors:
            holders = gc.get_referrers(_Memoised, *tensors)
            _functions.add(holders)
            _clear([one for one in holders if type(one) is _Memoised], wanted)
            _drop(_without_namespaces(holders), wanted)

    def _left(self) -> list[weakref.ref[Tensor]]:
        """The tensors that the run has made and that are neither outputs nor in the model."""
        left = [ref for ref in self._made if ref() is not None]
        model = self._model
        for belong in (
            lambda: self.outputs,
            lambda: [*model.parameters(), *model.buffers()],
            lambda: [vars(module) for module in model.modules()],
        ):
            if left:
                kept = {id(tensor) for tensor in tensors_in(belong())}
                left = [ref for ref in left if id(ref()) not in kept]
        return left


@contextlib.contextmanager
def remembering_nothing(
    model: nn.Module, before: Callable[[Any, Sequence[Any]], None] | None = None
) -> Iterator[Memory]:
    """Watches a run of `model`; afterwards what it has left in the process, but for its outputs, is gone.

    Args:
        model: runs inside.
        before: is called before each torch function; see `FunctionCalls`.
    """
    memory = Memory(model)
    try:
        with FunctionCalls(before=before, after=memory.note), traced_hashes(memory.count):
            yield memory
    except BaseException as error:
        _clear_frames(error)
        raise
    finally:
        memory.forget()


def _clear_frames(error: BaseException | None) -> None:
    """Empties the frames that have ended with an error: each tensor of the run would seem to lie in a table."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def _is_among(tensor: Tensor, values: Sequence[Any]) -> bool:
    """Whether one of some values, or an entry of tuples and lists among them, is this very tensor."""
    for value in values:
        if value is tensor or (isinstance(value, (tuple, list)) and any(entry is tensor for entry in value)):
            return True
    return False


def _namespaces(model: nn.Module) -> list[dict[str, Any]]:
    """Returns the global names of the files that the model's classes are from."""
    names = {type(module).__module__ for module in model.modules()}
    return [vars(sys.modules[name]) for name in sorted(names) if name in sys.modules]


def _in_attributes(model: nn.Module) -> Iterator[Any]:
    """Yields what modules hold and is no module: values, what is in tables and helpers, what functions close over."""
    level: Collection[Any] = [vars(module) for module in model.modules()]
    for _ in range(_DEPTH):
        parts = itertools.chain.from_iterable(map(_parts, level))
        level = {id(one): one for one in gc.get_referents(*parts) if not isinstance(one, _ELSEWHERE)}.values()
        yield from level


def _parts(value: Any) -> tuple[Any, ...]:
    """What to look into: not into the global names of a function."""
    if isinstance(value, types.FunctionType):
        return value.__closure__, value.__defaults__, value.__kwdefaults__
    return (value,)


def _clear(functions: Iterable[Any], wanted: set[int]) -> None:
    """Clears the memoised functions that remember some tensors."""
    for memoised in functions:
        if memoised.cache_info().currsize and _holds(memoised, wanted):
            memoised.cache_clear()


def _holds(memoised: Any, wanted: set[int]) -> bool:
    """Whether a memoised function remembers one of some tensors, in a tuple perhaps."""
    level: list[Any] = [memoised]
    for _ in range(_DEPTH):
        level = [one for one in gc.get_referents(*level) if not isinstance(one, (type, types.ModuleType, nn.Module))]
        if any(id(one) in wanted for one in level):
            return True
        level = [one for one in level if not isinstance(one, (Tensor, types.FunctionType))]
    return False


def _drop(tables: Iterable[Any], wanted: set[int]) -> None:
    """Drops the entries of plain tables that are some tensors."""
    for table in tables:
        if type(table) is dict and "__name__" not in table:
            for key in [key for key, value in table.items() if id(value) in wanted]:
                del table[key]


def _without_namespaces(holders: Iterable[Any]) -> list[dict[Any, Any]]:
    """Returns the tables among some objects, without the names of classes, objects and frames, which have to stay."""
    tables = [one for one in holders if type(one) is dict]
    owners = gc.get_referrers(*tables) if tables else []
    names = {id(getattr(owner, "__dict__", None)) for owner in owners}
    return [table for table in tables if id(table) not in names]


@contextlib.contextmanager
def without_memory(functions: Collection[Any], *, everywhere: Collection[Any] = ()) -> Iterator[None]:
    """Inside, memoised functions compute each answer anew.

    Args:
        functions: are replaced where they are known by their own names, others anywhere.
        everywhere: those of them that are replaced wherever they are known, by other names, too.
    """
    places = {one: list(_places_by_name(one)) for one in functions}
    places |= _places_everywhere([one for one in functions if one in everywhere or not places[one]])
    for owner, name, function in itertools.chain.from_iterable(places.values()):
        _put(owner, name, function.__wrapped__)
    try:
        yield
    finally:
        for owner, name, function in itertools.chain.from_iterable(places.values()):
            _put(owner, name, function)


def known_by_name(function: Any) -> bool:
    """Whether a module or class knows a memoised function by the function's own name."""
    return any(True for _ in _places_by_name(function))


def _places_by_name(function: Any) -> Iterator[_Place]:
    """Yields the modules that know a function by its name, and the class that it is written in."""
    for module in [*sys.modules.values()]:
        names = getattr(module, "__dict__", {})
        if names.get(function.__name__) is function:
            yield names, function.__name__, function
    owner = sys.modules.get(function.__module__)
    *path, name = function.__qualname__.split(".")
    for part in path:
        owner = getattr(owner, "__dict__", {}).get(part)
    if isinstance(owner, type) and vars(owner).get(name) is function:
        yield owner, name, function


def _places_everywhere(functions: Sequence[Any]) -> dict[Any, list[_Place]]:
    """Returns the places of each function: names in modules, classes and objects, entries of tables, and closures."""
    places: dict[Any, list[_Place]] = {function: [] for function in functions}
    holders = gc.get_referrers(*functions) if functions else []
    tables = [one if type(one) is dict else getattr(one, "__dict__", {}) for one in holders]
    of_classes = [table for table in tables if "__module__" in table]
    classes = [one for one in gc.get_referrers(*of_classes) if isinstance(one, type)] if of_classes else []
    for holder, table in zip(holders, tables, strict=True):
        if type(holder) is types.CellType:
            places[holder.cell_contents].append((holder, "", holder.cell_contents))
        owner = next((one for one in classes if one is holder or _refers(one, table)), table)
        for name, value in [*table.items()]:
            if type(value) is _Memoised and value in places:
                places[value].append((owner, name, value))
    return places


def _refers(one: Any, other: Any) -> bool:
    return any(referent is other for referent in gc.get_referents(one))


def _put(owner: Any, name: Any, function: Any) -> None:
    if type(owner) is types.CellType:
        owner.cell_contents = function
    elif isinstance(owner, type):
        setattr(owner, name, function)
    else:
        owner[name] = function
