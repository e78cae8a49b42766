"""How much memory one forward pass takes at its peak, weights included."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from isomorphic.inputs import tensors_in


def weight_bytes(model: nn.Module) -> int:
    """Returns the bytes of all parameters and buffers, shared ones once."""
    storages = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr() or id(tensor)] = storage.nbytes()
    return sum(storages.values())


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Returns the most bytes that `run` holds at a time beyond those that were there before it.

    On CUDA the allocator says so, workspaces of kernels included. Elsewhere it is the sum of the tensors that
    operations return, for as long as anybody holds them; what an operation takes for itself alone is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveTensors() as live:
        run()
    return live.peak


class _LiveTensors(TorchDispatchMode):
    """Adds up the storages that operations return, until they are gone."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        own = {tensor.untyped_storage()._cdata for tensor in tensors_in([args, kwargs])}
        output = func(*args, **kwargs)
        for tensor in tensors_in(output):
            storage = tensor.untyped_storage()
            if storage._cdata not in own | self._known:  # a view has the storage of an argument
                self._note(storage)
        return output

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self._bytes += size
        self.peak = max(self.peak, self._bytes)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._bytes -= size
