"""From the loader to the device, one batch ahead of its use."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator

import torch

from isomorphic.data.workers import naming_dead_workers
from isomorphic.training.sampling import RawBatch


def prefetch(loader: Iterable[RawBatch], device: torch.device | str) -> Generator[RawBatch, None, None]:
    """The batches of `loader`, in order, on `device`; closed early, it leaves the loader ready for another pass.

    On CUDA the next batch is loaded, and its copy queued on a stream of its own, before this one is handed out: the
    copy runs beside whatever is done with this one. Elsewhere a batch is loaded when it is asked for.

    Raises:
        UserError: an image cannot be read; a worker process died while a batch was waited for (see
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
            # pinned memory is not given to another batch before its copy has run: torch's allocator sees to that
            copy = RawBatch(*(part.to(device, non_blocking=True) for part in batch))
            copied = torch.cuda.Event()
            copied.record(side)
        if ahead is not None:
            yield _hand_over(*ahead)
        ahead = copy, copied
    if ahead is not None:
        yield _hand_over(*ahead)


def _hand_over(batch: RawBatch, copied: torch.cuda.Event) -> RawBatch:
    """Lets the current stream wait for this batch's copy alone, not for the next one's, which is queued already."""
    current = torch.cuda.current_stream(batch.images.device)
    current.wait_event(copied)
    for part in batch:
        part.record_stream(current)  # its memory belongs to the side stream, which may not reuse it while we work
    return batch
