"""One model over several processes: copies that share gradients, or one whose parameters are spread over all."""

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


def over_processes(model: nn.Module, device: torch.device, recipe: NetworkRecipe) -> nn.Module:
    """The model whose backward pass averages gradients over all processes; itself where there is only one.

    Under `recipe.fsdp` that is `model` itself, its parameters spread over the processes (see `spread`).
    """
    if not distributed.is_distributed():
        return model
    if recipe.fsdp:
        return spread(model, device, recipe)
    copies = _Copies(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        static_graph=recipe.static_graph,
    )
    copies.broadcast_buffers = False  # not at every step: `engine.share_running_statistics` does so once an epoch
    return copies


class _Copies(DistributedDataParallel):
    """DDP, which says in one line where parameters were left out of the loss."""

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
    """A module under torch.compile; the first batch of a kind compiles."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        if isinstance(network, _Copies):  # whose own code is not for the compiler, in contrast to the model inside
            network.forward = torch.compiler.disable(network.forward, recursive=False)
        self.call: Any = torch.compile(network)

    def forward(self, images: Tensor) -> Any:
        from torch._dynamo.exc import TorchDynamoException
        from torch._inductor.exc import InductorError

        try:
            return self.call(images)
        except (TorchDynamoException, InductorError) as error:
            cause = getattr(error, "inner_exception", error)  # what the backend raised, where it was the backend
            raise UserError(f"--compile does not work here: {first_line(cause)}; leave it out") from error


def compiled(network: nn.Module) -> nn.Module:
    """What `over_processes` gave, under torch.compile, which splits it where gradients are exchanged.

    Raises, at its first forward pass:
        UserError: it cannot be compiled here; a CPU needs a C++ compiler for it, a GPU needs Triton.
    """
    return _Compiled(network)


def gradient_sync(network: nn.Module, enabled: bool) -> AbstractContextManager[object]:
    """Around the forward and backward pass of a batch: whether gradients are averaged over processes after it.

    Where several batches make a step, only the last one's pass has to.
    """
    inner = network.network if isinstance(network, _Compiled) else network
    if isinstance(inner, DistributedDataParallel):
        return nullcontext() if enabled else inner.no_sync()
    for part in distributed.fsdp_modules(inner)[:1]:
        part.set_requires_gradient_sync(enabled)
    return nullcontext()


# --- a sharded model ---


def spread(model: nn.Module, device: torch.device, recipe: NetworkRecipe) -> nn.Module:
    """Under `recipe.fsdp`, and with several processes, spreads the parameters of `model` over them, in place.

    The optimizer is built afterwards. A sharded model cannot be copied: make the moving average of its weights first,
    and spread that, too. All processes must hold the same weights.
    """
    if recipe.fsdp and distributed.is_distributed():
        plain = copy.deepcopy(model).cpu() if distributed.is_main() else None
        distributed.apply_fsdp(model, repeated_blocks(model), device)
        object.__setattr__(model, _PLAIN, plain)  # no submodule of it
    return model


_PLAIN = "_plain_twin"


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that a model repeats: modules of parts in lists of several of a kind, and no such list inside."""
    lists = [module for module in model.modules() if isinstance(module, (nn.Sequential, nn.ModuleList))]
    blocks = [child for one in lists for child in one if _is_block(child, one)]
    return [block for block in dict.fromkeys(blocks) if not set(block.modules()).intersection(blocks) - {block}]


def _is_block(module: nn.Module, siblings: nn.Module) -> bool:
    alike = [other for other in siblings.children() if type(other) is type(module)]
    has_parts = any(True for _ in module.children()) and any(True for _ in module.parameters())
    return has_parts and len(alike) > 1 and not isinstance(module, (nn.ModuleList, nn.Sequential))


def plain_model(model: nn.Module) -> nn.Module | None:
    """`model`, or where it is sharded, a whole one on the CPU with its weights, in the first process only.

    All processes call this; it is what a checkpoint is written of.
    """
    if not distributed.fsdp_modules(model):
        return model
    state, plain = distributed.full_state(model), getattr(model, _PLAIN)
    if plain is not None:
        plain.load_state_dict(state)
        plain.train(model.training)
    return plain


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, every process holds all of a sharded model, and runs it without the others as often as it likes."""
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
    """The state dict of a model; of a sharded one in the first process only. All processes call this."""
    return distributed.full_state(model) if distributed.fsdp_modules(model) else model.state_dict()


def load_model_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Puts what `model_state` gave into a model, sharded or not; every process has it."""
    if distributed.fsdp_modules(model):
        distributed.load_full_state(model, state)
    else:
        model.load_state_dict(state)


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """As `Optimizer.state_dict`, with parameters by their names in `model`; of a sharded one in the first process only.

    All processes call this. The same whether the model is sharded or not.
    """
    if distributed.fsdp_modules(model):
        return distributed.full_state(model, optimizer)
    names, state = _names(model, optimizer), optimizer.state_dict()
    groups = [group | {"params": [names[index] for index in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[index]: values for index, values in state["state"].items()}, "param_groups": groups}


def load_optimizer_state(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Puts what `optimizer_state` gave into an optimizer of the same groups, sharded or not; every process has it.

    Raises:
        UserError: the parameters are others.
    """
    ours = [set(group["params"]) for group in optimizer_groups(model, optimizer)]
    if ours != [set(group["params"]) for group in state["param_groups"]]:
        raise UserError("the optimizer of the training state has other parameters than this model's")
    if distributed.fsdp_modules(model):
        distributed.load_full_state(model, state, optimizer)
        return
    indices = {name: index for index, name in enumerate(_names(model, optimizer))}
    groups = [
        group | {"params": [indices[name] for name in mine["params"]]}
        for group, mine in zip(state["param_groups"], optimizer_groups(model, optimizer), strict=True)
    ]
    optimizer.load_state_dict(
        {"state": {indices[name]: values for name, values in state["state"].items()}, "param_groups": groups}
    )


def optimizer_groups(model: nn.Module, optimizer: Optimizer) -> list[dict[str, Any]]:
    """The groups of an optimizer with their parameters by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [group | {"params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups]


def _names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Of the optimizer's parameters, in the order of its state dict."""
    return [name for group in optimizer_groups(model, optimizer) for name in group["params"]]
