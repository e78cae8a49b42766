"""What the rows of studies.depgraph say: a table a family, and differences of ways on the same dense models."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from studies.depgraph.ways import SPEEDUPS, WAYS, Row

REFERENCE = "isomorphic taylor"  # what ways are held against, seed by seed
PLAIN = "l1, first layer"


def page(rows: Sequence[Row]) -> Iterator[str]:
    """Yields all tables, as Markdown."""
    for family in dict.fromkeys(row.family for row in rows):
        mine = [row for row in rows if row.family == family]
        yield from ("", f"## {family}", "", *family_table(mine), "", *difference_table(mine), "", *findings(mine))


def mean_and_error(values: Sequence[float]) -> str:
    """As "93.06 ± 0.40", with the standard error of the mean; one value has none."""
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values) / len(values) ** 0.5:.2f}"


def family_table(rows: Sequence[Row]) -> list[str]:
    """Top-1 before the cut, just pruned and finetuned, at every speed-up."""
    head = [f"{speedup}× {when}" for speedup in SPEEDUPS for when in ("pruned", "finetuned")]
    lines = [_cells("way", "recover", "seeds", "weak half", "before", *head), _cells(*["---"] * (5 + len(head)))]
    for name in ("dense", "trained on"):
        whole = [row for row in rows if row.way == name]
        start = mean_and_error([row.start for row in whole])
        lines.append(_cells(name, "", str(len(whole)), _share(whole), start, *[""] * len(head)))
    for name, recover in _ways(rows):
        mine = [row for row in rows if (row.way, row.recover) == (name, recover)]
        cells = []
        for speedup in SPEEDUPS:
            here = [row for row in mine if row.speedup == speedup]
            cells.append(mean_and_error([row.pruned for row in here]))
            cells.append(mean_and_error([row.finetuned for row in here if row.finetuned is not None]))
        seeds = len({row.seed for row in mine})
        start = mean_and_error([row.start for row in mine if row.speedup == SPEEDUPS[0]])
        lines.append(_cells(name, recover or "–", str(seeds), _share(mine), start, *cells))
    return lines


def difference_table(rows: Sequence[Row]) -> list[str]:
    """Finetuned top-1 of each way less that of `REFERENCE`, on the same dense model with the same recovery."""
    lines = [f"Finetuned, less {REFERENCE} on the same dense models:", ""]
    lines += [_cells("way", "recover", *[f"{speedup}×" for speedup in SPEEDUPS]), _cells(*["---"] * 5)]
    known = {(row.seed, row.way, row.recover, row.speedup): row.finetuned for row in rows}
    for name, recover in _ways(rows):
        if name == REFERENCE:
            continue
        cells = []
        for speedup in SPEEDUPS:
            pairs = [
                (known[seed, name, recover, speedup], known.get((seed, REFERENCE, recover, speedup)))
                for seed in sorted({row.seed for row in rows})
                if (seed, name, recover, speedup) in known
            ]
            found = [mine - other for mine, other in pairs if mine is not None and other is not None]
            cells.append(mean_and_error(found))
        lines.append(_cells(name, recover or "–", *cells))
    return lines


def findings(rows: Sequence[Row]) -> Iterator[str]:
    """Yields what each sparse phase saves of what plain magnitude pruning loses just after the cut."""
    for way in WAYS:
        if not way.sparsify or not any(row.way == way.name for row in rows):
            continue
        for speedup in SPEEDUPS:
            plain, sparse = _loss(rows, PLAIN, "", speedup), _loss(rows, way.name, "", speedup)
            both = _loss(rows, way.name, "compensate", speedup)
            if plain is None or sparse is None or both is None or plain < 1:
                continue
            yield (
                f"- {way.name}, {speedup}×: just pruned it loses {sparse:.1f} points where {PLAIN} loses {plain:.1f} "
                f"({sparse / plain:.0%}), with compensation {both:.1f}"
            )


def _loss(rows: Sequence[Row], way: str, recover: str, speedup: int) -> float | None:
    """Mean of what a cut costs before finetuning, in points of top-1."""
    lost = [row.start - row.pruned for row in rows if (row.way, row.recover, row.speedup) == (way, recover, speedup)]
    return statistics.fmean(lost) if lost else None


def _ways(rows: Sequence[Row]) -> list[tuple[str, str]]:
    found = {(row.way, row.recover) for row in rows}
    return [(way.name, recover) for way in WAYS for recover in ("", "compensate") if (way.name, recover) in found]


def _share(rows: Sequence[Row]) -> str:
    return f"{statistics.fmean(row.weak_half for row in rows):.3f}" if rows else "–"


def _cells(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
