"""Budgets as people write them: 4.2G, 20M, 50%, 5ms, or a plain number."""

from __future__ import annotations

import math
from dataclasses import dataclass

from isomorphic.errors import UserError

AMOUNTS = {"G": 1e9, "M": 1e6, "K": 1e3, "%": 0.01}  # of MACs and params; capitals or not
SECONDS = {"ms": 1e-3, "us": 1e-6, "s": 1.0, "%": 0.01}


@dataclass(frozen=True)
class Amount:
    """MACs, params or seconds: an absolute value, or a share of what the dense model takes."""

    value: float
    relative: bool = False

    def of(self, dense: float) -> float:
        """Returns the budget for a dense model that takes `dense`."""
        return self.value * dense if self.relative else self.value


def parse_amount(text: str | float) -> Amount:
    """Reads `4.2G`, `600M`, `1.5e9`, a number, or `50%` of the dense model's MACs or params.

    Raises:
        UserError: it is no such thing, not positive, less than one, or more than all.
    """
    written = str(text)
    amount = _parse(written, written[-1:].upper(), AMOUNTS)
    if amount.value < 1 and not amount.relative:
        raise UserError(
            f"{text!r} is less than one: a share of what the dense model takes is written {amount.value:.0%}"
        )
    return amount


def parse_duration(text: str | float) -> Amount:
    """Reads `5ms`, `0.5s`, `800us`, or `50%` of the dense model's latency; a number is in seconds.

    Raises:
        UserError: it is no such thing, not positive, or more than all.
    """
    if isinstance(text, (int, float)):
        return _parse(f"{text}s", "s", SECONDS)
    unit = next((unit for unit in SECONDS if text.endswith(unit)), None)
    if unit is None:
        raise UserError(f"{text!r} has no unit: write 5ms, 0.5s, 800us or 50%")
    return _parse(text, unit, SECONDS)


def _parse(text: str, unit: str, scales: dict[str, float]) -> Amount:
    scale = scales.get(unit)
    digits = text if scale is None else text[: -len(unit)]
    try:
        value = float(digits) * (1.0 if scale is None else scale)
    except ValueError as error:
        raise UserError(f"{text!r} is not a number, or one with a unit of {', '.join(scales)}") from error
    if not math.isfinite(value):
        raise UserError(f"{digits} is not finite")
    if value <= 0:
        raise UserError(f"{text} is not positive and finite")
    if unit == "%" and value > 1:
        raise UserError(f"{text} is more than the dense model takes")
    return Amount(value, relative=unit == "%")
