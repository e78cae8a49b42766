"""What a page shows of a cut, as plain data that a checkpoint stores under "cut" in its provenance.

Names are those of the dense model. A model that lost the second of its three blocks has them as 0 and 1; here they are
0 and 2, and block 1 has a width of 0 after the cut.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from isomorphic.models import ModelSpec
from isomorphic.page.inventory import Inventory
from isomorphic.pruning.groups import CoupledGroup
from isomorphic.pruning.plan import PruningPlan
from isomorphic.pruning.planning import PlannedPruning
from isomorphic.pruning.report import TracedGraph, name_groups, stays_by_reason

BINS = 40
OPEN_ABOVE = 2 / 3  # of all MACs: what holds more is shown by what is in it, as are the blocks of a ViT
REST = "the rest"
CUT = "cut"  # where the provenance of a checkpoint holds the facts


@dataclass(frozen=True)
class LayerWidth:
    """Channels that a layer makes, before and after; of attention also its heads, and which are left."""

    name: str
    before: int
    after: int
    heads: int = 0
    kept_heads: tuple[int, ...] = ()


@dataclass(frozen=True)
class StageCost:
    """Costs of a part of the model for one image, each before and after: exact MACs, params, seconds if measured."""

    name: str
    macs: tuple[int, int]
    params: tuple[int, int]
    seconds: tuple[float, float] | None = None


@dataclass(frozen=True)
class ScoreHistogram:
    """The scores that the units of an isomorphism class were ranked by.

    Attributes:
        title: number and first group, as in "2: blocks.0.mlp.fc1 (12 groups)".
        units, kept: of all groups of the class.
        low, high: decadic logarithms of the axis's ends.
        kept_bins, removed_bins: units in each of `BINS` equal parts of the axis; zeros are in the first.
        cut: decadic logarithm of the score below which as many units lie as were removed; None where none or all were.
    """

    title: str
    units: int
    kept: int
    low: float
    high: float
    kept_bins: tuple[int, ...]
    removed_bins: tuple[int, ...]
    cut: float | None


@dataclass(frozen=True)
class Stay:
    """Layers that kept their width for one reason: names as a list, the line of code, their share of the width."""

    layers: str
    reason: str
    where: str = ""
    share: float | None = None


@dataclass(frozen=True)
class CutFacts:
    """All of that, of one cut.

    Attributes:
        before: MACs and params of the dense model, as fields of `Complexity`.
        after: the same of the cut model.
        layers, stages, classes, stays: see there.
        prunable: share of the width that could go, in [0, 1]; None where nobody counted.
        errors: relative reconstruction error before and after compensation, by group.
        asked: what the user wanted, such as {"macs": "50%"}.
        command: what was typed, in files of a model that was trained further; else the file's own command says so.
    """

    before: Mapping[str, int]
    after: Mapping[str, int]
    layers: tuple[LayerWidth, ...]
    stages: tuple[StageCost, ...]
    classes: tuple[ScoreHistogram, ...] = ()
    stays: tuple[Stay, ...] = ()
    prunable: float | None = None
    errors: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    asked: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> CutFacts:
        """Returns what `to_dict` stored, also if JSON turned its tuples into lists.

        Raises:
            KeyError, TypeError, ValueError: `stored` is something else.
        """
        return cls(
            _complexity(stored["before"]),
            _complexity(stored["after"]),
            tuple(_layer(**layer) for layer in stored["layers"]),
            tuple(_stage(**stage) for stage in stored["stages"]),
            tuple(_histogram(**histogram) for histogram in stored["classes"]),
            tuple(_stay(**stay) for stay in stored["stays"]),
            None if stored["prunable"] is None else float(stored["prunable"]),
            {str(name): _finite_pair(*pair) for name, pair in stored["errors"].items()},
            dict(stored["asked"]),
            str(stored["command"]),
        )


def gather_facts(
    before: Inventory,
    after: Inventory,
    planned: PlannedPruning,
    *,
    errors: Mapping[str, tuple[float, float]] | None = None,
    asked: Mapping[str, Any] | None = None,
) -> CutFacts:
    """Puts together what a page shows.

    Args:
        before, after: of the dense and of the cut model.
        planned: the plan that was applied, with its graph and, if anything was scored, its scores.
        errors, asked: see `CutFacts`.
    """
    dense_name = ModelSpec("none", "", kept_blocks=dict(planned.kept_blocks)).dense_name
    widths = planned.graph.widths if isinstance(planned.graph, TracedGraph) else None
    return CutFacts(
        before.complexity.figures(),
        after.complexity.figures(),
        tuple(_layers(before.widths, _renamed(after.widths, dense_name), planned, dense_name)),
        tuple(_stages(before, after, dense_name)),
        tuple(_histograms(planned)),
        tuple(Stay(*stays) for stays in stays_by_reason(planned.graph, widths)),
        widths.prunable if widths else None,
        dict(errors or {}),
        dict(asked or {}),
    )


def _renamed(by_name: Mapping[str, Any], dense_name: Callable[[str], str]) -> dict[str, Any]:
    return {dense_name(name): value for name, value in by_name.items()}


def _layers(
    before: Mapping[str, int], after: Mapping[str, int], plan: PlannedPruning, dense_name: Callable[[str], str]
) -> Iterator[LayerWidth]:
    heads = {dense_name(group.name.partition(":")[0]): group for group in plan.graph.attention}
    for name, width in before.items():
        group = heads.get(name)
        total, kept = (group.num_sections, tuple(plan.kept_heads(group))) if group else (0, ())
        yield LayerWidth(name.removesuffix(".weight"), width, after.get(name, 0), total, kept)


def _stages(before: Inventory, after: Inventory, dense_name: Callable[[str], str]) -> Iterator[StageCost]:
    names = _stage_names(before)
    macs, params, seconds = (_renamed(costs, dense_name) for costs in (after.macs, after.params, after.seconds))
    timed = bool(before.seconds and after.seconds)
    for name in names:
        yield StageCost(
            name,
            (before.macs[name], macs.get(name, 0)),
            (before.params[name], params.get(name, 0)),
            (_inside(before.seconds, name), _inside(seconds, name)) if timed else None,
        )
    yield StageCost(
        REST,
        (_left(before.complexity.macs_exact, before.macs, names), _left(after.complexity.macs_exact, macs, names)),
        (_left(before.complexity.params, before.params, names), _left(after.complexity.params, params, names)),
        (_time_left(before.seconds, names), _time_left(seconds, names)) if timed else None,
    )


def _stage_names(model: Inventory) -> list[str]:
    """The parts that a model falls into: its children, but what has most of the MACs is shown by its own children.

    Of a ViT whose `blocks` have 97%: patch_embed, blocks.0, …, blocks.11, norm, head. Of a ResNet: conv1, layer1 to
    layer4, fc. Parts without MACs and params are left out.
    """
    names = list(model.children[""])
    total = max(model.complexity.macs_exact, 1)
    while large := [name for name in names if model.macs[name] > OPEN_ABOVE * total and model.children[name]]:
        position = names.index(large[0])
        names[position : position + 1] = model.children[large[0]]
    return [name for name in names if model.macs[name] or model.params[name]]


def _left(total: int, by_name: Mapping[str, int], names: Sequence[str]) -> int:
    """What is in none of the parts; nothing where parts share parameters, which count in both."""
    return max(total - sum(by_name.get(name, 0) for name in names), 0)


def _inside(seconds: Mapping[str, float], name: str) -> float:
    """A module's seconds; of one that is never called, such as a list of blocks, those of what is called in it."""
    if name in seconds:
        return seconds[name]
    inside = [other for other in seconds if other.startswith(f"{name}.")]
    outermost = [other for other in inside if not any(other.startswith(f"{above}.") for above in inside)]
    return sum(seconds[other] for other in outermost)


