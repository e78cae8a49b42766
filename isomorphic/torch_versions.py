"""What is newer than the oldest torch that the project runs with (`constraints-oldest.txt`), and what is done there.

Nothing else in the project asks for a version.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

_ISOLATES = "isolate_recompiles" in inspect.signature(torch.compile).parameters


def known_overloads(*names: str) -> list[Any]:
    """Returns the default overloads of those aten operations that this torch has.

    Torch 2.6 lacks `_fused_rms_norm`, and makes `rms_norm` of operations that are known anyway.
    """
    return [getattr(torch.ops.aten, name).default for name in names if hasattr(torch.ops.aten, name)]


def second_client(store: Any) -> Any:
    """Returns another connection to the store that torchrun's processes share: `clone`, which torch 2.6 lacks."""
    if hasattr(store, "clone"):
        return store.clone()
    return type(store)(store.host, store.port, is_master=False, wait_for_workers=False)


def apart_from_others() -> dict[str, Any]:
    """Returns the argument of `torch.compile` by which a model's compilations do not count as another's recompilations.

    Older versions lack it: there a model that is compiled for many sizes may reach torch's limit, and run as it is.
    """
    return {"isolate_recompiles": True} if _ISOLATES else {}


def cpu_multiplies_bf16() -> bool:
    """Returns True if this processor has instructions for bfloat16; False, too, where torch cannot tell.

    Only `get_capabilities` of newer versions is public, and its keys are those of x86.
    """
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)
