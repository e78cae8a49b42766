"""One model in several processes: replicas that average their gradients (DDP), or one sharded over all (FSDP2)."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from isomorphic.errors import UserError, first_line
from isomorphic.processes import distributed
from isomorphic.training.recipe import NetworkRecipe


def wrap_ddp(model: nn.Module, device: torch.device, recipe: NetworkRecipe) -> nn.Module:
    """Returns `model` in DistributedDataParallel, which averages gradients over all processes in its backward pass.

    Returns `model` itself where there is only one process, and under `recipe.fsdp`: a sharded model (see `shard`)
    averages its gradients without a wrapper.
    """
    if recipe.fsdp or not distributed.is_distributed():
        return model
    wrapped = _DDP(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        static_graph=recipe.static_graph,
    )
    wrapped.broadcast_buffers = False  # not at every step: `engine.share_running_statistics` does so once an epoch
    return wrapped


class _DDP(DistributedDataParallel):
    """DDP that reports in one line the parameters on which the loss does not depend."""

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        try:
            return super().forward(*inputs, **keywords)
        except RuntimeError as error:
            if "Expected to have finished reduction" not in str(error):
                raise
            indices = re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(error))
            names = [name for name, parameter in self.module.named_parameters() if parameter.requires_grad]
            left_out = [names[int(index)] for index in indices[1].split()] if indices else ["some"]
            raise UserError(
                f"parameters that the loss does not depend on: {', '.join(left_out[:3])}"
                f"{' …' if len(left_out) > 3 else ''}; --static-graph trains without them if that is so at every step"
            ) from error


class _Compiled(nn.Module):
    """A module under torch.compile, which compiles at the first batch of each shape."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        if isinstance(network, _DDP):  # the compiler is for the model inside, not for the wrapper's own code
            network.forward = torch.compiler.disable(network.forward, recursive=False)
        self.call: Any = torch.compile(network)

    def forward(self, images: Tensor) -> Any:
        from torch._dynamo.exc import TorchDynamoException
        from torch._inductor.exc import InductorError

        try:
            return self.call(images)
        except (TorchDynamoException, InductorError) as error:
            cause = getattr(error, "inner_exception", error)  # the backend's own error, if it was the backend
            raise UserError(f"--compile does not work here: {first_line(cause)}; leave it out") from error


def compiled(network: nn.Module) -> nn.Module:
    """Returns `network` under torch.compile, which splits a DDP-wrapped one where gradients are exchanged.

    Raises, at its first forward pass:
        UserError: it cannot be compiled here; a CPU needs a C++ compiler for it, a GPU needs Triton.
    """
    return _Compiled(network)


def gradient_sync(network: nn.Module, enabled: bool) -> AbstractContextManager[object]:
    """Returns a context for a batch's forward and backward pass that turns averaging over processes on or off.

    Where several batches make a step, only the last one's pass needs it.
    """
    inner = network.network if isinstance(network, _Compiled) else network
    if isinstance(inner, DistributedDataParallel):
        return nullcontext() if enabled else inner.no_sync()
    for part in distributed.fsdp_modules(inner)[:1]:
        part.set_requires_gradient_sync(enabled)
    return nullcontext()


# --- a sharded model ---

_UNSHARDED = "_unsharded_copy"


