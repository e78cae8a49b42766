"""Allocating a budget among isomorphism classes: the share that each loses is searched for, on a calibration loss.

The paper gives every isomorphism class the same ratio. A model has but a handful of classes, so their ratios can be
searched for. A point of the search is one exponent for each pool: where the paper's allocation keeps a share k, a pool
of exponent a keeps kᵃ. Equal exponents are the paper's allocation, so only their ratios matter, and `plan_for_budget`
finds the k that meets the budget. What a global ranking removes of a class is a prefix of the class's own removal
order (but for single steps that `leftover.py` gives back), so that is such a point, too: the search starts from the
better of both, and takes only what is better still.

Every point costs a model that is cut and recovered. Where a loss on fewer images is to be had, which is quick, the
search asks that one, and all images only say whether what it found is better than where it started. Quick losses of
models that lose a single pool come first: what they predict of all pools together (`prediction.py`) leads the search.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from isomorphic.errors import UserError
from isomorphic.measure.complexity import Complexity
from isomorphic.pruning.groups import CoupledGroup
from isomorphic.pruning.plan import PruningPlan
from isomorphic.pruning.ranking.budget import Cost, plan_for_budget, shared_ratios
from isomorphic.pruning.ranking.prediction import Prediction
from isomorphic.pruning.ranking.ranker import HEADS, Ranker, RankingPool, Ratios
from isomorphic.pruning.recovery.held_out import Judged
from isomorphic.pruning.report import name_groups

Exponents = Mapping[RankingPool, float]

# The search walks along log₂ of an exponent, the largest being 1, plus this: to 0, where a pool stays whole, and back.
OFFSET = 0.125
# Its first step, and the last that is worth an evaluation.
FIRST_STEP, LAST_STEP = 1.0, 1 / 16
# Points that the search looks at where it asks a prediction, and the losses between which logarithms are taken.
PREDICTED, NO_LOSS, WORST = 300, 1e-6, 1e3


@dataclass(frozen=True)
class Allocation:
    """The best plan that was found, and what it is better than.

    Attributes:
        plan: within the budget; its `ratios` are the shares that the pools lose, by "heads", "head dims" or the first
            group's name and the number of groups.
        loss: of that plan on the calibration set; inf where it is not finite.
        uniform_loss: of the paper's allocation under the same budget.
        global_loss: of the allocation that a global ranking implies.
        evaluations: plans whose loss the search has measured.
        uniform: the plan of the paper's allocation.
        confirmed: how many of these were measured again on all images; 0 where the search had all.
        on_held_out: the found plan beside the uniform one on images that the search has not seen; None without any.
    """

    plan: PruningPlan
    loss: float
    uniform_loss: float
    global_loss: float
    evaluations: int
    uniform: PruningPlan
    confirmed: int = 0
    on_held_out: Judged | None = None

    def judged(self, loss_on_held_out: Callable[[PruningPlan], float]) -> Allocation:
        """Returns the allocation that held-out images want: this one, or the paper's if that is nearer to the dense.

        Args:
            loss_on_held_out: of this plan and the uniform one, on images that the search has not seen.
        """
        before, after = loss_on_held_out(self.uniform), loss_on_held_out(self.plan)
        found = Judged("allocate", before, after, after <= before)
        return replace(self, plan=self.plan if found.stays else self.uniform, on_held_out=found)

    @property
    def line(self) -> str:
        """What a person reads: "Calibration loss: 2.31 uniform, 2.48 global => 2.10 (24 evaluations and 3 on all…)"."""
        if len(self.plan.ratios) < 2:
            return "Nothing to allocate: no two isomorphism classes can lose anything"
        start = f"{self.uniform_loss:.4f} uniform, {self.global_loss:.4f} global"
        count = f"{self.evaluations} evaluation{'' if self.evaluations == 1 else 's'}"
        count += f" and {self.confirmed} on all images" if self.confirmed else ""
        return f"Calibration loss: {start} => {self.loss:.4f} ({count})"

    @property
    def lines(self) -> tuple[str, ...]:
        """The same, and what held-out images say: "Held-out KL: 0.4012 uniform => 0.3120"."""
        if self.on_held_out is None:
            return (self.line,)
        before, after, stays = self.on_held_out.before, self.on_held_out.after, self.on_held_out.stays
        end = "" if stays else ", so the uniform allocation is taken"
        return self.line, f"Held-out KL to the dense model: {before:.4f} uniform => {after:.4f}{end}"


def allocate(
    ranker: Ranker,
    cost: Cost,
    unit: str,
    target: int,
    loss_of: Callable[[PruningPlan], float],
    *,
    heads: float | None,
    head_dims: float | None,
    evaluations: int,
    seed: int = 0,
    quick_loss_of: Callable[[PruningPlan], float] | None = None,
) -> Allocation:
    """Searches for the ratios of all pools under a budget that leave the least loss.

    Args:
        ranker: of an isomorphic ranking.
        cost, unit, target: the budget, as for `plan_for_budget`.
        loss_of: of a plan: what a copy of the model loses on the calibration set when it is cut, and recovered, like
            the final one. The same plan has the same loss; what is not finite is worst.
        heads, head_dims: explicit shares, which stay what they are; None leaves them to the search.
        evaluations: how many plans the search may measure; both starting points are always measured.
        seed: of the order in which pools are tried.
        quick_loss_of: `loss_of` on fewer images, which the search asks instead; it calls `loss_of` for three plans.

    Raises:
        UserError: the paper's allocation does not reach the budget.
    """
    pools = _open_pools(ranker, heads, head_dims)

    def plan_of(exponents: Exponents, ranker: Ranker = ranker, cost: Cost = cost) -> PruningPlan:
        def ratios_at(ratio: float) -> Ratios:
            return tilted(shared_ratios(ratio, heads, head_dims), exponents)

        return plan_for_budget(ranker, ratios_at, cost, unit, target)

    trials = _Trials(plan_of, quick_loss_of or loss_of, evaluations)
    equal = dict.fromkeys(pools, 1.0)
    uniform = trials.measured(equal, plan_of(equal))
    global_plan = plan_of({}, ranker.with_ranking("global"))  # what a ratio above is of a class, it is of all here
    implied = implied_exponents(global_plan, pools, shared_ratios(0.5, heads, head_dims))
    as_global = trials.measured(implied, global_plan)
    best, whole = min(uniform, as_global, key=lambda point: point.loss), shared_ratios(0.0, heads, head_dims)
    if len(pools) > 1 and quick_loss_of and evaluations > trials.evaluations + len(pools) + 1:
        prediction = _predict(ranker, pools, uniform.plan, whole, trials)
        about = _EstimatedCost(cost, unit, ranker.groups)
        best = _follow(prediction, best, trials, pools, lambda exponents: plan_of(exponents, cost=about), seed)
    if len(pools) > 1:
        best = _search(best, trials, random.Random(seed))
    confirmed = 0
    if quick_loss_of:
        on_all = _Trials(plan_of, loss_of, 3)
        uniform, as_global, best = (on_all.measured(p.exponents, p.plan) for p in (uniform, as_global, best))
        best, confirmed = min(uniform, as_global, best, key=lambda point: point.loss), on_all.evaluations

    def with_ratios(plan: PruningPlan) -> PruningPlan:
        return replace(
            plan, ratios={_title(pool, groups): share_lost(plan, pool, groups) for pool, groups in pools.items()}
        )

    plan, losses = with_ratios(best.plan), (best.loss, uniform.loss, as_global.loss)
    return Allocation(plan, *losses, trials.evaluations, with_ratios(uniform.plan), confirmed)


def tilted(ratios: Ratios, exponents: Exponents) -> Ratios:
    """The ratios that leave kᵃ of a pool of exponent a, where `ratios` leave k."""
    return replace(ratios, by_pool={pool: 1 - (1 - ratios.of(pool)) ** a for pool, a in exponents.items()})


def implied_exponents(
    plan: PruningPlan, pools: Mapping[RankingPool, Sequence[CoupledGroup]], ratios: Ratios
) -> dict[RankingPool, float]:
    """The exponents, up to 1, that lead from what `ratios` keep of each pool to what `plan` keeps of it."""
    kept = kept_shares(plan, pools)
    return _normalized({pool: math.log(share) / math.log(1 - ratios.of(pool)) for pool, share in kept.items()})


def share_lost(plan: PruningPlan, pool: RankingPool, groups: Sequence[CoupledGroup]) -> float:
    """The share that a plan removes of a pool's heads, or of its units in heads that survive."""
    heads = {group.name: len(plan.kept_heads(group)) for group in groups}
    if pool == HEADS:
        return 1 - sum(heads.values()) / sum(group.num_sections for group in groups)
    units = sum(heads[group.name] * group.section_size for group in groups)
    return 1 - sum(len(plan.kept[group.name]) for group in groups) / units


