"""DIMAP: data-independent, module-aware pruning (ICLR 2024, arXiv 2404.13648).

A weight's score is its share of the energy that would be left if it were the next to go. Of the weights of a layer,
sorted by square, p₁ the largest: Imp(p_j) = W²(p_j) / Σ_{k ≤ j} W²(p_k), the value of LAMP (Lee et al., ICLR 2021). It
is the same at any scale of the layer, so that weights of different layers can be compared. They compete within a
module, which is all layers with one role in whatever block and stage (`layer_roles.py`); every module loses the same
share of its weights. The same score over the energies of coupled units is the criterion "dimap" of `scoring.py`.
No image is needed for either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from isomorphic.errors import UserError
from isomorphic.pruning.weights.layer_roles import AUX


class Pruned(NamedTuple):
    """How many weights there are, and how many of them were pruned."""

    total: int
    pruned: int


@dataclass(frozen=True)
class Masking:
    """What `mask` did.

    Attributes:
        modules: the weights of each module, by role.
        parameters: the weights of each parameter of a module, by name.
    """

    modules: dict[str, Pruned]
    parameters: dict[str, Pruned]

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that lost weights: what `ModelSpec.masking` takes."""
        return tuple(name for name, (_, pruned) in self.parameters.items() if pruned)

    def __str__(self) -> str:
        """`MLP: 9,483,264 of 17,252,352 weights pruned`, a line for each module."""
        return "\n".join(
            f"{role}: {pruned:,} of {total:,} weights pruned" for role, (total, pruned) in self.modules.items()
        )


def surviving_share(energies: Tensor) -> Tensor:
    """Of each energy, its share of the sum of itself and all that are larger (section 3 of the paper).

    Args:
        energies: squares, of any shape, not negative. Of equal ones the first counts as the larger.

    Returns:
        float64, of the same shape: 1 for the largest, 0 for zeros.
    """
    flat = energies.double().flatten()
    descending, order = flat.sort(descending=True, stable=True)
    shares = torch.empty_like(flat)
    shares[order] = (descending / descending.cumsum(0)).nan_to_num(0.0)  # 0 / 0 where all are zero
    return shares.view(energies.shape)


def lamp_scores(weight: Tensor) -> Tensor:
    """The score of each weight of one layer, float64, of the weight's shape: [3, 2, 1] → [1, 4/13, 1/14]."""
    return surviving_share(weight.detach().double().square())


@torch.no_grad()
def mask(model: nn.Module, roles: Mapping[str, str], ratio: float) -> Masking:
    """Sets the least important weights of each module to zero, in place: round(ratio · n) of its n.

    One threshold divides each module's weights; of several that are at it, the first go.

    Args:
        model: holds the weights.
        roles: the module of each parameter, by name, from `assign_roles`; those of "AUX" are left alone.
        ratio: share of each module's weights that is zero afterwards; zeros that are there already count.

    Raises:
        UserError: the ratio is no share, nothing has a role, or a weight is not finite.
    """
    if not 0 <= ratio <= 1:
        raise UserError(f"a pruning ratio of {ratio} is not between 0 and 1")
    weights = {name: model.get_parameter(name) for name, role in roles.items() if role != AUX}
    if not weights:
        raise UserError("no layer of an attention or MLP, and no dense convolution, to prune single weights of")
    bad = next((name for name, weight in weights.items() if not weight.isfinite().all()), None)
    if bad:
        raise UserError(f"the weights of {bad} are not finite")
    modules, parameters = {}, {}
    for role in dict.fromkeys(roles[name] for name in weights):
        members = {name: weight for name, weight in weights.items() if roles[name] == role}
        scores = torch.cat([lamp_scores(weight).flatten() for weight in members.values()])
        count = round(ratio * len(scores))
        modules[role] = Pruned(len(scores), count)
        sizes = [weight.numel() for weight in members.values()]
        for (name, weight), lowest in zip(members.items(), _lowest(scores, count).split(sizes), strict=True):
            weight.masked_fill_(lowest.view_as(weight), 0)
            parameters[name] = Pruned(weight.numel(), int(lowest.sum()))
    return Masking(modules, parameters)


def _lowest(scores: Tensor, count: int) -> Tensor:
    """Which are the `count` lowest of `scores` (n,), the first of equals: bool (n,)."""
    if not count:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(count).values
    lowest = scores < threshold
    at_it = (scores == threshold).nonzero().flatten()
    lowest[at_it[: count - int(lowest.sum())]] = True
    return lowest
