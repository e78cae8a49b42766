"""Integers of forward code that remember where they come from.

While a model is traced, its modules' integer attributes and the sizes of prunable axes are instances of `TracedInt`: an
`int` that carries an `Expression`. Arithmetic keeps track; what leaves it (a float, a comparison) is reported.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from torch import nn

from isomorphic.number_tables import set_number_table
from isomorphic.pruning.expressions import OPERATORS, Attribute, Constant, Expression, Number, Operation

# Integers of convolution and pooling that have nothing to do with channels.
_SPATIAL = frozenset(
    {"stride", "padding", "dilation", "kernel_size", "output_padding", "num_embeddings", "padding_idx"}
)


Equalize = Callable[..., None]  # (left, right, *, in_doubt=False), see `SizeMode.equalize`


class TracedInt(int):
    """An integer with its expression; `equalize` is told what must stay equal: comparisons that held, and casts.

    What a cast leaves is a plain number without a memory. It may be computed anew by the cut model, as in
    `int(x.shape[1])`, or have to stay what it is, as where `float(dim)` scales attention: that is in doubt.
    """

    expression: Expression
    equalize: Equalize
    on_first_hash: ClassVar[Any] = None  # a function without arguments, for all of them; see `traced_hashes`

    def __hash__(self) -> int:
        if TracedInt.on_first_hash is not None:
            told, TracedInt.on_first_hash = TracedInt.on_first_hash, None
            told()
        return int.__hash__(self)

    def __int__(self) -> int:
        return _forgotten(self, int.__int__(self))

    def __round__(self, ndigits: int | None = None) -> int:
        return self if ndigits is None else _forgotten(self, int.__round__(self, ndigits))

    def __trunc__(self) -> int:
        return self

    __floor__ = __ceil__ = __pos__ = __trunc__

    def __eq__(self, other: object) -> bool:
        equal = int.__eq__(self, other)  # type: ignore[operator]
        if equal is True:
            self.equalize(self.expression, expression_of(other))  # type: ignore[arg-type]
        return equal

    def __ne__(self, other: object) -> bool:
        equal = self.__eq__(other)
        return equal if equal is NotImplemented else not equal

    def __float__(self) -> float:
        return _forgotten(self, int.__float__(self))

    def bit_length(self) -> int:
        self.equalize(self.expression, Constant(plain(self)))
        return int.bit_length(self)

    def __neg__(self) -> int:
        return self * -1  # type: ignore[return-value]


class TracedFloat(float):
    """A number that was computed from sizes or attributes, such as head_dim ** -0.5."""

    expression: Expression
    equalize: Equalize

    def __float__(self) -> float:
        return _forgotten(self, float.__add__(self, 0.0))

    def __int__(self) -> int:
        return _forgotten(self, float.__int__(self))

    def __trunc__(self) -> int:
        return _forgotten(self, float.__trunc__(self))

    def __floor__(self) -> int:
        return _forgotten(self, float.__floor__(self))

    def __ceil__(self) -> int:
        return _forgotten(self, float.__ceil__(self))

    def __round__(self, ndigits: int | None = None) -> float:
        return _forgotten(self, float.__round__(self, ndigits))

    def __neg__(self) -> float:
        return self * -1  # type: ignore[return-value]


def _forgotten(number: TracedInt | TracedFloat, value: Any) -> Any:
    """Returns what a cast makes of a traced number, `value`, which remembers nothing."""
    number.equalize(number.expression, Constant(value), in_doubt=True)
    return value


def traced(value: Number, expression: Expression, equalize: Equalize) -> Any:
    """`value` with its expression."""
    found = TracedInt(value) if isinstance(value, int) else TracedFloat(value)
    found.expression, found.equalize = expression, equalize
    return found


def expression_of(value: Number) -> Expression:
    """The expression of a traced number, else the number itself."""
    return getattr(value, "expression", None) or Constant(plain(value))


def plain(value: Number) -> Number:
    """The same number without a memory."""
    if isinstance(value, TracedFloat):
        return float.__add__(value, 0.0)
    return int.__add__(value, 0) if isinstance(value, TracedInt) else value


def as_int(value: Any) -> int:
    """Returns an argument of the forward code as a plain integer, which is no cast of that code."""
    return int.__add__(value, 0) if isinstance(value, TracedInt) else int(value)


def _binary(symbol: str, reflected: bool) -> Callable[[Any, Any], Any]:
    compute = OPERATORS[symbol]

    def method(self: Any, other: Any) -> Any:
        if not isinstance(other, (int, float)) or isinstance(other, bool):
            return NotImplemented
        left, right = (other, self) if reflected else (self, other)
        value = compute(plain(left), plain(right))
        return traced(value, Operation(symbol, expression_of(left), expression_of(right)), self.equalize)

    return method


for _symbol, _name in zip(OPERATORS, ("add", "sub", "mul", "floordiv", "mod", "truediv", "pow"), strict=True):
    for _type in (TracedInt, TracedFloat):
        setattr(_type, f"__{_name}__", _binary(_symbol, reflected=False))
        setattr(_type, f"__r{_name}__", _binary(_symbol, reflected=True))


@contextlib.contextmanager
def traced_hashes(tell: Callable[[], None]) -> Iterator[None]:
    """Inside, `tell` is called before a traced integer is looked for in a table for the first time."""
    before = TracedInt.on_first_hash
    TracedInt.on_first_hash = tell
    try:
        yield
    finally:
        TracedInt.on_first_hash = before


@contextlib.contextmanager
def traced_math() -> Iterator[None]:
    """Inside, `math` knows traced numbers: attention is scaled by `math.sqrt` as often as by `** -0.5`.

    Its logarithms take whole numbers as they are, without asking for a float; here they ask.
    """
    originals = {name: getattr(math, name) for name in ("sqrt", "log", "log2", "log10")}

    def root(number: Any) -> Any:
        return number**0.5 if isinstance(number, (TracedInt, TracedFloat)) else originals["sqrt"](number)

    def asking(logarithm: Callable[..., float]) -> Callable[..., float]:
        return lambda number, *base: logarithm(float(number) if isinstance(number, TracedInt) else number, *base)

    try:
        math.sqrt = root
        for name in ("log", "log2", "log10"):
            setattr(math, name, asking(originals[name]))
        yield
    finally:
        for name, original in originals.items():
            setattr(math, name, original)


@contextlib.contextmanager
def traced_attributes(model: nn.Module, equalize: Equalize) -> Iterator[None]:
    """Inside, the modules' public integers, also in tuples, lists and mappings, are traced; all comes back."""
    before = {module: dict(module.__dict__) for module in model.modules()}
    try:
        for name, module in model.named_modules():
            for attribute, value in before[module].items():
                if not attribute.startswith("_") and attribute not in _SPATIAL:
                    new = _traced_attribute(value, name, attribute, equalize)
                    if new is value:
                        continue
                    if isinstance(new, dict):
                        set_number_table(module, attribute, new)
                    else:
                        module.__dict__[attribute] = new
        yield
    finally:
        for module, attributes in before.items():
            module.__dict__.clear()
            module.__dict__.update(attributes)


def _traced_attribute(value: Any, module: str, name: str, equalize: Equalize) -> Any:
    if type(value) is int:
        return traced(value, Attribute(module, name), equalize)
    if type(value) in (tuple, list) and value and all(type(entry) is int for entry in value):
        return type(value)(traced(v, Attribute(module, name, i), equalize) for i, v in enumerate(value))
    if type(value) is dict:
        integers = {key: v for key, v in value.items() if type(v) is int and type(key) is str}
        if integers:
            return value | {key: traced(v, Attribute(module, name, key), equalize) for key, v in integers.items()}
    return value
