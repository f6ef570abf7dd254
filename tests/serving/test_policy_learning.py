"""What the switching policy learns from the server and the link, and what it refuses."""

import dataclasses
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.serving.driving import PROBE, QUICK, SPLIT, TABLE, answer, drive, names, policy_at
from tests.serving.events import sequence

from dsc_split.errors import UsageError
from dsc_split.lookup_table import Link
from dsc_split.serving import Observation, PolicyParameters, RateEstimator, SwitchPolicy


@pytest.mark.parametrize("reports", ["server", "queue"])
def test_a_busy_server_moves_the_work_to_the_device_and_an_idle_one_gets_it_back(reports: str) -> None:
    policy = policy_at(60.0)
    busy = drive(policy, [60.0] * 20, load=1.0, queue=70.0, reports=reports)
    assert names(busy)[0] == "full-offload"
    assert names(busy)[-1] == "no-offload"

    idle = drive(policy, [60.0] * 60, start_s=20.0, reports=reports)
    assert names(idle)[-1] == "full-offload"
    assert policy.queue_ms(80.0) == pytest.approx(0.0, abs=1.0)


def test_what_the_server_reports_is_told_apart_into_load_and_queue() -> None:
    policy = policy_at(60.0)
    drive(policy, [60.0] * 30, load=1.8, queue=5.0, reports="queue")

    assert policy.server_load(30.0) == pytest.approx(1.8, rel=0.05)
    assert policy.queue_ms(30.0) == pytest.approx(5.0, rel=0.05)
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


def test_after_a_long_silence_a_report_counts_in_full() -> None:
    policy = policy_at(60.0)
    for time_s, queue_ms in ((1.0, 15.0), (2.0, 15.0), (1000.0, 5.0)):
        policy.observe(
            Observation(
                time_s=time_s,
                choice="full-offload",
                batch=1,
                latency_ms=25.0 + queue_ms,
                head_ms=0.0,
                server_ms=10.0 + queue_ms,
                queue_ms=queue_ms,
            )
        )

    assert policy.queue_ms(1000.0) == pytest.approx(5.0)


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
        call_ms = table.latency_ms("full-offload", 1, 12.5)
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
    with pytest.raises(UsageError, match="rpc_ms"):
        policy.observe(Observation(time_s=500.0, choice=SPLIT, batch=1, latency_ms=50.0, head_ms=50.0))
    for call in (policy.probe_failed, lambda time_s: policy.probed(time_s, PROBE, 10.0)):
        with pytest.raises(UsageError, match="time_s"):
            call(math.nan)
    with pytest.raises(UsageError, match="transfer_ms"):
        policy.probed(500.0, PROBE, -1.0)

    assert policy.decide(0.0, 1) == untouched.decide(0.0, 1)
    assert vars(policy.estimator) == vars(untouched.estimator)


@pytest.mark.parametrize(
    ("name", "value"),
    [("latency_ms", math.nan), ("head_ms", -1.0), ("rpc_ms", math.inf), ("rtt_ms", 1e10), ("queue_ms", 5.0)],
)
def test_an_observation_with_a_number_out_of_range_names_it(name: str, value: float) -> None:
    good = Observation(time_s=0.0, choice=SPLIT, batch=1, latency_ms=50.0, head_ms=1.0)

    with pytest.raises(UsageError, match=name):
        dataclasses.replace(good, **{name: value})  # type: ignore[arg-type]  # what is tested


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hysteresis", 1.1),
        ("switch_cost_ms", -1.0),
        ("dwell_requests", 1.5),
        ("probe_bytes", -1),
        ("deadline_factor", 0.5),
        ("deadline_ms", math.nan),
        ("server_weight", 2.0),
        ("server_half_life_s", 0.0),
        ("percentile", 99),
    ],
)
def test_a_parameter_out_of_range_is_a_usage_error_that_names_it(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=name):
        PolicyParameters(**{name: value})  # type: ignore[arg-type]  # what is tested


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
