"""Attention heads that lose dims lose their weakest directions: of values, and of queries and keys.

Nothing but linear maps lies between the layer that makes a head's values and the one that reads what attention gives:
attention sums values over tokens. So the d dims o of a head, which the reader multiplies by P, may be mixed like any
linear stream's (`rotation.py`): o ≈ μ + B A (o − μ), with d' directions that lose the least of E|P (o − μ)|²; what is
constant goes into the reader's bias.

Queries and keys meet in qᵀk. With q and k of different tokens taken as independent, S_q = E[q qᵀ] and S_k the same of
keys without their mean over the tokens of an image, which the softmax loses, the d' dims that lose the least of
E|qᵀk|² are, with the singular value decomposition S_q^½ S_k^½ = U Σ Vᵀ,

    q̃ = Σ^½ U_d'ᵀ S_q^-½ q,    k̃ = Σ^½ V_d'ᵀ S_k^-½ k

since q̃ᵀk̃ = qᵀk where d' = d, and E|qᵀ M k|² = |S_q^½ M S_k^½|² for any M. Of a head whose queries use but 40 of 64
dims, 40 dims say it all, whichever they are. Both are tried: where a norm or a rotary embedding lies between, queries
and keys lose dims as they are, and where something else than a sum over tokens reads the values, these do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from isomorphic.inputs import Inputs, call, floats_in
from isomorphic.observe import module_calls
from isomorphic.processes import distributed
from isomorphic.pruning.groups import ChannelGraph, CoupledGroup
from isomorphic.pruning.plan import PruningPlan
from isomorphic.pruning.recovery.attention import QueryKey, by_head, change_of_basis, find_query_keys, times_by_head
from isomorphic.pruning.recovery.channel_maps import ChannelMap
from isomorphic.pruning.recovery.principal import (
    are_alike,
    as_large,
    inverse_root_of,
    principal_directions,
    put_back,
    root_of,
)
from isomorphic.pruning.recovery.watching import is_plain_layer


@dataclass(frozen=True)
class HeadDims:
    """The dims of one attention layer's h surviving heads, d of each, of which d' stay.

    Attributes:
        group: the name of their group.
        layer, reader: names of the linear layers that make queries, keys and values, and that read attention.
        rows: of `layer`: where its three parts lie (3, h, d).
        columns: of `reader` (h, d).
        kept: which of a head's d dims are left by the cut, ascending (h, d').
        query_key: which two of the parts meet in a plain product; None where something lies between.
        value: which part may be mixed with `columns`; None if none may.
    """

    group: str
    layer: str
    reader: str
    rows: Tensor
    columns: Tensor
    kept: Tensor
    query_key: tuple[int, int] | None = None
    value: int | None = None


def find_head_dims(model: nn.Module, graph: ChannelGraph, plan: PruningPlan, images: Inputs) -> list[HeadDims]:
    """Returns the attention layers whose heads lose dims that can be mixed, as trials on some images say.

    Args:
        model: the dense one, in eval mode; its weights change and are put back.
        graph, plan: its groups, and what they keep.
        images: one or a few of what the model takes.
    """
    products = find_query_keys(model, graph, plan, images)
    losing = [group for group in graph.groups if group.heads is not None and plan.removed(group)]
    dims = [one for group in losing if (one := _dims_of(model, group, plan))]
    known = [replace(one, query_key=_parts_of(one, products.get(one.layer))) for one in dims]
    tried = [replace(one, value=_value_part(model, one, images)) for one in known]
    return [one for one in tried if one.query_key or one.value is not None]


def _dims_of(model: nn.Module, group: CoupledGroup, plan: PruningPlan) -> HeadDims | None:
    """Where a group's dims lie, if one plain linear makes three of each and another reads it, and some go."""
    made = [m for m in group.members if m.tensor == "weight" and m.dim == 0]
    read = [m for m in group.members if m.tensor == "weight" and m.dim == 1]
    sides = [node.side for node in group.nodes]
    if sides != ["out", "in"] or [m.index.shape[1] for m in (*made, *read)] != [3, 1]:
        return None
    heads, size = plan.kept_heads(group), group.section_size
    layers = [model.get_submodule(member.module) for member in (*made, *read)]
    plain = all(isinstance(layer, nn.Linear) and is_plain_layer(layer) for layer in layers)
    if not plain or len(plan.kept[group.name]) == len(heads) * size:
        return None
    rows = made[0].index.view(group.num_sections, size, 3)[heads].movedim(-1, 0)
    columns = read[0].index.view(group.num_sections, size)[heads]
    kept = torch.tensor(plan.kept[group.name]).view(len(heads), -1) % size
    return HeadDims(group.name, made[0].module, read[0].module, rows, columns, kept)


