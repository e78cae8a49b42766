"""Parts of studies.depgraph: what one process measures, and where its rows are kept."""

from __future__ import annotations

from pathlib import Path

import torch

from studies.depgraph.models import FAMILIES
from studies.depgraph.ways import Epochs, Row, measure
from studies.rows import read_rows, write_rows

Part = tuple[str, int]  # a family and a seed


def file_of(folder: Path, epochs: Epochs, part: Part) -> Path:
    """The file of a part; a part with other epochs has another."""
    family, seed = part
    dense = epochs.dense or FAMILIES[family].dense_epochs
    return folder / f"{family}-{dense}-{epochs.sparse}-{epochs.finetuning}-seed{seed}.csv"


def measure_part(folder: Path, epochs: Epochs, part: Part) -> Part:
    """Measures one dense model and keeps its rows in the folder."""
    torch.set_num_threads(1)
    write_rows(file_of(folder, epochs, part), Row, list(measure(*part, epochs)))
    return part


def stored_rows(folder: Path, epochs: Epochs) -> list[Row]:
    """Returns all that was measured so far with these epochs, in the order of the families and the seeds."""
    rows: list[Row] = []
    for family in FAMILIES:
        pattern = file_of(folder, epochs, (family, 0)).name.replace("seed0", "seed*")
        seeds = sorted(int(path.stem.rpartition("seed")[2]) for path in folder.glob(pattern))
        for seed in seeds:
            rows += read_rows(file_of(folder, epochs, (family, seed)), Row)
    return rows
