"""All that the project knows about processes: ranks, collectives, sharded models.

The only file that imports ``torch.distributed``. Everything here also works in a single process that never called
`init`: it is rank 0 of 1, and collectives return their argument.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.optim import Optimizer

from isomorphic.errors import UserError
from isomorphic.processes import launchers
from isomorphic.processes.failing import (
    GRACE_SECONDS,
    LATE_SECONDS,
    POLL_SECONDS,
    FailureMonitor,
    FailureStore,
    LostContact,
    end_process,
)
from isomorphic.torch_versions import second_client

T = TypeVar("T")

# Parts of gloo's messages where another process is gone.
_GONE = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


class _Joined:
    """Set by `init` and cleared by `shutdown`, once per process as torch's default process group is."""

    failures: FailureStore | None = None
    monitor: FailureMonitor | None = None
    cpu_group: Any = None
    launcher: str | None = None  # of processes that torchrun did not start


def is_distributed() -> bool:
    """Returns True between `init` under torchrun and `shutdown`."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Returns this process's number among all, 0 where there is only one."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Returns the number of processes that work together, 1 where nothing was initialised."""
    return dist.get_world_size() if is_distributed() else 1


def local_rank() -> int:
    """Returns this process's number among those of its machine: the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Returns True in the one process that prints and writes files."""
    return rank() == 0


def adopt_launcher() -> None:
    """Tells a process that srun or mpirun started beside others who it is, as torchrun would have; see `launchers`.

    Raises:
        UserError: they cannot find each other by what the launcher says.
    """
    if task := launchers.find_task(os.environ):
        os.environ.update(launchers.join_variables(task, os.environ))
        _Joined.launcher = task.launcher


def launcher() -> str | None:
    """Returns the name of the launcher, other than torchrun, whose processes work together here."""
    return _Joined.launcher


def mark_started() -> None:
    """Notes in torchrun's store that the work has begun, for the processes that torchrun starts after a failure."""
    if _Joined.failures and is_main():
        _Joined.failures.store.set("started", "")


def is_restart() -> bool:
    """Returns True where earlier processes of the same torchrun have called `mark_started`. All processes call this."""
    was_started = bool(_Joined.failures and is_main() and _Joined.failures.store.check(["started"]))
    return any(gather_objects(was_started))


def init(device: torch.device | str) -> None:
    """Joins the process group that torchrun's environment describes: nccl for CUDA devices, gloo otherwise.

    Does nothing without ``RANK`` in the environment (a plain ``python`` run) or when the group is there.
    On CUDA the process also takes the GPU of its local rank, so that its tensors and collectives meet there.
    From then on this process ends when another one fails (see `failing`).

    Raises:
        UserError: torchrun started more processes than the machine has GPUs.
        OthersFailed, LostContact: not all processes get here.
    """
    if "RANK" not in os.environ or is_distributed():
        return
    gpu = _take_gpu() if torch.device(device).type == "cuda" else None
    store, number, size = next(rendezvous("env://"))
    failures = _Joined.failures or FailureStore(second_client(store), number, size)
    failures.rendezvous()
    _Joined.failures = failures
    monitored = FailureStore(second_client(store), number, size, attempt=failures.attempt)
    _Joined.monitor = FailureMonitor(monitored, on_lost_store=_end_with_torchrun)
    _Joined.monitor.start()
    dist.init_process_group(
        backend="nccl" if gpu else "gloo",
        # the store still holds what attempts before this one wrote
        store=dist.PrefixStore(failures.attempt, store),  # pyright: ignore[reportPrivateImportUsage]
        rank=number,
        world_size=size,
        device_id=gpu,
    )
    _Joined.cpu_group = dist.new_group(backend="gloo")


def _take_gpu() -> torch.device:
    if local_rank() >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank()} of this machine finds {torch.cuda.device_count()} GPUs: "
            "start torchrun with at most that many processes (--nproc_per_node), or pass --device cpu"
        )
    gpu = torch.device("cuda", local_rank())
    torch.cuda.set_device(gpu)
    return gpu


def shutdown() -> None:
    """Leaves the process group; harmless where there is none."""
    if _Joined.monitor:
        _Joined.monitor.stop()
    _Joined.failures = _Joined.monitor = _Joined.cpu_group = None
    if is_distributed():
        dist.destroy_process_group()


# --- when something goes wrong ---


def is_lost_contact(error: BaseException | None) -> bool:
    """Returns True where `error`, or one that it was raised from, only says that another process is gone."""
    while error is not None:
        if isinstance(error, (LostContact, dist.DistBackendError, dist.DistNetworkError)):
            return True
        if isinstance(error, RuntimeError) and any(words in str(error) for words in _GONE):
            return True
        error = error.__cause__
    return False


def claim_first_report(*, patience: float = 0.0) -> bool:
    """Returns True in the process that has to say what went wrong: the first of all that fails, before or after `init`.

    One whose failure looks like the consequence of another's waits `patience` seconds for that one to claim.
    """
    failures = _Joined.failures or _failures_before_init()
    try:
        return failures is None or failures.claim_first_report(patience=patience)
    except RuntimeError:  # the store is gone, and nobody else can be asked
        return True


def rank_prefix() -> str:
    """Returns "rank 1 of 2: " where there are several processes, before `init` too, else ""."""
    size = os.environ.get("WORLD_SIZE", "1") if "RANK" in os.environ else "1"
    return "" if size == "1" else f"rank {os.environ['RANK']} of {size}: "


