"""Measures what pruned models gain on this machine for studies.speed, by evaluate.py itself, in fresh processes.

For each script of scripts/pruning: its model is cut from random weights by L1 to the published MACs, and each of a few
fresh processes times it in turns with the dense one. One more process times copies in all roundings that are asked for.
Where one of those is faster for sure at the same MACs, the script is run once more with that `--round-to`, and what it
leaves is measured like the first. Figures are of a quiet machine; `busy` in a row says what other processes took.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from isomorphic import progress
from isomorphic.errors import UserError
from isomorphic.provenance import hardware
from studies.speed.rows import measure_scripts
from studies.speed.script_flags import prune, read_pruning_script

SCRIPTS = ("deit_4.2G", "swin_4.5G", "resnet50_2.0G")
EVALUATE = Path(__file__).resolve().parents[2] / "evaluate.py"


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        batch_sizes: images of a batch.
        processes: fresh ones, for each model.
        roundings: of the copies that are timed beside each other; none to leave them out.
        threads: of torch.
        modes: ways to run a model, as `evaluate.py --latency-modes` takes them.
    """

    batch_sizes: Sequence[int] = (1, 32)
    processes: int = 3
    roundings: Sequence[int] = (1, 2, 4, 8, 16, 32)
    threads: int = 2
    modes: str = "fp32"


class LatencyRow(NamedTuple):
    """One model in one process, way to run it and size of batch: the columns of latency_cpu.csv.

    Attributes:
        subject: "pruned", "pruned, --round-to 16", or "copy, --round-to 16": of that rounding at the same MACs.
        process: which of the fresh processes.
        macs_ratio: of the dense model by this one, paper's counter.
        kept: speed-up by that ratio.
        busy: share of the time that other processes had the processor; empty on a GPU.
    """

    script: str
    subject: str
    mode: str
    batch_size: int
    process: int
    dense_ms: float
    latency_ms: float
    speedup: float
    macs_ratio: float
    kept: float
    busy: float | None


def run(scripts: Sequence[str], options: Options, path: Path) -> None:
    """Measures each script and writes all rows to `path`, and a table of them beside it, as .md.

    Raises:
        UserError: no such script, a process fails, or a file cannot be written.
    """
    measure_scripts(
        scripts,
        LatencyRow,
        lambda file, folder: measure_script(file, options, folder),
        lambda rows: page(rows, options),
        path,
    )


def measure_script(file: Path, options: Options, folder: Path) -> list[LatencyRow]:
    """Returns the rows of one script, and prints a line for each process."""
    dense = read_pruning_script(file).model
    rows = list(measure_model(file, "pruned", prune(file, folder), dense, options))
    if not options.roundings:
        return rows
    words = ["--round-to", ",".join(map(str, options.roundings))]
    found = evaluate(prune(file, folder), dense, options, words)
    rows += rounding_rows(file.stem, found, options)
    best = found["faster_round_to"]
    if best is not None:
        checkpoint = prune(file, folder, "--round-to", str(best))
        rows += measure_model(file, f"pruned, --round-to {best}", checkpoint, dense, options)
    return rows


def measure_model(file: Path, subject: str, checkpoint: Path, dense: str, options: Options) -> Iterator[LatencyRow]:
    """Yields the rows of a pruned model, process by process."""
    for process in range(options.processes):
        found = evaluate(checkpoint, dense, options, [])
        for mode, size, prefix in settings(options):
            busy = found.get(f"{prefix}latency_cpu_share")
            row = LatencyRow(
                file.stem,
                subject,
                mode,
                size,
                process,
                found[f"{prefix}against_latency_ms"],
                found[f"{prefix}latency_ms"],
                found[f"{prefix}speedup"],
                found[f"{prefix}macs_ratio"],
                found[f"{prefix}kept_share"],
                None if busy is None else round(1 - busy, 4),
            )
            print(line(row), flush=True)
            progress.has_spoken()
            yield row


