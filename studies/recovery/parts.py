"""Parts of studies.recovery: what one process measures, and where its rows are kept."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from studies.recovery.models import FAMILIES
from studies.recovery.rows import measure
from studies.recovery.tables import TITLES, RecoveryRow
from studies.rows import read_rows, write_rows


class Part(NamedTuple):
    """What one process measures: a table of one dense model."""

    table: str
    family: str
    seed: int

    def file(self, folder: Path) -> Path:
        return folder / "rows" / f"{self.table}-{self.family}-{self.seed}.csv"


def measure_part(folder: Path, part: Part) -> Part:
    """Measures one part and keeps its rows in the folder."""
    write_rows(part.file(folder), RecoveryRow, measure(folder, *part))
    return part


def stored_rows(folder: Path) -> list[RecoveryRow]:
    """All that was measured so far, in the order of the tables, the families and the seeds."""
    names = [path.stem.split("-") for path in (folder / "rows").glob("*.csv")]
    parts = [Part(table, family, int(seed)) for table, family, seed in names]
    tables, families = list(TITLES), list(FAMILIES)
    parts.sort(key=lambda part: (tables.index(part.table), families.index(part.family), part.seed))
    return [row for part in parts for row in read_rows(part.file(folder), RecoveryRow)]
