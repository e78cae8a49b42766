"""Using up what a search leaves of its budget, where the next step of every pool costs more than that.

Steps come back in the order in which they went: the last one first. That order stalls where one pool ranks cheap and
dear steps together, as a global ranking does, or one over groups at several resolutions. Sets whose own next step fits
then get it back, although a dearer step of the same pool, which scored higher, stays out. A plan that leaves no more
than `CLOSE` of its budget is not touched.

Worked example: a step of a residual stream is worth 4 M MACs, one inside a block 1 M. Of a pool's removal order
(stream, a, a, b, stream) all five were taken, and 2.5 M of 100 M are left over. The last step, the stream's, does not
fit, and the stream is done with. The step of `b` comes back, then the later one of `a`; half a million, 0.5%, is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from isomorphic.pruning.ranking.estimate import Kept
from isomorphic.pruning.ranking.search import Candidate, Price, largest_fitting, step_prices

CLOSE = 0.005  # the share of a budget that may be left over
ROUNDS = 3  # an estimate that is put right at what was found so often has found what it can


def use_up(
    found: Candidate, asked_for: Candidate, estimate: Callable[[Kept], float], cost: Price, target: int
) -> Candidate:
    """Returns a candidate with further steps back, measured to fit, or `found` where it is near enough or none fits.

    Args:
        found: within the target.
        asked_for: what explicit shares alone remove; pools that lose no more than that get nothing back.
        estimate: about what is left, from what each group keeps.
        cost: what a candidate really costs, measured.
        target: the budget, in the unit of `cost`.
    """
    for _ in range(ROUNDS):
        anchor, measured = estimate(found.kept), cost(found)
        if measured >= (1 - CLOSE) * target or not anchor:
            break

        def price(candidate: Candidate, rate: float = measured / anchor) -> int:
            return round(estimate(candidate.kept) * rate)

        trail = list(_steps_back(found, asked_for, price, target))

        def fits(back: int, trail: list[Candidate] = trail) -> bool:
            return cost(trail[back - 1]) <= target

        back = largest_fitting(fits, len(trail), len(trail)) if trail else 0
        if not back:
            break
        found = trail[back - 1]
    return found


def _steps_back(candidate: Candidate, asked_for: Candidate, price: Price, target: int) -> Iterator[Candidate]:
    """Yields the candidate with one step back, with two, and so on, until the target is near or no step fits."""
    prices = step_prices(replace(candidate, returned={}), price)
    varying = [pool for pool in prices if candidate.steps[pool] > asked_for.steps[pool]]
    for pool in sorted(varying, key=lambda pool: -prices[pool]):  # the costliest first, as in the search
        order = candidate.orders[pool]
        done_with: set[str] = set()  # sets whose next step did not fit
        back_already = dict(candidate.returned)
        for owner in reversed(order.owner[: candidate.steps[pool]]):
            name = order.names[owner]
            if back_already.get(name):
                back_already[name] -= 1
                continue
            if name in done_with:
                continue
            wider = candidate.with_one_back(name)
            amount = price(wider)
            if amount > target:
                done_with.add(name)
                continue
            candidate = wider
            yield candidate
            if amount >= (1 - CLOSE) * target:
                return