def rounding_rows(script: str, found: dict[str, Any], options: Options) -> list[LatencyRow]:
    """Returns the rows of the copies, whose speed-ups are ratios of the medians of all runs."""
    rows = []
    for mode, size, prefix in settings(options):
        dense_ms, dense_macs = found[f"{prefix}against_latency_ms"], found[f"{prefix}against_macs"]
        busy = found.get(f"{prefix}latency_cpu_share")
        for round_to in options.roundings:
            latency_ms = found.get(f"{prefix}round_to_{round_to}_latency_ms")
            if latency_ms is None:  # no widths of such multiples meet the budget
                continue
            speedup = dense_ms / latency_ms
            ratio = dense_macs / found[f"{prefix}round_to_{round_to}_macs"]
            figures = (round(speedup, 4), round(ratio, 4), round(speedup / ratio, 4))
            quiet = None if busy is None else round(1 - busy, 4)
            subject = f"copy, --round-to {round_to}"
            rows.append(LatencyRow(script, subject, mode, size, 0, dense_ms, latency_ms, *figures, quiet))
            print(line(rows[-1]), flush=True)
    return rows


def settings(options: Options) -> Iterator[tuple[str, int, str]]:
    """Yields each mode and size of batch, with the prefix of its keys in evaluate.py's results: none for the first."""
    prefix = ""
    for mode in options.modes.split(","):
        for size in options.batch_sizes:
            yield mode, size, prefix and f"{mode}_b{size}_"
            prefix = "further"


def evaluate(checkpoint: Path, dense: str, options: Options, words: Sequence[str]) -> dict[str, Any]:
    """Returns the results of evaluate.py in a process of its own.

    Raises:
        UserError: it fails; its last line is the reason.
    """
    progress.stage(f"timing {checkpoint.stem} beside {dense}")
    results = checkpoint.with_suffix(".json")
    timing = ["--latency", "--latency-batch-size", ",".join(map(str, options.batch_sizes))]
    timing += ["--latency-modes", options.modes, "--against", dense, *words]
    dry = ["--no-pretrained", "--dataset", "synthetic", "--synthetic-size", "1", "--workers", "0", "--overwrite"]
    command = [sys.executable, EVALUATE, "--model", checkpoint, *timing, *dry, "--results-file", results]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"evaluate.py failed for {checkpoint.name}: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(results.read_text(encoding="utf-8"))


# --- the page ---


def page(rows: Sequence[LatencyRow], options: Options) -> list[str]:
    """Returns the lines of the table: a row for each model, way and size of batch, over all of its processes."""
    machine = hardware()
    device = ", ".join(machine["gpus"] or []) or f"{machine['cpu']}, {machine['cores']} cores"
    lines = [
        "# Latency",
        "",
        f"{device}, {options.threads} threads, torch {torch.__version__}.",
        "Speed-ups are medians over the processes; in brackets the least and the most of them.",
        "",
        "| script | model | mode | batch | dense | pruned | speed-up | MACs ratio | kept | busy |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key in dict.fromkeys(row[:4] for row in rows):
        same = [row for row in rows if row[:4] == key]
        speedups = [row.speedup for row in same]
        spread = f"{median(speedups):.2f}×" + (f" ({min(speedups):.2f} … {max(speedups):.2f})" if len(same) > 1 else "")
        dense, pruned = (median(getattr(row, name) for row in same) for name in ("dense_ms", "latency_ms"))
        busy = max((row.busy for row in same if row.busy is not None), default=None)
        cells = [*map(str, key), f"{dense:.1f} ms", f"{pruned:.1f} ms", spread, f"{same[0].macs_ratio:.2f}×"]
        cells += [f"{median(row.kept for row in same):.0%}", "" if busy is None else f"{busy:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def line(row: LatencyRow) -> str:
    """A row as it is printed."""
    times = f"{row.dense_ms:9.2f} ms => {row.latency_ms:9.2f} ms"
    gain = f"{row.speedup:5.2f}× of {row.macs_ratio:5.2f}×, {row.kept:4.0%} kept"
    busy = "" if row.busy is None else f", busy {row.busy:.0%}"
    return f"{row.script:18}{row.subject:24}{row.mode:20}{row.batch_size:4}{times}  {gain}{busy}"
