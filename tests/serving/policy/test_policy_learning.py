"""What the switching policy learns from the server and the link, and what it refuses."""

import dataclasses
import math
import random
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.policies import PROBE, QUICK, SPLIT, TABLE, answer, drive, names, policy_at
from tests.support.policy_events import sequence

from dsc_split.errors import UsageError
from dsc_split.lookup_table import BatchTable, Link, Row, State
from dsc_split.serving import Observation, PolicyParameters, RateEstimator, SwitchPolicy


@pytest.mark.parametrize("reports", ["server", "queue"])
def test_a_busy_server_moves_the_work_to_the_device_and_an_idle_one_gets_it_back(reports: str) -> None:
    policy = policy_at(60.0)
    busy = drive(policy, [60.0] * 20, load=1.0, queue=70.0, reports=reports)
    assert names(busy)[0] == "full-offload"
    assert names(busy)[6:18] == ["no-offload"] * 12

    idle = drive(policy, [60.0] * 60, start_s=20.0, reports=reports)
    assert names(idle)[-40:] == ["full-offload"] * 40
    assert policy.queue_ms(80.0) == pytest.approx(0.0, abs=1.0)


def test_what_the_server_reports_is_told_apart_into_load_and_queue() -> None:
    policy = policy_at(60.0)
    drive(policy, [60.0] * 30, load=1.8, queue=5.0, reports="queue")

    assert policy.server_load(30.0) == pytest.approx(1.8, rel=0.05)
    assert policy.queue_ms(30.0) == pytest.approx(5.0, rel=0.1)
    assert policy.decide(30.0, 1).predicted_ms == pytest.approx(10.0 * 1.8 + 5.0 + 10.0, rel=0.05)


def test_what_the_server_took_is_not_blamed_on_the_link_where_it_reports() -> None:
    rates = {}
    for reports in ("server", "nothing"):
        policy = policy_at(60.0, estimator=QUICK)
        drive(policy, [60.0], start_s=5.0, queue=20.0, reports=reports)
        estimate = policy.estimator.estimate(6.0)
        assert estimate is not None
        rates[reports] = estimate.rate_mb_s

    assert rates["server"] == pytest.approx(60.0, rel=0.01)
    assert rates["nothing"] == pytest.approx(20.0, rel=0.01)


def test_load_and_queue_are_forgotten_by_halves_while_the_server_is_not_used() -> None:
    policy = policy_at(60.0, PolicyParameters(server_weight=1.0, server_half_life_s=10.0))
    policy.observe(
        Observation(
            time_s=5.0, choice="full-offload", batch=1, latency_ms=55.0, head_ms=0.0, server_ms=45.0, queue_ms=15.0
        )
    )

    assert (policy.server_load(5.0), policy.queue_ms(5.0)) == (3.0, 15.0)
    assert (policy.server_load(15.0), policy.queue_ms(15.0)) == (2.0, 7.5)


def test_a_report_has_the_same_weight_whenever_it_comes() -> None:
    policy = policy_at(60.0)
    for time_s in (1.0, 1000.0):
        policy.observe(
            Observation(
                time_s=time_s,
                choice="full-offload",
                batch=1,
                latency_ms=40.0,
                head_ms=0.0,
                server_ms=30.0,
                queue_ms=10.0,
            )
        )
        assert policy.queue_ms(time_s) == pytest.approx(0.3 * 10.0)
        assert policy.server_load(time_s) == pytest.approx(1.0 + 0.3 * 1.0)


@pytest.mark.parametrize("cold_ms", [500.0, 10_000.0, 60_000.0])
@pytest.mark.parametrize("reports", ["server", "load", "queue"])
def test_one_cold_start_of_the_server_keeps_the_device_away_for_seconds_only(cold_ms: float, reports: str) -> None:
    policy = policy_at(60.0)
    made = policy.decide(0.0, 1)
    policy.failed(0.06, made.choice, started_s=0.0)
    taken = [policy.decide(1.5, 1)]
    policy.probed(1.6, taken[0].probe_bytes, PROBE / 1e3 / 60.0)
    policy.observe(
        Observation(
            time_s=cold_ms / 1e3,
            choice=made.choice,
            batch=1,
            latency_ms=10.0 + cold_ms,
            head_ms=0.0,
            server_ms=cold_ms,
            queue_ms={"server": None, "load": 0.0, "queue": cold_ms - 10.0}[reports],
        )
    )
    assert (policy.server_load(cold_ms / 1e3) == 1.0) == (reports != "load")
    taken += [policy.decide(cold_ms / 1e3 + i, 1) for i in range(10)]

    assert taken[0].reason == "server-down"
    assert names(taken)[-5:] == ["full-offload"] * 5


