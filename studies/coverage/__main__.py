#!/usr/bin/env python3
"""What of each model family can be pruned, and does the pruned model hold?

    python -m studies.coverage                      # every set of benchmarks/families.json
    python -m studies.coverage --set timm           # the 90 timm families
    python -m studies.coverage --only swin_t --graph depgraph
    python -m studies.coverage --set people         # models of eleven other libraries, see studies/coverage/people

Every model is traced, cut by 50% (L2) under one ratio in every group ("local") and under isomorphic ranking, run
forward and backward, saved, reloaded, and held against the masked dense model: see model.py. Each runs in a process of
its own on one thread. A model that fails is a row that says where and why. Rows go to benchmarks/coverage.csv, those of
people to benchmarks/coverage_people.csv, and as a table with the totals to the screen and to a page of the same name.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from isomorphic.commands import entry, flags
from isomorphic.errors import UserError
from isomorphic.files import atomic_write, check_writable
from isomorphic.pruning.grouping.trace import TRACERS
from studies.apart import OK, measure_all, write_csv
from studies.coverage.example import Case
from studies.coverage.model import RANKINGS, CoverageRow, Family, measure
from studies.coverage.people import ENTRIES, installed

FAMILIES = Path("benchmarks/families.json")
CSV = Path("benchmarks/coverage.csv")
SETS = ("timm", "torchvision", "more")
PEOPLE, PEOPLE_CSV = "people", Path("benchmarks/coverage_people.csv")
ENOUGH = 0.4  # of the width, to call a model prunable
EXACT = 1e-4  # of an output's spread
RESULTS = (("macs", ".0%"), ("error", ".0e"))  # columns for each ranking, and how they are printed
HEADER = (
    "model", "status", "prunable", "groups", "classes", "heads can go", "trace s",
    "local MACs", "error", "isom. MACs", "error", "frozen",
)  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = flags.make_parser("Measure how much of each model family can be pruned.")
    parser.add_argument("--set", nargs="+", choices=(*SETS, PEOPLE), default=list(SETS), help="which lists of models")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="just these models of the lists")
    parser.add_argument("--graph", choices=TRACERS, default="exact", help="tracer")
    parser.add_argument("--jobs", type=flags.positive_int, default=max((os.cpu_count() or 2) - 1, 1), help="processes")
    parser.add_argument("--time-limit", type=flags.positive_int, default=300, metavar="SECONDS", help="for each model")
    parser.add_argument("--families", type=Path, default=FAMILIES, help="the lists of models")
    parser.add_argument(
        "--csv",
        type=Path,
        help=f"where the rows go, and the table beside them as .md (default: {CSV}, {PEOPLE_CSV}; with --only nowhere)",
    )
    args = parser.parse_args()
    if PEOPLE in args.set and len(args.set) > 1:
        parser.error(f"--set {PEOPLE} goes to a file of its own: measure it by itself")
    return args


def main() -> None:
    args = parse_args()
    of_people = PEOPLE in args.set
    path = args.csv or (None if args.only else PEOPLE_CSV if of_people else CSV)
    if path:
        check_writable(path)
    cases = find_people(args.only) if of_people else read_families(args.families, args.set, args.only)
    layout = Layout.for_models(case.model for case in cases)
    print(layout.line(HEADER))
    rows = []
    started = [(case, CoverageRow(case.set, case.model, "start")) for case in cases]
    for row in measure_all(functools.partial(measure, tracer=args.graph), started, args.jobs, args.time_limit):
        rows.append(row)
        print(layout.line(cells(row)), flush=True)
    print("\n".join(["", *summary(rows)]))
    if path:
        write_csv(path, CoverageRow, rows)
        write_page(path.with_suffix(".md"), [layout.line(HEADER), *(layout.line(cells(row)) for row in rows)], rows)
        print(f"Saving the rows to {path}, and the table to {path.with_suffix('.md')}")


def read_families(path: Path, sets: Sequence[str], only: Sequence[str]) -> list[Family]:
    """The models of some sets, in the file's order; all of them, or those named by `only`.

    Raises:
        UserError: the file cannot be read, or a name is in none of the sets.
    """
    try:
        stored = json.loads(path.read_text())
        families = [Family(set=name, **family) for name in sets for family in stored[name]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the lists of models in {path}: {error}") from error
    unknown = set(only) - {family.model for family in families}
    if unknown:
        raise UserError(f"{', '.join(sorted(unknown))}: not in {path} under {', '.join(sets)}")
    return [family for family in families if not only or family.model in only]


def find_people(only: Sequence[str]) -> Sequence[Case]:
    """Returns the models of other libraries; all of them, or those named by `only`. What is not installed is printed.

    Raises:
        UserError: a name is unknown, or none of the libraries is installed.
    """
    unknown = set(only) - {entry.model for entry in ENTRIES}
    if unknown:
        raise UserError(f"{', '.join(sorted(unknown))}: not in studies/coverage/people")
    entries, missing = installed([entry for entry in ENTRIES if not only or entry.model in only])
    print("".join(f"{line}\n" for line in missing), end="")
    if not entries:
        raise UserError("nothing to measure: install studies/coverage/requirements.txt")
    return entries


def write_page(path: Path, table: Sequence[str], rows: Sequence[CoverageRow]) -> None:
    """The printed table as a page of text, its totals first.

    Raises:
        UserError: the file cannot be written.
    """
    text = ["# Coverage", "", *(f"- {line}" for line in summary(rows) if line), "", "```", *table, "```", ""]
    with atomic_write(path) as temporary:
        temporary.write_text("\n".join(text), encoding="utf-8")


@dataclass(frozen=True)
class Layout:
    """Widths of the columns, known before the first row: those of the models' names, and of the header."""

    widths: tuple[int, ...]

    @classmethod
    def for_models(cls, models: Iterable[str]) -> Layout:
        return cls((max(map(len, models)), len("isomorphic backward"), *map(len, HEADER[2:])))

    def line(self, cells: Sequence[str]) -> str:
        """The first two cells to the left, numbers to the right, and the last as long as it is."""
        words = [cell.ljust(width) for cell, width in zip(cells[:2], self.widths, strict=False)]
        words += [cell.rjust(width) for cell, width in zip(cells[2:-1], self.widths[2:], strict=False)]
        return "  ".join([*words, cells[-1]]).rstrip()