def _parts_of(one: HeadDims, found: QueryKey | None) -> tuple[int, int] | None:
    if found is None:
        return None
    query, key = (
        next(part for part in range(3) if torch.equal(one.rows[part], own)) for own in (found.query, found.key)
    )
    return query, key


def _value_part(model: nn.Module, one: HeadDims, images: Inputs) -> int | None:
    """Which part may be written in another basis, and what reads attention in its inverse, while the outputs stay.

    All processes ask, each with its own images, and get one answer.
    """
    layer, reader = model.get_submodule(one.layer), model.get_submodule(one.reader)
    assert isinstance(layer, nn.Linear) and isinstance(reader, nn.Linear)
    touched = [*layer.parameters(), reader.weight]
    before = [tensor.detach().clone() for tensor in touched]
    expected = floats_in(call(model, images))
    basis = change_of_basis(*one.columns.shape).double()
    for part in (2, 1, 0):  # values come last nearly everywhere
        if part not in (one.query_key or ()):
            _mix_values(layer, reader, one, part, basis, torch.linalg.inv(basis), _every_dim(one))
            alike = are_alike(floats_in(call(model, images)), expected)
            put_back(touched, before)
            if all(distributed.gather_objects(alike)):
                return part
    return None


class HeadMoments:
    """S_q, S_k and the covariance of what attention gives, for some layers, over the images of all processes."""

    def __init__(self, heads: Sequence[HeadDims]) -> None:
        self._made = {one.layer: one for one in heads}
        self._read = {one.reader: one for one in heads}
        self._sums: dict[tuple[str, str], Tensor] = {}

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Inside, what `model` makes is added up."""
        made = {name: model.get_submodule(name) for name in self._made}
        read = {name: model.get_submodule(name) for name in self._read}
        with module_calls(made, after=self._note), module_calls(read, before=self._see):
            yield

    def finish(self) -> None:
        """Adds up over all processes."""
        self._sums = {key: distributed.all_reduce_sum(total) for key, total in self._sums.items()}

    def query(self, one: HeadDims) -> Tensor:
        """S_q (h, d, d)."""
        return self._sums[one.layer, "query"] / self._sums[one.layer, "count"]

    def key(self, one: HeadDims) -> Tensor:
        """S_k (h, d, d)."""
        return self._sums[one.layer, "key"] / self._sums[one.layer, "count"]

    def given(self, one: HeadDims) -> tuple[Tensor, Tensor]:
        """E[o] (h, d) and E[o oᵀ] (h, d, d)."""
        count = self._sums[one.layer, "read"]
        return self._sums[one.layer, "mean"] / count, self._sums[one.layer, "square"] / count

    def _note(self, name: str, output: Any) -> None:
        one = self._made[name]
        if one.query_key is None:
            return
        query, key = (by_head(output, one.rows[part]) for part in one.query_key)
        key = key - key.mean(1, keepdim=True)
        self._add(name, "count", torch.tensor(float(query.shape[0] * query.shape[1])).to(query))
        for what, dims in (("query", query), ("key", key)):
            self._add(name, what, torch.einsum("bthi,bthj->hij", dims, dims))

    def _see(self, name: str, positional: tuple[Any, ...], keyword: dict[str, Any]) -> None:
        one = self._read[name]
        given = by_head(positional[0].reshape(1, -1, positional[0].shape[-1]), one.columns)[0]  # (tokens, h, d)
        self._add(one.layer, "read", torch.tensor(float(len(given))).to(given))
        self._add(one.layer, "mean", given.sum(0))
        self._add(one.layer, "square", torch.einsum("thi,thj->hij", given, given))

    def _add(self, name: str, what: str, new: Tensor) -> None:
        old = self._sums.get((name, what))
        self._sums[name, what] = new.double() if old is None else old + new.double()


def turn_heads(model: nn.Module, one: HeadDims, moments: HeadMoments) -> tuple[ChannelMap, ChannelMap | None]:
    """Puts the strongest directions of each head where the kept dims are, and zeros where the others were, in place.

    Returns:
        What the layer makes of what it made, and what the reader reads of what it read (None: as it was), as the cut
        leaves them.
    """
    layer, reader = model.get_submodule(one.layer), model.get_submodule(one.reader)
    assert isinstance(layer, nn.Linear) and isinstance(reader, nn.Linear)
    count, size = one.kept.shape[1], one.rows.shape[2]
    as_it_is = torch.eye(size, dtype=torch.float64)[one.kept]  # (h, d', d)
    made = [as_it_is] * 3
    if one.query_key:
        directions = query_key_directions(moments.query(one), moments.key(one), count)
        for part, forth in zip(one.query_key, directions, strict=True):
            _mix_rows(layer, one.rows[part], one.kept, forth)
            made[part] = forth
    read = None
    if one.value is not None:
        forth, back, left_over = _value_directions(reader, one, moments)
        _mix_values(layer, reader, one, one.value, forth, back, one.kept)
        if reader.bias is not None:
            reader.bias.add_(left_over.to(reader.bias))
        made[one.value] = forth
        read = _map_of([(one.columns, forth)], one.kept, reader.in_features)
    return _map_of(list(zip(one.rows, made, strict=True)), one.kept, layer.out_features), read


def query_key_directions(query: Tensor, key: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What q̃ is of q and k̃ of k, each (h, d', d), given S_q and S_k (h, d, d), all float64."""
    left, values, right = torch.linalg.svd(root_of(query) @ root_of(key))
    size = values[..., :count, None].sqrt()
    return (size * left[..., :count].mT @ inverse_root_of(query), size * right[..., :count, :] @ inverse_root_of(key))