def test_the_round_trip_time_that_was_seen_last_is_predicted_with() -> None:
    policy = policy_at(60.0)
    policy.observe(
        Observation(
            time_s=1.0, choice="full-offload", batch=1, latency_ms=40.0, head_ms=0.0, server_ms=10.0, rtt_ms=20.0
        )
    )

    assert policy.decide(1.0, 1).predicted_ms == pytest.approx(TABLE.pick(1, 60.0, rtt_ms=20.0).latency_ms)


def test_of_a_call_the_fixed_costs_and_the_way_back_are_not_the_transfer() -> None:
    def rate_seen(link: Link) -> float:
        table = dataclasses.replace(TABLE, link=link)
        policy = SwitchPolicy(table, estimator=RateEstimator(QUICK))
        call_ms = table.latency_ms("full-offload", State(batch=1, rate_mb_s=12.5))
        policy.observe(
            Observation(time_s=1.0, choice="full-offload", batch=1, latency_ms=call_ms, head_ms=0.0, rpc_ms=call_ms)
        )
        estimate = policy.estimator.estimate(1.0)
        assert estimate is not None
        return estimate.rate_mb_s

    costs = {"c0_ms": 2.0, "c1_ms_per_mb": 3.0, "rtt_ms": 7.0, "round_trips": 1.5}
    assert rate_seen(Link(**costs)) == pytest.approx(12.5)  # type: ignore[arg-type]  # all of them are floats
    assert rate_seen(Link(count_downlink=True)) == pytest.approx(12.5)
    assert rate_seen(Link(count_downlink=True, downlink_rate_mb_s=1.0)) == pytest.approx(12.5)


def test_bytes_beyond_all_bounds_at_a_batch_that_was_not_measured_are_still_a_sample() -> None:
    rows = [
        Row(
            choice=0,
            head_ms=0.0,
            head_ci_ms=None,
            head_p95_ms=None,
            tail_ms=1.0,
            tail_ci_ms=None,
            tail_p95_ms=None,
            uplink_bytes=size_bytes,
            downlink_bytes=size_bytes,
        )
        for size_bytes in (2**42, 0)
    ]
    batches = tuple(
        BatchTable(batch=batch, rows=(row,), segments=()) for batch, row in zip((2**20 - 1, 2**20), rows, strict=True)
    )
    for link in (Link(), Link(count_downlink=True), Link(count_downlink=True, downlink_rate_mb_s=5.0)):
        policy = SwitchPolicy(dataclasses.replace(TABLE, link=link, choices=TABLE.choices[:1], batches=batches))
        assert policy.table.pick(1, 10.0).ranking[0].uplink_bytes > 2**42
        policy.observe(Observation(time_s=1.0, choice=0, batch=1, latency_ms=100.0, head_ms=0.0, server_ms=50.0))

        assert policy.queue_ms(1.0) == pytest.approx(0.3 * 49.0)
        assert policy.estimator.estimate(1.0) is not None


# ---- bad input ---------------------------------------------------------------------------------------------


