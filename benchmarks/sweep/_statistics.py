"""Statistics of one cell: percentiles of the calls, and a confidence interval from the means of rounds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from msgspec.structs import replace

from dsc_split.benchmarks.cells._cells import FirstCalls, Statistics

__all__ = [
    "MIN_ROUNDS",
    "MIN_ROUNDS_AT_LIMIT",
    "interval_ms",
    "is_precise",
    "percentile",
    "summarise",
    "summarise_compute",
]

MIN_ROUNDS = 5
"""Fewest rounds of a cell that stops before its time limit."""
MIN_ROUNDS_AT_LIMIT = 3
"""Fewest rounds of a cell at its time limit."""

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
         2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
         2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip
"""Student's t, 97.5 % quantile, for 1 to 30 degrees of freedom."""


def t_quantile(degrees: int) -> float:
    """Return Student's 97.5 % quantile; beyond the table, from its expansion in ``1/degrees``."""
    if degrees <= len(T_975):
        return T_975[degrees - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def percentile(ordered: Sequence[float], share: float) -> float:
    """Interpolate linearly between the sorted values, as NumPy does."""
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def interval_ms(rounds: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the median of all calls and the half-width of its 95 % confidence interval.

    The half-width comes from the spread of the means of rounds, because calls in a row are not independent.
    It is infinite for fewer than two rounds.
    """
    median = statistics.median(sample for samples in rounds for sample in samples)
    count = len(rounds)
    if count < 2:
        return median, math.inf
    spread = statistics.stdev(statistics.fmean(samples) for samples in rounds)
    return median, t_quantile(count - 1) * spread / math.sqrt(count)


def is_precise(rounds: Sequence[Sequence[float]], goal: float, *, at_limit: bool = False) -> bool:
    """Return whether there are enough rounds and the half-width is at most ``goal`` of the median."""
    if len(rounds) < (MIN_ROUNDS_AT_LIMIT if at_limit else MIN_ROUNDS):
        return False
    median, half_width = interval_ms(rounds)
    return half_width <= goal * median


def summarise(rounds: Sequence[Sequence[float]], first_after_pause: Sequence[float], slowdown: float) -> Statistics:
    """Summarise a cell.

    Args:
        rounds: Milliseconds of each call, by round; no round is empty, and there are at least two.
        first_after_pause: Milliseconds of the first calls after each pause, which are not in ``rounds``.
        slowdown: Every time is multiplied by it.
    """
    short = summarise_compute(rounds, slowdown)
    ordered = sorted(sample for samples in rounds for sample in samples)
    first = sorted(first_after_pause)
    return replace(
        short,
        p90=percentile(ordered, 0.90) * slowdown,
        p99=percentile(ordered, 0.99) * slowdown,
        mean=statistics.fmean(ordered) * slowdown,
        std=(statistics.stdev(ordered) if len(ordered) > 1 else 0.0) * slowdown,
        first_after_pause=FirstCalls(
            n=len(first),
            median=statistics.median(first) * slowdown,
            p95=percentile(first, 0.95) * slowdown,
        )
        if first
        else None,
    )


def summarise_compute(rounds: Sequence[Sequence[float]], slowdown: float) -> Statistics:
    """Return only count, median, 95th percentile and confidence interval.

    Arguments as in :func:`summarise`.
    """
    median, half_width = interval_ms(rounds)
    ordered = sorted(sample for samples in rounds for sample in samples)
    return Statistics(
        n=len(ordered),
        median=median * slowdown,
        p95=percentile(ordered, 0.95) * slowdown,
        ci=(max(0.0, median - half_width) * slowdown, (median + half_width) * slowdown),
    )