def exit_alone(status: int, *, at_once: bool = False) -> NoReturn:
    """Ends this process after a failure, its output flushed, without waiting for the others: they may be gone.

    In a single process it is `sys.exit`, unless `at_once` is set because exit handlers might wait forever.
    """
    if at_once or is_distributed():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        if is_distributed() and is_main() and not _has_agent():
            time.sleep(POLL_SECONDS + 2 * GRACE_SECONDS)  # the store ends with this process, and the others ask it
        end_process(status)
    sys.exit(status)


def _has_agent() -> bool:
    """Returns True where torchrun keeps the store; otherwise the first process does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _failures_before_init() -> FailureStore | None:
    """Returns the store of a process that fails before `init`: torchrun's, which is there without waiting for others.

    None where there is no torchrun, or its store cannot be reached.
    """
    if not _has_agent() or "RANK" not in os.environ:
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    seconds = timedelta(seconds=LATE_SECONDS)  # a name that is looked up may take five
    try:
        store = dist.TCPStore(address, port, is_master=False, timeout=seconds)  # pyright: ignore[reportPrivateImportUsage]
    except RuntimeError:
        return None
    _Joined.failures = FailureStore(store, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    return _Joined.failures


def _end_with_torchrun() -> None:
    """Ends this process, since the store is gone and torchrun with it.

    A store that rank 0 holds itself, in a run started by hand, ends when rank 0's work does: then nothing is wrong.
    """
    if not _has_agent():
        return
    if local_rank() == 0:
        print("lost contact with torchrun's first host", file=sys.stderr, flush=True)
    end_process(1)


# --- collectives ---


def barrier() -> None:
    """Waits for all processes, without the device."""
    if is_distributed():
        dist.all_reduce(torch.zeros(1), group=_Joined.cpu_group)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Adds `tensor` over all processes, in place, and returns it. Under nccl it must live on a CUDA device."""
    if is_distributed():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


class _Sum(torch.autograd.Function):
    """The sum over processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return all_reduce_sum(tensor.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return all_reduce_sum(gradients[0].contiguous().clone())


def differentiable_sum(tensor: Tensor) -> Tensor:
    """Returns the sum of `tensor` over all processes, for a loss that is their sum; all must go backward through it."""
    return _Sum.apply(tensor) if is_distributed() else tensor  # type: ignore[return-value]


def gather_objects(obj: T) -> list[T]:
    """Returns the picklable `obj` of every process, in order of rank, in every process."""
    if not is_distributed():
        return [obj]
    boxes: list[Any] = [None] * world_size()
    dist.all_gather_object(boxes, obj)
    return boxes


class PendingMax:
    """The largest of one number per process, while it is being found: an asynchronous all-reduce on the CPU.

    Every process makes one, with its number, and calls `wait` later.
    """

    def __init__(self, number: int) -> None:
        self._number = torch.tensor(number)
        self._work: Any = dist.all_reduce(self._number, op=dist.ReduceOp.MAX, group=_Joined.cpu_group, async_op=True)

    def wait(self) -> int:
        """Returns the largest number, once all processes have started. Raises `LostContact` where one is gone."""
        try:
            self._work.wait()
        except RuntimeError as error:
            raise LostContact.because(error) from error
        return int(self._number)


# --- sharded models (FSDP2); its modules take a second to import, so that happens where one is asked for ---


def apply_fsdp(model: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Shards the parameters of `model` over all processes, in place; a block's are gathered while it runs.

    They are other parameters afterwards, so the optimizer comes later, and the model cannot be copied any more.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def fsdp_modules(model: nn.Module) -> list[Any]:
    """Returns the modules of `model` that `apply_fsdp` has sharded, `model` first; none of an unsharded one."""
    if "torch.distributed.fsdp" not in sys.modules:
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def local_shard(tensor: Tensor) -> Tensor:
    """Returns this process's shard of a sharded model's tensor, perhaps empty; any other tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    return to_local() if to_local else tensor


def full_state(model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, Any]:
    """Returns the state of a sharded model, or of its optimizer, on the CPU of the first process; {} in the others.

    An optimizer's is {"state": {name: …}, "param_groups": […]}, with its parameters by name. All processes call this.
    """
    from torch.distributed.checkpoint import state_dict as api

    options = api.StateDictOptions(full_state_dict=True, cpu_offload=True)
    if optimizer is None:
        return api.get_model_state_dict(model, options=options)
    return dict(api.get_optimizer_state_dict(model, optimizer, options=options))


def load_full_state(model: nn.Module, state: dict[str, Any], optimizer: Optimizer | None = None) -> None:
    """Loads a state of `full_state` into a sharded model, or its optimizer; every process passes the full state."""
    from torch.distributed.checkpoint import state_dict as api

    options = api.StateDictOptions(full_state_dict=True)
    if optimizer is None:
        api.set_model_state_dict(model, dict(state), options=options)  # it changes the dictionary
        return
    # a copy of every dictionary that it changes
    copied: dict[str, Any] = {
        "state": {name: dict(values) for name, values in state["state"].items()},
        "param_groups": [dict(group) for group in state["param_groups"]],
    }
    api.set_optimizer_state_dict(model, optimizer, copied, options=options)
