#!/usr/bin/env python3
"""What do recoveries and a searched allocation bring back of a pruned model's accuracy, before finetuning and after?

    python -m studies.recovery --jobs 3                                  # all of it: hours on 4 cores
    python -m studies.recovery --tables hidden whole --families deit     # a part

Three small families on the handwritten digits, several seeds each. Dense models that --folder lacks are trained into it
first. What was measured once lies there, too, in rows/, and is not measured again: remove a file to have it anew. A
table that is not asked for is printed as far as its rows are there. Rows go to benchmarks/recovery.csv and the tables
to the screen and to benchmarks/recovery.md.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from isomorphic.commands import entry, flags
from isomorphic.files import atomic_write, check_writable
from studies.recovery.models import FAMILIES, train_dense
from studies.recovery.parts import Part, measure_part, stored_rows
from studies.recovery.tables import TITLES, RecoveryRow, page
from studies.rows import write_rows

INTRODUCTION = """\
# Recoveries and allocation on digits

Made by `-m studies.recovery`, as README.md in this folder describes; every single measurement is a row of
recovery.csv. Top-1 in percent on the 360 validation images of the handwritten digits: one image is 0.28 points. A cell
is the mean over the seeds of the dense model ± their standard deviation. Nothing is finetuned unless a table says so.
"""


def parse_args() -> argparse.Namespace:
    parser = flags.make_parser("Measure what recoveries and a searched allocation bring back, on digits.")
    parser.add_argument("--tables", nargs="+", choices=list(TITLES), default=list(TITLES), help="which ones")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES), help="which models")
    parser.add_argument("--seeds", nargs="+", type=flags.non_negative_int, default=list(range(5)), help="dense models")
    parser.add_argument("--jobs", type=flags.positive_int, default=3, help="processes, of one thread each")
    parser.add_argument("--folder", type=Path, default=Path("output/study"), help="for models and what was measured")
    text = "where the rows go, and the tables beside them as .md"
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/recovery.csv"), help=text)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    check_writable(args.csv)
    os.environ["OMP_NUM_THREADS"] = "1"  # read when the processes start
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        for families in training_order(args.families):
            dense = [(args.folder, family, seed) for seed in args.seeds for family in families]
            list(pool.map(train_dense, *zip(*dense, strict=True)))
        wanted = itertools.product(args.seeds, args.tables, args.families)
        parts = [Part(table, family, seed) for seed, table, family in wanted]
        missing = [part for part in parts if not part.file(args.folder).exists()]
        for part in pool.map(measure_part, [args.folder] * len(missing), missing):
            print(f"measured: {part.table}, {part.family}, seed {part.seed}", flush=True)
    rows = stored_rows(args.folder)
    write(args.csv, rows)


def training_order(families: Sequence[str]) -> Iterator[list[str]]:
    """Teachers and families without one; then, so that no teacher is trained twice at once, their students."""
    teachers = {FAMILIES[family].teacher for family in families}
    students = [family for family in families if FAMILIES[family].teacher]
    first = [family for family in FAMILIES if family in {*teachers, *families} - set(students)]
    yield from filter(None, (first, students))


def write(path: Path, rows: Sequence[RecoveryRow]) -> None:
    """Prints the tables, and writes them and the rows.

    Raises:
        UserError: a file cannot be written.
    """
    text = "\n".join(page(rows))
    print(text)
    write_rows(path, RecoveryRow, rows)
    with atomic_write(path.with_suffix(".md")) as temporary:
        temporary.write_text(f"{INTRODUCTION}{text}\n", encoding="utf-8")
    print(f"Saving the rows to {path}, and the tables to {path.with_suffix('.md')}")


if __name__ == "__main__":
    entry.run(main)
