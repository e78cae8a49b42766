#!/usr/bin/env python3
"""What does group sparse training buy, and what a criterion, at equal training?

    python -m studies.depgraph --jobs 4                              # all of it: hours on 4 cores
    python -m studies.depgraph --families resnet --seeds 0 1         # a part

Four small families on digits made hard (see studies/hard_digits.py), several seeds each: criteria with and without a
sparse phase before them, with and without compensation, at 2, 4 and 8 times fewer MACs, just pruned and after equal
training. What was measured once lies in --folder and is not measured again: remove a file to have it anew. Rows go to
benchmarks/depgraph.csv, the tables to the screen and to benchmarks/depgraph.md.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from isomorphic.commands import entry, flags
from isomorphic.files import atomic_write, check_writable
from studies.depgraph.models import FAMILIES
from studies.depgraph.parts import file_of, measure_part, stored_rows
from studies.depgraph.tables import page
from studies.depgraph.ways import Epochs, Row
from studies.rows import write_rows

INTRODUCTION = """\
# Sparse training and criteria on digits made hard

Made by `-m studies.depgraph`, as README.md in this folder describes; every model is a row of depgraph.csv. Top-1 in
percent on 1,440 distorted images of 360 digits: mean over the seeds ± standard error. "weak half" is the share of the
norm that the weaker half of a group's channels holds before the cut. All ways get the same training after the dense
phase: {sparse} epochs in a sparse phase and {finetuning} of finetuning, or all of them as finetuning.
"""


def parse_args() -> argparse.Namespace:
    parser = flags.make_parser("Measure what sparse training and criteria buy, on digits made hard.")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES), help="which models")
    parser.add_argument("--seeds", nargs="+", type=flags.non_negative_int, default=list(range(5)), help="dense models")
    parser.add_argument("--jobs", type=flags.positive_int, default=2, help="processes, of one thread each")
    phases = {"nargs": 2, "type": flags.positive_int, "metavar": ("SPARSE", "FINETUNING")}
    parser.add_argument("--epochs", **phases, default=[Epochs.sparse, Epochs.finetuning], help="of these phases")
    parser.add_argument("--dense-epochs", type=flags.positive_int, help="of the dense phase (default: the family's)")
    parser.add_argument("--folder", type=Path, default=Path("output/depgraph"), help="for what was measured")
    text = "where the rows go, and the tables beside them as .md"
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/depgraph.csv"), help=text)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    check_writable(args.csv)
    epochs = Epochs(*args.epochs, dense=args.dense_epochs)
    os.environ["OMP_NUM_THREADS"] = "1"  # read when the processes start
    parts = [(family, seed) for seed, family in itertools.product(args.seeds, args.families)]
    missing = [part for part in parts if not file_of(args.folder, epochs, part).exists()]
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        for family, seed in pool.map(partial(measure_part, args.folder, epochs), missing):
            print(f"measured: {family}, seed {seed}", flush=True)
    write(args.csv, stored_rows(args.folder, epochs), epochs)


def write(path: Path, rows: Sequence[Row], epochs: Epochs) -> None:
    """Prints the tables, and writes them and the rows.

    Raises:
        UserError: a file cannot be written.
    """
    text = "\n".join(page(rows))
    print(text)
    write_rows(path, Row, rows)
    introduction = INTRODUCTION.format(sparse=epochs.sparse, finetuning=epochs.finetuning)
    with atomic_write(path.with_suffix(".md")) as temporary:
        temporary.write_text(f"{introduction}{text}\n", encoding="utf-8")
    print(f"Saving the rows to {path}, and the tables to {path.with_suffix('.md')}")


if __name__ == "__main__":
    entry.run(main)
