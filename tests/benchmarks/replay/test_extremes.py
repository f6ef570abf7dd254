import math
from dataclasses import replace

import pytest
from tests.support.replays import Scripted, at_rates, by_name, golden, text_of, timed, under_test

from dsc_split.benchmarks.replay._device import PolicyUnderTest
from dsc_split.benchmarks.replay._replay import replay
from dsc_split.benchmarks.replay._scenario import Scenario
from dsc_split.benchmarks.replay._statistics import excess, gain, mean
from dsc_split.lookup_table import Link, LookupTable, State, Terms
from dsc_split.serving import Observation, PolicyParameters, SwitchPolicy


def test_an_answer_that_takes_longer_than_anybody_waits_is_never_seen() -> None:
    states = [
        timed(0, 1e-7),  # 1e9 ms and more
        timed(1, 10, queue_ms=1e10),
        timed(2, 10, rtt_ms=2e9),
        timed(3, 1e-305),
        timed(4, 40),
        timed(5, 40),
    ]
    policy = Scripted(lambda *_: "features.4.0", timeout_ms=1e300)
    replay(golden(), Scenario.of(states), policy=under_test(policy))
    assert [item[0] for item in policy.told] == [*["decide"] * 5, "observe", "decide"]

    for noise in (0.0, 3.0):
        own = PolicyUnderTest(policy=SwitchPolicy(golden(), allow=["full-offload"]), observation=Observation)
        replay(golden(), Scenario.of(states), allow=["full-offload"], policy=own, noise=noise)


def test_a_round_trip_that_the_link_does_not_count_may_be_as_long_as_it_likes() -> None:
    table = replace(golden(), link=replace(Link(), round_trips=0))
    own = PolicyUnderTest(policy=SwitchPolicy(table, allow=["full-offload"]), observation=Observation)
    result = replay(table, at_rates(*[40] * 5, rtt_ms=2e9), allow=["full-offload"], policy=own)

    assert set(by_name(result)["policy"].latencies_ms) == {25.0}


def test_a_call_that_takes_no_time_is_measured_all_the_same() -> None:
    policy = Scripted(lambda *_: "full-offload")
    replay(golden(), at_rates(*[math.inf] * 3, server_load=0.0), policy=under_test(policy))
    calls_ms = [item[2]["rpc_ms"] for item in policy.told if item[0] == "observe"]
    assert len(calls_ms) == 2
    assert all(0.0 < call_ms < 1e-5 for call_ms in calls_ms)

    own = PolicyUnderTest(policy=SwitchPolicy(golden()), observation=Observation)
    result = replay(golden(), at_rates(*[math.inf] * 30, server_load=0.0), policy=own)
    assert by_name(result)["policy"].choices[-1] == golden().choice("full-offload")


def spread() -> LookupTable:
    """Return a table whose tails have a 95th percentile of twice their median."""
    table = golden()
    batches = [
        replace(item, rows=tuple(replace(row, tail_p95_ms=2.0 * row.tail_ms) for row in item.rows))
        for item in table.batches
    ]
    return replace(table, batches=tuple(batches))


def test_a_policy_that_goes_by_the_95th_percentile_measures_medians_and_settles_on_the_ideal() -> None:
    table = spread()
    states = at_rates(*[30.0] * 60)
    switching = SwitchPolicy(table, parameters=PolicyParameters(percentile=95))
    own = PolicyUnderTest(policy=switching, observation=Observation)
    result = replay(table, states, percentile=95, policy=own)
    assert result.policy is not None

    assert result.ideal.latencies_ms[0] == table.pick(1, 30.0, percentile=95).latency_ms
    assert result.policy.choices[-50:] == result.ideal.choices[-50:]
    assert result.policy.latencies_ms[-50:] == result.ideal.latencies_ms[-50:]
    assert switching.server_load(60.0) == pytest.approx(1.0)


def test_what_is_measured_are_medians_whatever_the_percentile() -> None:
    seen = []
    for percentile in (None, 95):
        policy = Scripted(lambda *_: "features.4.0")
        replay(spread(), at_rates(10, 10, server_load=2, queue_ms=3), percentile=percentile, policy=under_test(policy))
        seen.append(policy.told[1])

    assert seen[0] == seen[1]
    assert seen[0][2]["server_ms"] == 19.0


def test_latencies_whose_sum_is_beyond_binary64_have_a_mean() -> None:
    result = replay(golden(), at_rates(*[1e-305] * 3000))
    methods = by_name(result)
    full_ms = methods["full-offload"].latencies_ms[0]

    assert 1e307 < full_ms < math.inf
    assert mean(methods["full-offload"].latencies_ms) == pytest.approx(full_ms)
    assert excess(methods["full-offload"], methods["features.4.0"]).of_mean == pytest.approx(3.0)
    assert gain(methods["full-offload"], methods["no-offload"]) == pytest.approx(-full_ms / 60)
    assert "never" not in text_of(result).split("Gain G")[0]


def test_the_switching_policy_survives_an_outage_between_its_requests() -> None:
    own = PolicyUnderTest(policy=SwitchPolicy(golden()), observation=Observation)
    result = replay(golden(), at_rates(*[40] * 10, *[0] * 5, *[40] * 60), policy=own)
    assert result.policy is not None

    assert [i for i, waited_in_vain in enumerate(result.policy.fallbacks) if waited_in_vain] == [10]
    assert {choice and choice.name for choice in result.policy.choices[11:15]} == {"no-offload"}
    assert result.policy.choices[-1] == golden().choice("full-offload")


def test_the_delayed_ideal_asks_the_table_once_while_nothing_new_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    ranking = LookupTable.ranking

    def counting(table: LookupTable, state: State) -> tuple[Terms, ...]:
        asked.append((state.batch, state.rate_mb_s))
        return ranking(table, state)

    monkeypatch.setattr(LookupTable, "ranking", counting)
    policy = under_test(Scripted(lambda *_: "full-offload"))
    replay(golden(), at_rates(0), period_ms=100, allow=["full-offload"], policy=policy)

    assert asked == [(1, 0), (1, 1e-6)]
