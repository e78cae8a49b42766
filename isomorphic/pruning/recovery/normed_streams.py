"""Streams that are read behind layer norms, as a transformer's: they, too, can be turned.

The stream x ∈ ℝⁿ of a pre-norm transformer is written by linear layers, class tokens and positions, and every reader
reads norm(x) = γ ∘ (x − x̄)/σ + β. Three rewritings leave the function alone, and no more than (x − x̄)/σ between:

    γ and β go into the readers,         W ← W diag(γ), b ← b + W β
    layer scales go into the writers,    W ← diag(s) W, b ← s ∘ b
    writers write no mean over channels, W ← (I − 11ᵀ/n) W, since the norm takes it away

What is left depends on x only by x/|x|, and is the same for Q x with any orthogonal Q that keeps the vector of ones
(Ashkboos et al., SliceGPT, ICLR 2024, for norms that take no mean away). So the cut may take the weakest directions
rather than channels. With P (m−1, n) the leading eigenvectors of E[x̂ x̂ᵀ], x̂ = √n x/|x| as the readers read it, and
B (m, m−1) an orthonormal basis of the vectors in ℝᵐ whose sum is nought,

    z = A x,  A = B P,     norm(z) = √m z/|z|,     x̂ ≈ ρ √(n/m) Aᵀ norm(z),  ρ² the share of E|x̂|² that P keeps

z has no mean for the norm to take away, and so many directions as channels but for one: of 4 channels that keep 2, A is
(1, −1)ᵀ/√2 times the strongest direction. Norms by the root mean square alone take no mean: A = P, of m directions.

Which norm a reader reads, and which writer a scale follows, is guessed from the order in which modules run. Whether
the guess, and the structure, are right is tried: with all of it rewritten and a random Q the outputs must stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isomorphic.inputs import Inputs, call
from isomorphic.kinds import kind_names
from isomorphic.observe import module_calls
from isomorphic.pruning.groups import CoupledGroup, Member
from isomorphic.pruning.recovery.channel_maps import ChannelMap, map_of_units
from isomorphic.pruning.recovery.fusion import makes_units, tensor_of
from isomorphic.pruning.recovery.principal import zero_sum_basis
from isomorphic.pruning.recovery.watching import is_plain_layer

LEAST_GAIN = 1e-4  # of a norm's largest: what it gives of a channel with less is nought
_RMS_NORMS = ("torch.nn.modules.normalization.RMSNorm", "timm.layers.norm.RmsNorm")


@dataclass(frozen=True)
class NormedStream:
    """How a group's units are written, scaled, normed and read.

    Attributes:
        writers: weights and biases of layers, and parameters that are added or joined to the stream.
        readers: weights of layers.
        norms: by norm, the layers that read it.
        scales: by the name of a layer scale, (n,), the layer that it follows.
        is_centred: the norms take the mean away.
    """

    writers: Sequence[Member]
    readers: Sequence[Member]
    norms: Mapping[str, Sequence[str]]
    scales: Mapping[str, str]
    is_centred: bool

    @property
    def members(self) -> list[Member]:
        """All that a mixture of the units changes."""
        return [*self.writers, *self.readers]


@dataclass(frozen=True)
class Rewritten:
    """What `rewrite` took out of the layers around a stream of n units: float64, by the name of a layer.

    Attributes:
        scales: s of a writer (n,).
        norms: γ and β of what a reader reads, each (its inputs,).
    """

    scales: Mapping[str, Tensor]
    norms: Mapping[str, tuple[Tensor, Tensor]]

    def made(self, stream: NormedStream, forth: Tensor, kept: Sequence[int]) -> dict[str, ChannelMap]:
        """What the writers make of what the dense ones make, A diag(s), by name; A is `forth` (m, n)."""
        maps = {}
        for member in stream.writers:
            if makes_units(member):
                rows = member.index[:, 0]
                scale = self.scales.get(member.module)
                maps[member.module] = map_of_units(forth if scale is None else forth * scale[rows], rows, kept)
        return maps

    def read(self, stream: NormedStream, forth: Tensor, kept: Sequence[int]) -> dict[str, ChannelMap]:
        """What the readers read of what the dense ones read, `forth` (m, n) times (x − β)/γ, by name.

        Nothing is told of a channel whose γ is nought, nor of readers that take several positions of each unit.
        """
        maps = {}
        for member in stream.readers:
            if member.index.shape[1] == 1:
                rows = member.index[:, 0]
                gain, shift = (values[rows] for values in self.norms[member.module])
                inverse = torch.where(gain.abs() > LEAST_GAIN * gain.abs().max(), 1 / gain, torch.zeros_like(gain))
                mixture = forth * inverse
                maps[member.module] = map_of_units(mixture, rows, kept, -mixture @ shift)
        return maps


def find_normed_stream(model: nn.Module, group: CoupledGroup, inputs: Inputs, tied: set[int]) -> NormedStream | None:
    """Returns how a group is normed and read, as far as one forward pass shows; None where that is something else.

    Args:
        model: run once.
        group: whose units may go.
        inputs: what the model runs on.
        tied: identities of the parameters that several modules hold.
    """
    if group.sections or group.split_dim:
        return None
    norms = {member.module for member in group.members if group.nodes[member.node].kind == "norm"}
    layers = [member for member in group.members if group.nodes[member.node].kind in ("conv", "linear")]
    parameters = [member for member in group.members if group.nodes[member.node].kind == "parameter"]
    if not norms or any(id(tensor_of(model, member)) in tied for member in group.members):
        return None
    centred = {_takes_mean(model.get_submodule(name)) for name in norms}
    if len(centred) > 1 or None in centred:
        return None
    readers = [member for member in layers if member.dim == 1]
    writers = [member for member in layers if member.dim == 0]
    plain = all(is_plain_layer(model.get_submodule(member.module)) for member in layers)
    ungrouped = all(getattr(model.get_submodule(member.module), "groups", 1) == 1 for member in layers)
    if not (plain and ungrouped and readers and all(member.index.shape[1] == 1 for member in writers)):
        return None
    scales = [member for member in parameters if tensor_of(model, member).dim() == 1]
    added = [member for member in parameters if tensor_of(model, member).dim() > 1]
    reads, follows = _in_order(model, norms, readers, writers, scales, inputs)
    if None in reads.values() or len(reads) < len({member.module for member in readers}):
        return None
    if len(follows) < len(scales):
        return None
    by_norm = {norm: [reader for reader, own in reads.items() if own == norm] for norm in sorted(norms)}
    if not all(by_norm.values()):  # one that writes the stream, say
        return None
    return NormedStream([*writers, *added], readers, by_norm, follows, centred == {True})


def _takes_mean(norm: nn.Module) -> bool | None:
    """True for a layer norm, False for one by the root mean square, None for whatever else."""
    if isinstance(norm, nn.LayerNorm):
        return True
    return False if any(name in _RMS_NORMS for name in kind_names(type(norm))) else None


def _in_order(
    model: nn.Module,
    norms: set[str],
    readers: Sequence[Member],
    writers: Sequence[Member],
    scales: Sequence[Member],
    inputs: Inputs,
) -> tuple[dict[str, str | None], dict[str, str]]:
    """The norm that ran last before each reader, and the writer before each scale's module, by name."""
    reads: dict[str, str | None] = {}
    follows: dict[str, str] = {}
    last: dict[str, str] = {}
    reading, writing = {member.module for member in readers}, {m.module for m in writers if makes_units(m)}
    scaling = {member.module: member.name for member in scales}

    def enter(name: str, *arguments: object) -> None:
        if name in norms:
            last["norm"] = name
        if name in reading:
            reads[name] = last.get("norm")
        if name in scaling and "writer" in last:
            follows[scaling[name]] = last["writer"]

    def leave(name: str, output: object) -> None:
        last["writer"] = name

    entered = {name: model.get_submodule(name) for name in {*norms, *reading, *scaling}}
    left = {name: model.get_submodule(name) for name in writing}
    with torch.no_grad(), module_calls(entered, before=enter), module_calls(left, after=leave):
        call(model, inputs)
    return reads, follows