def kept_shares(plan: PruningPlan, pools: Mapping[RankingPool, Sequence[CoupledGroup]]) -> dict[RankingPool, float]:
    """The share that a plan keeps of each pool."""
    return {pool: 1 - share_lost(plan, pool, groups) for pool, groups in pools.items()}


def single_pool_plans(
    ranker: Ranker, pools: Mapping[RankingPool, Sequence[CoupledGroup]], uniform: PruningPlan, whole: Ratios
) -> dict[RankingPool, PruningPlan]:
    """A plan for each pool that cuts it alone, by as much as `uniform` does, or by more if that is nothing.

    Args:
        ranker, pools, uniform: as in `allocate`.
        whole: the ratios at which all of the pools stay whole.
    """
    plans = {}
    for pool, groups in pools.items():
        for share in (share_lost(uniform, pool, groups), 0.5, 1.0):
            plans[pool] = ranker.plan(replace(whole, by_pool={pool: share}))
            if share_lost(plans[pool], pool, groups) > 0:
                break
    return plans


def _predict(
    ranker: Ranker,
    pools: Mapping[RankingPool, Sequence[CoupledGroup]],
    uniform: PruningPlan,
    whole: Ratios,
    trials: _Trials,
) -> Prediction:
    """Measures a plan for each pool, which cuts it alone, and one that cuts none; returns what they predict."""
    dense = _log(trials.loss_of(ranker.plan(whole)))
    alone = {
        pool: (kept_shares(plan, pools)[pool], _log(trials.loss_of(plan)))
        for pool, plan in single_pool_plans(ranker, pools, uniform, whole).items()
    }
    return Prediction.from_single_pools(dense, alone)


