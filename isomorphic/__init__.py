"""Structural pruning of vision models within isomorphic groups.

    import isomorphic as iso

    graph  = iso.trace(model, inputs)                           # what goes together, and why the rest stays
    plan   = iso.plan(model, inputs, macs="50%", data=loader)   # what would go; changes nothing
    pruned = iso.prune(model, inputs, macs="50%", data=loader)  # a pruned copy
    regularize = iso.sparsify(model, graph)                     # for a training loop: weak channels shrink as wholes
    iso.prune(…, data=images, loss=iso.own_answer_loss)         # without labels: the model's own answers
    pruned.save("net.safetensors")
    model  = iso.load_model("net.safetensors", model=build())
    iso.export(pruned.model, inputs, "net.onnx")                # or .pt2; written, read back, compared
    iso.measure.latency, iso.measure.fidelity                   # how fast it is, how far it agrees with the dense model

Each name is imported when it is first asked for, so that `import isomorphic` and its submodules stay light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isomorphic import measure
    from isomorphic.api import plan, prune, trace
    from isomorphic.checkpoints.open import load_model
    from isomorphic.errors import UserError
    from isomorphic.exporting.face import export
    from isomorphic.pruning.gradients import own_answer_loss
    from isomorphic.pruning.sparsify.regularizers import sparsify

__all__ = ["UserError", "export", "load_model", "measure", "own_answer_loss", "plan", "prune", "sparsify", "trace"]

_HOMES = {
    "trace": "isomorphic.api",
    "plan": "isomorphic.api",
    "prune": "isomorphic.api",
    "load_model": "isomorphic.checkpoints.open",
    "sparsify": "isomorphic.pruning.sparsify.regularizers",
    "export": "isomorphic.exporting.face",
    "own_answer_loss": "isomorphic.pruning.gradients",
    "UserError": "isomorphic.errors",
}
_PACKAGES = ("measure",)


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"isomorphic.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
