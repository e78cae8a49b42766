"""The exact tracer's face: one model in, its coupled groups out."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from isomorphic.inputs import Inputs, call, map_tensors, no_fast_path, without_data
from isomorphic.measure.meta_outputs import ShapeKernels
from isomorphic.observe import modes_kept
from isomorphic.pruning.cutting.cut import shape_copy
from isomorphic.pruning.grouping.integers import traced_attributes, traced_math
from isomorphic.pruning.grouping.recorder import Recorder
from isomorphic.pruning.grouping.rules.table import find_rule
from isomorphic.pruning.grouping.shrink_together import settle
from isomorphic.pruning.grouping.size_arguments import SIZE_RULES, note_sizes
from isomorphic.pruning.grouping.size_equations import SizeMode
from isomorphic.pruning.grouping.trial import Trial, shapes_of
from isomorphic.pruning.grouping.unit_mode import UnitMode
from isomorphic.pruning.groups import ChannelGraph

# What models raise on a copy that has shapes but no data, when they ask for values.
_ASKS_FOR_DATA = (RuntimeError, NotImplementedError, TypeError, ValueError, AssertionError, LookupError, AttributeError)


def trace(model: nn.Module, inputs: Inputs, *, tried: bool = True) -> ChannelGraph:
    """The coupled groups of `model`; see `trace.trace_groups`.

    A copy of the model that has shapes but no data runs in eval mode, once more in training mode where that may reach
    what eval mode left alone (auxiliary classifiers, running averages), and once more for each trial cut. A model
    whose forward depends on values runs itself instead, without a trial, and is left as it was.

    Args:
        model, inputs: as there.
        tried: cut the graph on trial before it is handed out, where that needs no data; see `trial.py`.
    """
    try:
        return _trace(shape_copy(model), without_data(inputs), tried=tried)
    except _ASKS_FOR_DATA:
        with _undisturbed(model):
            return _trace(model, map_tensors(inputs, torch.clone), tried=False)


def _trace(model: nn.Module, inputs: Inputs, *, tried: bool) -> ChannelGraph:
    recorder = Recorder(model, SIZE_RULES)
    sizes = SizeMode(recorder, model, note_sizes)
    trial = Trial(model, inputs) if tried else None
    with _plain_kernels(model):
        outputs = _run(model.eval(), inputs, recorder, sizes)
        if trial:
            trial.calls, trial.shapes = tuple(sizes.calls), shapes_of(outputs)
        if any(leaf.name not in recorder.used and any(leaf.units.axes) for leaf in recorder.leaves.values()):
            twice = map_tensors(inputs, lambda tensor: torch.cat([tensor, tensor]) if tensor.dim() else tensor)
            with contextlib.suppress(*_ASKS_FOR_DATA):  # where it cannot be trained on these inputs
                _run(model.train(), twice, recorder, sizes)  # batch norms want more than one value
        return settle(recorder, sizes, model, trial)


def _run(model: nn.Module, inputs: Inputs, recorder: Recorder, sizes: SizeMode) -> Any:
    integers = (traced_math(), traced_attributes(model, sizes.equalize))
    with torch.inference_mode(), integers[0], integers[1], sizes, ShapeKernels(), UnitMode(recorder, find_rule):
        outputs = call(model, inputs)
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
