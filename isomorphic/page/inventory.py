"""What a model has at one moment, module by module: its widths and its costs. A page compares two of them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from isomorphic.inputs import Inputs, call, device_of
from isomorphic.measure.complexity import Complexity, count_by_module
from isomorphic.measure.first_image import first_image
from isomorphic.measure.layer_hooks import measuring_calls
from isomorphic.observe import eval_mode
from isomorphic.progress import steps
from isomorphic.pruning.widths import producers

WARM_UP_RUNS, RUNS = 2, 7


@dataclass(frozen=True)
class Inventory:
    """A model's widths and costs at one moment.

    Attributes:
        complexity: MACs by both counters, and parameters, of the whole.
        widths: channels that each layer makes, by its weight's name, in the order of the modules.
        macs: exact MACs for one image, by module, with all that runs inside it.
        params: parameters by module, shared ones once.
        children: names of each module's children, by its name; "" is the model.
        seconds: how long one image takes inside each module, where that was measured.
    """

    complexity: Complexity
    widths: Mapping[str, int]
    macs: Mapping[str, int]
    params: Mapping[str, int]
    children: Mapping[str, tuple[str, ...]]
    seconds: Mapping[str, float] = field(default_factory=dict)


def take_inventory(model: nn.Module, inputs: Inputs, *, timed: bool = False) -> Inventory:
    """Counts a model module by module in one forward pass, and times it in nine more where that is asked for.

    Args:
        model: any module, on the device of `inputs`; its mode is put back.
        inputs: what it takes; a batch is cut to its first image.
        timed: measure seconds, too.
    """
    complexity, macs = count_by_module(model, inputs)
    widths = {name: weight.shape[dim] for name, (weight, dim) in producers(model).items()}
    names = {module: name for name, module in model.named_modules()}
    children = {name: tuple(names[child] for child in module.children()) for module, name in names.items()}
    params = {name: sum(p.numel() for p in module.parameters()) for module, name in names.items()}
    return Inventory(
        complexity, widths, macs, params, children, _seconds(model, inputs, complexity.as_given) if timed else {}
    )


@torch.no_grad()
def _seconds(model: nn.Module, inputs: Inputs, as_given: bool) -> dict[str, float]:
    """The time of one image inside each module that is called: the fastest of seven runs, after two to warm up."""
    image, device = inputs if as_given else first_image(inputs), device_of(inputs)
    fastest: dict[nn.Module, float] = {}

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    with eval_mode(model), steps("timing its layers", WARM_UP_RUNS + RUNS, unit="run") as bar:
        for number in range(WARM_UP_RUNS + RUNS):
            taken: dict[nn.Module, float] = {}
            with measuring_calls(model, clock, taken):
                call(model, image)
            if number >= WARM_UP_RUNS:
                for module, seconds in taken.items():
                    fastest[module] = min(seconds, fastest.get(module, seconds))
            bar.update()
    return {name: fastest[module] for name, module in model.named_modules() if module in fastest}
