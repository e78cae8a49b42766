"""Compensation of query and key dims, which no linear layer reads: they meet in a product.

A head's logits are qᵀk; after pruning they are q̃ᵀk̃ over fewer dims. A matrix A put between, q̃ᵀ A k̃, costs nothing: it
is multiplied into the rows that make k̃. With q and k of different tokens taken as independent, S_ab = E[a bᵀ], and keys
without their mean over the tokens of an image (what is constant along the keys is lost in the softmax),
E |q̃ᵀ A k̃ − qᵀk|² is least where

    S_q̃q̃ A S_k̃k̃ = S_q̃q S_kk̃

This is solved for A − I with a ridge on either side, so that a large one leaves plain selection. Which ridge is best is
asked of the logits themselves, on the half of the images that A was not fitted on. Where the forward code divides by
the root of the head dim, the cut has multiplied q̃ to make up for that, and q stands for the dense queries times that.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from isomorphic.inputs import Inputs, call
from isomorphic.observe import eval_mode, module_calls
from isomorphic.processes import distributed
from isomorphic.pruning.groups import ChannelGraph, CoupledGroup
from isomorphic.pruning.plan import PruningPlan
from isomorphic.pruning.recovery.least_squares import RIDGES, choose_ridge, damped

# A change of basis moves nothing that attention gives by more than this share of the largest value.
SAME = 1e-3
# Images, or windows, of each half whose logits are compared.
TESTED = 64


@dataclass(frozen=True)
class QueryKey:
    """Where queries and keys lie among the outputs of one linear layer.

    Attributes:
        reader: name of the layer that reads what attention gives.
        query, key: rows of the dense layer, shape (heads, head dims), of the heads that stay.
        kept_query, kept_key: rows of the pruned layer, shape (heads, kept head dims).
    """

    reader: str
    query: Tensor
    key: Tensor
    kept_query: Tensor
    kept_key: Tensor


@torch.no_grad()
def find_query_keys(model: nn.Module, graph: ChannelGraph, plan: PruningPlan, images: Inputs) -> dict[str, QueryKey]:
    """The linears that make queries and keys of heads which lose dims, by name, where the two meet in a plain product.

    Which rows those are is asked of the model itself: what attention gives does not change when queries and keys are
    written in another basis, q → G⁻ᵀ q and k → G k. With a norm or a rotation by position between it does.

    Args:
        model: the dense one; its weights change and are put back.
        graph, plan: its groups, and what they keep.
        images: one or a few of what the model takes.
    """
    choices: dict[str, list[QueryKey]] = {}
    for group in graph.groups:
        name = _only_producer(model, group)
        if name and len(plan.kept[group.name]) < len(plan.kept_heads(group)) * group.section_size:
            columns = range(group.members[0].index.shape[1])
            choices[name] = [_rows(group, plan, *pair) for pair in itertools.combinations(columns, 2)]
    firsts = {name: rows[0] for name, rows in choices.items() if rows}  # queries, keys, values: as nearly everywhere
    with eval_mode(model):
        if _are_products(model, firsts, images):
            return firsts
        found = {
            name: next((one for one in rows if _are_products(model, {name: one}, images)), None)
            for name, rows in choices.items()
        }
    return {name: rows for name, rows in found.items() if rows}


def match_keys(layer: nn.Linear, rows: QueryKey, dense: Tensor, inputs: Tensor) -> None:
    """Multiplies A of the module's docstring into the key rows of `layer`, in place.

    Args:
        layer: of the pruned model.
        rows: from `find_query_keys`.
        dense: what the dense layer made, shape (images or windows, tokens…, dense rows), its queries multiplied by what
            the cut has multiplied the pruned ones by.
        inputs: what `layer` sees, shape (images or windows, tokens…, channels).
    """
    made = layer.forward(inputs)  # past its hooks
    key, own_key = by_head(dense, rows.key), by_head(made, rows.kept_key)
    key, own_key = key - key.mean(1, keepdim=True), own_key - own_key.mean(1, keepdim=True)
    tensors = (by_head(made, rows.kept_query), by_head(dense, rows.query), own_key, key)
    first, second = (_Half.of(*some) for some in zip(*(tensor.tensor_split(2) for tensor in tensors), strict=True))
    ridge = choose_ridge((first, second), lambda half, ridge: half.all.solve(ridge), _Half.error, RIDGES)
    matrix = (first.all + second.all).solve(ridge).to(layer.weight.dtype)
    for tensor in layer.parameters():
        tensor[rows.kept_key] = times_by_head(matrix, tensor[rows.kept_key])


@dataclass(frozen=True)
class _Products:
    """Sums over tokens, float64, shape (…, heads, kept head dims, either): q̃q̃ᵀ, q̃qᵀ, k̃k̃ᵀ, kk̃ᵀ."""

    query: Tensor
    query_cross: Tensor
    key: Tensor
    key_cross: Tensor

    @classmethod
    def over(cls, sums: str, *tensors: Tensor) -> _Products:
        """Of q̃, q, k̃, k, shape (images, tokens, heads, dims), by an einsum's right side."""
        own_query, query, own_key, key = tensors
        pairs = (own_query, own_query), (own_query, query), (own_key, own_key), (key, own_key)
        return cls(*(torch.einsum(f"bthi,bthj->{sums}", *pair).double() for pair in pairs))

    def __add__(self, other: _Products) -> _Products:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return _Products(*(one + another for one, another in pairs))

    def solve(self, ridge: float) -> Tensor:
        """A, shape (heads, kept head dims, the same)."""
        identity = torch.eye(self.query.shape[-1], dtype=self.query.dtype, device=self.query.device)
        if ridge == math.inf:
            return identity.expand_as(self.query)
        residual = self.query_cross @ self.key_cross - self.query @ self.key
        left = torch.linalg.solve(damped(self.query, ridge), residual)
        return identity + torch.linalg.solve(damped(self.key, ridge), left, left=False)


