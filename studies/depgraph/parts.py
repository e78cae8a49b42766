"""Parts of studies.depgraph: what one process measures, and where its rows are kept."""

from __future__ import annotations

from pathlib import Path

import torch

from studies.depgraph.models import FAMILIES
from studies.depgraph.ways import Epochs, Row, measure
from studies.rows import read_rows, write_rows

Part = tuple[str, int]  # a family and a seed


def file_of(folder: Path, part: Part) -> Path:
    family, seed = part
    return folder / f"{family}-{seed}.csv"


def measure_part(folder: Path, epochs: Epochs, part: Part) -> Part:
    """Measures one dense model and keeps its rows in the folder."""
    torch.set_num_threads(1)
    write_rows(file_of(folder, part), Row, list(measure(*part, epochs)))
    return part


def stored_rows(folder: Path) -> list[Row]:
    """Returns all that was measured so far, in the order of the families and the seeds."""
    names = [path.stem.rsplit("-", 1) for path in folder.glob("*.csv")]
    order = list(FAMILIES)
    parts = sorted(((family, int(seed)) for family, seed in names), key=lambda part: (order.index(part[0]), part[1]))
    return [row for part in parts for row in read_rows(file_of(folder, part), Row)]
