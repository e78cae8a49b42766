"""What trainers keep beside weights is read as plain values, and is no way in for anything else."""

from __future__ import annotations

import argparse
import pathlib
import pickle
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from isomorphic.checkpoints.released.beside_weights import NumpyArray, NumpyType, scalar
from isomorphic.checkpoints.released.legacy import read_pickle
from isomorphic.errors import UserError
from tests.faults import one_line
from tests.unit.checkpoints.released.test_safe_pickle import archive, called, named, several, table, text


def read(value: Any, folder: Path) -> Any:
    torch.save({"value": value}, folder / "file.pth")
    return read_pickle(folder / "file.pth")["value"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float64(71.25), 71.25),
        (np.float32(0.5), 0.5),
        (np.int64(-7), -7),
        (np.uint8(200), 200),
        (np.bool_(True), True),
        (np.str_("best"), "best"),
        (Counter("aab"), {"a": 2, "b": 1}),
        (defaultdict(list, loss=[1.0, 2.0]), {"loss": [1.0, 2.0]}),
        (pathlib.PurePosixPath("runs") / "latin1", None),
        (pathlib.PosixPath("runs/latin1/x"), "runs/latin1/x"),
        (argparse.Namespace(best=np.float64(3.5)), argparse.Namespace(best=3.5)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_are_read_as_plain_ones(value: Any, expected: Any, tmp_path: Path):
    if expected is None:
        with pytest.raises(UserError, match="it wants pathlib.PurePosixPath"):
            read(value, tmp_path)
    else:
        found = read(value, tmp_path)
        assert found == expected and type(found).__module__ in ("builtins", "collections", "argparse")


def test_values_of_older_numpy_are_read(tmp_path: Path):
    torch.save({"value": np.float64(1.5)}, tmp_path / "new.pth")
    pickled = pickle.dumps(np.float64(1.5), 2).removeprefix(b"\x80\x02").removesuffix(b".")
    older = pickled.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")  # numpy 2's name, and numpy 1's
    assert b"numpy.core.multiarray" in older
    assert read_pickle(archive(tmp_path / "old.pth", table(value=older))) == {"value": 1.5}


def test_arrays_hold_nothing(tmp_path: Path):
    for array in (np.arange(3), np.zeros((2, 3), np.float32), np.zeros((), bool)):
        assert isinstance(read(array, tmp_path), NumpyArray)
    state = read(np.random.RandomState(0).get_state(), tmp_path)
    assert state[0] == "MT19937" and isinstance(state[1], NumpyArray)


NUMPY_TYPE = called(named("numpy", "dtype"), text("O8"), b"\x89", b"\x88")
BYTES = called(named("_codecs", "encode"), text("12345678"), text("latin1"))
SCALAR = named("numpy._core.multiarray", "scalar")
STATE = several(b"K\x03", text("<"), b"N", b"N", b"N", b"K\x00", b"K\x00", b"K\x00")
PROGRAMS: dict[str, tuple[bytes, str]] = {
    "object by its address": (called(SCALAR, NUMPY_TYPE + STATE + b"b", BYTES), "it has a numpy value of the kind O8"),
    "scalar of text": (called(SCALAR, NUMPY_TYPE, text("x")), "with something else than that takes"),
    "another codec": (called(named("_codecs", "encode"), text("x"), text("rot13")), "it wants _codecs.encode, which"),
    "type with another state": (NUMPY_TYPE + table() + b"b", "fill what is not an empty"),
    "type filled twice": (NUMPY_TYPE + STATE + b"b" + STATE + b"b", "fill what is not an empty"),
    "type with fields": (called(named("numpy", "dtype"), b"]", b"\x89", b"\x88"), "with something else than"),
    "array of objects": (
        called(named("numpy._core.multiarray", "_reconstruct"), named("numpy", "ndarray"), several(b"K\x00"), BYTES)
        + several(b"K\x01", several(b"K\x01"), NUMPY_TYPE, b"\x89", b"]") + b"b",
        "fill what is not an empty",
    ),
    "call of a default": (called(named("builtins", "int"), text("3")), "it wants to call builtins.int"),
    "new dict": (named("builtins", "dict") + b")\x81", "it wants to make builtins.dict"),
    "class alone": (named("builtins", "list"), "it holds the class list where none belongs"),
    "path of a number": (called(named("pathlib", "PosixPath"), b"K\x01"), "it wants to call pathlib.PosixPath"),
    "counter of text": (called(named("collections", "Counter"), text("aab")), "with something else than"),
    "default of a call": (called(named("collections", "defaultdict"), text("x")), "with something else than"),
    "load of an array": (named("numpy", "load"), "it wants numpy.load"),
}  # fmt: skip


@pytest.mark.parametrize("case", PROGRAMS)
def test_nothing_else_comes_in_that_way(case: str, tmp_path: Path):
    program, message = PROGRAMS[case]
    with pytest.raises(UserError, match=message) as error:
        read_pickle(archive(tmp_path / "file.pth", table(value=program)))
    one_line(error)


@pytest.mark.parametrize("kind", ["O8", "V4", "M8[ns]", "f8,f8", "U99999", ""])
def test_numpy_values_are_plain_or_refused(kind: str):
    with pytest.raises(ValueError, match="numpy value of the kind"):
        scalar(NumpyType(kind), bytes(8))
