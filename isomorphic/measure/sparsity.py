"""How much of a masked model is left: params and MACs that are not zero, per layer and in sum.

As in DIMAP (ICLR 2024), a pruned weight costs nothing: of a layer's MACs there remains the share of its weights that is
not zero. Only the zeros of masked parameters count; a bias that happens to be zero was not pruned. What has no weights
(attention's products, activations) costs what it did.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from isomorphic.inputs import Inputs
from isomorphic.measure.charges import Charge, charges
from isomorphic.measure.complexity import Complexity, format_macs, format_params
from isomorphic.measure.first_image import one_item
from isomorphic.measure.results import change_lines, complexity_line


@dataclass
class LayerSparsity:
    """One module's own parameters and the MACs of its weights, by the paper's counter: all, and those not zero."""

    name: str
    params: int = 0
    nonzero_params: int = 0
    macs: float = 0.0
    nonzero_macs: float = 0.0


@dataclass(frozen=True)
class Sparsity:
    """What a masked model costs.

    Attributes:
        layers: every module that has parameters, in the model's order; a parameter that several share, under the first.
        dense: the complexity if no weight were zero; what `count_complexity` says.
        nonzero: the complexity without the pruned weights.
    """

    layers: tuple[LayerSparsity, ...]
    dense: Complexity
    nonzero: Complexity


def count_sparsity(model: nn.Module, example_inputs: Inputs, masked: Collection[str]) -> Sparsity:
    """Counts params and MACs of `model` for one image, with and without the zeros of its masked parameters.

    Args:
        model: with data, on the device of the inputs; not sharded.
        example_inputs: see `count_complexity`.
        masked: names of the masked parameters.
    """
    layers: dict[str, LayerSparsity] = {}
    layer_of: dict[int, LayerSparsity] = {}
    share_left: dict[int, float] = {}
    for name, parameter in model.named_parameters():
        module = name.rpartition(".")[0]
        layer = layer_of[id(parameter)] = layers.setdefault(module, LayerSparsity(module))
        nonzero = int(parameter.count_nonzero()) if name in masked else parameter.numel()
        share_left[id(parameter)] = nonzero / max(parameter.numel(), 1)
        layer.params += parameter.numel()
        layer.nonzero_params += nonzero

    inputs = one_item(model, example_inputs)
    sums: dict[str, tuple[float, float]] = {}
    for unit in ("macs_paper", "macs_exact"):
        total = left = 0.0
        for charge in charges(model, inputs, unit, makers=()):
            total += charge.amount
            left += charge.amount
            for weight, amount in _by_weight(charge):
                left -= amount * (1 - share_left[id(weight)])
                if unit == "macs_paper":
                    layer_of[id(weight)].macs += amount
                    layer_of[id(weight)].nonzero_macs += amount * share_left[id(weight)]
        sums[unit] = total, left
    params = sum(layer.params for layer in layers.values()), sum(layer.nonzero_params for layer in layers.values())
    dense, nonzero = (
        Complexity(round(sums["macs_paper"][which]), round(sums["macs_exact"][which]), params[which])
        for which in (0, 1)
    )
    return Sparsity(tuple(layers.values()), dense, nonzero)


def sparsity_table(sparsity: Sparsity) -> str:
    """The layers that lost weights, what all others cost, and the sum; MACs by the paper's counter."""
    rows = [layer for layer in sparsity.layers if layer.nonzero_params < layer.params]
    dense, nonzero = sparsity.dense, sparsity.nonzero
    total = LayerSparsity("sum", dense.params, nonzero.params, dense.macs_paper, nonzero.macs_paper)
    rest = LayerSparsity(
        "all others",
        total.params - sum(layer.params for layer in rows),
        total.nonzero_params - sum(layer.nonzero_params for layer in rows),
        total.macs - sum(layer.macs for layer in rows),
        total.nonzero_macs - sum(layer.nonzero_macs for layer in rows),
    )
    cells = [("layer", "params", "non-zero", "", "MACs", "non-zero", ""), *map(_cells, [*rows, rest, total])]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    )


def nonzero_line(sparsity: Sparsity) -> str:
    """`Non-zero MACs: 2.2187 G, Params: 14.0561 M`, with the exact MACs where they differ."""
    return f"Non-zero {complexity_line(sparsity.nonzero)}"


def nonzero_change_lines(sparsity: Sparsity) -> str:
    """`MACs: 4.51 G => 2.95 G (non-zero)` and `Params: 28.29 M => 14.06 M (non-zero)`."""
    lines = change_lines(sparsity.dense, sparsity.nonzero).splitlines()
    return "\n".join(
        line.replace(" (", " (non-zero; ") if line.endswith(")") else f"{line} (non-zero)" for line in lines
    )


def sparsity_results(sparsity: Sparsity, macs_counter: str = "paper") -> dict[str, Any]:
    """The non-zero figures, named after those of `complexity_results`."""
    macs = {"paper": sparsity.nonzero.macs_paper, "exact": sparsity.nonzero.macs_exact}[macs_counter]
    return {"macs_nonzero": macs, "params_nonzero": sparsity.nonzero.params}


def _by_weight(charge: Charge) -> Iterator[tuple[Tensor, float]]:
    """What of a charge falls to each of its weights; biases and scales have no MACs of their own beside those."""
    weights = [parameter for parameter in charge.parameters if parameter.dim() > 1] or list(charge.parameters)
    numbers = sum(weight.numel() for weight in weights)
    for weight in weights:
        yield weight, charge.amount * weight.numel() / numbers


def _cells(layer: LayerSparsity) -> tuple[str, ...]:
    return (
        layer.name,
        format_params(layer.params),
        format_params(layer.nonzero_params),
        _percent(layer.nonzero_params, layer.params),
        format_macs(layer.macs),
        format_macs(layer.nonzero_macs),
        _percent(layer.nonzero_macs, layer.macs),
    )


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"