def _time_left(seconds: Mapping[str, float], names: Sequence[str]) -> float:
    return max(seconds.get("", 0.0) - sum(_inside(seconds, name) for name in names), 0.0)


def _histograms(planned: PlannedPruning) -> Iterator[ScoreHistogram]:
    if not planned.normalized:
        return
    for summary in planned.summaries():
        scores = torch.cat([planned.normalized[group.name] for group in summary.groups]).double().cpu()
        kept = torch.cat([_is_kept(group, planned) for group in summary.groups])
        yield _histogram_of(f"{summary.number}: {name_groups(summary.groups)}", scores, kept)


def _is_kept(group: CoupledGroup, plan: PruningPlan) -> Tensor:
    kept = torch.zeros(group.num_units, dtype=torch.bool)
    kept[list(plan.kept[group.name])] = True
    return kept


def _histogram_of(title: str, scores: Tensor, kept: Tensor) -> ScoreHistogram:
    """The histogram of scores (n,), of which `kept` (n,) says which stay."""
    low, high = _decades(scores)
    places = scores.clamp(10**low, 10**high).log10().sub(low).div(high - low).mul(BINS).long().clamp(0, BINS - 1)
    removed = int((~kept).sum())
    cut = None
    if 0 < removed < len(scores):
        below, above = scores.sort().values[removed - 1 : removed + 1].clamp_min(10**low).log10().tolist()
        cut = (below + above) / 2
    bins = [tuple(places[part].bincount(minlength=BINS).tolist()) for part in (kept, ~kept)]
    return ScoreHistogram(title, len(scores), len(scores) - removed, low, high, bins[0], bins[1], cut)