def _value_directions(reader: nn.Linear, one: HeadDims, moments: HeadMoments) -> tuple[Tensor, Tensor, Tensor]:
    """A (h, d', d), B (h, d, d') and P (μ − B A μ) summed over the heads; without a bias μ is taken for nought."""
    mean, square = moments.given(one)
    mean = mean if reader.bias is not None else torch.zeros_like(mean)
    columns = one.columns.to(reader.weight.device)
    forths, backs, left_over = [], [], torch.zeros(reader.out_features, dtype=torch.float64, device=mean.device)
    for head, (own_mean, own_square) in enumerate(zip(mean, square, strict=True)):
        weight = reader.weight.detach().double()[:, columns[head]]
        covariance = own_square - torch.outer(own_mean, own_mean)
        forth, back = principal_directions(weight.T @ weight, covariance, one.kept.shape[1])
        forth, back = as_large(forth, back, covariance)
        left_over += weight @ (own_mean - back @ (forth @ own_mean))
        forths.append(forth)
        backs.append(back)
    return torch.stack(forths), torch.stack(backs), left_over


def _mix_values(
    layer: nn.Linear, reader: nn.Linear, one: HeadDims, part: int, forth: Tensor, back: Tensor, kept: Tensor
) -> None:
    """Values become `forth` (h, d', d) times themselves, and the reader takes them `back` (h, d, d'), in place."""
    _mix_rows(layer, one.rows[part], kept, forth)
    columns = one.columns.to(reader.weight.device)
    own = reader.weight.detach()[:, columns].permute(1, 2, 0).double()  # (h, d, outputs)
    new = back.mT.to(own) @ own  # (h, d', outputs)
    reader.weight[:, columns] = 0.0
    reader.weight[:, columns.gather(1, kept.to(columns.device))] = new.permute(2, 0, 1).to(reader.weight)


def _every_dim(one: HeadDims) -> Tensor:
    return torch.arange(one.columns.shape[1]).expand_as(one.columns)


def _mix_rows(layer: nn.Linear, rows: Tensor, kept: Tensor, forth: Tensor) -> None:
    """Puts `forth` (h, d', d) times the rows where the kept ones are, and zeros where the others were, in place."""
    rows = rows.to(layer.weight.device)
    places = rows.gather(1, kept.to(rows.device))
    for tensor in layer.parameters():
        new = times_by_head(forth.to(tensor.device).double(), tensor.detach()[rows].double()).to(tensor)
        tensor[rows] = 0.0
        tensor[places] = new


def _map_of(parts: Sequence[tuple[Tensor, Tensor]], kept: Tensor, size: int) -> ChannelMap:
    """One map (m, n) of several mixtures, in the order in which the cut leaves the channels.

    Args:
        parts: channels of heads (h, d), and what the kept ones are of them (h, d', d): all that the cut leaves.
        kept: which of a head's dims stay (h, d').
        size: n.
    """
    factor = torch.zeros(size, size, dtype=torch.float64)
    stays = torch.zeros(size, dtype=torch.bool)
    for rows, forth in parts:
        places = rows.gather(1, kept)
        for own, mixed, mixture in zip(rows, places, forth.cpu(), strict=True):
            factor[mixed[:, None], own] = mixture
        stays[places.flatten()] = True
    return ChannelMap(factor[stays], torch.zeros(int(stays.sum()), dtype=torch.float64))
