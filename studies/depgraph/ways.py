"""What studies.depgraph measures of one dense model: every way to rank, at every speed-up, before and after finetuning.

All ways get the same training after the dense phase. Those with a sparse phase spend it there before the cut, the
others spend as many epochs on finetuning instead:

    sparse:  dense ── sparse phase ── cut ── finetuning
    plain:   dense ─────────────────  cut ── finetuning, longer by the sparse phase
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import isomorphic as iso
from isomorphic.measure.complexity import count_complexity
from studies import hard_digits
from studies.depgraph.models import BATCH, FAMILIES, INPUTS, Family, top1, train

SPEEDUPS = (2, 4, 8)
RECOVERIES: tuple[tuple[str, ...], ...] = ((), ("compensate",))
CALIBRATION_IMAGES = 256


@dataclass(frozen=True)
class Epochs:
    """Epochs of each phase; those of the dense one are its family's, unless they are given."""

    sparse: int = 20
    finetuning: int = 10
    dense: int | None = None


@dataclass(frozen=True)
class Way:
    """A way to rank.

    Attributes:
        name: as the tables have it.
        ranking: arguments of `isomorphic.prune`.
        sparsify: the kind of sparse training before it, "" for none.
    """

    name: str
    ranking: Mapping[str, Any]
    sparsify: str = ""


def first_layer_l1(group: Any, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Σ |w| over the first layer that makes a unit: what most people mean by magnitude pruning."""
    return weights[0].abs().sum(1)


GROUP_NORM = {"criterion": "group_norm", "normalizer": "top", "ranking": "global"}
WAYS = (
    Way("l1, first layer", {"criterion": first_layer_l1, "ranking": "global"}),
    Way("group norm", GROUP_NORM),
    Way("isomorphic taylor", {"criterion": "taylor"}),
    Way("group norm + group sparsity", GROUP_NORM, "group"),
    Way("group norm + growing", GROUP_NORM, "growing"),
    Way("bn scale + bn sparsity", {"criterion": "bn_scale", "ranking": "global"}, "bn"),
)
STRENGTHS = {"bn": 0.5, "growing": 0.2}  # of a family's strength for "group"


class Row(NamedTuple):
    """One model: the columns of depgraph.csv.

    Attributes:
        family, seed: the dense model.
        way: a name of `WAYS`; "dense" for the model itself, "sparse, …" for what a sparse phase left, "trained on"
            for the dense model after all the training that the others get.
        speedup: times fewer MACs that were asked for.
        recover: "compensate", or "" for none.
        macs, params: that are left, MACs by the exact counter.
        start: top-1 in percent before the cut.
        pruned: just after it, without any training.
        finetuned: after the finetuning; None where it was not asked for.
        weak_half: share of the norm that the weaker halves of groups held before the cut.
    """

    family: str
    seed: int
    way: str
    speedup: int
    recover: str
    macs: int
    params: int
    start: float
    pruned: float
    finetuned: float | None
    weak_half: float


def measure(family_name: str, seed: int, epochs: Epochs) -> Iterator[Row]:
    """Yields the rows of one dense model, which is trained first."""
    family = FAMILIES[family_name]
    torch.manual_seed(seed)
    dense = family.build()
    train(dense, family, epochs.dense or family.dense_epochs, seed=seed, first_phase=True)
    yield _whole(family_name, seed, "dense", dense)
    longer = copy.deepcopy(dense)
    train(longer, family, epochs.sparse + epochs.finetuning, seed=seed + 1)
    yield _whole(family_name, seed, "trained on", longer)
    for way in WAYS:
        if way.sparsify == "bn" and not family.has_batch_norm:
            continue
        start = copy.deepcopy(dense)
        if way.sparsify:
            sparsify(start, family, way.sparsify, epochs.sparse, seed)
            yield _whole(family_name, seed, f"sparse, {way.sparsify}", start)
        left = epochs.finetuning + (0 if way.sparsify else epochs.sparse)
        yield from _cuts(family_name, seed, way, start, left)


def sparsify(model: nn.Module, family: Family, kind: str, epochs: int, seed: int) -> None:
    """The sparse phase, in place; of "growing", the weakest channel's strength ends at that of "group"."""
    reg = family.reg * STRENGTHS.get(kind, 1.0)
    growth = {"delta": 16 * family.reg / epochs} if kind == "growing" else {}
    regularizer = iso.sparsify(model, iso.trace(model, INPUTS), kind=kind, reg=reg, **growth)
    train(model, family, epochs, seed=seed + 1, regularize=regularizer)


def _cuts(family: str, seed: int, way: Way, start: nn.Module, epochs: int) -> Iterator[Row]:
    """The model at every speed-up and recovery; it is finetuned for so many epochs."""
    begin, half = top1(start), weak_half(start)
    batches = list(hard_digits.epoch(torch.Generator().manual_seed(seed + 2), BATCH))
    images = torch.cat([images for images, _ in batches])[:CALIBRATION_IMAGES]
    data = {"data": batches} if way.ranking["criterion"] == "taylor" else {}
    for speedup in SPEEDUPS:
        for recover in RECOVERIES:
            calibration = {"recover": recover, "calibration": images} if recover else {}
            pruned = iso.prune(
                start,
                INPUTS,
                macs=f"{100 / speedup}%",
                macs_counter="exact",
                max_ratio=0.95,
                **way.ranking,
                **data,
                **calibration,
            )
            model, cost = pruned.model, pruned.after
            just_pruned = top1(model)
            train(model, FAMILIES[family], epochs, seed=seed + 3)
            yield Row(
                family,
                seed,
                way.name,
                speedup,
                " ".join(recover),
                cost.macs_exact,
                cost.params,
                round(begin, 3),
                round(just_pruned, 3),
                round(top1(model), 3),
                half,
            )


def weak_half(model: nn.Module) -> float:
    """Share of the norm that the weaker halves of groups hold."""
    return round(iso.sparsify(model, iso.trace(model, INPUTS)).weak_half(), 5)


def _whole(family: str, seed: int, way: str, model: nn.Module) -> Row:
    cost, reached = count_complexity(model, INPUTS), round(top1(model), 3)
    return Row(family, seed, way, 1, "", cost.macs_exact, cost.params, reached, reached, None, weak_half(model))
