"""The rate estimate: what counts, what is ignored, and how fast it follows."""

import math
import random
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsc_split.errors import UsageError
from dsc_split.serving import EstimatorParameters, RateEstimate, RateEstimator
from dsc_split.serving.policy._decay import decay

MB = 1_000_000


def estimator_at(rate_mb_s: float, *, parameters: EstimatorParameters | None = None) -> RateEstimator:
    """Make an estimator that has seen one second of 0.5 MB transfers at one rate, back to back."""
    estimator = RateEstimator(parameters)
    for i in range(10):
        estimator.add(i / 10, MB // 2, 500.0 / rate_mb_s)
    return estimator


def estimate(estimator: RateEstimator, time_s: float) -> RateEstimate:
    found = estimator.estimate(time_s)
    assert found is not None
    return found


def slow_start_ms(size_bytes: int, rate_mb_s: float, rtt_ms: float) -> float:
    """Give what a transfer takes that begins with TCP's first window of ten segments, doubled every round trip."""
    window, left, time_ms = 14480, size_bytes, 0.0
    while left > window and window / 1e3 / rate_mb_s < rtt_ms:
        left, window, time_ms = left - window, 2 * window, time_ms + rtt_ms
    return time_ms + left / 1e3 / rate_mb_s


def test_decay_is_within_two_units_of_the_last_place_and_exact_at_whole_half_lives() -> None:
    numbers = random.Random(0)
    worst = 0.0
    with localcontext() as context:
        context.prec = 40
        for _ in range(2000):
            age = numbers.choice([1.0, 10.0, 1000.0]) * numbers.random()
            exact = Decimal(2) ** -Decimal(age)
            worst = max(worst, abs(float((Decimal(decay(age)) - exact) / Decimal(math.ulp(decay(age))))))

    assert worst < 2.0
    assert [decay(float(n)) for n in (0, 1, 10, 1074)] == [1.0, 0.5, 2.0**-10, 2.0**-1074]
    assert decay(1100.0) == decay(math.inf) == 0.0


def test_nothing_is_known_before_the_first_sample() -> None:
    assert RateEstimator().estimate(0.0) is None


def test_an_initial_rate_is_gone_by_until_the_first_sample_replaces_it() -> None:
    estimator = RateEstimator(initial_rate_mb_s=8.0)
    before = estimate(estimator, 5.0)

    assert (before.rate_mb_s, before.age_s, before.stale) == (8.0, math.inf, True)
    assert estimator.add(6.0, MB, 500.0) == "taken"
    assert estimate(estimator, 6.0).rate_mb_s == 2.0


def test_the_mean_is_of_the_inverse_rate_and_weighted_by_bytes() -> None:
    estimator = RateEstimator(EstimatorParameters(surprise_change=10.0))
    estimator.add(1.0, MB, 100.0)
    estimator.add(1.0, 3 * MB, 600.0)

    found = estimate(estimator, 1.0)
    assert found.seconds_per_mb == pytest.approx(0.7 / 4)
    assert found.rate_mb_s == pytest.approx(4 / 0.7)
    assert found.deviation_s_per_mb == pytest.approx(math.sqrt(0.25 * 0.075**2 + 0.75 * 0.025**2))


def test_a_sample_counts_half_after_a_half_life() -> None:
    estimator = RateEstimator(EstimatorParameters(half_life_s=4.0))
    estimator.add(10.0, MB, 100.0)
    estimator.add(14.0, MB, 110.0)

    assert estimate(estimator, 14.0).seconds_per_mb == pytest.approx((0.5 * 0.1 + 0.11) / 1.5)


def test_samples_too_small_to_mean_anything_are_ignored() -> None:
    estimator = estimator_at(10.0)
    before = estimate(estimator, 1.0)

    assert estimator.add(1.0, 1000, 4.9) == "too-small"
    assert estimator.add(1.0, 0, 400.0) == "too-small"
    assert estimate(estimator, 1.0) == before
    assert estimator.add(1.0, 131072, 4.9) != "too-small"
    assert estimator.add(1.0, 100_000, 10.0) == "taken"


def test_samples_taken_while_tcp_opened_its_window_do_not_drag_the_estimate() -> None:
    slow_ms = slow_start_ms(577_600, rate_mb_s=100.0, rtt_ms=20.0)
    assert slow_ms > 10 * 5.776

    wise, naive = estimator_at(100.0), estimator_at(100.0)
    for i in range(5):
        assert wise.add(2.0 + i, 577_600, slow_ms, rtt_ms=20.0) == "window-limited"
        naive.add(2.0 + i, 577_600, slow_ms)

    assert estimate(wise, 7.0).rate_mb_s == pytest.approx(100.0)
    assert estimate(naive, 7.0).rate_mb_s < 10.0


def test_on_a_busy_connection_the_window_is_open_and_the_sample_counts() -> None:
    estimator = estimator_at(100.0)
    slow_ms = slow_start_ms(577_600, rate_mb_s=100.0, rtt_ms=20.0)

    assert estimator.add(1.1, 577_600, slow_ms, rtt_ms=20.0) == "surprise"


def test_a_link_that_fell_is_seen_although_every_request_begins_with_a_small_window() -> None:
    estimator = estimator_at(20.0)
    for i in range(3):
        sample = estimator.add(2.0 + i, 577_600, slow_start_ms(577_600, rate_mb_s=4.0, rtt_ms=20.0), rtt_ms=20.0)
        assert sample != "window-limited"

    assert estimate(estimator, 5.0).rate_mb_s == pytest.approx(4.0, rel=0.2)


def test_a_link_that_fell_is_seen_on_a_long_way_although_slow_start_fills_most_of_every_transfer() -> None:
    estimator = estimator_at(10.0)
    slow_ms = slow_start_ms(577_600, rate_mb_s=1.5, rtt_ms=200.0)
    assert 0.9 * slow_ms < 5 * 200.0

    assert estimator.add(4.0, 577_600, slow_ms, rtt_ms=200.0) == "surprise"
    assert estimator.add(7.0, 577_600, slow_ms, rtt_ms=200.0) == "reset"
    assert estimate(estimator, 7.0).rate_mb_s == pytest.approx(577.6 / (slow_ms - 5 * 200.0))
    assert estimator.add(10.0, 577_600, slow_ms, rtt_ms=200.0, window_limited=True) == "window-limited"


def test_a_window_limited_sample_can_still_raise_the_estimate_or_be_the_first() -> None:
    first, slow = RateEstimator(), estimator_at(1.0)

    assert first.add(0.0, MB, 100.0, window_limited=True) == "taken"
    assert first.add(0.1, MB, 120.0, window_limited=True) == "window-limited"
    assert slow.add(1.0, MB, 100.0, window_limited=True) == "surprise"
    assert estimate(slow, 1.0).rate_mb_s > 1.0


@pytest.mark.parametrize("factor", [0.1, 0.5, 3.0])
def test_a_change_point_is_followed_in_two_samples_where_the_plain_mean_takes_longer(factor: float) -> None:
    quick = estimator_at(10.0)
    plain = estimator_at(10.0, parameters=EstimatorParameters(surprise_sigmas=math.inf))
    results = []
    for estimator in (quick, plain):
        results = [estimator.add(1.0 + i / 10, MB // 2, 50.0 / factor) for i in (0, 1)]
        if estimator is quick:
            assert results == ["surprise", "reset"]

    assert results == ["taken", "taken"]
    assert estimate(quick, 1.1).rate_mb_s == pytest.approx(10.0 * factor)
    assert abs(estimate(plain, 1.1).rate_mb_s / (10.0 * factor) - 1.0) > 0.2


def test_one_outlier_is_no_change() -> None:
    estimator = estimator_at(10.0)

    assert estimator.add(1.0, MB // 2, 500.0) == "surprise"
    assert estimator.add(1.1, MB // 2, 50.0) == "taken"
    assert [estimator.add(1.2 + i / 10, MB // 2, 50.0) for i in range(9)] == ["taken"] * 9
    assert estimate(estimator, 2.0).rate_mb_s > 6.0


def test_two_outliers_on_different_sides_are_no_change() -> None:
    estimator = estimator_at(10.0)

    assert estimator.add(1.0, MB // 2, 500.0) == "surprise"
    assert estimator.add(1.1, MB // 2, 5.0) == "taken"


def test_a_change_that_is_small_or_short_is_no_surprise_however_steady_the_link_was() -> None:
    assert estimator_at(10.0).add(1.0, MB // 2, 50.0 * 1.25) == "taken"
    assert estimator_at(10.0).add(1.0, MB // 2, 50.0 * 1.35) == "surprise"
    assert estimator_at(10.0).add(1.0, 10_000, 5.9) == "taken"
    assert estimator_at(10.0).add(1.0, 10_000, 6.1) == "surprise"


def test_noise_that_was_seen_before_is_no_surprise() -> None:
    numbers = random.Random(3)
    estimator = RateEstimator()
    said = [estimator.add(i / 10, MB // 2, 50.0 * numbers.lognormvariate(0.0, 0.2)) for i in range(1000)]

    assert said.count("reset") <= 2


def test_an_old_estimate_is_stale_and_the_next_sample_starts_afresh() -> None:
    estimator = estimator_at(10.0)

    assert not estimate(estimator, 30.0).stale
    assert estimate(estimator, 31.0).stale
    assert estimate(estimator, 31.0).age_s == pytest.approx(30.1)
    assert estimator.add(31.0, MB, 1000.0) == "reset"
    assert estimate(estimator, 31.0) == RateEstimate(
        rate_mb_s=1.0, seconds_per_mb=1.0, deviation_s_per_mb=0.0, age_s=0.0, stale=False
    )


def test_after_a_restart_the_next_sample_alone_is_the_estimate() -> None:
    estimator = estimator_at(10.0)
    estimator.restart()

    assert estimate(estimator, 1.0).stale
    assert estimate(estimator, 1.0).rate_mb_s == pytest.approx(10.0)
    assert estimator.add(1.0, MB, 500.0) == "reset"
    assert estimate(estimator, 1.0).rate_mb_s == 2.0


def test_a_clock_that_goes_back_stands_still() -> None:
    straight, back = RateEstimator(), RateEstimator()
    for estimator, second_s in ((straight, 100.0), (back, 3.0)):
        estimator.add(100.0, MB, 100.0)
        estimator.add(second_s, MB, 110.0)

    assert estimate(back, 0.0) == estimate(straight, 100.0)


def test_years_of_silence_and_extreme_transfers_stay_finite() -> None:
    estimator = RateEstimator(EstimatorParameters(stale_after_s=math.inf, surprise_sigmas=math.inf))
    for time_s, size_bytes, transfer_ms in (
        (0.0, 1, 1e9),
        (1e12, 2**42, 1e-9),
        (1e300, 2**42, 5e-324),
        (1e300, 1, 5.0),
    ):
        estimator.add(time_s, size_bytes, transfer_ms)
        found = estimate(estimator, time_s)
        assert 1e-9 <= found.rate_mb_s <= 1.1e9
        assert math.isfinite(found.deviation_s_per_mb)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((math.nan, MB, 1.0), "time_s"),
        ((-1.0, MB, 1.0), "time_s"),
        ((math.inf, MB, 1.0), "time_s"),
        ((0.0, -1, 1.0), "size_bytes"),
        ((0.0, 2**42 + 1, 1.0), "size_bytes"),
        ((0.0, 1.5, 1.0), "size_bytes"),
        ((0.0, MB, 0.0), "transfer_ms"),
        ((0.0, MB, math.nan), "transfer_ms"),
        ((0.0, MB, "soon"), "transfer_ms"),
        ((0.0, MB, 1e10), "transfer_ms"),
    ],
)
def test_bad_numbers_are_usage_errors_that_change_nothing(arguments: tuple[float, int, float], named: str) -> None:
    estimator = estimator_at(10.0)
    before = estimate(estimator, 1.0)

    with pytest.raises(UsageError, match=named):
        estimator.add(*arguments)
    with pytest.raises(UsageError, match="rtt_ms"):
        estimator.add(1.0, MB, 1.0, rtt_ms=-1.0)
    with pytest.raises(UsageError, match="time_s"):
        estimator.estimate(math.nan)
    assert estimate(estimator, 1.0) == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("half_life_s", 0.0),
        ("half_life_s", math.nan),
        ("half_life_s", "1"),
        ("surprise_change", Decimal("0.3")),
        ("stale_after_s", True),
        ("min_bytes", -1),
        ("min_bytes", True),
        ("min_transfer_ms", math.inf),
        ("initial_window_bytes", 0),
        ("surprise_sigmas", -1.0),
        ("stale_after_s", -1.0),
    ],
)
def test_parameters_out_of_range_or_of_another_type_are_usage_errors_that_name_them(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=name):
        EstimatorParameters(**{name: value})


def test_parameters_are_stored_as_plain_numbers() -> None:
    half_life_s = EstimatorParameters(half_life_s=Fraction(1, 2)).half_life_s  # type: ignore[arg-type]  # tested

    assert (type(half_life_s), half_life_s) == (float, 0.5)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_an_initial_rate_has_to_be_above_zero_and_finite(rate: float) -> None:
    with pytest.raises(UsageError, match="initial_rate_mb_s"):
        RateEstimator(initial_rate_mb_s=rate)


@given(
    st.lists(
        st.tuples(st.floats(0.0, 100.0), st.integers(1, 2**42), st.floats(1e-3, 1e9), st.none() | st.floats(0.0, 1e9)),
        min_size=1,
        max_size=30,
    )
)
def test_the_estimate_is_always_within_the_range_of_the_samples(
    samples: list[tuple[float, int, float, float | None]],
) -> None:
    estimator = RateEstimator()
    for time_s, size_bytes, transfer_ms, rtt_ms in samples:
        estimator.add(time_s, size_bytes, transfer_ms, rtt_ms=rtt_ms)
    found = estimator.estimate(0.0)

    if found is not None:
        seen = [min(max(transfer / 1000.0 / (size / 1e6), 1e-9), 1e9) for _, size, transfer, _ in samples]
        assert min(seen) <= found.seconds_per_mb <= max(seen)
        assert found.deviation_s_per_mb <= (max(seen) - min(seen)) * (1 + 1e-9)
