"""From the forward code's sizes to groups that shrink together.

Whether the equations can hold is tried out before anything is cut: groups are given arbitrary sizes, and the equations
are solved for the modules' attributes. Where they cannot be, the groups behind the conflict have to keep one common
fraction of their units; where even that does not help, they stay as they are. Heads are tried last.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import random
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

from torch import nn

from isomorphic.pruning.cutting.sizes import AxisLengths, SizeConflictError, SizeEquations, dense_values
from isomorphic.pruning.expressions import evaluate
from isomorphic.pruning.grouping.assembly import Assembly, dims_of_heads, groups_of
from isomorphic.pruning.grouping.recorder import Recorder
from isomorphic.pruning.grouping.size_equations import IN_MULTIHEAD, SizeMode
from isomorphic.pruning.grouping.trial import Trial
from isomorphic.pruning.groups import FIXED_SIZE, ChannelGraph, SizeEquation

_EXTRA_ATTEMPTS = 2  # with every group shrunk, after those that tell each two groups apart


class _Obstacle(enum.Enum):
    """Why a group, or its heads, cannot follow what is cut; the value is what users read."""

    UNCOMMON = "its size has no fraction in common with those that it must follow"
    FIXED_SIZE = FIXED_SIZE
    FIXED_HEADS = "its heads' number is fixed in the forward code"
    FULL_WIDTH = "the forward code makes its heads as wide as another axis: -1 there would let them go"
    MULTIHEAD = "nn.MultiheadAttention makes its heads as wide as its input"
    FAILED_TRIAL = "the forward code does something else, or fails, without half of it"


_OF_HEADS = frozenset({_Obstacle.FIXED_HEADS, _Obstacle.FULL_WIDTH, _Obstacle.MULTIHEAD})


class _Stuck(NamedTuple):
    """Groups that must be frozen, or of which the heads must where the obstacle is one of heads."""

    names: Collection[str]
    obstacle: _Obstacle
    where: str = ""  # the line of forward code that stands in the way


def settle(
    recorder: Recorder,
    sizes: SizeMode,
    model: nn.Module,
    trial: Trial | None,
    computes_alike: Callable[[ChannelGraph], bool] | None = None,
) -> ChannelGraph:
    """The finished graph: every plan that honours it leaves a model whose sizes fit.

    A plain number in the forward code may be a size that it casts, as in `int(x.shape[1])`, and that the cut model
    computes anew. So before a group is frozen for such a number, the equations in doubt are left out, and the model is
    cut on trial without them: it must make the same calls, and compute what the masked model does.

    Args:
        recorder, sizes: what the trace noted.
        model: what was traced.
        trial: cuts it on trial; None where it does not run without data.
        computes_alike: of a graph: does the model without half of it compute what the masked model does? None where
            that cannot be known; nothing is left out then.
    """
    left_out: frozenset[Any] = frozenset()
    doubtful = sizes.doubtful() if trial and computes_alike else frozenset()
    while True:
        assembly = Assembly(recorder, sizes, left_out)
        search = _Search(assembly, model)
        stuck = search.run() or search.stuck_heads()
        if stuck and doubtful:
            left_out, doubtful = doubtful, frozenset()
            continue
        graph = search.graph()
        if not stuck and trial:
            stuck = _tried(trial, graph)
            fails = any(one.obstacle is _Obstacle.FAILED_TRIAL for one in stuck)  # not its heads alone: those may stay
            if fails and left_out and (needed := assembly.left_out_with(stuck[0].names)):
                left_out -= needed
                continue
        if not stuck and left_out and computes_alike and not computes_alike(graph):
            left_out = frozenset()
            continue
        if not stuck:
            return graph
        for names, obstacle, where in stuck:
            freeze = assembly.freeze_heads if obstacle in _OF_HEADS else assembly.freeze
            freeze(names, obstacle.value, where)


def _tried(trial: Trial, graph: ChannelGraph) -> list[_Stuck]:
    """Groups, or else heads, without half of which the model does something else."""
    if graph.groups and (failed := trial.failures(graph)):
        return [_Stuck(failed, _Obstacle.FAILED_TRIAL)]
    if graph.head_sets and (failed := trial.head_failures(graph)):
        return [_Stuck(failed, _Obstacle.FIXED_HEADS)]
    return []


class _Search:
    """Tries sizes until no equation objects; groups in conflict are joined on the way."""

    def __init__(self, assembly: Assembly, model: nn.Module) -> None:
        self._groups = {group.name: group for group in assembly.groups}
        self._graph = ChannelGraph(
            tuple(assembly.groups),
            assembly.frozen(),
            equations=tuple(assembly.equations()),
            rescalings=tuple(assembly.rescalings()),
            frozen_heads=assembly.frozen_heads(),
            frozen_head_lines=assembly.frozen_head_lines(),
            unused=assembly.unused(),
        )
        self._value_of = dense_values(model)
        self._names_of = {equation: groups_of(equation) for equation in self._graph.equations}
        self._graph = dataclasses.replace(self._graph, equations=tuple(filter(self._may_hold, self._graph.equations)))
        self._system = SizeEquations(tuple(dict.fromkeys(self._graph.equations)))
        self._joined = {name: name for name in self._groups}
        self._random = random.Random(0)
        for names in (*assembly.equal_rows(), *assembly.together_in_doubt()):
            self._join(self._with_width(names))

    def _may_hold(self, equation: SizeEquation) -> bool:
        """False for what does not even hold in the dense model: the trace has misread a size, and no group can help."""
        if self._with_width(self._names_of[equation]):
            return True
        try:
            found = evaluate(equation.expression, AxisLengths(self._graph), self._value_of)
        except ZeroDivisionError:
            return False
        return found == AxisLengths(self._graph)(equation.axis)

    def run(self) -> list[_Stuck]:
        """The groups in a conflict that joining them cannot solve; none when everything fits."""
        attempt = 0
        while attempt < self._attempts:
            if stuck := self._stuck():
                return [_Stuck(stuck, _Obstacle.UNCOMMON)]
            conflicts = self._conflicts(attempt, with_heads=False)
            if stuck := self._join_conflicts(conflicts):
                behind = (one[0].where for one in conflicts if self._names_of[one[0]] & stuck)
                return [_Stuck(stuck, _Obstacle.FIXED_SIZE, next(behind, ""))]
            attempt = 0 if conflicts else attempt + 1
        return []

    def stuck_heads(self) -> list[_Stuck]:
        """Attention that cannot lose heads, by the line of forward code in conflict with it; once all widths fit.

        Heads that a line shares with those of an earlier one are left to the next search: what is in their way may be
        gone with the others.
        """
        found: list[_Stuck] = []
        sets: set[str] = set()  # of the heads found so far
        conflicts = [one for attempt in range(self._attempts) for one in self._conflicts(attempt, with_heads=True)]
        for where in dict.fromkeys(conflict[0].where for conflict in conflicts):
            alike = [equation for conflict in conflicts if conflict[0].where == where for equation in conflict]
            named = set().union(*(self._names_of[equation] for equation in alike))
            attention = {name for name in named if self._groups[name].heads}
            head_sets = {self._groups[name].head_set for name in attention}
            if attention and sets.isdisjoint(head_sets):
                sets |= head_sets
                others = named.difference(attention, *map(dims_of_heads, alike))
                obstacle = _Obstacle.FULL_WIDTH if others else _Obstacle.FIXED_HEADS
                found.append(
                    _Stuck(attention, _Obstacle.MULTIHEAD if where.endswith(IN_MULTIHEAD) else obstacle, where)
                )
        return found

    @property
    def _attempts(self) -> int:
        return len(self._groups).bit_length() + _EXTRA_ATTEMPTS

    def _join_conflicts(self, conflicts: Iterable[tuple[SizeEquation, ...]]) -> set[str]:
        """Makes the groups behind each conflict shrink together; returns those that did already."""
        together = {name: self._root(name) for name in self._groups}
        stuck: set[str] = set()
        for equation, *causes in conflicts:
            own, others = self._with_width(self._names_of[equation]), (self._names_of[cause] for cause in causes)
            names = own.union(*map(self._with_width, others))
            if len({together[name] for name in names}) < 2:
                stuck |= own or names
            self._join(names)
        return stuck

    def graph(self) -> ChannelGraph:
        """With the sets of groups that shrink together."""
        sets = tuple(names for names in self._sets() if len(names) > 1)
        return dataclasses.replace(self._graph, shrink_together=sets)

    def _conflicts(self, attempt: int, with_heads: bool) -> tuple[tuple[SizeEquation, ...], ...]:
        """What fails for some sizes. In the first attempts any two sets differ at least once: one shrinks, one not."""
        lengths = AxisLengths(self._graph)
        sets = self._sets()
        head_set_of = {group.name: group.head_set for group in self.graph().attention} if with_heads else {}
        heads_left: dict[str, int] = {}  # of each head set that loses any
        for number, names in enumerate(sets, start=1):
            shrinks = attempt >= len(sets).bit_length() or number >> attempt & 1
            common = math.gcd(*(self._groups[name].section_size for name in names))
            kept = self._random.randint(1, max(common - 1, 1)) if shrinks else common
            for name in names:
                group = self._groups[name]
                heads = group.num_sections
                head_set = head_set_of.get(name, "")
                if shrinks and head_set == name:  # the first of its set; the others follow
                    heads_left[name] = self._random.randint(1, max(heads - 1, 1))
                heads = heads_left.get(head_set, heads)
                lengths.assume(name, group.section_size // common * kept * heads, heads)
        try:
            self._system.solve(lengths, self._value_of)
        except SizeConflictError as error:
            return error.conflicts
        return ()

    def _stuck(self) -> set[str]:
        """Of each set whose sizes have no common fraction, the smallest groups."""
        found: set[str] = set()
        for names in self._sets():
            sizes = {name: self._groups[name].section_size for name in names}
            if len(names) > 1 and math.gcd(*sizes.values()) == 1:
                found |= {name for name, size in sizes.items() if size == min(sizes.values())}
        return found

    def _sets(self) -> list[tuple[str, ...]]:
        sets: dict[str, list[str]] = {}
        for name in self._groups:
            sets.setdefault(self._root(name), []).append(name)
        return [tuple(names) for names in sets.values()]

    def _root(self, name: str) -> str:
        root = name
        while self._joined[root] != root:
            root = self._joined[root]
        while self._joined[name] != root:  # the next search is shorter
            self._joined[name], name = root, self._joined[name]
        return root

    def _with_width(self, names: Iterable[str]) -> set[str]:
        """Those of some groups that can lose more than whole heads."""
        return {name for name in names if self._groups[name].has_width}

    def _join(self, names: Iterable[str]) -> None:
        """Makes groups shrink together."""
        roots = sorted({self._root(name) for name in names})
        for root in roots[1:]:
            self._joined[root] = roots[0]
