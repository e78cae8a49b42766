"""Group sparse training: units become unimportant as wholes, before they are scored and cut.

A cut takes a unit from every tensor that it occupies, so that it costs nothing only where all of these slices are
small at once. A regularizer adds to the gradients, between the backward pass and the optimizer's step, what shrinks
weak units over everything they occupy. With I_k = Σ ‖w[k]‖² over all weights that unit k of a group occupies (outputs,
inputs, norm scales, tables; no biases):

"group" (DepGraph, CVPR 2023, section 3.3): + reg · γ_k · w[k], which is the gradient of ½ · reg · Σ_k γ_k · I_k at
    constant γ, with γ_k = 2^(α · (max √I − √I_k) / (max √I − min √I)) over the group. With α = 4 its weakest unit is
    shrunk 16 times as hard as its strongest. γ is computed anew in each step, from norms as in the published code; the
    paper's formula has their squares. Where all units of a group are equally strong, γ is 1.
"growing" (GReg, ICLR 2021): + λ_k · w[k], where λ_k begins at reg and grows at each epoch's end by
    delta · (max √I − √I_k) / (max √I − min √I).
"bn" (network slimming, ICCV 2017, over groups): + reg · sign(w) for the scales w of the batch norms on a group's units.

What a step costs: each weight is squared once, into memory that is given back at once, and its squares are added up for
each of its dims that units lie along; for each of these its gradient is read and written once more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from isomorphic.errors import UserError
from isomorphic.pruning.groups import ChannelGraph
from isomorphic.pruning.scoring import batch_norm_scales
from isomorphic.pruning.sparsify.units import UnitSet, UnitWeights, unit_sets
from isomorphic.wrappers import check_unwrapped

STRENGTHS = {"group": 5e-4, "bn": 1e-5, "growing": 1e-4}  # the published runs' `reg`
ALPHA, DELTA = 4.0, 1e-5  # theirs, too


class Regularizer:
    """Adds to the gradients of a model what makes its units sparse. See `sparsify`."""

    def __init__(self, model: nn.Module, graph: ChannelGraph, reg: float) -> None:
        """
        Args:
            model: the model that is trained, on its device.
            graph: its groups.
            reg: strength.
        """
        self.reg = reg
        self._weights = UnitWeights(model, self._sets(model, graph))

    def _sets(self, model: nn.Module, graph: ChannelGraph) -> list[UnitSet]:
        """The units to make sparse."""
        sets = unit_sets(graph)
        if not sets:
            raise UserError(
                "nothing in this model can be made sparse: no channels can go, or only one of each kind (print the "
                "graph of isomorphic.trace, which says why)"
            )
        return sets

    def __call__(self, epoch: int = 0) -> None:
        """Adds to the gradients: after backward(), unscaled and averaged over processes, and before the step.

        Args:
            epoch: counts from 0; "growing" grows when it changes.

        Raises:
            UserError: no parameter has a gradient.
        """
        raise NotImplementedError

    def unit_norms(self) -> dict[str, Tensor]:
        """Returns √I of every unit, float32 (n,), by the name of its group, and of heads by that with " heads"."""
        return self._weights.by_set(self._weights.squared_norms().sqrt())

    def weak_half(self) -> float:
        """Returns the share of I that the weaker half of a group's units holds, as the mean over groups.

        Of units that are all alike it is 0.5; it falls towards 0 as half of every group becomes free to cut.
        """
        shares = []
        for squared in self._weights.by_set(self._weights.squared_norms().cpu()).values():
            total = squared.sum()
            weakest = squared.sort().values[: len(squared) // 2].sum()
            shares.append(float(weakest / total) if total > 0 else 0.0)
        return sum(shares) / len(shares)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs to go on exactly."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict`."""

    def _weakness(self) -> Tensor:
        """(max √I − √I_k) / (max √I − min √I) of every unit: 0 for the strongest of its group, 1 for the weakest.

        0 where all are alike.
        """
        norms = self._weights.squared_norms().sqrt()
        smallest, largest = self._weights.extremes(norms)
        span = largest - smallest
        return torch.where(span > 0, (largest - norms) / span, 0.0)


