"""What a model costs, what it gets right, and how fast it is.

    iso.measure.latency.measure_latency(model, inputs)
    found = iso.measure.latency.measure_in_turns({"dense": (dense, inputs), "pruned": (pruned, inputs)})
    found.speedup("pruned", over="dense")
    iso.measure.fidelity.measure_fidelity(pruned, dense, batches)

A module is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isomorphic.measure import accuracy, complexity, execution, fidelity, latency

__all__ = ["accuracy", "complexity", "execution", "fidelity", "latency"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted(__all__)
