"""The page: one self-contained HTML file about one cut model, or about several side by side.

It opens from disk and fetches nothing: styles, pictures (SVG), a few lines of script and the figures as JSON lie in it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from isomorphic.files import atomic_write
from isomorphic.measure.complexity import format_macs, format_params
from isomorphic.measure.latency import format_seconds
from isomorphic.page.charts import bar, heads_row, histogram, legend
from isomorphic.page.facts import CutFacts, LayerWidth, StageCost

Figure = tuple[str, str, str, str]  # name, before, after, note


@dataclass(frozen=True)
class Subject:
    """One cut model on a page.

    Attributes:
        title: how the page calls it: its file or its name.
        model: the dense model's name.
        cut: what was cut.
        provenance: of the file, or of the run: command, figures, versions, commit, hardware.
    """

    title: str
    model: str
    cut: CutFacts
    provenance: Mapping[str, Any]


def write_page(path: str | Path, subjects: Sequence[Subject]) -> None:
    """Writes the page of one or several cut models.

    Raises:
        UserError: the file cannot be written.
    """
    text = page(subjects)
    with atomic_write(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


def page(subjects: Sequence[Subject]) -> str:
    """Returns the page as HTML."""
    title = " · ".join(subject.title for subject in subjects)
    sections = [
        _head(subjects),
        _section("Width, layer by layer", _layers(subjects)),
        _section("Isomorphism classes", _classes(subjects)),
        _section("Costs by stage", _stages(subjects)),
        _section("Reconstruction errors", _errors(subjects)),
        _section("What stayed, and why", _stays(subjects)),
        _section("Where it comes from", _origins(subjects)),
    ]
    facts = [{"title": s.title, "model": s.model, "cut": s.cut.to_dict()} for s in subjects]
    data = json.dumps(facts).replace("<", "\\u003c")  # the same text in JSON, and never a tag in HTML
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_resource('page.css')}</style></head>\n<body>\n"
        f'{"".join(sections)}\n<script type="application/json" id="facts">{data}</script>'
        f"<script>{_resource('page.js')}</script>\n</body></html>\n"
    )


def _resource(name: str) -> str:
    return resources.files("isomorphic.page").joinpath(name).read_text(encoding="utf-8")


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>\n" if content else ""


# --- the top: figures ---------------------------------------------------------------------------------------------


def _head(subjects: Sequence[Subject]) -> str:
    if len(subjects) == 1:
        (subject,) = subjects
        asked = _asked(subject)
        return (
            f"<header><h1>{escape(subject.model)}</h1><p class=soft>{escape(subject.title)}</p>"
            f"{f'<p>Asked for: {asked}</p>' if asked else ''}"
            f"<div class=figures>{''.join(map(_tile, _figures(subject)))}</div></header>\n"
        )
    return f"<header><h1>{len(subjects)} models side by side</h1>{_figures_table(subjects)}</header>\n"


def _asked(subject: Subject) -> str:
    """What was asked for, as in "macs 50%, criterion taylor"; empty where nobody knows."""
    return escape(", ".join(f"{name} {_told(value)}" for name, value in subject.cut.asked.items()))


def _told(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{key}={inner}" for key, inner in value.items())
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _figures(subject: Subject) -> Iterator[Figure]:
    """The figures that people ask for first; of accuracies and latencies only what was measured."""
    before, after = subject.cut.before, subject.cut.after
    yield _change("MACs", before["macs_paper"], after["macs_paper"], format_macs, "paper's counter")
    yield _change("MACs", before["macs_exact"], after["macs_exact"], format_macs, "exact counter")
    yield _change("Params", before["params"], after["params"], format_params)
    told = subject.provenance
    if isinstance(told.get("top1"), (int, float)):
        dense = told.get("dense_top1")
        yield "Top-1", f"{dense:.2f}%" if isinstance(dense, (int, float)) else "", f"{told['top1']:.2f}%", ""
    seconds = [stage.seconds for stage in subject.cut.stages]
    if seconds and all(seconds):
        first, last = (sum(pair[side] for pair in seconds if pair) for side in (0, 1))
        yield _change("Time of one image", first, last, format_seconds, "sum of the stages below")
    if isinstance(told.get("latency_ms"), (int, float)):
        batch = f"batch {told.get('latency_batch_size', 1)}"
        yield "Latency", "", format_seconds(told["latency_ms"] / 1e3), batch


def _change(name: str, before: float, after: float, text: Callable[[Any], str], note: str = "") -> Figure:
    share = f"{after / before:.1%} left" if before else ""
    return name, text(before), text(after), ", ".join(filter(None, (share, note)))


def _tile(figure: Figure) -> str:
    name, before, after, note = map(escape, figure)
    change = f"{before} → {after}" if before else after
    return f"<div class=figure><span>{name}</span><b>{change}</b><span>{note}</span></div>"


def _figures_table(subjects: Sequence[Subject]) -> str:
    """Figures of several models, a column each."""
    rows: dict[tuple[str, str], list[str]] = {}
    for number, subject in enumerate(subjects):
        for name, before, after, note in _figures(subject):
            label = name, note.partition(", ")[2]
            cells = rows.setdefault(label, [""] * len(subjects))
            cells[number] = f"{before} → {after}" if before else after
    head = "".join(f"<th>{_key(number)}{escape(subject.title)}</th>" for number, subject in enumerate(subjects))
    body = "".join(
        f"<tr><th>{escape(name)}{f' <small>({escape(note)})</small>' if note else ''}</th>"
        f"{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for (name, note), cells in rows.items()
    )
    models = "".join(f"<td>{escape(subject.model)}</td>" for subject in subjects)
    asked = "".join(f"<td>{_asked(subject)}</td>" for subject in subjects)
    return (
        f"<div class=table><table><tr><th></th>{head}</tr><tr><th>model</th>{models}</tr>{body}"
        f"<tr><th>asked for</th>{asked}</tr></table></div>"
    )


def _key(number: int) -> str:
    return f'<span class="legend"><i class="kept c{number % 4}"></i></span>'


# --- widths along the network ---------------------------------------------------------------------------------------


def _layers(subjects: Sequence[Subject]) -> str:
    rows: dict[str, list[LayerWidth | None]] = {}
    for number, subject in enumerate(subjects):
        for layer in subject.cut.layers:
            rows.setdefault(layer.name, [None] * len(subjects))[number] = layer
    largest = max((layer.before for layers in rows.values() for layer in layers if layer), default=1)
    blocks: dict[str, list[str]] = {}
    for name, layers in rows.items():
        block, layer_name = _block_and_layer(name)
        blocks.setdefault(block, []).append(_layer_row(layer_name, name, layers, largest))
    parts = "".join(
        f"<div class=block>{f'<h3>{escape(block)}</h3>' if block else ''}{''.join(content)}</div>"
        for block, content in blocks.items()
    )
    shares = [subject.cut.prunable for subject in subjects]
    note = f"<p>{shares[0]:.1%} of the width could go.</p>" if len(shares) == 1 and shares[0] is not None else ""
    text = "Channels that each layer makes, in the order of the modules; dots are heads."
    return f"<p class=soft>{text}</p>{note}{legend([s.title for s in subjects])}<div class=blocks>{parts}</div>"


def _block_and_layer(name: str) -> tuple[str, str]:
    """Splits behind the last number: ("blocks.0", "attn.qkv"), ("", "head"); a layer that is a number is no block."""
    path = name.split(".")
    numbers = [place for place, part in enumerate(path[:-1]) if part[-1:].isdigit()]
    end = numbers[-1] + 1 if numbers else len(path) - 1 if path[-1].isdigit() else 0
    return ".".join(path[:end]), ".".join(path[end:])


def _layer_row(shown: str, name: str, layers: Sequence[LayerWidth | None], largest: int) -> str:
    bars, numbers, heads = [], [], []
    for color, layer in enumerate(layers):
        if layer is None:
            continue
        bars.append(bar(layer.before, layer.after, largest, color % 4))
        numbers.append(f"{layer.before} → {layer.after}" if layer.after != layer.before else str(layer.before))
        if layer.heads:
            heads.append(heads_row(layer.heads, layer.kept_heads))
    return (
        f'<div class="layer" data-layer="{escape(name)}"><span>{escape(shown)}</span><span>{"".join(bars)}</span>'
        f'<span class="number">{"<br>".join(numbers)}</span>{"".join(heads)}</div>'
    )


# --- classes --------------------------------------------------------------------------------------------------------


def _classes(subjects: Sequence[Subject]) -> str:
    if not any(subject.cut.classes for subject in subjects):
        return ""
    text = (
        "Units compete inside their class. The scores are those that they were ranked by, after normalisation inside "
        "each group; every axis is logarithmic. Below the line lie as many units as were removed. Where heads lose "
        "equally many dims, or groups shrink together, some units below it stay and others above it go."
    )
    cards = [
        _class_card(subject, number if len(subjects) > 1 else None, place)
        for place in range(max(len(subject.cut.classes) for subject in subjects))
        for number, subject in enumerate(subjects)
    ]
    return f"<p class=soft>{text}</p>{legend([s.title for s in subjects])}<div class=cards>{''.join(cards)}</div>"


def _class_card(subject: Subject, number: int | None, place: int) -> str:
    if place >= len(subject.cut.classes):
        return ""
    scores = subject.cut.classes[place]
    owner = f"{_key(number)}{escape(subject.title)}, " if number is not None else ""
    share = scores.kept / scores.units if scores.units else 1.0
    return (
        f"<figure class=card><h3>{escape(scores.title)}</h3>{histogram(scores, (number or 0) % 4)}"
        f"<figcaption>{owner}{scores.kept} of {scores.units} units kept ({share:.0%})</figcaption></figure>"
    )


# --- costs ----------------------------------------------------------------------------------------------------------


def _stages(subjects: Sequence[Subject]) -> str:
    rows: dict[str, list[StageCost | None]] = {}
    for number, subject in enumerate(subjects):
        for stage in subject.cut.stages:
            rows.setdefault(stage.name, [None] * len(subjects))[number] = stage
    stages = [stage for found in rows.values() for stage in found if stage]
    if not stages:
        return ""
    note = "For one image, before and after."
    kinds: list[tuple[str, Callable[[StageCost], Any], Callable[[Any], str]]] = [
        ("MACs (exact)", lambda stage: stage.macs, format_macs),
        ("params", lambda stage: stage.params, format_params),
    ]
    if any(stage.seconds for stage in stages):
        note += " Times are the fastest of several runs, on the machine that cut the model."
        kinds.append(("time of one image", lambda stage: stage.seconds, format_seconds))
    head = "".join(f"<span class=soft>{name}</span>" for name, _, _ in kinds)
    body = "".join(_stage_row(name, found, stages, kinds) for name, found in rows.items())
    return f"<p class=soft>{note}</p><div class=stage><span></span>{head}</div>{body}"


def _stage_row(
    name: str, found: Sequence[StageCost | None], stages: Sequence[StageCost], kinds: Sequence[tuple[str, Any, Any]]
) -> str:
    cells = []
    for _, pair_of, text in kinds:
        largest = max(max(pair_of(stage) or (0,)) for stage in stages)
        lines = [
            f"{bar(pair[0], pair[1], largest, number % 4)}<span class=number>{_arrow(pair, text)}</span>"
            for number, stage in enumerate(found)
            if stage is not None and (pair := pair_of(stage)) is not None
        ]
        cells.append(f"<span>{'<br>'.join(lines)}</span>")
    return f'<div class="stage" data-stage="{escape(name)}"><span>{escape(name)}</span>{"".join(cells)}</div>'


def _arrow(pair: tuple[float, float], text: Callable[[Any], str]) -> str:
    first, last = (text(value) if value else "0" for value in pair)
    return f"{first} → {last}"


def _errors(subjects: Sequence[Subject]) -> str:
    tables = []
    for subject in subjects:
        errors = subject.cut.errors
        if errors:
            largest = max(before for before, _ in errors.values())
            rows = "".join(
                f'<div class="layer"><span>{escape(name)}</span><span>{bar(before, after, largest)}</span>'
                f'<span class="number">{before:.3f} → {after:.3f}</span></div>'
                for name, (before, after) in errors.items()
            )
            title = f"<h3>{escape(subject.title)}</h3>" if len(subjects) > 1 else ""
            tables.append(f"{title}<div class=blocks>{rows}</div>")
    if not tables:
        return ""
    text = "Relative error of what the layers that read a group make, on calibration images, before and after."
    return f"<p class=soft>{text}</p>{''.join(tables)}"


# --- the end --------------------------------------------------------------------------------------------------------


def _stays(subjects: Sequence[Subject]) -> str:
    parts = []
    for subject in subjects:
        rows = "".join(
            f"<tr><td class=number>{'' if stay.share is None else f'{stay.share:.1%}'}</td>"
            f"<td class=wide>{escape(stay.layers)}</td><td class=wide>{escape(stay.reason)}"
            f"{f'<br><span class=soft>{escape(stay.where)}</span>' if stay.where else ''}</td></tr>"
            for stay in subject.cut.stays
        )
        if rows:
            title = f"<h3>{escape(subject.title)}</h3>" if len(subjects) > 1 else ""
            parts.append(
                f"{title}<table><tr><th class=number>width</th><th>layers</th><th>reason</th></tr>{rows}</table>"
            )
    return "".join(parts)


def _origins(subjects: Iterable[Subject]) -> str:
    return "".join(_origin(number, subject) for number, subject in enumerate(subjects))


def _origin(number: int, subject: Subject) -> str:
    told = subject.provenance
    commands = list(dict.fromkeys(filter(None, (subject.cut.command, str(told.get("command") or "")))))
    boxes = "".join(
        f'<pre id="command-{number}-{place}">{escape(command)}</pre>'
        f'<p><button data-copy="command-{number}-{place}">copy</button></p>'
        for place, command in enumerate(commands)
    )
    versions, hardware = (_mapping(told.get(key)) for key in ("versions", "hardware"))
    rows = {
        "file": subject.title,
        "commit": told.get("commit"),
        "parent": told.get("parent") and f"SHA-256 {told['parent']}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "hardware": _hardware(hardware),
    }
    table = "".join(
        f"<tr><th>{name}</th><td class=wide>{escape(str(value))}</td></tr>" for name, value in rows.items() if value
    )
    return f"{boxes}<table>{table}</table>"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _hardware(hardware: Mapping[str, Any]) -> str:
    parts = [hardware.get("cpu"), hardware.get("cores") and f"{hardware['cores']} cores"]
    parts.append(hardware.get("memory_gib") and f"{hardware['memory_gib']} GiB")
    gpus = hardware.get("gpus")
    parts += gpus if isinstance(gpus, list) else []
    return ", ".join(str(part) for part in parts if part)