def cells(row: CoverageRow) -> tuple[str, ...]:
    """A row as `HEADER` names its columns; what could not be measured is a dash."""

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    results = [cell(getattr(row, f"{ranking}_{what}"), form) for ranking in RANKINGS for what, form in RESULTS]
    status = row.status if row.status == OK else row.status.split(":")[0]
    counts = (cell(row.prunable, ".1%"), cell(row.groups, "d"), cell(row.classes, "d"))
    return (row.model, status, *counts, _heads(row), cell(row.trace_seconds, ".2f"), *results, row.frozen)


def _heads(row: CoverageRow) -> str:
    """How many heads can go, of how many: "8 of 12"."""
    return "-" if row.heads is None else f"{row.heads} of {row.heads + (row.heads_stay or 0)}"


def summary(rows: Sequence[CoverageRow]) -> list[str]:
    """What failed, in full; then the totals of each set."""
    failed = [f"{row.model}: {row.status}" for row in rows if row.status != OK]
    sets = dict.fromkeys(row.set for row in rows)
    return [*failed, *[""][: len(failed)], *(totals(name, [row for row in rows if row.set == name]) for name in sets)]


def totals(name: str, rows: Sequence[CoverageRow]) -> str:
    """How many models of a set ran, how many are prunable, and how many exactly."""
    enough = sum(row.status == OK and (row.prunable or 0) >= ENOUGH for row in rows)
    exact = ", ".join(f"{sum(_is_exact(row, ranking) for row in rows)} ({ranking})" for ranking in RANKINGS)
    seconds = [row.trace_seconds for row in rows if row.trace_seconds is not None]
    return (
        f"{name}: {sum(row.status == OK for row in rows)} of {len(rows)} ran, "
        f"{enough} with at least {ENOUGH:.0%} of their width prunable, exact to {EXACT:.0e}: {exact}, "
        f"traced in {statistics.median(seconds or [0]):.2f} s (median), "
        f"{sum(row.heads or 0 for row in rows)} of {sum((row.heads or 0) + (row.heads_stay or 0) for row in rows)} "
        "heads can go"
    )


def _is_exact(row: CoverageRow, ranking: str) -> bool:
    error = getattr(row, f"{ranking}_error")
    return error is not None and error <= EXACT


if __name__ == "__main__":
    entry.run(main)
