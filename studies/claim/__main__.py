#!/usr/bin/env python3
"""Does ranking inside isomorphic classes help, by how much, how sure is that, and when?

    python -m studies.claim --jobs 2                                      # digits: hours on 2 cores
    python -m studies.claim --models efficientnet_lite0 --images DIR --judged-on DIR --seeds 0
    python -m studies.claim --models mine --checkpoint mine net.safetensors --images DIR --judged-on DIR

Isomorphic, global, local and allocated rankings of three criteria, at 75, 50 and 25% of the MACs, just cut, compensated
and distilled, before and after equal finetuning: four small families on digits made hard (studies/hard_digits.py), and
models with real weights, judged by their agreement with the dense one on unlabelled images. What is in --csv is not
measured again; a run that was stopped goes on after its last row. Tables go beside the CSV, as .md.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from isomorphic.commands import entry, flags
from isomorphic.errors import UserError
from isomorphic.files import atomic_write, check_writable
from studies.claim.figures import draw_scores
from studies.claim.runs import CRITERIA, RECOVERIES, Part, Row, Run, measure_part
from studies.claim.subjects import EFFICIENTNET, Sources, open_subject
from studies.claim.tables import page
from studies.depgraph.models import FAMILIES
from studies.rows import read_rows, write_rows

INTRODUCTION = """\
# The claim: ranking inside isomorphic classes

Made by `-m studies.claim`, as docs/claim.md describes; every run is a row of claim.csv. Means ± standard errors.

"""


def parse_args() -> argparse.Namespace:
    parser = flags.make_parser("Measure what ranking inside isomorphic classes brings.")
    models_help = f"families on digits ({', '.join(FAMILIES)}), {EFFICIENTNET}, names of --checkpoint"
    parser.add_argument("--models", nargs="+", default=list(FAMILIES), metavar="MODEL", help=models_help)
    parser.add_argument("--checkpoint", nargs=2, action="append", default=[], metavar=("NAME", "FILE"))
    parser.add_argument("--images", type=flags.path, metavar="DIR", help="unlabelled images for real weights")
    parser.add_argument("--judged-on", type=flags.path, metavar="DIR", help="others, to judge on")
    parser.add_argument("--seeds", nargs="+", type=flags.non_negative_int, default=list(range(5)))
    parser.add_argument("--criteria", nargs="+", choices=CRITERIA, default=list(CRITERIA))
    parser.add_argument("--recoveries", nargs="+", choices=list(RECOVERIES), default=list(RECOVERIES))
    parser.add_argument("--jobs", type=flags.positive_int, default=2, help="processes")
    parser.add_argument("--threads", type=flags.positive_int, default=1, help="of each process")
    parser.add_argument(
        "--folder", type=Path, default=Path("output/claim"), help="for dense models and unfinished parts"
    )
    figures_help = "draw the scores of each model's classes (its first seed, Taylor) into this folder"
    parser.add_argument("--figures", type=Path, metavar="DIR", help=figures_help)
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/claim.csv"), help="all rows, old and new")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    check_writable(args.csv)
    sources = _sources(args)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # read when the processes start
    known = read_rows(args.csv, Row) if args.csv.exists() else []
    chosen = itertools.product(args.seeds, args.criteria, args.models)
    parts = [Part(model, seed, criterion, tuple(args.recoveries), args.threads) for seed, criterion, model in chosen]
    rows = known
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        for part in pool.map(partial(measure_part, args.folder, sources, known=known), parts):
            print(f"measured: {part.model}, seed {part.seed}, {part.criterion}", flush=True)
            rows = merged(known, _stored(args.folder))
            write(args.csv, rows)
    print("\n".join(page(rows)))
    for model in args.models if args.figures else ():
        args.figures.mkdir(parents=True, exist_ok=True)
        path = args.figures / f"claim_scores_{model}.png"
        draw_scores(open_subject(model, args.seeds[0], args.folder, sources), "taylor", model, path)
        print(f"Saving {path}")


def _sources(args: argparse.Namespace) -> Sources:
    """
    Raises:
        UserError: a model that is none.
    """
    sources = Sources(args.images, args.judged_on, tuple(map(tuple, args.checkpoint)))
    unknown = set(args.models) - {*FAMILIES, EFFICIENTNET, *dict(sources.checkpoints)}
    if unknown:
        raise UserError(f"{sorted(unknown)[0]} is no model of this study: name its file by --checkpoint NAME FILE")
    if not set(args.models) <= set(FAMILIES) and not (args.images and args.judged_on):
        raise UserError("models with real weights want --images DIR and --judged-on DIR")
    return sources


def _stored(folder: Path) -> list[Row]:
    return [row for file in sorted((folder / "rows").glob("*.csv")) for row in read_rows(file, Row)]


def merged(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """All rows, one a run, in an order that does not depend on when they were measured."""
    by_run = {row.run: row for row in [*new, *old]}
    return [by_run[run] for run in sorted(by_run, key=_place)]


def _place(run: Run) -> tuple[object, ...]:
    models = list(FAMILIES)
    place = models.index(run.model) if run.model in models else len(models)
    return place, run.model, run.seed, CRITERIA.index(run.criterion), -run.share, run.ranking, run.recovery


def write(path: Path, rows: Sequence[Row]) -> None:
    """Writes the rows, and the tables beside them.

    Raises:
        UserError: a file cannot be written.
    """
    write_rows(path, Row, rows)
    with atomic_write(path.with_suffix(".md")) as temporary:
        temporary.write_text(INTRODUCTION + "\n".join(page(rows)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    entry.run(main)