def _follow(
    prediction: Prediction,
    best: _Point,
    trials: _Trials,
    pools: Mapping[RankingPool, Sequence[CoupledGroup]],
    quick_plan_of: Callable[[Exponents], PruningPlan],
    seed: int,
) -> _Point:
    """Measures the best point of a prediction, corrects the prediction by it, and so on until one comes twice."""
    while not trials.spent:
        measured = [(kept_shares(point.plan, pools), _log(point.loss)) for point in trials.points]
        corrected = prediction.corrected(measured)

        def predicted(plan: PruningPlan, by: Prediction = corrected) -> float:
            return by.log_loss(kept_shares(plan, pools))

        inner = _Trials(quick_plan_of, predicted, PREDICTED)
        start = inner.measured(best.exponents, best.plan)
        promising = _search(start, inner, random.Random(seed))
        known = trials.evaluations
        best = trials.better(promising.exponents, best) or best
        if trials.evaluations == known:
            break
    return best


class _EstimatedCost:
    """Takes the estimate of a cost at its word: near enough for plans that are only to be predicted."""

    def __init__(self, cost: Cost, unit: str, groups: Sequence[CoupledGroup]) -> None:
        self._groups, self._about = groups, cost.estimate(unit)

    def __call__(self, plan: PruningPlan) -> Complexity:
        heads = {group.name: len(plan.kept_heads(group)) for group in self._groups}
        amount = round(self._about({name: (count, len(plan.kept[name]) // count) for name, count in heads.items()}))
        return Complexity(amount, amount, amount)

    def estimate(self, unit: str) -> Callable[..., float]:
        return self._about


def _log(loss: float) -> float:
    """The logarithm of a loss, of the worst that counts where it is no number."""
    return math.log(min(max(loss, NO_LOSS), WORST)) if math.isfinite(loss) else math.log(WORST)


@dataclass(frozen=True)
class _Point:
    """Exponents, the plan that they lead to, and its loss."""

    exponents: Exponents
    plan: PruningPlan
    loss: float


class _Trials:
    """Measures the loss of plans, of each plan once, until `limit` have been; `points` are those of the search."""

    def __init__(
        self, plan_of: Callable[[Exponents], PruningPlan], loss_of: Callable[[PruningPlan], float], limit: int
    ) -> None:
        self._plan_of, self._loss_of, self._limit = plan_of, loss_of, limit
        self._losses: dict[tuple[tuple[int, ...], ...], float] = {}  # by the kept units of all groups
        self.points: list[_Point] = []

    @property
    def evaluations(self) -> int:
        return len(self._losses)

    @property
    def spent(self) -> bool:
        return self.evaluations >= self._limit

    def loss_of(self, plan: PruningPlan) -> float:
        """The loss of a plan; infinity where it is not finite."""
        key = tuple(plan.kept.values())
        if key not in self._losses:
            loss = self._loss_of(plan)
            self._losses[key] = loss if math.isfinite(loss) else math.inf
        return self._losses[key]

    def measured(self, exponents: Exponents, plan: PruningPlan) -> _Point:
        """The point of these exponents, which lead to this plan."""
        point = _Point(exponents, plan, self.loss_of(plan))
        self.points.append(point)
        return point

    def better(self, exponents: Exponents, than: _Point) -> _Point | None:
        """The point of these exponents if its loss is lower, and the budget within their reach."""
        if self.spent:
            return None
        exponents = _normalized(exponents)
        try:
            plan = self._plan_of(exponents)
        except UserError:  # pools that stay whole leave too much
            return None
        point = self.measured(exponents, plan)
        return point if point.loss < than.loss else None


def _search(best: _Point, trials: _Trials, order: random.Random) -> _Point:
    """Pattern search (Hooke and Jeeves, 1961), with a step for each pool, which halves where it fails both ways.

    Its second move repeats what a round over all pools has gained, which follows a valley that no pool's axis does.
    """
    steps = dict.fromkeys(best.exponents, FIRST_STEP)
    while not trials.spent and any(abs(step) >= LAST_STEP for step in steps.values()):
        begin = best
        for pool in order.sample(list(steps), len(steps)):
            if abs(steps[pool]) >= LAST_STEP:
                best, steps[pool] = _move_one(best, pool, steps[pool], trials)
        best = _move_on(begin, best, trials)
    return best


def _move_one(best: _Point, pool: RankingPool, step: float, trials: _Trials) -> tuple[_Point, float]:
    """The point after one step of a pool, in whichever direction is better, and the pool's next step."""
    for signed in (step, -step):
        moved = _stretched(best.exponents[pool], 2**signed)
        if found := trials.better({**best.exponents, pool: moved}, best):
            return found, signed
    return best, step / 2


def _move_on(begin: _Point, best: _Point, trials: _Trials) -> _Point:
    """The last of the points in a row that repeat the way from `begin` to `best`, each better than the one before."""
    while begin is not best:
        before = begin.exponents
        ahead = {p: _stretched(a, (a + OFFSET) / (before[p] + OFFSET)) for p, a in best.exponents.items()}
        begin, best = best, trials.better(ahead, best) or best
    return best


def _stretched(exponent: float, factor: float) -> float:
    return max((exponent + OFFSET) * factor - OFFSET, 0.0)


def _normalized(exponents: Exponents) -> dict[RankingPool, float]:
    """The same allocation with 1 for the largest: the ratio that `plan_for_budget` varies is that pool's own."""
    largest = max(exponents.values(), default=0.0)
    return {pool: a / largest if largest else 1.0 for pool, a in exponents.items()}


def _open_pools(ranker: Ranker, heads: float | None, head_dims: float | None) -> dict[RankingPool, list[CoupledGroup]]:
    """The pools that can lose anything and whose share was not asked for."""
    explicit = {"heads": heads, "head_dims": head_dims}
    pools = ranker.pools(separate_head_dims=True)  # as in every search for a budget
    return {pool: groups for pool, groups in pools.items() if explicit.get(pool.kind) is None}


def _title(pool: RankingPool, groups: Sequence[CoupledGroup]) -> str:
    return {"heads": "heads", "head_dims": "head dims"}.get(pool.kind) or name_groups(groups)
