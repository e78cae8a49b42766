"""Mixtures of a group's units in its layers, and the moments that tell which mixtures are worth keeping."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from isomorphic.inputs import Inputs, call
from isomorphic.observe import module_calls
from isomorphic.processes import distributed
from isomorphic.pruning.groups import CoupledGroup, Member
from isomorphic.pruning.recovery.fusion import merge_positions, tensor_of
from isomorphic.pruning.recovery.held_out import parts_of


def mix_units(
    model: nn.Module, group: CoupledGroup, members: Sequence[Member], kept: Tensor, forth: Tensor, back: Tensor
) -> None:
    """Writers make `forth` (m, n) times the units, readers take them `back` (n, m)."""
    for member in members:
        reads = group.nodes[member.node].kind in ("conv", "linear") and member.dim == 1
        merge_positions(tensor_of(model, member), member.dim, member.index, kept, back.T if reads else forth)


class Observer(Protocol):
    """Whoever adds up something of a model's forward passes."""

    def watching(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside, it adds up."""
        ...

    def finish(self) -> None:
        """Adds up over all processes."""
        ...


def observe_all(model: nn.Module, images: Inputs, observers: Sequence[Observer]) -> None:
    """Runs a model on all images, in parts, for whoever watches it; not at all if nobody does."""
    if not observers:
        return
    with contextlib.ExitStack() as watching:
        for observer in observers:
            watching.enter_context(observer.watching(model))
        for part in parts_of(images):
            call(model, part)
    for observer in observers:
        observer.finish()


class UnitMoments:
    """Second moments of what layers read of some groups, and moments of what others write, over all processes.

    Args:
        members: weights that read or write units.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self._sums: dict[int, list[Tensor]] = {}
        self._readers: dict[str, list[Member]] = {}
        self._writers: dict[str, list[Member]] = {}
        for member in members:
            (self._writers if member.dim == 0 else self._readers).setdefault(member.module, []).append(member)

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Inside, what `model` reads and writes is added up."""
        reading = {module: model.get_submodule(module) for module in self._readers}
        writing = {module: model.get_submodule(module) for module in self._writers}

        def see(module: str, positional: tuple[Any, ...], keyword: dict[str, Any]) -> None:
            for member in self._readers[module]:
                self._add(member, positional[0], reading[module])

        def note(module: str, output: Any) -> None:
            for member in self._writers[module]:
                self._add(member, output, writing[module])

        with module_calls(reading, before=see), module_calls(writing, after=note):
            yield

    def finish(self) -> None:
        """Adds up over all processes."""
        for key, (count, total, square) in self._sums.items():
            count = distributed.all_reduce_sum(count)
            self._sums[key] = [distributed.all_reduce_sum(sums) / count for sums in (total, square)]

    def read(self, member: Member) -> Tensor:
        """E[x xᵀ] (n, n) of what a reader reads."""
        return self._sums[id(member)][1]

    def written(self, member: Member) -> tuple[Tensor, Tensor]:
        """E[y] (n,) and E[y yᵀ] (n, n) of what a writer writes."""
        total, square = self._sums[id(member)]
        return total, square

    def _add(self, member: Member, values: Tensor, layer: nn.Module) -> None:
        """Adds units (samples, n); where a unit has several positions, each is a sample."""
        rows = values.movedim(-1 if isinstance(layer, nn.Linear) else 1, -1).flatten(0, -2)
        units = rows[:, member.index.T.to(rows.device)].flatten(0, 1)  # (samples, k, n) -> (samples · k, n)
        new = [units.new_tensor(len(units), dtype=torch.float64), units.sum(0).double(), (units.T @ units).double()]
        old = self._sums.get(id(member))
        self._sums[id(member)] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]