def test_errors_of_the_table_pass_through_and_change_nothing() -> None:
    policy, untouched = policy_at(10.0), policy_at(10.0)
    for batch in (0, 1000):
        with pytest.raises(UsageError):
            policy.decide(500.0, batch)
        with pytest.raises(UsageError):
            policy.observe(Observation(time_s=500.0, choice=SPLIT, batch=batch, latency_ms=50.0, head_ms=1.0))
    with pytest.raises(UsageError, match="unknown choice"):
        policy.failed(500.0, "nowhere")
    with pytest.raises(UsageError, match="does not use the server"):
        policy.failed(500.0, "no-offload")
    with pytest.raises(UsageError, match="started_s"):
        policy.failed(500.0, SPLIT, started_s=math.nan)
    with pytest.raises(UsageError, match="rpc_ms"):
        policy.observe(Observation(time_s=500.0, choice=SPLIT, batch=1, latency_ms=50.0, head_ms=50.0))
    for call in (policy.probe_failed, lambda time_s: policy.probed(time_s, PROBE, 10.0)):
        with pytest.raises(UsageError, match="time_s"):
            call(math.nan)
    with pytest.raises(UsageError, match="transfer_ms"):
        policy.probed(500.0, PROBE, math.inf)

    assert policy.decide(0.0, 1) == untouched.decide(0.0, 1)
    assert vars(policy.estimator) == vars(untouched.estimator)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("time_s", math.inf),
        ("batch", True),
        ("latency_ms", math.nan),
        ("latency_ms", "50"),
        ("head_ms", -1.0),
        ("rpc_ms", math.inf),
        ("server_ms", Decimal(5)),
        ("rtt_ms", 1e10),
        ("queue_ms", 5.0),
    ],
)
def test_an_observation_with_a_value_out_of_range_or_of_another_type_names_it(name: str, value: Any) -> None:
    good = Observation(time_s=0.0, choice=SPLIT, batch=1, latency_ms=50.0, head_ms=1.0)

    with pytest.raises(UsageError, match=name):
        dataclasses.replace(good, **{name: value})


def test_observations_and_parameters_are_stored_as_plain_numbers() -> None:
    half: Any = Fraction(1, 2)
    seen = Observation(time_s=half, choice=SPLIT, batch=1, latency_ms=50, head_ms=half, rtt_ms=half)
    parameters = PolicyParameters(hysteresis=half, deadline_ms=half, percentile=95.0)

    assert {type(value) for value in (seen.time_s, seen.latency_ms, seen.head_ms, seen.rtt_ms)} == {float}
    assert {type(value) for value in (parameters.hysteresis, parameters.deadline_ms)} == {float}
    assert type(parameters.percentile) is int


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hysteresis", 1.1),
        ("switch_cost_ms", -1.0),
        ("dwell_requests", 1.5),
        ("probe_bytes", -1),
        ("deadline_factor", 0.5),
        ("deadline_ms", math.nan),
        ("deadline_ms", 0.0),
        ("probe_timeout_s", 0.0),
        ("hysteresis", "0.1"),
        ("retry_s", Decimal(1)),
        ("server_weight", True),
        ("probe_bytes", True),
        ("server_weight", 2.0),
        ("server_half_life_s", 0.0),
        ("percentile", 99),
        ("percentile", Decimal(95)),
    ],
)
def test_a_parameter_out_of_range_or_of_another_type_is_a_usage_error_that_names_it(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=name):
        PolicyParameters(**{name: value})


def test_allowing_a_text_or_an_unknown_choice_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"Write \['no-offload'\]"):
        SwitchPolicy(TABLE, allow="no-offload")
    with pytest.raises(UsageError, match="unknown choice"):
        SwitchPolicy(TABLE, allow=["nowhere"])


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.sets(st.sampled_from([choice.id for choice in TABLE.choices]), min_size=1))
def test_whatever_happens_a_masked_choice_is_never_taken_and_nothing_breaks(seed: int, allowed: set[int]) -> None:
    numbers = random.Random(seed)
    policy = SwitchPolicy(TABLE, allow=sorted(allowed))
    time_s = 0.0
    for _ in range(40):
        time_s += numbers.expovariate(1.0)
        batch = numbers.choice([1, 2, 4])
        made = policy.decide(time_s, batch)
        assert made.choice.id in allowed
        assert made.predicted_ms >= 0.0
        assert made.timeout_ms > 0.0
        if made.probe_bytes and numbers.random() < 0.8:
            policy.probed(time_s, made.probe_bytes, numbers.lognormvariate(2.0, 3.0))
        if made.choice.uses_server and numbers.random() < 0.3:
            policy.failed(time_s, made.choice)
        else:
            rate_mb_s = numbers.lognormvariate(1.0, 2.0)
            answer(policy, time_s, made, batch, rate_mb_s, reports="queue", queue=numbers.random())


def test_the_same_events_give_the_same_answers() -> None:
    assert list(sequence(random.Random(7))) == list(sequence(random.Random(7)))
