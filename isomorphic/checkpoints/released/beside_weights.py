"""What trainers keep beside weights, as it is read: numpy's values, counters, default dicts and paths.

A best accuracy is often a numpy scalar, a history a default dict, an output folder a path. None of them is built by
the library that wrote it: a scalar is read as a number of Python's, a path as text, a default dict as a dict, and an
array as something that holds nothing, since nobody asks for its numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

# Booleans, whole numbers, fractions and text, which are bytes and no references to objects.
PLAIN_NUMPY = re.compile(r"(b1|[iu][1248]|f[248]|U\d{1,4})")
BYTE_ORDERS = ("<", ">", "|", "=")


class NumpyType:
    """Stands in for `numpy.dtype`: numpy("f8", False, True), then filled with (3, "<", None, None, None, -1, -1, 0)."""

    def __init__(self, kind: str, *_: Any) -> None:
        self.kind, self.order = kind, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]

    def dtype(self) -> np.dtype[Any]:
        """Returns numpy's own.

        Raises:
            ValueError: its values are not plain ones.
        """
        if not PLAIN_NUMPY.fullmatch(self.kind) or self.order not in BYTE_ORDERS:
            raise ValueError(f"it has a numpy value of the kind {self.kind:.20}")
        return np.dtype(self.order + self.kind)


class NumpyArray:
    """Stands in for an array, and holds nothing."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        pass


def scalar(kind: NumpyType, data: bytes) -> Any:
    """Returns the number, or the text, that a numpy scalar is."""
    return np.frombuffer(data, kind.dtype(), count=1)[0].item()


def array(*_: Any) -> NumpyArray:
    return NumpyArray()


def plain_dict(_: Any = None) -> dict[Any, Any]:
    return {}


def path_text(*parts: str) -> str:
    return "/".join(parts)


# By their names in pickles.
STAND_INS: Mapping[str, Callable[..., Any]] = {
    "numpy.dtype": NumpyType,
    "numpy.ndarray": NumpyArray,
    "numpy.core.multiarray.scalar": scalar,
    "numpy._core.multiarray.scalar": scalar,
    "numpy.core.multiarray._reconstruct": array,
    "numpy._core.multiarray._reconstruct": array,
    "collections.defaultdict": plain_dict,
    **{f"builtins.{kind.__name__}": kind for kind in (bool, dict, float, int, list, str)},  # what default dicts make
    **{f"{home}.{kind}": path_text for home in ("pathlib", "pathlib._local") for kind in ("PosixPath", "WindowsPath")},
}
# What may be called, with arguments of which kinds, and the kind of what comes of it (see `safe_pickle.CALLS`).
CALLS: Mapping[str, tuple[tuple[tuple[str, ...], ...], str]] = {
    "numpy.dtype": ((("text", "flag", "flag"), ("text", "number", "number")), "numpy type"),
    "numpy.core.multiarray.scalar": ((("numpy type", "bytes"),), "plain"),
    "numpy._core.multiarray.scalar": ((("numpy type", "bytes"),), "plain"),
    "numpy.core.multiarray._reconstruct": ((("name", "numbers", "bytes"),), "numpy array"),
    "numpy._core.multiarray._reconstruct": ((("name", "numbers", "bytes"),), "numpy array"),
    "collections.Counter": ((("dict",),), "dict"),
    "collections.defaultdict": ((("name",), ("flag",), ()), "dict"),
}
# What an object of these kinds is filled with, once.
STATES: Mapping[str, tuple[str, ...]] = {
    "numpy type": ("number", "text", "flag", "flag", "flag", "number", "number", "number"),
    "numpy array": ("number", "numbers", "numpy type", "flag", "bytes"),
}
PATHS = frozenset(name for name, stand_in in STAND_INS.items() if stand_in is path_text)
