"""All that the project knows about processes: who am I, how do we add up, and what do we share.

The only file that imports ``torch.distributed``. Every query answers sensibly in a single process that never
called `init`: rank 0 of 1, collectives that hand back what they were given.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.optim import Optimizer

from isomorphic.errors import UserError
from isomorphic.processes.failing import LATE, Board, LostContact, Watch, end_process

T = TypeVar("T")

# What gloo says where another process is gone.
_GONE = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


class _Here:
    """What this process holds while it is one of many."""

    board: Board | None = None
    watch: Watch | None = None
    cpu_group: Any = None


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


def mark_under_way() -> None:
    """Lets the processes that torchrun may start after these know that there is something to go on with."""
    if _Here.board and is_main():
        _Here.board.store.set("under way", "")


def is_under_way() -> bool:
    """Whether processes of the same torchrun before these came as far as `mark_under_way`. All processes call this."""
    return any(gather_objects(bool(_Here.board and is_main() and _Here.board.store.check(["under way"]))))


def init(device: torch.device | str) -> None:
    """Join the process group that torchrun's environment describes: nccl for CUDA devices, gloo otherwise.

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
    board = _Here.board or Board(store.clone(), number, size)
    board.meet()
    _Here.board = board
    _Here.watch = Watch(Board(store.clone(), number, size, name=board.name), lost=_lost_store)
    _Here.watch.start()
    dist.init_process_group(
        backend="nccl" if gpu else "gloo",
        store=dist.PrefixStore(board.name, store),  # pyright: ignore[reportPrivateImportUsage]
        # the store still holds what attempts before this one wrote
        rank=number,
        world_size=size,
        device_id=gpu,
    )
    _Here.cpu_group = dist.new_group(backend="gloo")


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
    """Leave the process group; harmless where there is none."""
    if _Here.watch:
        _Here.watch.stop()
    _Here.board = _Here.watch = _Here.cpu_group = None
    if is_distributed():
        dist.destroy_process_group()


# --- when something goes wrong ---


def is_lost_contact(error: BaseException | None) -> bool:
    """Whether `error`, or what it was raised from, only says that another process is gone."""
    while error is not None:
        if isinstance(error, (LostContact, dist.DistBackendError, dist.DistNetworkError)):
            return True
        if isinstance(error, RuntimeError) and any(words in str(error) for words in _GONE):
            return True
        error = error.__cause__
    return False


def claim_report(*, patience: float = 0.0) -> bool:
    """True in the process that has to say what went wrong: the first of all that fails, before or after `init`.

    One whose failure looks like the consequence of another's waits `patience` seconds for that one to claim.
    """
    board = _Here.board or _agents_board()
    try:
        return board is None or board.claim(patience=patience)
    except RuntimeError:  # the store is gone, and with it those who would know
        return True


def whoami() -> str:
    """ "rank 1 of 2: " where there are several processes, before `init` too."""
    size = os.environ.get("WORLD_SIZE", "1") if "RANK" in os.environ else "1"
    return "" if size == "1" else f"rank {os.environ['RANK']} of {size}: "


def leave(status: int, *, at_once: bool = False) -> NoReturn:
    """Ends this process with what it has printed, after a failure: without the others, whom it may not reach any more.

    In a process that is none of many it is `sys.exit`, unless what that does at the end may wait forever: `at_once`.
    """
    if at_once or is_distributed():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        end_process(status)
    sys.exit(status)


def _agents_board() -> Board | None:
    """The board of a process that fails before `init`: only torchrun's store is there without waiting for others."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or "RANK" not in os.environ:
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    seconds = timedelta(seconds=LATE)  # a name that is looked up may take five
    try:
        store = dist.TCPStore(address, port, is_master=False, timeout=seconds)  # pyright: ignore[reportPrivateImportUsage]
    except RuntimeError:
        return None
    _Here.board = Board(store, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    return _Here.board


def _lost_store() -> None:
    """torchrun's store ends with torchrun; that of a first process which was started by hand ends with its work."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    if local_rank() == 0:
        print("lost contact with torchrun's first host", file=sys.stderr, flush=True)
    end_process(1)


# --- collectives ---


def barrier() -> None:
    """Waits for all processes, without the device."""
    if is_distributed():
        dist.all_reduce(torch.zeros(1), group=_Here.cpu_group)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Add `tensor` over all processes, in place, and return it. Under nccl it must live on a CUDA device."""
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
    """The sum of `tensor` over all processes, for a loss that is the sum of theirs; all must go backward through it."""
    return _Sum.apply(tensor) if is_distributed() else tensor  # type: ignore[return-value]


def gather_objects(obj: T) -> list[T]:
    """The picklable `obj` of every process, in order of rank, in every process."""
    if not is_distributed():
        return [obj]
    boxes: list[Any] = [None] * world_size()
    dist.all_gather_object(boxes, obj)
    return boxes


class Question:
    """What is the largest of the processes' numbers? Asked when it is made, on the CPU, in all of them."""

    def __init__(self, number: int) -> None:
        self._number = torch.tensor(number)
        self._work: Any = dist.all_reduce(self._number, op=dist.ReduceOp.MAX, group=_Here.cpu_group, async_op=True)

    def answer(self) -> int:
        """Waits until all have asked. Raises `LostContact` where one is gone."""
        try:
            self._work.wait()
        except RuntimeError as error:
            raise LostContact.because(error) from error
        return int(self._number)


# --- sharded models (FSDP2); its modules take a second to import, so that happens where one is asked for ---


def shard(model: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Spreads the parameters of `model` over all processes, in place; a block's are put together while it runs.

    They are other parameters afterwards, so the optimizer comes later, and the model cannot be copied any more.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def sharded_parts(model: nn.Module) -> list[Any]:
    """The modules of `model` that `shard` has gone over, `model` first; none of a plain one."""
    if "torch.distributed.fsdp" not in sys.modules:
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor of a sharded model, perhaps nothing; a plain tensor is held as a whole."""
    to_local = getattr(tensor, "to_local", None)
    return to_local() if to_local else tensor


def whole_state(model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, Any]:
    """The state of a sharded model, or of its optimizer, on the CPU of the first process; empty in the others.

    An optimizer's is {"state": {name: …}, "param_groups": […]}, with its parameters by name. All processes call this.
    """
    from torch.distributed.checkpoint import state_dict as api

    options = api.StateDictOptions(full_state_dict=True, cpu_offload=True)
    if optimizer is None:
        return api.get_model_state_dict(model, options=options)
    return dict(api.get_optimizer_state_dict(model, optimizer, options=options))


def load_whole_state(model: nn.Module, state: dict[str, Any], optimizer: Optimizer | None = None) -> None:
    """Puts what `whole_state` gave back: every process hands over the whole of it."""
    from torch.distributed.checkpoint import state_dict as api

    options = api.StateDictOptions(full_state_dict=True)
    if optimizer is None:
        api.set_model_state_dict(model, dict(state), options=options)  # which it changes
        return
    mine: dict[str, Any] = {
        "state": {name: dict(values) for name, values in state["state"].items()},
        "param_groups": [dict(group) for group in state["param_groups"]],
    }
    api.set_optimizer_state_dict(model, optimizer, mine, options=options)