def touched_tensors(model: nn.Module, stream: NormedStream) -> list[Tensor]:
    """The parameters that `rewrite` and a mixture change."""
    modules = [*stream.norms, *(member.module for member in stream.members)]
    owned = [p for name in modules for p in model.get_submodule(name).parameters(recurse=False)]
    return list({id(p): p for p in [*owned, *map(model.get_parameter, stream.scales)]}.values())


@torch.no_grad()
def rewrite(model: nn.Module, stream: NormedStream) -> Rewritten | None:
    """Takes affine maps, scales and means out of a stream, in place; None if a reader lacks a bias for a β."""
    taken = {}
    for norm_name, readers in stream.norms.items():
        norm: Any = model.get_submodule(norm_name)
        for reader in readers:
            layer: Any = model.get_submodule(reader)
            gain, shift = _affine(norm, layer.weight)
            if not _absorb_affine(layer, gain, shift):
                return None
            taken[reader] = (gain.double().cpu(), shift.double().cpu())
        _fill(norm.weight, 1.0)
        _fill(getattr(norm, "bias", None), 0.0)
    scales = {}
    for name, writer in stream.scales.items():
        scale = model.get_parameter(name)
        layer: Any = model.get_submodule(writer)
        layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.dim() - 1)))
        if layer.bias is not None:
            layer.bias.mul_(scale)
        scales[writer] = scale.detach().double().cpu().clone()
        _fill(scale, 1.0)
    if stream.is_centred:
        for member in stream.writers:
            tensor = tensor_of(model, member)
            along = tensor.detach().movedim(member.dim, 0)
            places = member.index[:, 0].to(along.device)
            along[places] -= along[places].mean(0)
    return Rewritten(scales, taken)


def _affine(norm: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    width = like.shape[1]
    gain = norm.weight.detach().clone() if norm.weight is not None else like.new_ones(width)
    bias = getattr(norm, "bias", None)
    return gain, bias.detach().clone() if bias is not None else like.new_zeros(width)


def _absorb_affine(layer: Any, gain: Tensor, shift: Tensor) -> bool:
    """W diag(γ) and b + W β, in place; False where there is a β and no bias."""
    if len(gain) != layer.weight.shape[1] or (layer.bias is None and bool(shift.any())):
        return False
    if layer.bias is not None:
        layer.bias.add_(layer.weight.flatten(2).sum(2) @ shift if layer.weight.dim() > 2 else layer.weight @ shift)
    layer.weight.mul_(gain.view(1, -1, *[1] * (layer.weight.dim() - 2)))
    return True


def _fill(parameter: Tensor | None, value: float) -> None:
    if parameter is not None:
        parameter.fill_(value)


def normed_directions(moment: Tensor, count: int, *, is_centred: bool) -> tuple[Tensor, float]:
    """A (m, n) of the docstring above, float64, and ρ √(n/m).

    Args:
        moment: E[x̂ x̂ᵀ] (n, n).
        count: m, at least 2.
        is_centred: see `NormedStream`.
    """
    energies, components = torch.linalg.eigh(moment)
    leading = count - 1 if is_centred else count
    directions = components[:, -leading:].T  # (m − 1, n)
    share = float(energies[-leading:].sum() / energies.sum())
    gain = (share * len(moment) / count) ** 0.5
    if is_centred:
        directions = zero_sum_basis(count).to(directions) @ directions
    return directions, gain
