"""Times what group sparse training adds to a training step, for `studies.speed sparse`.

A step is forward, backward and SGD on a batch of random images. The same model takes turns: a step as it is, a step
with each kind of regularizer before the optimizer, and the regularizer by itself. The share is that of the regularizer
by itself: a difference of whole steps would be lost in their noise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import timm
import torch
from torch import nn
from torch.nn import functional as F

import isomorphic as iso
from isomorphic import progress
from isomorphic.pruning.sparsify.regularizers import KINDS
from studies.rows import write_rows

MODELS = ("resnet50", "deit_base_patch16_224")


class SparseRow(NamedTuple):
    """One kind of regularizer on one model: the columns of sparse_step.csv; times are medians over the rounds.

    Attributes:
        params: of the model.
        units: channels and heads, of all groups.
        step_seconds: of a step without it.
        sparse_step_seconds: of a step with it.
        regularizer_seconds: of it alone.
        share: of it alone in a step without it.
    """

    model: str
    kind: str
    batch_size: int
    threads: int
    params: int
    units: int
    step_seconds: float
    sparse_step_seconds: float
    regularizer_seconds: float
    share: float


def run(names: Sequence[str], batch_size: int, rounds: int, threads: int, path: Path) -> None:
    """Measures each model and writes all rows to `path`.

    Raises:
        UserError: a file cannot be written.
    """
    torch.set_num_threads(threads)
    rows: list[SparseRow] = []
    for name in names:
        progress.stage(f"timing steps of {name}")
        rows += measure_model(name, batch_size, rounds, threads)
    write_rows(path, SparseRow, rows)
    print(f"Saving the rows to {path}")


def measure_model(name: str, batch_size: int, rounds: int, threads: int) -> list[SparseRow]:
    """Returns a row a kind that the model can be trained with, and prints it."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=1000)
    images, labels = torch.randn(batch_size, 3, 224, 224), torch.randint(1000, (batch_size,))
    graph = iso.trace(model, images[:1])
    kinds = [kind for kind in KINDS if kind != "bn" or any(isinstance(m, nn.BatchNorm2d) for m in model.modules())]
    regularizers = {kind: iso.sparsify(model, graph, kind=kind) for kind in kinds}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step(regularize: Callable[[], object] | None = None) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        if regularize:
            regularize()
        optimizer.step()

    taken: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds + 1):  # the first one does not count
        found = {("", "step"): seconds_of(step)}
        for kind, regularize in regularizers.items():
            found[kind, "step"] = seconds_of(lambda regularize=regularize: step(regularize))
            found[kind, "alone"] = seconds_of(regularize)
        for key, seconds in found.items():
            taken.setdefault(key, []).extend([seconds] if number else [])
    plain, params = median(taken["", "step"]), sum(parameter.numel() for parameter in model.parameters())
    rows = []
    for kind in kinds:
        alone, sparse = median(taken[kind, "alone"]), median(taken[kind, "step"])
        units = sum(len(norms) for norms in regularizers[kind].unit_norms().values())
        figures = (round(plain, 4), round(sparse, 4), round(alone, 5), round(alone / plain, 5))
        rows.append(SparseRow(name, kind, batch_size, threads, params, units, *figures))
        print(
            f"{name:<22} {kind:<8} {units:>6} units: a step takes {plain:.2f} s, with it {sparse:.2f} s, "
            f"it alone {1e3 * alone:.1f} ms, {alone / plain:.2%} of a step",
            flush=True,
        )
    return rows


def seconds_of(act: Callable[[], object]) -> float:
    begin = time.perf_counter()
    act()
    return time.perf_counter() - begin
