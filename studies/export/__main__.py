#!/usr/bin/env python3
"""Does a pruned model answer the same as ONNX and as .pt2, at batch 1 and 3?

    pip install --no-deps -r studies/coverage/requirements.txt   # for the models of other libraries
    python -m studies.export                                     # all of them
    python -m studies.export --only deit_4.2G transformers/detr  # some, nothing written

The paper's five families are pruned as their scripts say, the quickstart's models to half and a quarter of their MACs,
and models of other libraries by half of their width; torchvision's detectors are exported up to the raw outputs of
their heads. Weights are random but for the quickstart's DeiT, and none of them is zero. Each model runs in a process of
its own on one thread. What fails is a row that says where and why. Rows go to benchmarks/export.csv, and as a table to
benchmarks/export.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

from isomorphic import progress
from isomorphic.commands import entry, flags
from isomorphic.errors import UserError
from isomorphic.exporting.answers import BOUND
from isomorphic.files import atomic_write, check_writable
from isomorphic.measure.complexity import format_params
from studies.apart import OK, measure_all, write_csv
from studies.coverage.people.entry import IMPORTED_AS
from studies.export.models import CASES, Case
from studies.export.row import KINDS, ExportRow, measure

CSV = Path("benchmarks/export.csv")
HEADER = ("model", "MACs left", "params", "ONNX", ".pt2", "batches", "ONNX MB", "torch ms", "onnxruntime ms")
LIBRARIES = ("torch", "onnx", "onnxscript", "onnxruntime", "timm", "torchvision", "transformers", "ultralytics")


def parse_args() -> argparse.Namespace:
    parser = flags.make_parser("Export pruned models, and compare what was written with them.")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="just these models")
    parser.add_argument("--jobs", type=flags.positive_int, default=1, help="processes")
    parser.add_argument("--time-limit", type=flags.positive_int, default=1200, metavar="SECONDS", help="for each model")
    csv_help = f"where the rows go, and the table beside them as .md (default: {CSV}; with --only nowhere)"
    parser.add_argument("--csv", type=Path, help=csv_help)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    path = args.csv or (None if args.only else CSV)
    if path:
        check_writable(path)
    cases = choose(args.only)
    started = [(case, ExportRow(case.set, case.model, "start")) for case in cases]
    rows = []
    print(table_line(HEADER), flush=True)
    measured = measure_all(measure, started, args.jobs, args.time_limit)
    for row in progress.Bar(measured, desc="exporting", total=len(started), shown=False):
        rows.append(row)
        print(table_line(cells(row)), flush=True)
    print("\n".join(["", *summary(rows)]))
    if path:
        write_csv(path, ExportRow, rows)
        write_page(path.with_suffix(".md"), rows)
        print(f"Saving the rows to {path}, and the table to {path.with_suffix('.md')}")


def choose(only: Sequence[str]) -> list[Case]:
    """Returns all models, or those named by `only`. A library that is not installed is printed.

    Raises:
        UserError: a name is unknown, or nothing is left.
    """
    unknown = set(only) - {case.model for case in CASES}
    if unknown:
        raise UserError(f"{', '.join(sorted(unknown))}: not in studies/export/models.py")
    asked = [case for case in CASES if not only or case.model in only]
    missing = {case.set for case in asked if not _is_here(case.set)}
    for name in sorted(missing):
        print(f"{name} is not installed, left out: {', '.join(case.model for case in asked if case.set == name)}")
    cases = [case for case in asked if case.set not in missing]
    if not cases:
        raise UserError("nothing to measure: install studies/coverage/requirements.txt")
    return cases


def _is_here(library: str) -> bool:
    ours = library in ("paper", "quickstart")
    return ours or importlib.util.find_spec(IMPORTED_AS.get(library, library)) is not None


def cells(row: ExportRow) -> tuple[str, ...]:
    """A row as `HEADER` names its columns; what could not be measured is a dash."""

    def cell(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    batches = row.onnx_batches or row.pt2_batches
    return (
        row.model,
        cell(row.macs_left, ".0%"),
        "–" if row.params is None else format_params(row.params),
        cell(row.onnx_difference, ".1e"),
        cell(row.pt2_difference, ".1e"),
        ", ".join(batches.split()) or "–",
        cell(row.onnx_mb, ".2f"),
        cell(row.torch_ms, ".2f"),
        cell(row.onnxruntime_ms, ".2f"),
    )


def table_line(words: Sequence[str]) -> str:
    return f"| {' | '.join(words)} |"


def summary(rows: Sequence[ExportRow]) -> list[str]:
    """What failed, in full; then how many hold, and the largest difference of each kind."""
    lines = [f"{row.model}: {row.status}" for row in rows if row.status != OK]
    for kind in KINDS:
        found = {row.model: getattr(row, f"{kind}_difference") for row in rows}
        held = {model: value for model, value in found.items() if value is not None and value <= BOUND}
        line = f"{kind}: {len(held)} of {len(rows)} within {BOUND:.0e} of the output's largest value"
        worst = max(held, key=held.__getitem__, default=None)
        lines.append(f"{line}; the largest difference is {held[worst]:.1e}, of {worst}" if worst else line)
    return lines


def write_page(path: Path, rows: Sequence[ExportRow]) -> None:
    """Writes the totals, the versions and the table.

    Raises:
        UserError: the file cannot be written.
    """
    lines = ["# Export", "", *(f"- {line}" for line in summary(rows)), f"- {_versions(LIBRARIES)}", ""]
    lines += [table_line(HEADER), table_line(["---"] + ["---:"] * (len(HEADER) - 1))]
    lines += [table_line(cells(row)) for row in rows]
    with atomic_write(path) as temporary:
        temporary.write_text("\n".join([*lines, ""]), encoding="utf-8")


def _versions(libraries: Iterable[str]) -> str:
    here = [name for name in libraries if importlib.util.find_spec(name) is not None]
    return ", ".join([f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in here)])


if __name__ == "__main__":
    entry.run(main)
