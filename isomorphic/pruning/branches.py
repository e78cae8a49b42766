"""Branches of the forward code that the traced inputs do not take, and the data that take them.

A trace knows the layers that its inputs run through. What meets them on other inputs alone, a condition that is given
now and then or an expert that no traced token is sent to, keeps its widths, and does not fit what was cut around it:

    def forward(self, x, cond=None):
        y = self.e(x)                                        # traced with x alone: e loses channels,
        return self.o(y if cond is None else y + self.c(cond))  # and c, which is not seen, keeps them

So where a trace has left parameters out, a cut copy runs one batch of the data before anything is handed out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from isomorphic.errors import UserError, first_line
from isomorphic.inputs import Inputs, call, device_of, map_tensors, move_to
from isomorphic.observe import eval_mode, module_calls
from isomorphic.pruning.blocks.depth import remove_blocks
from isomorphic.pruning.cutting.cut import cut
from isomorphic.pruning.gradients import Loss, is_raised_by
from isomorphic.pruning.groups import ChannelGraph
from isomorphic.pruning.plan import PruningPlan
from isomorphic.pruning.report import listed, unused_layers


class Batches:
    """Batches of the user's that remember the first of them, which a generator gives only once.

    Args:
        data: the batches.
        loss: (model, batch) -> scalar; None: the model is called with a batch, or with the first part of a pair.
    """

    def __init__(self, data: Iterable[Any], loss: Loss | None = None) -> None:
        self._data, self._loss = data, loss
        self._first: Any = None

    def __iter__(self) -> Iterator[Any]:
        for batch in self._data:
            self._remember(batch)
            yield batch

    def first(self) -> Any:
        """Returns the first batch; None where there is none."""
        if self._first is None:
            self._remember(next(iter(self._data), None))
        return self._first

    def run(self, model: nn.Module, batch: Any) -> None:
        """Runs `model` on a batch, as a criterion would."""
        if self._loss is not None:
            self._loss(model, batch)
        else:
            inputs: Any = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
            call(model, inputs)

    def _remember(self, batch: Any) -> None:
        if self._first is None:
            self._first = map_tensors(batch, lambda tensor: tensor)  # containers of its own: a loss may empty them


def check_branches(
    model: nn.Module, graph: ChannelGraph, plan: PruningPlan, inputs: Inputs, batches: Batches | None
) -> None:
    """Runs a cut copy of `model` on the first batch, where the trace has left parameters out.

    Args:
        model: the dense model; it is left as it was.
        graph, plan, inputs: as for `apply_plan`.
        batches: what the model is meant for, if there are any.

    Raises:
        UserError: the dense model takes the batch, and the cut one does not.
    """
    if not graph.unused or batches is None or batches.first() is None:
        return
    batch = move_to(batches.first(), device_of(inputs))
    pruned = copy.deepcopy(model)
    if plan.kept_blocks:
        remove_blocks(pruned, plan.kept_blocks, inputs)
    cut(pruned, graph, plan)
    error = _refusal(pruned, batch, batches)
    if error is None or not is_raised_by(pruned, error):
        return
    layers, called = unused_layers(graph), set[str]()
    dense = copy.deepcopy(model)
    named = {name: module for name, module in dense.named_modules() if name in layers}
    with module_calls(named, before=lambda name, *_: called.add(name)):
        if _refusal(dense, batch, batches) is not None:
            return
    names = [name for name in layers if name in called] or layers
    raise UserError(
        f"the data take branches of the forward code that the inputs do not: {listed(names)} "
        f"{'was' if len(names) == 1 else 'were'} not traced, and the cut model does not take the first batch "
        f"({first_line(error)}). Give inputs that take these branches, or name the layers that they meet in ignore"
    ) from error


def _refusal(model: nn.Module, batch: Any, batches: Batches) -> Exception | None:
    """What `model` or the loss raises on a batch, in eval mode; None where they take it."""
    gpus = [device] if (device := device_of(batch)).type == "cuda" else []
    try:
        with torch.random.fork_rng(gpus, device_type="cuda"), eval_mode(model):
            batches.run(model, map_tensors(batch, lambda tensor: tensor))
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # whatever forward code raises
        return error
    return None
