"""Two models run side by side: each layer of the one is shown with what the same layer of the other saw and made.

The pruned model runs in the calling thread, the dense one in a second thread that waits at every watched layer until
the pruned model has come there, too, and is done with it. They share nothing else, so nothing is random; and no
activation outlives the layer that reads it, whatever the depth of the model.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from isomorphic.errors import UserError
from isomorphic.measure.eval_mode import eval_mode


class Seen(NamedTuple):
    """What a layer of the dense model saw and made."""

    name: str
    inputs: Tensor
    outputs: Tensor


# (name, what the dense layer saw and made, what the pruned layer is about to see)
Visit = Callable[[Seen, Tensor], None]


class _Ended(Exception):
    """The other model has stopped: this one need not go on."""


class _Handover:
    """The dense model's thread gives one `Seen` at a time, and goes on when it is done with."""

    def __init__(self) -> None:
        self._seen: queue.Queue[Seen | BaseException | None] = queue.Queue()
        self._done: queue.Queue[bool] = queue.Queue()

    def give(self, seen: Seen) -> None:
        self._seen.put(seen)
        if not self._done.get():
            raise _Ended

    def end(self, error: BaseException | None) -> None:
        self._seen.put(error)

    @contextlib.contextmanager
    def take(self, name: str) -> Iterator[Seen]:
        seen = self._seen.get()
        if isinstance(seen, BaseException):
            raise seen
        if seen is None or seen.name != name:
            raise UserError(f"the pruned model comes to {name} where the dense one does not")
        yield seen
        self._done.put(True)

    def finish(self) -> None:
        """Waits for the dense model's end."""
        seen = self._seen.get()
        if isinstance(seen, BaseException):
            raise seen
        if seen is not None:
            raise UserError(f"the dense model comes to {seen.name} where the pruned one does not")

    def stop(self) -> None:
        self._done.put(False)


@torch.no_grad()
def run_side_by_side(dense: nn.Module, pruned: nn.Module, images: Tensor, names: Sequence[str], visit: Visit) -> None:
    """Runs both models on `images`, in eval mode, and calls `visit` at every layer in `names`, in forward order.

    `visit` may change the pruned layer's weights, which then makes its outputs with the new ones.

    Args:
        dense, pruned: they have layers of these names, which run once and in the same order.
        images: what both run on, as one batch (N, C, H, W).
        names: of modules with one tensor as input and one as output.

    Raises:
        UserError: one model comes to another layer than the other.
    """
    handover = _Handover()
    device = torch.cuda.device(images.device) if images.is_cuda else contextlib.nullcontext()

    def show(name: str) -> Callable[..., None]:
        return lambda module, inputs, outputs: handover.give(Seen(name, inputs[0], outputs))

    def meet(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            with handover.take(name) as seen:
                visit(seen, inputs[0])

        return hook

    def run_dense() -> None:
        error: BaseException | None = None
        try:
            with torch.no_grad(), device:  # which hold for the thread that asks for them
                dense(images)
        except _Ended:
            return
        except BaseException as caught:
            error = caught
        handover.end(error)

    handles = [dense.get_submodule(name).register_forward_hook(show(name)) for name in names]
    handles += [pruned.get_submodule(name).register_forward_pre_hook(meet(name)) for name in names]
    thread = threading.Thread(target=run_dense, name="dense model", daemon=True)
    with eval_mode(dense), eval_mode(pruned):
        try:
            thread.start()
            pruned(images)
            handover.finish()
        finally:
            handover.stop()
            thread.join()
            for handle in handles:
                handle.remove()
