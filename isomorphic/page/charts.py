"""The pictures of a page: bars, rows of heads and histograms, as HTML and SVG without any library."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from isomorphic.page.facts import BINS, ScoreHistogram

# Size of a histogram in its own units, which are about pixels, and of the margins of its axes.
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 300, 120, 42, 22, 14
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def bar(before: float, after: float, largest: float, color: int = 0) -> str:
    """A bar of the length `before`, of which `after` is filled, on an axis that ends at `largest`.

    With 768 → 384 of at most 3072: a quarter of the axis, half of it filled.
    """
    lengths = [100 * min(value / largest, 1) if largest else 0 for value in (before, after)]
    return (
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="gone" width="{lengths[0]:.2f}" height="10"/>'
        f'<rect class="kept c{color}" width="{lengths[1]:.2f}" height="10"/></svg>'
    )


def heads_row(heads: int, kept: Iterable[int]) -> str:
    """A row of dots, one a head, filled where it is kept."""
    filled = set(kept)
    dots = "".join(f'<i class="{"on" if head in filled else "off"}"></i>' for head in range(heads))
    return f'<span class="heads" role="img" aria-label="{len(filled)} of {heads} heads kept">{dots}</span>'


def histogram(scores: ScoreHistogram, color: int = 0) -> str:
    """The scores of a class on a logarithmic axis: removed units below kept ones, and a line where the cut fell."""
    tallest = max(map(sum, zip(scores.kept_bins, scores.removed_bins, strict=True)))
    tallest = max(tallest, 1)
    room, step = HEIGHT - BOTTOM - TOP, (WIDTH - LEFT) / BINS
    parts = []
    for number, (kept, removed) in enumerate(zip(scores.kept_bins, scores.removed_bins, strict=True)):
        x, base = LEFT + number * step, float(HEIGHT - BOTTOM)
        for units, kind in ((removed, "gone"), (kept, f"kept c{color}")):
            if units:
                tall = units / tallest * room
                base -= tall
                parts.append(
                    f'<rect class="{kind}" x="{x:.1f}" y="{base:.1f}" width="{step:.1f}" height="{tall:.1f}"/>'
                )
    return (
        f'<svg class="histogram" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(_told(scores))}">'
        f"{''.join(parts)}{_axes(scores, tallest)}{_cut_line(scores)}</svg>"
    )


def _told(scores: ScoreHistogram) -> str:
    return f"scores of {scores.units} units, of which {scores.kept} are kept"


def _axes(scores: ScoreHistogram, tallest: int) -> str:
    floor = HEIGHT - BOTTOM
    lines = [
        f'<path class="axis" d="M{LEFT} {TOP}V{floor}H{WIDTH}"/>',
        f'<text x="{LEFT - 4}" y="{TOP + 8}" text-anchor="end">{tallest}</text>',
        f'<text x="{LEFT - 4}" y="{floor}" text-anchor="end">0</text>',
    ]
    for value, label in _ticks(scores.low, scores.high):
        x = _x(scores, value)
        anchor = "start" if x < LEFT + 12 else "end" if x > WIDTH - 12 else "middle"
        lines.append(f'<path class="axis" d="M{x:.1f} {floor}v4"/>')
        lines.append(f'<text x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{label}</text>')
    return "".join(lines)


def _cut_line(scores: ScoreHistogram) -> str:
    if scores.cut is None:
        return ""
    x = _x(scores, min(max(scores.cut, scores.low), scores.high))
    # The word stands on the side where there is more room for it.
    side, anchor = (4, "start") if x < (LEFT + WIDTH) / 2 else (-4, "end")
    return (
        f'<path class="cut" d="M{x:.1f} {TOP - 4}V{HEIGHT - BOTTOM}"/>'
        f'<text class="cut" x="{x + side:.1f}" y="{TOP - 2}" text-anchor="{anchor}">cut</text>'
    )


def _x(scores: ScoreHistogram, logarithm: float) -> float:
    return LEFT + (logarithm - scores.low) / (scores.high - scores.low) * (WIDTH - LEFT)


def _ticks(low: float, high: float, most: int = 5) -> list[tuple[float, str]]:
    """Places and labels on a logarithmic axis: whole decades where two are in sight, else round numbers.

    Scores from 0.86 to 1.16 get 0.9, 1 and 1.1.
    """
    decades = list(range(math.ceil(low), math.floor(high) + 1))
    if len(decades) >= 2:
        every = math.ceil(len(decades) / most)
        return [(float(decade), _power(decade)) for decade in decades[::every]]
    start, end = 10**low, 10**high
    coarse = 10 ** math.floor(math.log10(end - start))
    step = next(part * coarse for part in (0.5, 0.2, 0.1) if (end - start) / (part * coarse) >= 2)
    numbers = range(math.ceil(start / step), math.floor(end / step) + 1)
    every = math.ceil(len(numbers) / most)
    return [(math.log10(number * step), f"{number * step:.4g}") for number in numbers[::every] if number > 0]


def _power(decade: int) -> str:
    """1, 10, or a power of ten."""
    return {0: "1", 1: "10"}.get(decade, "10" + str(decade).translate(SUPERSCRIPTS))


def legend(labels: Sequence[str]) -> str:
    """What the colors mean: of one model kept and removed; of several, each model's color."""
    if len(labels) == 1:
        return '<p class="legend"><i class="kept c0"></i>kept <i class="gone"></i>removed</p>'
    items = "".join(f'<i class="kept c{number % 4}"></i>{escape(label)} ' for number, label in enumerate(labels))
    return f'<p class="legend">{items}<i class="gone"></i>removed</p>'
