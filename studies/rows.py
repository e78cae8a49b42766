"""Rows of measurements as CSV: named tuples of one kind, a column a field."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from isomorphic.errors import UserError
from isomorphic.files import atomic_write

Row = TypeVar("Row", bound=tuple[Any, ...])


def write_rows(path: Path, kind: type[Row], rows: Iterable[Row]) -> None:
    """Writes rows of one kind.

    Raises:
        UserError: the file cannot be written.
    """
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as table:
        csv.writer(table).writerows([_fields(kind), *rows])


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """Returns what `write_rows` wrote: fields are str, int or float, and empty where they may be None.

    Raises:
        UserError: the file holds other columns.
    """
    with open(path, newline="", encoding="utf-8") as file:
        try:
            return [kind(**_typed(kind, line)) for line in csv.DictReader(file)]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"cannot read {path}: remove it, and it is measured again") from error


def _fields(kind: Any) -> tuple[str, ...]:
    return kind._fields


def _typed(kind: Any, line: dict[str, str]) -> dict[str, Any]:
    """The cells of a line as the fields that they are of."""
    hints, values = get_type_hints(kind), {}
    for name, cell in line.items():
        of_field = next(each for each in (str, int, float) if each in (hints[name], *get_args(hints[name])))
        values[name] = of_field(cell) if cell or of_field is str else None
    return values
