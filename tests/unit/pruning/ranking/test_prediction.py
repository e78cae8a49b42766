"""Predicted losses of allocations: from single pools, and corrected by what was measured."""

from __future__ import annotations

import math

import pytest

from isomorphic.pruning.ranking.prediction import LEAST, Prediction
from isomorphic.pruning.ranking.ranker import HEADS, RankingPool

HIDDEN, STREAM = RankingPool("width", "1"), RankingPool("width", "2")
ALONE = {HEADS: (0.5, math.log(0.8)), HIDDEN: (0.25, math.log(0.8)), STREAM: (0.5, math.log(0.2))}


def prediction() -> Prediction:
    """A dense loss of 0.2, which half of the heads take to 0.8, and so does a quarter of the hidden units."""
    return Prediction.from_single_pools(math.log(0.2), ALONE)


def test_sensitivities_are_log_losses_by_log_shares():
    found = prediction().sensitivities
    assert found[HEADS] == pytest.approx(2.0)  # log 4 / log 2
    assert found[HIDDEN] == pytest.approx(1.0)
    assert found[STREAM] == pytest.approx(LEAST * 2.0)  # no pool is free


def test_a_predicted_log_loss_is_the_sum():
    kept = {HEADS: 0.5, HIDDEN: 0.5, STREAM: 1.0}
    assert math.exp(prediction().log_loss(kept)) == pytest.approx(0.2 * 4 * 2)
    assert math.exp(prediction().log_loss(dict.fromkeys(kept, 1.0))) == pytest.approx(0.2)


def test_what_was_measured_as_predicted_corrects_nothing():
    kept = {HEADS: 0.5, HIDDEN: 0.5, STREAM: 1.0}
    found = prediction().corrected([(kept, prediction().log_loss(kept))])
    assert found.sensitivities == pytest.approx(prediction().sensitivities)
    assert prediction().corrected([]).sensitivities == pytest.approx(prediction().sensitivities)


@pytest.mark.parametrize("factor", [0.5, 2.0, 100.0])
def test_measured_plans_draw_the_prediction_towards_them(factor: float):
    """However far off: every sensitivity stays above nought, and the order of the pools what the single ones said."""
    kept = {HEADS: 0.5, HIDDEN: 0.5, STREAM: 0.5}
    before = prediction().log_loss(kept)
    measured = before + math.log(factor)
    found = prediction().corrected([(kept, measured)])
    assert abs(found.log_loss(kept) - measured) < 0.5 * abs(before - measured)
    assert found.sensitivities[HEADS] > found.sensitivities[HIDDEN] > found.sensitivities[STREAM] > 0


def test_two_plans_tell_which_pool_was_misjudged():
    kept = [{HEADS: 1.0, HIDDEN: 0.5, STREAM: 1.0}, {HEADS: 0.5, HIDDEN: 1.0, STREAM: 1.0}]
    measured = [(kept[0], math.log(0.2) + 2 * math.log(2)), (kept[1], prediction().log_loss(kept[1]))]
    found = prediction().corrected(measured).sensitivities
    assert found[HIDDEN] > 1.4
    assert found[HEADS] == pytest.approx(2.0, abs=0.2)
