"""Compensation: the layers of a pruned model get the weights with which they make what the dense model's made.

Every linear and convolution whose inputs were cut, be they hidden units or a residual stream behind its norm, is solved
for by least squares (`least_squares.py`). A grouped convolution is solved for group by group: a depthwise one learns to
make, of each channel as it comes now, what the dense one made of it. Heads that lost dims get keys that go with the
queries that are left (`attention.py`). That goes from the first layer to the last, each on what those before it, new
weights and all, give it, while the dense model runs alongside (`lockstep.py`): one forward pass of either over the
calibration images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from isomorphic.inputs import Inputs, call, items_of
from isomorphic.observe import eval_mode, module_calls
from isomorphic.progress import steps
from isomorphic.pruning.cutting.cut import kept_positions, row_scales
from isomorphic.pruning.groups import ChannelGraph
from isomorphic.pruning.plan import PruningPlan
from isomorphic.pruning.recovery.attention import QueryKey, match_keys
from isomorphic.pruning.recovery.batch_norm import absorb_biases, follow
from isomorphic.pruning.recovery.channel_maps import ChannelMap
from isomorphic.pruning.recovery.least_squares import RIDGES, draw_positions, fit_weights, mean_of, mean_of_sums
from isomorphic.pruning.recovery.lockstep import Seen, run_side_by_side
from isomorphic.pruning.recovery.patches import Layer, Patches
from isomorphic.pruning.recovery.watching import is_plain_layer, tied_parameters

CHUNK = 32  # images whose patches are made at once
NEGLIGIBLE = 1e-10  # variance, as a share of the mean square, that is rounding


@dataclass(frozen=True)
class Reconstruction:
    """How far a layer's outputs are from the dense one's: E |difference|² as a share of the dense one's variance.

    Over the positions that were looked at.

    Attributes:
        layer: its name.
        before: with the weights that the cut left.
        after: with the new ones, on the same inputs.
    """

    layer: str
    before: float
    after: float


@dataclass(frozen=True)
class CutLayers:
    """Where a pruned model's layers come from.

    Attributes:
        outputs: which of the dense layer's outputs a layer makes, ascending positions (m,), or a map from them; all of
            them for layers that are left out.
        columns: which of the dense layer's inputs it reads, ascending positions (m,); for layers with cut inputs only.
        scales: by what the cut multiplied the rows of a dense layer's weight (n,), from `surgery.row_scales`.
        query_keys: see `attention.find_query_keys`.
        mixtures: of layers that read mixed units: what they read, of what the dense layer reads.
    """

    outputs: Mapping[str, Tensor | ChannelMap]
    columns: Mapping[str, Tensor]
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    query_keys: Mapping[str, QueryKey] = field(default_factory=dict)
    mixtures: Mapping[str, ChannelMap] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, graph: ChannelGraph, plan: PruningPlan) -> CutLayers:
        """What `plan` will cut of the dense `model`, but for queries and keys."""
        kept = kept_positions(model, graph, plan)
        weights = {module: dims for (module, tensor), dims in kept.items() if tensor == "weight"}
        outputs = {module: dims[0] for module, dims in weights.items() if 0 in dims}
        columns = {module: dims[1] for module, dims in weights.items() if 1 in dims}
        return cls(outputs, columns, row_scales(model, graph, plan))


def compensate(
    dense: nn.Module,
    pruned: nn.Module,
    images: Inputs,
    cut: CutLayers,
    *,
    layers: Sequence[str] | None = None,
    ridges: Sequence[float] = RIDGES,
) -> list[Reconstruction]:
    """Changes weights and biases of `pruned`, in place.

    A layer without a bias gains one, which goes into the batch norm that follows the layer where there is one.

    Args:
        dense: as it was before the cut.
        pruned: the same model after it.
        images: this process's calibration images, on the models' device, as the models take them: all go
            at once.
        cut: what was cut.
        layers: whose weights may change; None for all of `solvable_layers`.
        ridges: what λ may be; with none of them only the biases change: the mean shift.

    Returns:
        One for each layer that was solved for, in forward order.

    Raises:
        UserError: the pruned model calls its layers in another order than the dense one.
    """
    wanted = solvable_layers(pruned, images, cut) if layers is None else layers
    report: list[Reconstruction] = []

    def visit(seen: Seen, inputs: Tensor) -> None:
        layer = pruned.get_submodule(seen.name)
        assert isinstance(layer, Layer)
        target = _Target(cut.scales.get(seen.name), cut.outputs.get(seen.name))
        if seen.name in cut.columns or _is_grouped(layer):
            report.append(Reconstruction(seen.name, *_fit(layer, inputs, seen.outputs, target, ridges)))
        if seen.name in cut.query_keys and ridges and isinstance(layer, nn.Linear):
            match_keys(layer, cut.query_keys[seen.name], target.scaled(seen.outputs), inputs)
        bar.update()

    unbiased = [name for name in wanted if pruned.get_submodule(name).bias is None]
    with steps("compensating", len(wanted), unit="layer") as bar:
        run_side_by_side(dense, pruned, images, wanted, visit)
    if unbiased:
        absorb_biases(pruned, follow(pruned, items_of(images, slice(1))), unbiased)
    return report


def solvable_layers(model: nn.Module, images: Inputs, cut: CutLayers) -> list[str]:
    """Names of the linears and convolutions with cut inputs which one forward pass calls once, in its order.

    The channels of a grouped convolution, a depthwise one above all, go with its outputs: each group is solved for.
    A layer that runs twice, or shares its weight, has one for two places; one that standardises its weight on the way
    would undo what is written into it; what calls no module, as torch's attention its projections, is not seen.
    """
    calls: list[str] = []
    tied = tied_parameters(model)
    named = {name: model.get_submodule(name) for name in (*cut.outputs, *cut.columns, *cut.query_keys)}
    plain = {
        name: layer
        for name, layer in named.items()
        if isinstance(layer, Layer) and is_plain_layer(layer)
        if (name in cut.columns or name in cut.query_keys or _is_grouped(layer)) and id(layer.weight) not in tied
    }
    with torch.no_grad(), eval_mode(model), module_calls(plain, after=lambda name, outputs: calls.append(name)):
        call(model, items_of(images, slice(1)))
    return [name for name in calls if calls.count(name) == 1]


@dataclass(frozen=True)
class _Target:
    """What a pruned layer should make where the dense one makes y (…, n), channels last.

    Attributes:
        scale: by what the cut multiplied its rows (n,); None for 1.
        outputs: as in `CutLayers`; None for all of them.
    """

    scale: Tensor | None
    outputs: Tensor | ChannelMap | None

    def scaled(self, dense: Tensor) -> Tensor:
        return dense if self.scale is None else dense * self.scale.to(dense)

    def of(self, dense: Tensor) -> Tensor:
        """Returns (…, m); of means it gives the means."""
        dense = self.scaled(dense)
        if isinstance(self.outputs, ChannelMap):
            return dense @ self.outputs.factor.T.to(dense) + self.outputs.offset.to(dense)
        return dense if self.outputs is None else dense.index_select(-1, self.outputs.to(dense.device))


def _fit(
    layer: Layer, inputs: Tensor, outputs: Tensor, target: _Target, ridges: Sequence[float]
) -> tuple[float, float]:
    """New weights for one layer, and the bias that makes its mean outputs those of the target.

    Of the positions, only some are looked at where there are very many, but for the means.

    Args:
        layer: of the pruned model.
        inputs: what it reads.
        outputs: what the dense layer made, all of it.
        target: what of that the layer should make.
        ridges: see `compensate`.

    Returns:
        E |difference|² as a share of the target's variance, before and after.
    """
    groups = getattr(layer, "groups", 1)
    prior = layer.weight.detach().flatten(1)
    if groups > 1:  # (96, 1 · 9) of a depthwise one -> (96 groups, 1 output, 9 inputs)
        prior = prior.view(groups, -1, prior.shape[1])
    made = Patches.of_outputs(layer, outputs)
    positions = draw_positions(len(outputs), made.num_positions, prior.shape[-1], groups).to(outputs.device)
    count = len(outputs) * made.num_positions
    total, drawn = torch.zeros((), dtype=torch.float64), []
    for some, where in zip(inputs.split(CHUNK), positions.split(CHUNK), strict=True):
        patches = Patches(layer, some)
        total = total.to(some.device) + patches.total()
        drawn.append(patches.at(where))
    own_mean = _by_group(mean_of_sums(total, count), groups)
    mean = target.of(mean_of_sums(made.total(), count))
    own, wanted = _by_group(torch.cat(drawn), groups), target.of(made.at(positions))
    drawn.clear()
    variance = float(mean_of((some - mean.to(some.dtype)).square() for some in wanted.split(CHUNK)).sum())
    fit = fit_weights(prior, _by_group(wanted, groups), own, ridges)
    if layer.bias is None:
        layer.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight)))
    offset = mean - _means(prior.double(), own_mean) - layer.bias.double()
    layer.weight.copy_(fit.weights.view_as(layer.weight))
    layer.bias.copy_(mean - _means(layer.weight.double().reshape(prior.shape), own_mean))
    variance = max(variance, NEGLIGIBLE * (variance + float(mean.square().sum()))) or 1.0
    return (fit.before + float(offset.square().sum())) / variance, fit.after / variance


def _by_group(values: Tensor, groups: int) -> Tensor:
    """Splits the last dim, of channels: of 6 groups (…, 54) -> (…, 6, 9); of a single one nothing changes."""
    return values if groups == 1 else values.unflatten(-1, (groups, -1))


def _means(weights: Tensor, own_mean: Tensor) -> Tensor:
    """The mean outputs (outputs,) that weights (outputs, m), or (groups, outputs of each, m), make of mean inputs."""
    return (weights @ own_mean[..., None]).flatten()


def _is_grouped(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups > 1