def _decades(scores: Tensor) -> tuple[float, float]:
    """Logarithms between which all positive scores lie, but no more than six decades below the largest."""
    positive = scores[(scores > 0) & scores.isfinite()]
    if not len(positive):
        return -1.0, 0.0
    high = float(positive.max().log10())
    low = max(float(positive.min().log10()), high - 6)
    return (low, high) if high - low > 1e-3 else (low - 0.5, high + 0.5)


# --- stored facts come from files, so that they are held against what they should be --------------------------------


def _complexity(stored: Mapping[str, Any]) -> dict[str, int]:
    return {name: int(stored[name]) for name in ("macs_paper", "macs_exact", "params")}


def _layer(name: Any, before: Any, after: Any, heads: Any, kept_heads: Any) -> LayerWidth:
    return LayerWidth(str(name), int(before), int(after), int(heads), tuple(map(int, kept_heads)))


def _stage(name: Any, macs: Any, params: Any, seconds: Any) -> StageCost:
    pairs = [(int(first), int(last)) for first, last in (macs, params)]
    return StageCost(str(name), pairs[0], pairs[1], None if seconds is None else _finite_pair(*seconds))


def _finite_pair(first: Any, last: Any) -> tuple[float, float]:
    pair = float(first), float(last)
    if not all(map(math.isfinite, pair)):
        raise ValueError("not finite")
    return pair


def _histogram(**stored: Any) -> ScoreHistogram:
    bins = [tuple(map(int, stored[key])) for key in ("kept_bins", "removed_bins")]
    low, high = _finite_pair(stored["low"], stored["high"])
    if len(bins[0]) != BINS or len(bins[1]) != BINS or not low < high or min(min(bins[0]), min(bins[1])) < 0:
        raise ValueError("not a histogram")
    cut = None if stored["cut"] is None else float(stored["cut"])
    units, kept = int(stored["units"]), int(stored["kept"])
    return ScoreHistogram(str(stored["title"]), units, kept, low, high, bins[0], bins[1], cut)


def _stay(layers: Any, reason: Any, where: Any, share: Any) -> Stay:
    return Stay(str(layers), str(reason), str(where), None if share is None else float(share))
