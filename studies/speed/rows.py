"""What is measured of scripts' models: all rows in a file, and a page about them beside it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from isomorphic.files import atomic_write, check_writable
from studies.rows import Row, write_rows
from studies.speed.script_flags import find_pruning_script


def measure_scripts(
    names: Sequence[str],
    kind: Any,
    measure: Callable[[Path, Path], Sequence[Row]],
    page: Callable[[Sequence[Row]], list[str]],
    path: Path,
) -> None:
    """Measures the model of each pruning script; writes all rows to `path`, and a page of them beside it, as .md.

    Args:
        names: of scripts in scripts/pruning, or their paths.
        kind: of the rows.
        measure: (script, folder for its checkpoints) -> rows.
        page: rows -> lines of text.
        path: of the rows.

    Raises:
        UserError: no such script, it cannot be measured, or a file cannot be written.
    """
    for target in (path, path.with_suffix(".md")):
        check_writable(target)
    files = [find_pruning_script(name) for name in names]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for file in files:
            rows += measure(file, Path(folder))
    write_rows(path, kind, rows)
    with atomic_write(path.with_suffix(".md")) as temporary:
        temporary.write_text("\n".join(page(rows)) + "\n", encoding="utf-8")
    print(f"Saving the rows to {path}, and a table of them to {path.with_suffix('.md')}")
