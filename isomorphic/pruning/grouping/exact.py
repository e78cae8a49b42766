"""The exact tracer's face: one model in, its coupled groups out."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from isomorphic.inputs import Inputs, call, map_tensors, no_fast_path, without_data
from isomorphic.measure.first_image import one_item
from isomorphic.measure.meta_outputs import ShapeKernels
from isomorphic.observe import modes_kept
from isomorphic.progress import Bar, steps
from isomorphic.pruning.cutting.cut import cut
from isomorphic.pruning.cutting.self_check import TOLERANCE, cut_error, masked_copy
from isomorphic.pruning.grouping.axes import ViewForm
from isomorphic.pruning.grouping.integers import traced_attributes, traced_math
from isomorphic.pruning.grouping.memory import known_by_name, remembering_nothing, without_memory
from isomorphic.pruning.grouping.recorder import Recorder
from isomorphic.pruning.grouping.rules.table import find_rule
from isomorphic.pruning.grouping.shrink_together import settle
from isomorphic.pruning.grouping.size_arguments import SIZE_RULES, note_sizes
from isomorphic.pruning.grouping.size_equations import SizeMode
from isomorphic.pruning.grouping.training_run import does_more_in_training, doubled, may_do_more_in_training
from isomorphic.pruning.grouping.trial import Trial, halved, heads_halved, is_watched, shapes_of
from isomorphic.pruning.grouping.unit_mode import UnitMode
from isomorphic.pruning.grouping.width_records import find_records, head_calls
from isomorphic.pruning.groups import ChannelGraph
from isomorphic.pruning.plan import PruningPlan
from isomorphic.skeletons import shape_copy

# What models raise on a copy that has shapes but no data, when they ask for values.
ASKS_FOR_DATA = (RuntimeError, NotImplementedError, TypeError, ValueError, AssertionError, LookupError, AttributeError)


def trace(model: nn.Module, inputs: Inputs, *, tried: bool = True) -> ChannelGraph:
    """The coupled groups of `model`; see `trace.trace_groups`.

    A copy of the model that has shapes but no data runs in eval mode, once more in training mode where that does more
    (auxiliary classifiers, running averages), and once more for each trial cut. A model whose forward depends on values
    runs itself instead, without a trial, and is left as it was. What a trace finds out too late, it begins anew with.

    Args:
        model, inputs: as there.
        tried: cut the graph on trial before it is handed out, where that needs no data; see `trial.py`.
    """
    views: dict[int, ViewForm] = {}
    memoised: list[Any] = []
    everywhere: list[Any] = []
    with steps("tracing", unit="call") as bar:
        while True:
            begun = bar.counted
            try:
                with without_memory(memoised, everywhere=everywhere):
                    return _trace_without_data(model, inputs, views, everywhere, tried=tried, bar=bar)
            except _TraceAgainError as found:
                views |= found.views
                everywhere += [one for one in found.memoised if one in memoised or not known_by_name(one)]
                memoised += [one for one in found.memoised if one not in memoised]
                bar.expect(bar.counted - begun)


def _trace_without_data(
    model: nn.Module,
    inputs: Inputs,
    views: Mapping[int, ViewForm],
    remembering: Collection[Any] = (),
    *,
    tried: bool,
    bar: Bar,
) -> ChannelGraph:
    """Traces a copy that has shapes alone, or else the model itself.

    Args:
        model, inputs, tried: as for `trace`.
        views: forms of views that were taken for something else, by their numbers.
        remembering: memoised functions that may answer from memory: they are known where nothing can be put.
        bar: counts the torch functions that the forward code calls.
    """
    proof = functools.partial(_computes_alike, model, inputs)
    try:
        return _trace(
            shape_copy(model), without_data(inputs), views, remembering, bar, tried=tried, computes_alike=proof
        )
    except ASKS_FOR_DATA:
        with _undisturbed(model):
            return _trace(model, map_tensors(inputs, torch.clone), views, remembering, bar, tried=False)


class _TraceAgainError(Exception):
    """The trace has to begin anew, with what it has learnt.

    Attributes:
        views: forms of views that were taken for something else, by their numbers.
        memoised: functions that have answered from memory when they were asked for traced integers.
    """

    def __init__(self, views: Mapping[int, ViewForm] | None = None, memoised: Iterable[Any] = ()) -> None:
        super().__init__()
        self.views, self.memoised = dict(views or {}), list(memoised)


def _trace(
    model: nn.Module,
    inputs: Inputs,
    views: Mapping[int, ViewForm],
    remembering: Collection[Any],
    bar: Bar,
    *,
    tried: bool,
    computes_alike: Callable[[ChannelGraph], bool] | None = None,
) -> ChannelGraph:
    recorder = Recorder(model, SIZE_RULES, views)
    sizes = SizeMode(recorder, model, note_sizes)
    trial = Trial(model, inputs, bar) if tried else None
    with _plain_kernels(model):
        with head_calls(model.eval(), recorder.ids_on) as calls:
            outputs = _run(model, inputs, recorder, sizes, remembering, bar)
        if trial:
            trial.calls, trial.shapes = tuple(sizes.calls), shapes_of(outputs)
        with contextlib.suppress(*ASKS_FOR_DATA):  # where it cannot be trained on these inputs
            batch = doubled(inputs)
            unused = any(leaf.name not in recorder.used and any(leaf.units.axes) for leaf in recorder.leaves.values())
            if unused or _does_more_in_training(model, batch, sizes, outputs):
                bar.expect(len(sizes.calls))
                _run(model.train(), batch, recorder, sizes, remembering, bar)
        if recorder.views_wanted.keys() - views.keys():  # what has been tried already is put up with
            raise _TraceAgainError(views=recorder.views_wanted)
        graph = settle(recorder, sizes, model, trial, computes_alike)
    return dataclasses.replace(graph, records=find_records(model, calls))


def _does_more_in_training(model: nn.Module, batch: Inputs, sizes: SizeMode, outputs: Any) -> bool:
    functions = [func for func, _ in sizes.calls]
    return may_do_more_in_training(model) and does_more_in_training(model, batch, functions, shapes_of(outputs))


def _computes_alike(model: nn.Module, inputs: Inputs, graph: ChannelGraph) -> bool:
    """Does `model`, with random weights and half of its units and heads cut, compute what the masked model does?

    Half of every other set of groups is cut, and then half of the rest and of all heads, so that no two sets are cut
    alike. One item of the inputs will do.
    """
    if any(tensor.is_meta for tensor in model.parameters()):
        return False
    dense = copy.deepcopy(model).eval()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for parameter in dense.parameters():
            if parameter.is_floating_point():
                parameter.uniform_(-1, 1).div_(max(parameter[0].numel(), 1) ** 0.5 if parameter.dim() > 1 else 1)
    alone = [(group.name,) for group in graph.groups if not any(group.name in names for names in graph.shrink_together)]
    sets = [*graph.shrink_together, *alone]
    every_other, rest = (halved(graph, [n for names in chosen for n in names]) for chosen in (sets[::2], sets[1::2]))
    heads = heads_halved(graph, [group.name for group in graph.attention])
    both = {name: tuple(sorted({*kept} & {*heads.kept[name]})) for name, kept in rest.kept.items()}
    inputs = one_item(dense, inputs)
    for plan in (every_other, PruningPlan(both)):
        pruned = copy.deepcopy(dense)
        try:
            cut(pruned, graph, plan)
            if cut_error(masked_copy(dense, graph, plan), pruned, inputs) > TOLERANCE:
                return False
        except ASKS_FOR_DATA:
            return False
    return True


def _run(
    model: nn.Module, inputs: Inputs, recorder: Recorder, sizes: SizeMode, remembering: Collection[Any], bar: Bar
) -> Any:
    def count(func: Any, arguments: Any) -> None:
        if is_watched(func):
            bar.update()

    integers = (traced_math(), traced_attributes(model, sizes.equalize))
    modes = (torch.inference_mode(), *integers, sizes, ShapeKernels(), UnitMode(recorder, find_rule))
    with contextlib.ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        memory = stack.enter_context(
            remembering_nothing(model, before=count)
        )  # sees what the forward code calls, not what modes do
        outputs = memory.outputs = call(model, inputs)
    if asked := [one for one in memory.asked if one not in remembering]:
        raise _TraceAgainError(memoised=asked)
    recorder.freeze_outputs(outputs)
    return outputs


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Puts back modes, buffers and random state."""
    buffers = {module: dict(module._buffers) for module in model.modules()}  # some forwards assign new ones
    values = {buffer: buffer.clone() for buffer in model.buffers()}
    try:
        with modes_kept(model), torch.random.fork_rng():
            yield
    finally:
        for module, own in buffers.items():
            module._buffers.clear()
            module._buffers.update(own)
        with torch.no_grad():
            for buffer, value in values.items():
                buffer.copy_(value)


@contextlib.contextmanager
def _plain_kernels(model: nn.Module) -> Iterator[None]:
    """Switches off fused kernels that hide their operations: fast attention, recurrent layers of mkldnn and cudnn."""
    with no_fast_path(), contextlib.ExitStack() as stack:
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # about other settings of the same backend
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield
