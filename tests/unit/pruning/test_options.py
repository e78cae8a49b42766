"""Budgets in whole numbers, and options that contradict themselves."""

from __future__ import annotations

import pytest

from isomorphic.errors import UserError
from isomorphic.pruning.options import PlanOptions, Target


@pytest.mark.parametrize(
    ("amount", "whole"), [(435.6, 435), (436.0, 436), (0.29 * 100, 29), (0.57 * 100, 57), (4.16e9, 4_160_000_000)]
)
def test_a_budget_is_met_from_below_in_whole_numbers(amount: float, whole: int):
    """0.29 · 100 is 28.999999999999996 in floating point, and 29 is meant."""
    assert Target("macs_paper", amount).whole == whole


def test_a_precision_is_a_dtype_or_auto():
    assert PlanOptions(ratio=0.5).amp_dtype == PlanOptions(ratio=0.5, amp_dtype="auto").amp_dtype == "auto"
    with pytest.raises(UserError, match=r"amp_dtype = 'bf16' is no torch.dtype, None or 'auto'"):
        PlanOptions(ratio=0.5, amp_dtype="bf16")  # type: ignore[arg-type]
