"""Predicting what an allocation loses, from what each pool loses alone.

The logarithm of the calibration loss is taken for a sum over the pools. With k_p the share that a plan keeps of pool p,

    log loss(plan) ≈ b + Σ_p s_p · (−log k_p)

b is the log-loss of the dense model and s_p the *sensitivity* of a pool: where a model that has lost half of one pool
alone has twice the dense loss, s_p is log 2 / log 2 = 1. One plan a pool, with nothing else cut,
says all s_p. They are a first guess: pools that are cut together lose more, or less, than the sum. Plans that are
measured afterwards correct it, by no more than they have to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isomorphic.pruning.ranking.ranker import RankingPool

Kept = Mapping[RankingPool, float]  # the share that a plan keeps of each pool

# Standard deviations: of b; of the logarithms of all sensitivities together, and of each one's own; and of a measured
# log-loss from the sum, which no sensitivities say quite.
OF_DENSE, OF_ALL, OF_EACH, MISFIT = 0.1, 0.5, 0.5, 0.1
LEAST = 0.02  # of the largest sensitivity: no pool is free, whatever rounding says


@dataclass(frozen=True)
class Prediction:
    """Log-losses of allocations.

    Attributes:
        dense: b, the log-loss where every pool is whole.
        sensitivities: s_p by pool, all above nought.
    """

    dense: float
    sensitivities: Mapping[RankingPool, float]

    @classmethod
    def from_single_pools(cls, dense: float, alone: Mapping[RankingPool, tuple[float, float]]) -> Prediction:
        """What is predicted before anything else is measured.

        Args:
            dense: the log-loss of the dense model.
            alone: by pool, the share that was kept of it, below 1, and the log-loss with the other pools whole.
        """
        found = {pool: (loss - dense) / -math.log(kept) for pool, (kept, loss) in alone.items()}
        least = LEAST * max(*found.values(), LEAST)
        return cls(dense, {pool: max(s, least) for pool, s in found.items()})

    def log_loss(self, kept: Kept) -> float:
        """Returns the log-loss of a plan that keeps these shares, each above nought."""
        return self.dense + float(np.dot(list(self.sensitivities.values()), self._lost(kept)))

    def corrected(self, measured: Sequence[tuple[Kept, float]]) -> Prediction:
        """Returns what plans, whose log-losses were measured, make of this prediction: the most probable b and s.

        With normal distributions of b, of a factor c common to all sensitivities, of each one's own factor, and of what
        the sum does not say, all but b of logarithms, that is a least-squares problem in b, log c and log s.

        Args:
            measured: the shares that each plan keeps, and its log-loss.
        """
        from scipy.optimize import least_squares  # here, since it takes seconds to import

        if not measured:
            return self
        lost = np.stack([self._lost(kept) for kept, _ in measured])
        losses = np.array([loss for _, loss in measured])
        before = np.array(list(self.sensitivities.values()))

        def unlikely(change: NDArray[np.float64]) -> NDArray[np.float64]:
            dense, common, own = change[0], change[1], change[2:]
            predicted = self.dense + dense + lost @ (before * np.exp(common + own))
            return np.concatenate([(predicted - losses) / MISFIT, [dense / OF_DENSE, common / OF_ALL], own / OF_EACH])

        found = least_squares(unlikely, np.zeros(2 + len(before))).x
        after = before * np.exp(found[1] + found[2:])
        return Prediction(self.dense + float(found[0]), dict(zip(self.sensitivities, after.tolist(), strict=True)))

    def _lost(self, kept: Kept) -> NDArray[np.float64]:
        """−log k of the pools, in the order of the sensitivities."""
        return -np.log([kept[pool] for pool in self.sensitivities])
