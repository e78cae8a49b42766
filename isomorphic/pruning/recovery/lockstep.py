"""Two models run side by side: what each layer of the one sees is shown with what the same layer of the other made.

The pruned model runs in the calling thread, the dense one in a second thread, and they take turns: when the pruned
model comes to a watched layer, the dense one runs until it has been there, and stops. As only one of them computes at
any time, nothing is random and neither takes the cores from the other; and of the activations only those of the layer
at hand are kept, whatever the depth of the model.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from isomorphic.errors import UserError
from isomorphic.inputs import Inputs, call, device_of
from isomorphic.observe import eval_mode, module_calls


class Seen(NamedTuple):
    """What a layer of the dense model made."""

    name: str
    outputs: Tensor


# (what the dense layer made, what the pruned layer is about to see)
Visit = Callable[[Seen, Tensor], None]


class _Ended(BaseException):
    """The other model has stopped: this one need not go on, and no model's own code should hold it up."""


class _Turns:
    """The dense model's thread waits for its turn, and ends it by handing over a `Seen`, or how it has ended."""

    def __init__(self) -> None:
        self._seen: queue.Queue[Seen | BaseException | None] = queue.Queue()
        self._go_on: queue.Queue[bool] = queue.Queue()

    def wait(self) -> None:
        """In the dense model's thread: until it may run."""
        if not self._go_on.get():
            self.stop()  # for whoever asks again
            raise _Ended

    def hand_over(self, seen: Seen | BaseException | None) -> None:
        """In the dense model's thread: what it has seen, what has stopped it, or None at its end."""
        self._seen.put(seen)

    def next(self) -> Seen | None:
        """In the calling thread: lets the dense model run to its next layer, or its end."""
        self._go_on.put(True)
        seen = self._seen.get()
        if isinstance(seen, BaseException):
            raise seen
        return seen

    def stop(self) -> None:
        """The dense model need not go on."""
        self._go_on.put(False)


@torch.no_grad()
def run_side_by_side(dense: nn.Module, pruned: nn.Module, images: Inputs, names: Sequence[str], visit: Visit) -> None:
    """Runs both models on `images`, in eval mode, and calls `visit` at every layer in `names`, in forward order.

    `visit` may change the pruned layer's weights, which then makes its outputs with the new ones.

    Args:
        dense, pruned: they have layers of these names, which run once and in the same order.
        images: what both run on, as one batch.
        names: of modules with one tensor as input and one as output.

    Raises:
        UserError: one model comes to another layer than the other.
    """
    turns = _Turns()
    place = device_of(images)
    device = torch.cuda.device(place) if place.type == "cuda" else contextlib.nullcontext()

    def show(name: str, outputs: Tensor) -> None:
        turns.hand_over(Seen(name, outputs))
        turns.wait()

    def meet(name: str, positional: tuple[Any, ...], keyword: dict[str, Any]) -> None:
        seen = turns.next()
        if seen is None or seen.name != name:
            raise UserError(f"the pruned model comes to {name} where the dense one does not")
        visit(seen, positional[0])

    def run_dense() -> None:
        end: BaseException | None = None
        try:
            turns.wait()
            with torch.no_grad(), device:  # which hold for the thread that asks for them
                call(dense, images)
        except _Ended:
            return
        except BaseException as error:
            end = error
        turns.hand_over(end)

    thread = threading.Thread(target=run_dense, name="dense model", daemon=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(module_calls({name: dense.get_submodule(name) for name in names}, after=show))
        stack.enter_context(module_calls({name: pruned.get_submodule(name) for name in names}, before=meet))
        stack.enter_context(eval_mode(dense))
        stack.enter_context(eval_mode(pruned))
        thread.start()
        stack.callback(thread.join)
        stack.callback(turns.stop)
        call(pruned, images)
        if left := turns.next():
            raise UserError(f"the dense model comes to {left.name} where the pruned one does not")
