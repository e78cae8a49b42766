"""Copies batches from the loader to the device, one batch ahead of their use."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator

import torch

from isomorphic.data.workers import naming_dead_workers
from isomorphic.training.sampling import RawBatch


def prefetch(loader: Iterable[RawBatch], device: torch.device | str) -> Generator[RawBatch, None, None]:
    """Yields the batches of `loader`, in order, on `device`; if closed early, the loader is ready for another pass.

    On CUDA the next batch is loaded, and its copy queued on a separate stream, before this one is yielded: the copy
    runs while this batch is used. On other devices a batch is loaded when it is needed.

    Raises:
        UserError: an image cannot be read; a worker process died while its batch was awaited (see
            `naming_dead_workers` for one that dies while a batch is used).
    """
    device = torch.device(device)
    with naming_dead_workers():
        if device.type == "cuda":
            yield from _copied_ahead(loader, device)
        else:
            for batch in loader:
                yield RawBatch(*(part.to(device) for part in batch))


def _copied_ahead(loader: Iterable[RawBatch], device: torch.device) -> Iterator[RawBatch]:
    side = torch.cuda.Stream(device)
    ahead: tuple[RawBatch, torch.cuda.Event] | None = None
    for batch in loader:
        with torch.cuda.stream(side):
            # torch's allocator does not reuse this pinned memory before the copy is done
            copy = RawBatch(*(part.to(device, non_blocking=True) for part in batch))
            copied = torch.cuda.Event()
            copied.record(side)
        if ahead is not None:
            yield _hand_over(*ahead)
        ahead = copy, copied
    if ahead is not None:
        yield _hand_over(*ahead)


def _hand_over(batch: RawBatch, copied: torch.cuda.Event) -> RawBatch:
    """Makes the current stream wait for this batch's copy, but not for the next one, which is already queued."""
    current = torch.cuda.current_stream(batch.images.device)
    current.wait_event(copied)
    for part in batch:
        part.record_stream(current)  # allocated on the side stream, which must not reuse it before we are done
    return batch
