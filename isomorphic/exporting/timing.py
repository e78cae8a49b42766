"""How long a call takes: enough to put two runtimes side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

WARM_UP_CALLS = 3
MIN_CALLS, MIN_SECONDS, MAX_SECONDS = 10, 0.5, 10.0


def median_seconds(run: Callable[[], object]) -> float:
    """Returns the median time of a call: of at least 10 calls and half a second, within 10 seconds."""
    for _ in range(WARM_UP_CALLS):
        run()
    seconds: list[float] = []
    while sum(seconds) < MAX_SECONDS and (len(seconds) < MIN_CALLS or sum(seconds) < MIN_SECONDS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