class GroupSparsity(Regularizer):
    """+ reg · γ_k · w[k] (DepGraph, section 3.3)."""

    def __init__(self, model: nn.Module, graph: ChannelGraph, reg: float, alpha: float = ALPHA) -> None:
        super().__init__(model, graph, reg)
        self.alpha = alpha

    @torch.no_grad()
    def __call__(self, epoch: int = 0) -> None:
        self._weights.add_to_gradients(self.reg * torch.exp2(self.alpha * self._weakness()))


class GrowingSparsity(Regularizer):
    """+ λ_k · w[k], with a λ that grows from epoch to epoch (GReg)."""

    def __init__(self, model: nn.Module, graph: ChannelGraph, reg: float, delta: float = DELTA) -> None:
        super().__init__(model, graph, reg)
        self.delta = delta
        self._penalty = self._weights.one_for_all(reg)  # λ, (units,)
        self._epoch: int | None = None

    @torch.no_grad()
    def __call__(self, epoch: int = 0) -> None:
        if self._epoch is not None and epoch != self._epoch:
            self._penalty += self.delta * self._weakness()
        self._epoch = epoch
        self._weights.add_to_gradients(self._penalty)

    def state_dict(self) -> dict[str, Any]:
        return {"penalty": self._penalty.cpu(), "epoch": self._epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._penalty.copy_(state["penalty"])
        self._epoch = state["epoch"]


class BatchNormSparsity(Regularizer):
    """+ reg · sign(w) for the scales of batch norms (network slimming)."""

    def _sets(self, model: nn.Module, graph: ChannelGraph) -> list[UnitSet]:
        sets = []
        for group in graph.groups:
            scales = tuple(batch_norm_scales(model, group))
            if scales and group.num_units > 1:
                sets.append(UnitSet(group.name, group.num_units, scales))
        if not sets:
            raise UserError(
                f"{type(model).__name__} has no batch norm whose channels can go, which the kind 'bn' shrinks: take "
                "'group'"
            )
        return sets

    @torch.no_grad()
    def __call__(self, epoch: int = 0) -> None:
        self._weights.add_to_gradients(self._weights.one_for_all(self.reg), of_sign=True)


KINDS = ("group", "bn", "growing")


def sparsify(
    model: nn.Module,
    graph: ChannelGraph,
    *,
    kind: str = "group",
    reg: float | None = None,
    alpha: float = ALPHA,
    delta: float = DELTA,
) -> Regularizer:
    """Returns a regularizer for a training loop: units that matter little become zero as wholes.

        graph = iso.trace(model, inputs)
        regularize = iso.sparsify(model, graph)
        for epoch in range(epochs):
            for images, labels in loader:
                optimizer.zero_grad()
                loss_of(model(images), labels).backward()
                regularize(epoch)
                optimizer.step()
        pruned = iso.prune(model, inputs, macs="50%", criterion="group_norm", normalizer="top", ranking="global")

    Args:
        model: the model that is trained, on its device: not wrapped, not sharded.
        graph: its groups, of `trace`.
        kind: "group" (DepGraph), "bn" (network slimming) or "growing" (GReg): see the module's equations.
        reg: strength; None: 5e-4 for "group", 1e-5 for "bn", where "growing" begins: 1e-4.
        alpha: of "group": the weakest unit of a group is shrunk 2^alpha times as hard as its strongest.
        delta: of "growing": what the weakest unit's strength grows by an epoch.

    Raises:
        UserError: an unknown kind, a strength that is no number of at least 0, a graph of another model, or nothing to
            make sparse.
    """
    check_unwrapped(model, "sparsify")
    if kind not in KINDS:
        raise UserError(f"kind = {kind!r} is none of {', '.join(KINDS)}")
    reg = STRENGTHS[kind] if reg is None else reg
    for name, value in {"reg": reg, "alpha": alpha, "delta": delta}.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise UserError(f"{name} = {value!r} is not a number of at least 0")
    if kind == "bn":
        return BatchNormSparsity(model, graph, reg)
    if kind == "growing":
        return GrowingSparsity(model, graph, reg, delta)
    return GroupSparsity(model, graph, reg, alpha)