class _Half(NamedTuple):
    """Products of one half of the images: over all of them, of all processes, and of some one by one."""

    all: _Products
    each: _Products

    @classmethod
    def of(cls, *tensors: Tensor) -> _Half:
        every = _Products.over("hij", *tensors)
        for product in vars(every).values():
            distributed.all_reduce_sum(product)
        return cls(every, _Products.over("bhij", *(tensor[:TESTED] for tensor in tensors)))

    def error(self, matrix: Tensor) -> float:
        """Σ |q̃ᵀ A k̃ − qᵀk|² over the tokens of these images, of all processes, but for what no A changes."""
        ours = self.each.query @ matrix @ self.each.key - 2 * self.each.query_cross @ self.each.key_cross
        return float(distributed.all_reduce_sum((matrix * ours).sum()))


def _only_producer(model: nn.Module, group: CoupledGroup) -> str | None:
    """The linear layer that makes all of an attention group, which one layer reads."""
    sides = [node.side for node in group.nodes]
    first = group.members[0]
    if group.heads is None or sides != ["out", "in"] or first.tensor != "weight" or first.dim != 0:
        return None
    return first.module if type(model.get_submodule(first.module)) is nn.Linear else None


def _are_products(model: nn.Module, found: Mapping[str, QueryKey], images: Inputs) -> bool:
    """Whether attention, in eval mode, gives the same with all these queries and keys in another basis.

    All processes ask, each with its own images, and get one answer.
    """
    layers = {name: model.get_submodule(name) for name in found}
    before = [(tensor, tensor.detach().clone()) for layer in layers.values() for tensor in layer.parameters()]
    expected = _read(model, found.values(), images)
    try:
        for name, rows in found.items():
            basis = change_of_basis(*rows.query.shape).to(next(layers[name].parameters()))
            for tensor in layers[name].parameters():
                tensor[rows.query] = times_by_head(torch.linalg.inv(basis).mT, tensor[rows.query])
                tensor[rows.key] = times_by_head(basis, tensor[rows.key])
        given = _read(model, found.values(), images)
    finally:
        for tensor, values in before:
            tensor.copy_(values)
    pairs = zip(expected, given, strict=True)
    same = len(expected) == len(found) and all(
        bool((new - old).abs().max() <= SAME * old.abs().max()) for old, new in pairs
    )
    return all(distributed.gather_objects(same))


def _read(model: nn.Module, found: Iterable[QueryKey], images: Inputs) -> list[Tensor]:
    """What attention gives to the layers that read it."""
    inputs: list[Tensor] = []
    readers = {rows.reader: model.get_submodule(rows.reader) for rows in found}
    with module_calls(readers, before=lambda name, positional, keyword: inputs.append(positional[0].clone())):
        call(model, images)
    return inputs


def change_of_basis(heads: int, dims: int) -> Tensor:
    """A well-conditioned matrix for each head that is no rotation, shape (heads, dims, dims)."""
    generator = torch.Generator().manual_seed(0)
    rotation, _ = torch.linalg.qr(torch.randn(heads, dims, dims, generator=generator))
    return rotation * (1 + torch.rand(heads, dims, 1, generator=generator))


def times_by_head(matrix: Tensor, rows: Tensor) -> Tensor:
    """One matrix a head, (heads, i, j), times rows (heads, j) or (heads, j, columns)."""
    return matrix @ rows if rows.dim() > 2 else (matrix @ rows[..., None])[..., 0]


def _rows(group: CoupledGroup, plan: PruningPlan, query: int, key: int) -> QueryKey:
    """The rows of a group's units, of which its first member has several each: these are columns of its index."""
    kept, heads, index = torch.tensor(plan.kept[group.name]), plan.kept_heads(group), group.members[0].index
    dense = index.view(group.num_sections, group.section_size, -1)[heads]
    stay = index[kept].flatten().sort().values
    new = torch.searchsorted(stay, index[kept]).view(len(heads), -1, index.shape[1])
    return QueryKey(group.nodes[1].module, dense[..., query], dense[..., key], new[..., query], new[..., key])


def by_head(made: Tensor, rows: Tensor) -> Tensor:
    """(images, tokens, heads, dims) of a layer's outputs (images, tokens…, rows)."""
    tokens = made.reshape(len(made), -1, made.shape[-1])
    return tokens.index_select(-1, rows.flatten().to(made.device)).unflatten(-1, rows.shape)
