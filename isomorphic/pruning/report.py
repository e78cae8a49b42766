"""What a person sees of a pruning run: the table of isomorphism classes and the picture of their scores."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from isomorphic.files import atomic_write
from isomorphic.pruning.classify import classify
from isomorphic.pruning.groups import ChannelGraph, CoupledGroup, short_name
from isomorphic.pruning.plan import PruningPlan
from isomorphic.pruning.widths import WidthShares


@dataclass(frozen=True)
class ClassSummary:
    """One isomorphism class: its groups, all of its scores in one tensor (units,), and the units it keeps."""

    number: int
    groups: tuple[CoupledGroup, ...]
    scores: Tensor
    kept: int

    @property
    def title(self) -> str:
        """Number and first group, as in "2: blocks.0.mlp.fc1 (12 groups)"."""
        return f"{self.number}: {name_groups(self.groups)}"


def name_groups(groups: Sequence[CoupledGroup]) -> str:
    """First group and their number, as in "blocks.0.mlp.fc1 (12 groups)"."""
    first, count = short_name(groups[0].name), len(groups)
    return f"{first} ({count} {'group' if count == 1 else 'groups'})"


def summarize_classes(
    groups: Sequence[CoupledGroup], classes: Mapping[str, int], scores: Mapping[str, Tensor], plan: PruningPlan
) -> list[ClassSummary]:
    """The classes in their order, with scores (n,) as given by group name."""
    by_class: dict[int, list[CoupledGroup]] = {}
    for group in groups:
        by_class.setdefault(classes[group.name], []).append(group)
    return [
        ClassSummary(
            number,
            tuple(members),
            torch.cat([scores[group.name] for group in members]),
            sum(len(plan.kept[group.name]) for group in members),
        )
        for number, members in sorted(by_class.items())
    ]


@dataclass(frozen=True)
class TracedGraph(ChannelGraph):
    """A graph with its isomorphism classes, which prints as a table: `print(graph)`.

    Attributes:
        classes: class number by group name.
        widths: how much of the model's width is in groups; None where nobody counted.
    """

    classes: Mapping[str, int] = field(default_factory=dict)
    widths: WidthShares | None = None

    def __str__(self) -> str:
        return "\n".join(graph_lines(self))


def classified(graph: ChannelGraph, *, detailed: bool = False, widths: WidthShares | None = None) -> TracedGraph:
    """Returns the graph with its isomorphism classes, as the paper tells them apart, or `detailed` (see `classify`)."""
    return TracedGraph(**vars(graph), classes=classify(graph.groups, detailed=detailed), widths=widths)


def graph_lines(graph: TracedGraph) -> list[str]:
    """Returns what a person reads of a graph, line by line.

    class  first group          groups  layers  units
        0  patch_embed.proj          1      26    192
        1  blocks.0.attn.qkv        12       2   2304  (36 heads)
        2  blocks.0.mlp.fc1         12       2   9216
    Kept: head (it reaches the model's output), 8.0% of the width
    Width: 11712 of 12712 channels can go (92.1%)

    Reasons come by the share of the width that stays for them, the largest first. Behind a reason stands the line of
    forward code where it was found, if there is one.
    """
    by_class: dict[int, list[CoupledGroup]] = {}
    for group in graph.groups:
        by_class.setdefault(graph.classes[group.name], []).append(group)
    rows: list[tuple[str, ...]] = [("class", "first group", "groups", "layers", "units", "")]
    leaders = {groups[0].name for groups in graph.head_sets}  # a head counts once, wherever it has sections
    for number, groups in sorted(by_class.items()):
        heads = sum(group.num_sections for group in groups if group.name in leaders)
        units = sum(group.num_units for group in groups)
        counts = (str(len(groups)), str(len(groups[0].nodes)), str(units), f"({heads} heads)" if heads else "")
        rows.append((str(number), short_name(groups[0].name), *counts))
    return [*_table(rows), *_frozen_lines(graph, heads_wanted=False, widths=graph.widths), *_width_lines(graph.widths)]


def class_table(summaries: Sequence[ClassSummary], plan: PruningPlan) -> str:
    """The classes as text, one line each, with a second line for the heads of attention classes.

    Below it stands which classes have nothing but zeros for scores, as behind zero-initialised residual scales.
    """
    rows: list[tuple[str, ...]] = [("class", "first group", "groups", "layers", "units", "mean", "min", "max", "kept")]
    for summary in summaries:
        rows.extend(_class_rows(summary, plan))
    lines = _table(rows)
    if zeros := [str(summary.number) for summary in summaries if not summary.scores.any()]:
        lines.append(
            f"All scores are zero in class {', '.join(zeros)}: its groups lose equal shares, in order of position"
        )
    return "\n".join(lines)


def plan_lines(
    graph: ChannelGraph, plan: PruningPlan, *, heads_wanted: bool = False, spared: Collection[str] = ()
) -> list[str]:
    """Returns what the table leaves open: what stays and why, kept blocks, heads by stage, ratios searched for.

        Kept: stem, head and 24 more (it reaches the model's output)
        Not traced: cond (if your data take that branch, give inputs that take it, too)
        Spared: blocks.0.attn.qkv, blocks.0.mlp.fc1 (to be ignored)
        Blocks of stages.2.blocks: 9 stay (0 1 4 …)
        Heads of layers.0.blocks: 4 4 => 3 4
        Ratio of blocks.0.mlp.fc1 (12 groups): 0.62

    Args:
        graph: of the model.
        plan: for it.
        heads_wanted: heads were to go; there is a line if none can.
        spared: names of groups that stay because they were to be ignored.
    """
    stays = [short_name(group.name) for group in graph.groups if group.name in spared]
    blocks = plan.kept_blocks.items()
    return [
        *_frozen_lines(graph, heads_wanted),
        *([f"Spared: {listed(stays)} (to be ignored)"] if stays else []),
        *(f"Blocks of {name}: {len(kept)} stay ({' '.join(map(str, kept))})" for name, kept in blocks),
        *_head_lines(graph, plan),
        *(f"Ratio of {pool}: {ratio:.2f}" for pool, ratio in plan.ratios.items()),
    ]


class Stays(NamedTuple):
    """Layers that stay for one reason: their names as a list, the line of forward code, their share of the width."""

    layers: str
    reason: str
    where: str
    share: float | None


def stays_by_reason(graph: ChannelGraph, widths: WidthShares | None = None) -> list[Stays]:
    """Returns what stays of a graph, the reason with the largest share of the width first.

    Args:
        graph: of the model.
        widths: of the model; without them nobody knows the shares, and the order is the graph's.
    """
    names: dict[str, list[str]] = {}
    for name, frozen in graph.frozen.items():
        names.setdefault(frozen.reason, []).append(f"{short_name(name)} {frozen.part}".rstrip())
    shares = widths.frozen if widths else {}
    where = {frozen.reason: frozen.where for frozen in reversed([*graph.frozen.values()]) if frozen.where}
    reasons = sorted(names, key=lambda reason: -shares.get(reason, 0.0))
    return [Stays(listed(names[reason]), reason, where.get(reason, ""), shares.get(reason)) for reason in reasons]


def unused_layers(graph: ChannelGraph) -> list[str]:
    """Returns the layers that the traced inputs do not use, by name, and other parameters, "embeddings.mask_token"."""
    return list(dict.fromkeys(name.removesuffix(".weight").removesuffix(".bias") for name in graph.unused))


def _frozen_lines(graph: ChannelGraph, heads_wanted: bool, widths: WidthShares | None = None) -> list[str]:
    lines = []
    for stays in stays_by_reason(graph, widths):
        share = f", {stays.share:.1%} of the width" if stays.share is not None else ""
        where = f", {stays.where}" if widths and stays.where else ""
        lines.append(f"Kept: {stays.layers} ({stays.reason}{where}){share}")
    if layers := unused_layers(graph):
        lines.append(f"Not traced: {listed(layers)} (if your data take that branch, give inputs that take it, too)")
    return [*lines, *_frozen_head_lines(graph, heads_wanted)]


def _frozen_head_lines(graph: ChannelGraph, heads_wanted: bool) -> list[str]:
    """Which heads stay, and why: of the layers that could lose none, and of those that could."""
    names: dict[str, list[str]] = {}
    for name, reason in graph.frozen_heads.items():
        where = graph.frozen_head_lines.get(name)
        names.setdefault(f"{reason}, {where}" if where else reason, []).append(short_name(name))
    lines = [f"Kept: heads of {listed(found)} ({reason})" for reason, found in names.items()]
    return lines or (["There are no heads to prune"] if heads_wanted and not graph.attention else [])


def _width_lines(widths: WidthShares | None) -> list[str]:
    if widths is None:
        return []
    can_go = round(widths.prunable * widths.width)
    return [f"Width: {can_go} of {widths.width} channels can go ({widths.prunable:.1%})"]


def _head_lines(graph: ChannelGraph, plan: PruningPlan) -> list[str]:
    """The heads of every stage that loses any."""
    stages: dict[str, list[CoupledGroup]] = {}
    for first, *_ in graph.head_sets:
        stages.setdefault(_stage(first), []).append(first)
    lines = []
    for stage, groups in stages.items():
        before = [group.num_sections for group in groups]
        after = [len(plan.kept_heads(group)) for group in groups]
        if after != before:
            lines.append(f"Heads of {stage}: {' '.join(map(str, before))} => {' '.join(map(str, after))}")
    return lines


def _stage(group: CoupledGroup) -> str:
    """The name of the list that the group's block is in: "layers.0.blocks" of "layers.0.blocks.1.attn.qkv.weight:0"."""
    path = group.name.rpartition(":")[0].split(".")
    last = max((position for position, part in enumerate(path) if part[-1:].isdigit()), default=len(path))
    return ".".join(path[:last])


def listed(names: Sequence[str], shown: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def draw_scores(path: str | Path, summaries: Sequence[ClassSummary], *, title: str) -> None:
    """Draws each class's score distribution, on one logarithmic axis, as a PNG.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # a second of import time that only this picture needs

    figure = Figure(figsize=(8, 0.9 + 0.75 * len(summaries)), layout="constrained")
    rows = figure.subplots(len(summaries), 1, sharex=True, squeeze=False)[:, 0]
    low, high = _positive_range(torch.cat([summary.scores for summary in summaries]))
    bins = torch.logspace(low, high, 61).tolist()
    for position, (axes, summary) in enumerate(zip(rows, summaries, strict=True)):
        axes.hist(summary.scores.clamp_min(10**low).tolist(), bins=bins, color=f"C{position % 10}", alpha=0.85)
        axes.set_xscale("log")
        axes.set_yticks([])
        axes.spines[["left", "top", "right"]].set_visible(False)
        share = summary.kept / len(summary.scores)
        axes.set_title(f"{summary.title}: {len(summary.scores)} units, {share:.0%} kept", loc="left", fontsize=9)
    rows[-1].set_xlabel("score of a unit, before normalisation")
    figure.suptitle(title, fontsize=10)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _class_rows(summary: ClassSummary, plan: PruningPlan) -> Iterator[tuple[str, ...]]:
    first, scores = summary.groups[0], summary.scores
    statistics = tuple(f"{value:.3g}" for value in (scores.mean(), scores.min(), scores.max()))
    yield (
        str(summary.number),
        short_name(first.name),
        str(len(summary.groups)),
        str(len(first.nodes)),
        str(len(scores)),
        *statistics,
        f"{summary.kept / len(scores):.1%}",
    )
    attention = [group for group in summary.groups if group.head_set == group.name]  # a head counts once
    if attention:
        heads = sum(group.num_sections for group in attention)
        kept = sum(len(plan.kept_heads(group)) for group in attention)
        yield ("", "  heads", str(len(attention)), "", str(heads), "", "", "", f"{kept / heads:.1%}")


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(_aligned(row, widths)).rstrip() for row in rows]


def _aligned(row: tuple[str, ...], widths: Sequence[int]) -> Iterator[str]:
    for column, (text, width) in enumerate(zip(row, widths, strict=True)):
        yield text.ljust(width) if column == 1 else text.rjust(width)


def _positive_range(scores: Tensor) -> tuple[float, float]:
    """Decades that hold all positive scores; zeros are drawn at the lower end."""
    positive = scores[scores > 0]
    if not len(positive):
        return -1.0, 0.0
    low, high = float(positive.min().log10()), float(positive.max().log10())
    return (low, high) if high > low else (low - 0.5, low + 0.5)