def shard(model: nn.Module, device: torch.device, recipe: NetworkRecipe) -> nn.Module:
    """Under `recipe.fsdp`, and with several processes, shards the parameters of `model` over them; in place.

    The optimizer is built afterwards. A sharded model cannot be copied: make the moving average of its weights first,
    and shard that, too. All processes must hold the same weights.
    """
    if recipe.fsdp and distributed.is_distributed():
        unsharded = copy.deepcopy(model).cpu() if distributed.is_main() else None
        distributed.apply_fsdp(model, repeated_blocks(model), device)
        object.__setattr__(model, _UNSHARDED, unsharded)  # past nn.Module, which would register it as a submodule
    return model


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Returns the repeated blocks of a model, such as a ViT's `blocks.0` … `blocks.11`: the units of sharding.

    A block is a module with children and parameters that has siblings of its type in a Sequential or ModuleList, and
    no such block inside.
    """
    blocks: dict[nn.Module, None] = {}  # ordered, each once
    for module in model.modules():
        if isinstance(module, (nn.Sequential, nn.ModuleList)):
            blocks |= {child: None for child in module if _is_repeated(child, module)}
    return [block for block in blocks if not set(block.modules()) & blocks.keys() - {block}]


def _is_repeated(module: nn.Module, container: nn.Module) -> bool:
    alike = [other for other in container.children() if type(other) is type(module)]
    has_parts = any(True for _ in module.children()) and any(True for _ in module.parameters())
    return has_parts and len(alike) > 1 and not isinstance(module, (nn.ModuleList, nn.Sequential))


def unsharded_model(model: nn.Module) -> nn.Module | None:
    """Returns the model to write a checkpoint of: `model`, or where it is sharded, a copy with its full weights.

    The copy is on the CPU of the first process; the others get None. All processes call this.
    """
    if not distributed.fsdp_modules(model):
        return model
    state, unsharded = distributed.full_state(model), getattr(model, _UNSHARDED)
    if unsharded is not None:
        unsharded.load_state_dict(state)
        unsharded.train(model.training)
    return unsharded


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Gathers all parameters of a sharded model in every process, which can then run it without the others."""
    parts = distributed.fsdp_modules(model)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for number, part in enumerate(parts):
            part.reshard()
            part.set_reshard_after_forward(number > 0, recurse=False)  # the root is needed first in the backward pass


def model_state(model: nn.Module) -> dict[str, Any]:
    """Returns the state dict of a model; of a sharded one in the first process only. All processes call this."""
    return distributed.full_state(model) if distributed.fsdp_modules(model) else model.state_dict()


def load_model_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Loads a state of `model_state` into a model, sharded or not; every process passes the full state."""
    if distributed.fsdp_modules(model):
        distributed.load_full_state(model, state)
    else:
        model.load_state_dict(state)


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Returns `Optimizer.state_dict()` with parameters by their names in `model`, the same for a sharded model.

    Of a sharded model, only the first process gets it. All processes call this.
    """
    if distributed.fsdp_modules(model):
        return distributed.full_state(model, optimizer)
    names, state = _names(model, optimizer), optimizer.state_dict()
    groups = [group | {"params": [names[index] for index in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[index]: values for index, values in state["state"].items()}, "param_groups": groups}


def load_optimizer_state(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Loads a state of `optimizer_state` into an optimizer of the same groups; every process passes the full state.

    Raises:
        UserError: the groups are of other parameters.
    """
    expected = [set(group["params"]) for group in optimizer_groups(model, optimizer)]
    if expected != [set(group["params"]) for group in state["param_groups"]]:
        raise UserError("the optimizer of the training state has other parameters than this model's")
    if distributed.fsdp_modules(model):
        distributed.load_full_state(model, state, optimizer)
        return
    indices = {name: index for index, name in enumerate(_names(model, optimizer))}
    groups = [
        group | {"params": [indices[name] for name in current["params"]]}
        for group, current in zip(state["param_groups"], optimizer_groups(model, optimizer), strict=True)
    ]
    optimizer.load_state_dict(
        {"state": {indices[name]: values for name, values in state["state"].items()}, "param_groups": groups}
    )


def optimizer_groups(model: nn.Module, optimizer: Optimizer) -> list[dict[str, Any]]:
    """Returns the optimizer's parameter groups with parameters by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [group | {"params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups]


def _names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Returns the names of the optimizer's parameters, in the order of its state dict."""
    return [name for group in optimizer_groups(model, optimizer) for name in group["params"]]
