"""An independent witness: MACs as fvcore counts them, which shares no code with the paper's or the exact counter.

fvcore (https://github.com/facebookresearch/fvcore) traces the model with torch.jit and charges the operators that it
knows: convolutions, linear layers and matrix products by their multiply-adds ("one flop"), batch norms at 1 or 2 an
element, other norms at 4 or 5, some pooling and resizing. Biases, activations and movement are free. Operators
that it does not know cost nothing either, fused attention among them, so that a figure of its own says little: what it
left out is named beside it.

Of a ViT-Tiny at 224 pixels it sees 1.08 G of the 1.26 G, as the attention products of 12 blocks are missing:
2 · 197² tokens · 192 dims · 12 = 0.18 G.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isomorphic.errors import UserError, first_line
from isomorphic.inputs import Inputs, call, map_tensors, no_fast_path, tensors_in
from isomorphic.measure.first_image import one_item
from isomorphic.observe import eval_mode

_OTHER_COUNTERS = "take the paper's or the exact counter"


@dataclass(frozen=True)
class FvcoreCount:
    """The cost of one image by fvcore.

    Attributes:
        macs: multiply-adds of the operators that fvcore knows, with its prices for norms and pooling.
        uncounted: calls of those that it does not know, by name ("softmax", "torchvision::nms"), most calls first.
    """

    macs: int
    uncounted: dict[str, int]


def count_fvcore(model: nn.Module, example_inputs: Inputs) -> FvcoreCount:
    """Returns the MACs of `model` for one image by fvcore, and the operators that fvcore does not know.

    One traced forward pass in eval mode without gradients; the model is left as it was.

    Args:
        model: any module with its data: torch.jit cannot trace convolutions on the meta device.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments; see `count_complexity`.

    Raises:
        UserError: fvcore is not installed, or the model cannot be traced.
    """
    inputs = one_item(model, example_inputs)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of torch.jit: that it is old, and that shapes become constants
        try:
            from fvcore.nn import FlopCountAnalysis  # only here: no other counter needs it
        except ImportError as error:
            raise UserError(f"fvcore is not installed: pip install fvcore, or {_OTHER_COUNTERS}") from error
        stack.enter_context(eval_mode(model))
        stack.enter_context(_hooks_kept(model))
        stack.enter_context(no_fast_path())
        stack.enter_context(torch.no_grad())
        analysis = FlopCountAnalysis(_OnTensors(model, inputs), tuple(tensors_in(inputs)))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        try:
            macs, unknown = int(analysis.total()), analysis.unsupported_ops()
        except Exception as error:  # whatever forward code raises while torch.jit traces it
            message = f"the fvcore counter cannot trace this model ({first_line(error)}): {_OTHER_COUNTERS}"
            raise UserError(message) from error
    by_calls = sorted(unknown.items(), key=lambda item: (-item[1], item[0]))
    return FvcoreCount(macs, {name.removeprefix("aten::"): calls for name, calls in by_calls})


class _OnTensors(nn.Module):
    """A model as torch.jit wants it: tensors in, tensors out.

    A model that is called as net(x=image, scale=2.0) and returns {"logits": y} becomes (image,) -> (y,).
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model, self._inputs = model, inputs
        self.training = False

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        left = iter(tensors)
        outputs = call(self.model, map_tensors(self._inputs, lambda _: next(left)))
        return tuple(tensors_in(outputs))


@contextmanager
def _hooks_kept(model: nn.Module) -> Iterator[None]:
    """Removes the hooks that were added meanwhile: fvcore leaves its own behind where a trace fails."""
    before = [(hooks, set(hooks)) for module in model.modules() for hooks in _forward_hooks(module)]
    try:
        yield
    finally:
        for hooks, known in before:
            for key in set(hooks) - known:
                del hooks[key]


def _forward_hooks(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    return module._forward_pre_hooks, module._forward_hooks
