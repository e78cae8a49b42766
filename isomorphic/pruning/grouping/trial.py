"""Trial cuts: does a traced model run without half of its units, or heads, and does its code do the same?

A copy of the model that has shapes but no data is cut and run. Its outputs must keep their shapes, and its forward code
must make the same calls with the same numbers: a `0.5 * channels` that no tracer can follow shows here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn

from isomorphic.errors import UserError
from isomorphic.inputs import Inputs, call, tensors_in, without_data
from isomorphic.measure.meta_outputs import ShapeKernels
from isomorphic.progress import Bar
from isomorphic.pruning.cutting.cut import cut
from isomorphic.pruning.cutting.snapshot import Snapshot
from isomorphic.pruning.grouping.memory import remembering_nothing
from isomorphic.pruning.groups import ChannelGraph
from isomorphic.pruning.plan import PruningPlan

_PlanOf = Callable[[ChannelGraph, Collection[str]], PruningPlan]
Numbers = tuple[float | None, ...]  # those among a call's arguments; None for one that may change
# Functions whose integers are values.
_ARITHMETIC = frozenset({"add", "sub", "mul", "div", "truediv", "floordiv", "pow", "mod", "remainder", "fmod"}) | {
    *("subtract", "multiply", "divide", "true_divide", "floor_divide", "where", "clamp", "masked_fill", "fill", "full"),
    *("full_like", "eq", "ne", "lt", "le", "gt", "ge", "maximum", "minimum"),
}
_UNWATCHED = frozenset({"__get__", "size", "numel", "nelement", "dim"})
_FEW_SETS = 4  # that bisection finds as soon
_FAILURES = (RuntimeError, AssertionError, ValueError, IndexError, TypeError, KeyError, UserError)


class Trial:
    """One model, to be run without some of its units.

    Attributes:
        calls: the torch functions that its forward calls, with their numbers; None to compare outputs' shapes alone.
        shapes: of its outputs.
    """

    def __init__(self, skeleton: nn.Module, inputs: Inputs, bar: Bar | None = None) -> None:
        """
        Args:
            skeleton: a copy that has shapes but no data, as it is before its first run: some fill a cache then. It is
                cut and run here, and put back each time.
            inputs: what it is traced on.
            bar: counts the calls of its forward.
        """
        self._skeleton = skeleton.eval()
        self._dense = Snapshot(skeleton)
        self._inputs = without_data(inputs)
        self._bar = bar
        self.calls: Sequence[tuple[Any, Numbers]] | None = None
        self.shapes: list[torch.Size] = []

    def run_dense(self) -> None:
        """Finds out the outputs' shapes."""
        self.shapes = self._run()[0]

    def failures(self, graph: ChannelGraph) -> set[str]:
        """The groups without half of which the model does not run alike; all of them if no one is to blame."""
        together = [set(names) for names in graph.shrink_together]
        joined = set().union(*together)
        alone = [{group.name} for group in graph.groups if group.name not in joined]
        return self._blamed(graph, [*together, *alone], halved)

    def head_failures(self, graph: ChannelGraph) -> set[str]:
        """The groups without half of whose heads the model does not run alike; all of them if no one is to blame."""
        return self._blamed(graph, [{group.name for group in groups} for groups in graph.head_sets], heads_halved)

    def _blamed(self, graph: ChannelGraph, sets: Sequence[set[str]], plan_of: _PlanOf) -> set[str]:
        """Those of some sets, each of which loses alike, that are to blame, by bisection; none if all pass."""
        if self._passes(graph, plan_of(graph, set().union(*sets))):
            return set()
        return self._blamed_among(graph, sets, plan_of)

    def _blamed_among(self, graph: ChannelGraph, sets: Sequence[set[str]], plan_of: _PlanOf) -> set[str]:
        """Those that are to blame of some sets without which, all together, the model does not run alike."""
        names = set().union(*sets)
        if len(sets) < 2:
            return names
        halves = (sets[: len(sets) // 2], sets[len(sets) // 2 :])
        failing = [half for half in halves if not self._passes(graph, plan_of(graph, set().union(*half)))]
        if len(failing) == 2 and self._all_alike_fail(graph, sets, plan_of):
            return names
        failed = set().union(*(self._blamed_among(graph, half, plan_of) for half in failing))
        if not failed:  # it takes sets of both halves
            failed = set().union(*(one for one in sets if not self._passes(graph, plan_of(graph, one))))
        return failed or names

    def _all_alike_fail(self, graph: ChannelGraph, sets: Sequence[set[str]], plan_of: _PlanOf) -> bool:
        """Whether sets of one kind, such as the heads of a ViT's blocks, fail one by one: three of them stand for all.

        Bisection would take two runs for each set to find that none passes, 23 for twelve blocks. Where the three fail
        and another would not, that one stays, too: less can go then, but nothing goes wrong.
        """
        if len(sets) < _FEW_SETS or len({_pattern(names) for names in sets}) > 1:
            return False
        samples = (sets[0], sets[len(sets) // 2], sets[-1])
        return not any(self._passes(graph, plan_of(graph, names)) for names in samples)

    def _passes(self, graph: ChannelGraph, plan: PruningPlan) -> bool:
        try:
            self._dense.restore()
            cut(self._skeleton, graph, plan)
            shapes, calls = self._run()
        except _FAILURES:
            return False
        finally:
            self._dense.restore()
        return shapes == self.shapes and (self.calls is None or _alike(self.calls, calls))

    def _run(self) -> tuple[list[torch.Size], list[tuple[Any, Numbers]]]:
        calls: list[tuple[Any, Numbers]] = []
        if self._bar is not None and self.calls is not None:
            self._bar.expect(len(self.calls))

        def note(func: Any, arguments: Sequence[Any]) -> None:
            if is_watched(func):
                if self._bar is not None:
                    self._bar.update()
                calls.append((func, tuple(numbers_in(func, arguments))))

        with torch.inference_mode(), ShapeKernels(), remembering_nothing(self._skeleton, before=note) as memory:
            outputs = memory.outputs = call(self._skeleton, self._inputs)
        return shapes_of(outputs), calls


def _pattern(names: Collection[str]) -> frozenset[str]:
    """The names without their numbers: blocks.*.attn.qkv.weight:* of blocks.0.attn.qkv.weight:0."""
    return frozenset(re.sub(r"\d+", "*", name) for name in names)


def shapes_of(outputs: Any) -> list[torch.Size]:
    """The shapes of the tensors that a model returns."""
    return [tensor.shape for tensor in tensors_in(outputs)]


def halved(graph: ChannelGraph, names: Collection[str]) -> PruningPlan:
    """The plan that keeps the first half of each section of some groups, which shrink together as they must."""
    common = {group.name: group.section_size for group in graph.groups}
    for together in graph.shrink_together:
        common |= dict.fromkeys(together, math.gcd(*(common[name] for name in together)))
    kept = {}
    for group in graph.groups:
        size, shared = group.section_size, common[group.name]
        width = size // shared * max(shared // 2, 1) if group.name in names else size
        kept[group.name] = tuple(unit for unit in range(group.num_units) if unit % size < width)
    return PruningPlan(kept)


def heads_halved(graph: ChannelGraph, names: Collection[str]) -> PruningPlan:
    """The plan that keeps the first half of the heads of some groups, whole, and everything else."""
    kept = {}
    for group in graph.groups:
        heads = max(group.num_sections // 2, 1) if group.name in names else group.num_sections
        kept[group.name] = tuple(range(heads * group.section_size))
    return PruningPlan(kept)


def is_watched(func: Any) -> bool:
    """Whether a torch function counts as a call of the forward code.

    What asks for a tensor's properties does not.
    """
    return getattr(func, "__name__", "") not in _UNWATCHED


def numbers_in(func: Any, values: Any) -> list[float]:
    """The numbers in a call's nested arguments, in order: floats and, where they are values, not sizes, integers."""
    if isinstance(values, (tuple, list)):
        return [number for value in values for number in numbers_in(func, value)]
    is_number = isinstance(values, float) or (isinstance(values, int) and _name(func) in _ARITHMETIC)
    return [values] if is_number else []


def _name(func: Any) -> str:
    """ "mul" for `Tensor.__rmul__`, `Tensor.mul_` and `torch.mul`."""
    name = getattr(func, "__name__", "")
    return name.strip("_")[1:] if name.startswith(("__r", "__i")) else name.strip("_")


def _alike(expected: Sequence[tuple[Any, Numbers]], found: Sequence[tuple[Any, Numbers]]) -> bool:
    if [(func, len(numbers)) for func, numbers in expected] != [(func, len(numbers)) for func, numbers in found]:
        return False
    pairs = zip(expected, found, strict=True)
    return all(a is None or a == b for (_, old), (_, new) in pairs for a, b in zip(old, new, strict=True))
