from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from dsc_split.benchmarks.cells._cells import FirstCalls
from dsc_split.benchmarks.sweep._statistics import interval_ms, is_precise, percentile, summarise, t_quantile


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.706), (4, 2.776), (30, 2.042), (40, 2.021), (120, 1.980), (10**9, 1.960)]
)
def test_t_quantiles_are_those_of_the_textbook(degrees: int, quantile: float) -> None:
    assert t_quantile(degrees) == pytest.approx(quantile, abs=1e-3)


def test_interval_comes_from_the_means_of_rounds() -> None:
    # Means 1, 2, 3: their standard deviation is 1, t(2) is 4.303, so the half-width is 4.303 / sqrt(3).
    median, half_width = interval_ms([[0.5, 1.5], [2.0], [3.0, 3.0, 3.0]])

    assert median == 2.5
    assert half_width == pytest.approx(4.303 / math.sqrt(3))


def test_interval_of_one_round_is_infinite() -> None:
    assert interval_ms([[1.0, 2.0]])[1] == math.inf


def test_five_rounds_are_needed_and_three_when_time_is_up() -> None:
    assert not is_precise([[1.0]] * 4, 0.02)
    assert is_precise([[1.0]] * 5, 0.02)
    assert not is_precise([[1.0]] * 2, 0.02, at_limit=True)
    assert is_precise([[1.0]] * 3, 0.02, at_limit=True)
    assert not is_precise([[1.0], [1.1], [0.9], [1.0], [1.0]], 0.02)


def test_percentiles_agree_with_numpy() -> None:
    values = sorted(np.random.default_rng(0).lognormal(size=57).tolist())

    for share in (0.0, 0.5, 0.9, 0.95, 0.99, 1.0):
        assert percentile(values, share) == pytest.approx(np.quantile(values, share))


def test_slowdown_multiplies_every_time() -> None:
    rounds = [[1.0, 1.2], [1.1, 1.3], [0.9, 1.0]]

    plain, slow = summarise(rounds, [2.0], 1.0), summarise(rounds, [2.0], 6.0)

    assert plain.n == slow.n == 6
    for name in ("median", "p90", "p95", "p99", "mean", "std"):
        assert getattr(slow, name) == pytest.approx(6 * getattr(plain, name))
    assert slow.ci == pytest.approx([6 * end for end in plain.ci])
    assert slow.first_after_pause == FirstCalls(n=1, median=12.0, p95=12.0)
    assert plain.mean == pytest.approx(statistics.fmean([1.0, 1.2, 1.1, 1.3, 0.9, 1.0]))
    assert plain.ci[0] <= plain.median <= plain.ci[1]


def test_without_paced_calls_there_is_no_first_after_pause() -> None:
    assert summarise([[1.0], [1.0]], [], 1.0).first_after_pause is None
