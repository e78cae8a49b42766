"""Multiply-accumulates (MACs) and parameters of a model, for one image.

There are two counters of our own, because the number that everybody quotes and the number that is true drift apart as
soon as a model is pruned.

**paper** answers "which row of the published tables is this?". It looks at *modules*: each layer type in
``paper_counter.PAPER_RULES`` is charged by a formula, everything else is free. The formulas are those of torch-pruning,
which printed the tables, habits included: a linear layer's bias counts once per call, a timm attention block
is charged as a whole with a square output projection (right before pruning, off after it), attention written
with bare functions is not seen. Types match by ``isinstance``: a subclass counts as its parent. Where the
tables themselves left something out, ``UNCOUNTED_INSIDE`` says so.

**exact** answers "what does this model compute?". It looks at the *functions* that run, whichever class calls
them, and charges their true shapes by ``exact_counter.EXACT_RULES``: the products of convolutions, linear layers,
matrix products and attention (half of what ``torch.utils.flop_counter`` reports), and in the paper's units the small
rest: biases, 2 per element of an affine norm, 1 per activation, softmax or pooled element. ``BLOCK_EXTRAS``
adds what the paper's attention formula charges beyond these. So both counters agree to the unit on an
unpruned DeiT, Swin or ResNet, and a difference means something.

A third opinion is `fvcore_counter.py`: another library's figure for a whole model, which no budget can be in.

Residual additions, LayerScale, dropout, GRN and other plain arithmetic are free in the first two.

To teach a counter a new layer, add one line to its table: a module type (paper) or a function (exact), and
the rule that charges it. Counts are exact integers, the same on the CPU, on a GPU and on the meta device,
where counting takes milliseconds and no memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isomorphic.inputs import Inputs, call, map_tensors, tensors_in
from isomorphic.measure.exact_counter import BLOCK_EXTRAS, FunctionCounter
from isomorphic.measure.layer_hooks import counting, layers_in
from isomorphic.measure.paper_counter import paper_layers
from isomorphic.observe import eval_mode


@dataclass(frozen=True)
class Complexity:
    """The cost of one image: MACs by the paper's and by the exact counter, and the number of parameters."""

    macs_paper: int
    macs_exact: int
    params: int

    @property
    def disputed(self) -> bool:
        """Whether one counter finds more than twice the MACs of the other: then the paper's does not see the model."""
        less, more = sorted((self.macs_paper, self.macs_exact))
        return more > 2 * less


def count_complexity(model: nn.Module, example_inputs: Inputs) -> Complexity:
    """Counts the MACs of ``model`` for one image, and its parameters (shared ones once).

    One forward pass in eval mode without gradients. Training flags are restored and hooks removed, also when
    the forward fails; whatever it raises is passed on.

    Args:
        model: any module on any device. For a large model, count a copy on the meta device.
        example_inputs: what ``model.forward`` takes, on the model's device: a tensor, a tuple of positional or a
            mapping of keyword arguments. Dim 0 is the batch; a batch is cut to its first image.
    """
    inputs = first_image(example_inputs)
    with ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        paper = stack.enter_context(counting(dict(paper_layers(model))))
        extras = stack.enter_context(counting(dict(layers_in(model, BLOCK_EXTRAS))))
        stack.enter_context(torch.no_grad())
        functions = stack.enter_context(FunctionCounter())
        call(model, inputs)
    exact = functions.products + functions.rest + sum(extras)
    return Complexity(sum(paper), exact, sum(parameter.numel() for parameter in model.parameters()))


def format_macs(macs: float, digits: int = 2) -> str:
    """Returns ``'17.69 G'`` for ``17_690_000_000``, as tables print MACs; ``'4.61 M'`` where G would vanish."""
    return _scaled(macs, "GMK", digits)


def format_params(params: float, digits: int = 2) -> str:
    """Returns ``'87.34 M'`` for ``87_338_192``, as tables print parameters; ``'29.52 K'`` where M would vanish."""
    return _scaled(params, "MK", digits)


def format_amount(amount: float, unit: str) -> str:
    """Returns an amount of a field of `Complexity` as text: ``'4.1626 G MACs'``, ``'20.69 M params'``."""
    return f"{format_params(amount)} params" if unit == "params" else f"{format_macs(amount, 4)} MACs"


def _scaled(value: float, units: str, digits: int) -> str:
    """In the first unit of which there is at least a tenth, else in the last."""
    sizes = {"G": 1e9, "M": 1e6, "K": 1e3}
    unit = next((unit for unit in units if value >= 0.1 * sizes[unit]), units[-1])
    return f"{value / sizes[unit]:.{digits}f} {unit}"


def first_image(example_inputs: Inputs, copies: int = 1) -> Inputs:
    """Returns the inputs with every tensor that has the first one's batch size cut to its first item.

    Where the first tensor lies in a list, as the images (3, H, W) of a detector do, the list is the batch: it, and each
    list as long, such as one of targets, is cut to its first entry.

    Args:
        example_inputs: what a model takes.
        copies: how often the item is repeated: the batch size of what is returned.
    """
    images = list_of_first_tensor(example_inputs)
    if images is not None:
        return _first_of_lists(example_inputs, len(images), copies)
    batch_sizes = [tensor.shape[:1] for tensor in tensors_in(example_inputs)]

    def cut(tensor: Tensor) -> Tensor:
        if not tensor.dim() or tensor.shape[:1] != batch_sizes[0]:
            return tensor
        return tensor[:1] if copies == 1 else torch.cat([tensor[:1]] * copies)

    return map_tensors(example_inputs, cut)


def list_of_first_tensor(values: Any) -> list[Any] | None:
    """The list that the first of some nested tensors lies in, if it is in one."""
    if isinstance(values, list):
        return values
    items = values.values() if isinstance(values, Mapping) else values if isinstance(values, tuple) else ()
    first = next((item for item in items if tensors_in(item)), None)
    return None if first is None else list_of_first_tensor(first)


def _first_of_lists(values: Any, length: int, copies: int) -> Any:
    if isinstance(values, list) and len(values) == length:
        return values[:1] * copies
    if isinstance(values, Mapping):
        return {key: _first_of_lists(value, length, copies) for key, value in values.items()}
    if isinstance(values, tuple):
        return tuple(_first_of_lists(value, length, copies) for value in values)
    return values
