"""All that the project knows about processes: who am I, and how do we add up.

The only file that imports ``torch.distributed``. Every query answers sensibly in a single process that never
called `init`: rank 0 of 1, collectives that hand back what they were given.
"""

from __future__ import annotations

import os
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from isomorphic.errors import UserError

T = TypeVar("T")


def is_distributed() -> bool:
    """True between `init` under torchrun and `shutdown`."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process among all, 0 where there is only one."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """How many processes work together, 1 where nothing was initialised."""
    return dist.get_world_size() if is_distributed() else 1


def local_rank() -> int:
    """This process among those of its machine: the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """True in the one process that prints and writes files."""
    return rank() == 0


def init(device: torch.device | str) -> None:
    """Join the process group that torchrun's environment describes: nccl for CUDA devices, gloo otherwise.

    Does nothing without ``RANK`` in the environment (a plain ``python`` run) or when the group is there.
    On CUDA the process also takes the GPU of its local rank, so that its tensors and collectives meet there.
    Raises `UserError` where torchrun started more processes than the machine has GPUs.
    """
    if "RANK" not in os.environ or is_distributed():
        return
    if torch.device(device).type != "cuda":
        dist.init_process_group(backend="gloo")
        return
    if local_rank() >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank()} of this machine finds {torch.cuda.device_count()} GPUs: "
            "start torchrun with at most that many processes (--nproc_per_node), or pass --device cpu"
        )
    gpu = torch.device("cuda", local_rank())
    torch.cuda.set_device(gpu)
    dist.init_process_group(backend="nccl", device_id=gpu)


def shutdown() -> None:
    """Leave the process group; harmless where there is none."""
    if is_distributed():
        dist.destroy_process_group()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Add `tensor` over all processes, in place, and return it. Under nccl it must live on a CUDA device."""
    if is_distributed():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def gather_objects(obj: T) -> list[T]:
    """The picklable `obj` of every process, in order of rank, in every process."""
    if not is_distributed():
        return [obj]
    boxes: list[Any] = [None] * world_size()
    dist.all_gather_object(boxes, obj)
    return boxes
