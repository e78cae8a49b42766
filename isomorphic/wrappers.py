"""Modules around a model that hold on to its parameters, so that these cannot be replaced beneath them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from isomorphic.errors import UserError

# By class name, so that nothing has to be imported: what to take instead, and what to do after it was pruned.
WRAPPERS = {
    "DistributedDataParallel": ("module", "wrap the result anew"),
    "DataParallel": ("module", "wrap the result anew"),
    "OptimizedModule": ("_orig_mod", "compile the result anew"),
}
SHARDED_ADVICE = {"sparsify": "sparse training needs whole parameters, as under DistributedDataParallel"}
SHARDED = ("FullyShardedDataParallel", "FSDPModule")


def check_unwrapped(model: Any, doing: str = "prune") -> None:
    """Raises a UserError for what is no model, or one that is wrapped; the message says what to take instead.

    Args:
        model: what a user gave as a model.
        doing: what is to be done with it: "prune", after which it can be wrapped anew, "export" or "sparsify".
    """
    if isinstance(model, type):
        raise UserError(f"the model is a class, {model.__name__}: give a model that it makes, {model.__name__}(…)")
    if not isinstance(model, nn.Module):
        raise UserError(f"the model is {type(model).__name__}, not a torch.nn.Module")
    for kind in type(model).__mro__:
        if kind.__name__ in WRAPPERS:
            inner, then = WRAPPERS[kind.__name__]
            after = f", and {then}" if doing == "prune" else ""
            raise UserError(f"the model is wrapped in {kind.__name__}: {doing} model.{inner}{after}")
    for name, module in model.named_modules():
        if any(kind.__name__ in SHARDED for kind in type(module).__mro__):
            then = SHARDED_ADVICE.get(doing, f"{doing} it before it is sharded")
            raise UserError(f"{name or 'the model'} is sharded over processes (FSDP): {then}")
        if isinstance(module, torch.jit.ScriptModule):
            after = ", and script or trace the result anew" if doing == "prune" else ""
            advice = f"{doing} the module that it was made from{after}"
            raise UserError(f"{name or 'the model'} is a ScriptModule, whose code is compiled: {advice}")
    if next(model.parameters(), None) is None:
        raise UserError("the model has no parameters")
