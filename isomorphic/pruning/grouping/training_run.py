"""Does a model do something in training that it does not do in eval mode? Then it has to be traced in training, too.

Auxiliary heads and deep supervision return, or add, in training what eval mode computes in vain: classes that nothing
in eval mode keeps in place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from isomorphic.inputs import Inputs, call, map_tensors
from isomorphic.measure.meta_outputs import ShapeKernels
from isomorphic.pruning.grouping.memory import remembering_nothing
from isomorphic.pruning.grouping.trial import is_watched, shapes_of

# Stochastic depth, which timm and torchvision spell out: noise.bernoulli_(p).div_(p), times a block's output. What is
# returned is the same in eval mode.
_OF_DROPPED_PATHS = frozenset({"new_empty", "empty", "bernoulli_", "div_", "mul", "__mul__"})


def doubled(inputs: Inputs) -> Inputs:
    """Returns the inputs twice, one after the other: batch norms want more than one value in training."""
    return map_tensors(inputs, lambda tensor: torch.cat([tensor, tensor]) if tensor.dim() else tensor)


def does_more_in_training(
    model: nn.Module, inputs: Inputs, eval_calls: Iterable[Any], eval_shapes: Sequence[torch.Size]
) -> bool:
    """Returns True where training calls what eval mode does not, or returns something else; the mode stays training.

    It takes a few percent of a trace. A batch norm that counts its batches is no difference.

    Args:
        model: run once.
        inputs: of a batch that it can be trained on.
        eval_calls: torch functions that it called in eval mode.
        eval_shapes: of its outputs there, for a batch of another size.
    """
    calls = Counter[Any]()

    def note(func: Any, arguments: Sequence[Any]) -> None:
        counts_batches = func is Tensor.add_ and not arguments[0].is_floating_point()
        if is_watched(func) and not counts_batches:
            calls[func] += 1

    with torch.inference_mode(), ShapeKernels(), remembering_nothing(model, before=note) as memory:
        memory.outputs = call(model.train(), inputs)
    more = calls - Counter(eval_calls)
    dropped = sum(count for func, count in more.items() if func.__name__ == "bernoulli_")
    more -= Counter({func: dropped for func in more if func.__name__ in _OF_DROPPED_PATHS})
    return bool(more) or [shape[1:] for shape in shapes_of(memory.outputs)] != [shape[1:] for shape in eval_shapes]
