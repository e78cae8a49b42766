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

import torch
from torch import nn

from isomorphic.inputs import Inputs, call
from isomorphic.measure.exact_counter import BLOCK_EXTRAS, FunctionCounter
from isomorphic.measure.first_image import first_image, is_batch
from isomorphic.measure.layer_hooks import counting, layers_in, measuring_calls
from isomorphic.measure.paper_counter import paper_layers
from isomorphic.observe import eval_mode


@dataclass(frozen=True)
class Complexity:
    """The cost of one image: MACs by the paper's and by the exact counter, and the number of parameters.

    Attributes:
        as_given: the inputs are no batch, as a graph's nodes are none: the MACs are those of all of them.
    """

    macs_paper: int
    macs_exact: int
    params: int
    as_given: bool = False

    def figures(self) -> dict[str, int]:
        """Returns the figures by name, as files hold them; `as_given` is among them where it is true."""
        return {name: value for name, value in vars(self).items() if name != "as_given" or value}

    @property
    def disputed(self) -> bool:
        """Whether one counter finds more than twice the MACs of the other: then the paper's does not see the model."""
        less, more = sorted((self.macs_paper, self.macs_exact))
        return more > 2 * less


def count_complexity(model: nn.Module, example_inputs: Inputs, *, as_given: bool | None = None) -> Complexity:
    """Counts the MACs of ``model`` for one image, and its parameters (shared ones once).

    One forward pass in eval mode without gradients. Training flags are restored and hooks removed, also when
    the forward fails; whatever it raises is passed on.

    Args:
        model: any module on any device. For a large model, count a copy on the meta device.
        example_inputs: what ``model.forward`` takes, on the model's device: a tensor, a tuple of positional or a
            mapping of keyword arguments. Dim 0 is the batch, and a batch is cut to its first image. A model that does
            not run on that alone (see `first_image.is_batch`) is counted on the inputs as they are given.
        as_given: do so or not, where that is known; by default it is tried.
    """
    return _count(model, example_inputs, None, as_given)


def count_by_module(model: nn.Module, example_inputs: Inputs) -> tuple[Complexity, dict[str, int]]:
    """Counts as `count_complexity` does, and exact MACs of every module with all that runs inside it, by its name.

    A module that is never called, such as an `nn.ModuleList`, has the sum of its children's.
    """
    called: dict[nn.Module, int] = {}
    complexity = _count(model, example_inputs, called, None)
    macs = {name: _macs_inside(module, called) for name, module in model.named_modules() if name}
    return complexity, macs


def _macs_inside(module: nn.Module, called: Mapping[nn.Module, int]) -> int:
    if module in called:
        return called[module]
    return sum(_macs_inside(child, called) for child in module.children())


def _count(
    model: nn.Module, example_inputs: Inputs, by_module: dict[nn.Module, int] | None, as_given: bool | None
) -> Complexity:
    """Counts a model, and fills `by_module` with the exact MACs of every module that is called."""
    if as_given is None:
        as_given = not is_batch(model, example_inputs)
    inputs = example_inputs if as_given else first_image(example_inputs)
    with ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        paper = stack.enter_context(counting(dict(paper_layers(model))))
        extras = stack.enter_context(counting(dict(layers_in(model, BLOCK_EXTRAS))))
        stack.enter_context(torch.no_grad())
        functions = stack.enter_context(FunctionCounter())

        def exact() -> int:
            return functions.products + functions.rest + sum(extras)

        if by_module is not None:  # after the hooks of `extras`, which count for the module that they are on
            stack.enter_context(measuring_calls(model, exact, by_module))
        call(model, inputs)
        params = sum(parameter.numel() for parameter in model.parameters())
        return Complexity(sum(paper), exact(), params, as_given)


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
