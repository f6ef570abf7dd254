import csv
import io
import math
from dataclasses import replace

import pytest
from tests.support.replays import Scripted, at_rates, by_name, fading, golden, text_of, timed, under_test

from dsc_split._support.progress import Progress
from dsc_split.benchmarks.replay._device import PROBE_LIMIT_MS
from dsc_split.benchmarks.replay._replay import MAX_REQUESTS, list_requests, replay
from dsc_split.benchmarks.replay._scenario import Scenario
from dsc_split.benchmarks.replay._statistics import Method, excess, gain, summarise_method
from dsc_split.benchmarks.report._replay_text import replay_csv, replay_json
from dsc_split.errors import DscError, UsageError
from dsc_split.lookup_table import Link

# ---- requests ----------------------------------------------------------------------------------------------


def test_without_a_period_there_is_one_request_per_state() -> None:
    requests = list_requests(at_rates(1, 2, 3, every_s=2.0))

    assert [(item.time_s, item.lasts_s, item.state.rate_mb_s) for item in requests] == [
        (0.0, 2.0, 1),
        (2.0, 2.0, 2),
        (4.0, 2.0, 3),
    ]


def test_with_a_period_a_state_holds_until_the_next_one_begins() -> None:
    requests = list_requests(at_rates(1, 2, every_s=1.0), period_ms=400)

    assert [item.time_s for item in requests] == pytest.approx([0.0, 0.4, 0.8, 1.2, 1.6])
    assert [item.state.rate_mb_s for item in requests] == [1, 1, 1, 2, 2]
    assert sum(item.lasts_s for item in requests) == pytest.approx(2.0)


def test_a_period_that_is_none_or_makes_too_many_requests_is_refused() -> None:
    for period_ms in (0.001, 1e-320):
        with pytest.raises(UsageError, match=f"makes too many in 2 s; at most {MAX_REQUESTS} are replayed"):
            list_requests(at_rates(1, 2), period_ms=period_ms)
    for period_ms in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="is out of range"):
            list_requests(at_rates(1), period_ms=period_ms)


# ---- the ideal, the static choices and the gain ------------------------------------------------------------


def test_the_gain_is_that_of_eq_7_computed_by_hand() -> None:
    result = by_name(replay(golden(), at_rates(1, 10, 40)))

    assert result["ideal"].latencies_ms == (60.0, 43.0, 25.0)
    assert result["full-offload"].latencies_ms == (610.0, 70.0, 25.0)
    assert result["features.4.0"].latencies_ms == (178.0, 43.0, 31.75)
    assert gain(result["ideal"], result["no-offload"]) == pytest.approx((0 + 17 / 60 + 35 / 60) / 3)
    assert gain(result["ideal"], result["full-offload"]) == pytest.approx((550 / 610 + 27 / 70 + 0) / 3)
    assert gain(result["ideal"], result["features.4.0"]) == pytest.approx((118 / 178 + 0 + 6.75 / 31.75) / 3)


def test_every_number_is_the_tables_own() -> None:
    table, result = golden(), replay(golden(), fading())

    for i, request in enumerate(result.requests):
        pick = table.pick(request.state)
        assert (result.ideal.choices[i], result.ideal.latencies_ms[i]) == (pick.choice, pick.latency_ms)
        for static in result.statics:
            assert static.latencies_ms[i] == table.latency_ms(static.name, request.state)


def test_a_static_choice_that_cannot_send_counts_as_saved_altogether() -> None:
    result = by_name(replay(golden(), at_rates(0, 40)))

    assert result["full-offload"].latencies_ms == (math.inf, 25.0)
    assert gain(result["ideal"], result["full-offload"]) == 0.5
    assert gain(result["full-offload"], result["no-offload"]) == -math.inf
    assert summarise_method(result["full-offload"], [1, 1]).never == 1
    assert math.isinf(summarise_method(result["full-offload"], [1, 1]).mean_ms)


def test_requests_that_a_static_choice_has_no_row_for_are_left_out_of_its_numbers() -> None:
    states = [timed(0, 4, batch=1), timed(1, 4, batch=8)]
    result = replay(golden(), Scenario.of(states))
    local = by_name(result)["no-offload"]

    assert local.latencies_ms[0] == 60.0
    assert math.isnan(local.latencies_ms[1])
    assert summarise_method(local, [1, 1]).answerable == 1
    assert gain(result.ideal, local) == 0.0
    assert "no-offload has no times for 1 of 2 requests" in text_of(result)
    assert ",60.0\n" in replay_csv(result)
    assert replay_csv(result).endswith(",\n")


def test_where_nothing_that_is_allowed_can_answer_the_ideal_has_no_choice() -> None:
    result = replay(golden(), at_rates(0, 40, batch=8))

    assert [choice and choice.name for choice in result.ideal.choices] == [None, "full-offload"]
    assert summarise_method(result.ideal, [1, 3]).shares == {"full-offload": 0.75, "none": 0.25}
    assert excess(by_name(result)["full-offload"], result.ideal).of_mean == 0.0
    assert replay_json(result)["methods"][0]["never"] == 1


def test_a_mask_and_a_percentile_reach_the_table() -> None:
    table = golden()
    masked = replay(table, at_rates(40), allow=table.without_inputs_sent())
    tail = replay(table, at_rates(10), percentile=95)

    assert [method.name for method in masked.methods] == ["ideal", "features.4.0", "no-offload"]
    assert masked.ideal.latencies_ms == (31.75,)
    assert tail.ideal.latencies_ms == (table.pick(1, 10, percentile=95).latency_ms,)


def test_a_state_that_the_table_cannot_answer_is_named() -> None:
    with pytest.raises(UsageError, match="the state at 1 s: batch 9 is larger than every measured one"):
        replay(golden(), Scenario.of([timed(0, 1), timed(1, 1, batch=9)]))


def test_shares_are_of_time_and_switches_are_between_requests() -> None:
    states = [timed(0, 1), timed(1, 10), timed(4, 1)]
    result = replay(golden(), Scenario.of(states))
    summary = summarise_method(result.ideal, [item.lasts_s for item in result.requests], deadline_ms=50)

    assert result.scenario.end_s == 6.0
    assert summary.shares == {"no-offload": 0.5, "features.4.0": 0.5}
    assert (summary.switches, summary.missed) == (2, 2)


def test_percentiles_next_to_answers_that_never_come_are_no_nan() -> None:
    method = Method.of("x", [None] * 101, [1.0] * 95 + [math.inf] * 6)
    summary = summarise_method(method, [1.0] * 101)

    assert (summary.p50_ms, summary.p95_ms, summary.p99_ms) == (1.0, math.inf, math.inf)
    assert summarise_method(Method.of("x", [None] * 3, [1.0, 2.0, math.inf]), [1.0] * 3).p50_ms == 2.0


# ---- the policy --------------------------------------------------------------------------------------------


def test_a_policy_that_knows_the_state_is_as_good_as_the_ideal() -> None:
    scenario, table = fading(), golden()
    known = {item.time_s: table.pick(item.state).choice.name for item in scenario.states}
    result = replay(table, scenario, policy=under_test(Scripted(lambda time_s, _: known[time_s])), noise=0.3)
    assert result.policy is not None

    assert result.policy.latencies_ms == result.ideal.latencies_ms
    assert result.policy.choices == result.ideal.choices
    assert (excess(result.policy, result.ideal).of_mean, excess(result.policy, result.ideal).mean) == (0.0, 0.0)


def test_a_policy_that_never_leaves_the_device_has_the_numbers_of_no_offload() -> None:
    result = replay(golden(), fading(), policy=under_test(Scripted(lambda *_: "no-offload")))
    methods = by_name(result)

    assert methods["policy"].latencies_ms == methods["no-offload"].latencies_ms
    assert gain(methods["policy"], methods["no-offload"]) == 0.0
    assert excess(methods["policy"], result.ideal).of_mean > 0.0


def test_a_decision_knows_what_ended_before_it_and_nothing_else() -> None:
    policy = Scripted(lambda *_: "full-offload")
    replay(golden(), at_rates(0.4, 40, 40, 40), policy=under_test(policy))  # the first answer takes 1510 ms

    assert [item[:2] for item in policy.told] == [
        ("decide", 0.0),
        ("decide", 1.0),
        ("observe", pytest.approx(1.025)),
        ("observe", pytest.approx(1.51)),
        ("decide", 2.0),
        ("observe", pytest.approx(2.025)),
        ("decide", 3.0),
    ]


def test_an_answer_is_observed_with_its_parts() -> None:
    policy = Scripted(lambda *_: "features.4.0")
    states = [timed(i, 10, server_load=2, queue_ms=3, rtt_ms=5) for i in range(2)]
    replay(golden(), Scenario.of(states), policy=under_test(policy))

    # head 20, uplink 15, round trip 5, queue 3, tail 2 * 8
    assert policy.told[1] == (
        "observe",
        0.059,
        {
            "time_s": 0.059,
            "choice": golden().choice("features.4.0"),
            "batch": 1,
            "latency_ms": 59.0,
            "head_ms": 20.0,
            "rpc_ms": 39.0,
            "server_ms": 19.0,
            "queue_ms": 3.0,
            "rtt_ms": 5,
        },
    )


def test_a_run_on_the_device_is_observed_without_a_server() -> None:
    policy = Scripted(lambda *_: "no-offload")
    replay(golden(), at_rates(1, 1), policy=under_test(policy))
    seen = policy.told[1][2]

    assert (seen["latency_ms"], seen["head_ms"], seen["rpc_ms"]) == (60.0, 60.0, 0.0)
    assert (seen["server_ms"], seen["queue_ms"], seen["rtt_ms"]) == (None, None, None)


def test_noise_is_of_mean_one_on_what_the_policy_sees_and_not_on_what_it_took() -> None:
    seen = []
    for seed in (1, 1, 2):
        policy = Scripted(lambda *_: "full-offload")
        result = replay(golden(), at_rates(*[10] * 2001), policy=under_test(policy), noise=0.2, seed=seed)
        assert set(by_name(result)["policy"].latencies_ms) == {70.0}
        assert next(item[1] for item in policy.told if item[0] == "observe") == pytest.approx(0.07)
        seen.append([item[2]["rpc_ms"] - item[2]["server_ms"] for item in policy.told if item[0] == "observe"])

    logs = [math.log(link_ms / 60) for link_ms in seen[0]]
    mean_log = sum(logs) / len(logs)
    assert seen[0] == seen[1] != seen[2]
    assert sum(seen[0]) / len(seen[0]) == pytest.approx(60, rel=0.02)
    assert math.sqrt(sum((log - mean_log) ** 2 for log in logs) / len(logs)) == pytest.approx(0.2, rel=0.05)


def test_a_missed_timeout_costs_the_wait_and_a_run_on_the_device() -> None:
    policy = Scripted(lambda *_: "full-offload", timeout_ms=100.0)
    result = replay(golden(), at_rates(1, 40, 0), policy=under_test(policy))
    assert result.policy is not None

    assert result.policy.latencies_ms == (160.0, 25.0, 160.0)
    assert result.policy.fallbacks == (True, False, True)
    assert [item for item in policy.told if item[0] == "failed"] == [("failed", 0.1, "full-offload", 0.0)]
    assert [item[0] for item in policy.told] == ["decide", "failed", "decide", "observe", "decide"]
    assert "2 of the policy's requests missed their timeout" in text_of(result)


def test_an_answer_that_never_comes_is_never_seen() -> None:
    policy = Scripted(lambda *_: "full-offload")
    result = replay(golden(), at_rates(0, 0, 40), policy=under_test(policy))

    assert [item[0] for item in policy.told] == ["decide"] * 3
    assert by_name(result)["policy"].latencies_ms == (math.inf, math.inf, 25.0)
    assert replay_json(result)["methods"][1]["mean_ms"] is None


def test_a_probe_ends_after_its_round_trip_and_bytes_or_fails() -> None:
    policy = Scripted(lambda *_: "no-offload", probe_bytes=100_000)
    link = replace(Link(), rtt_ms=20.0)
    result = replay(replace(golden(), link=link), at_rates(0.5, math.inf, 0, *[1] * 7), policy=under_test(policy))
    probes = [item for item in policy.told if item[0].startswith("probe")]

    assert probes[0] == ("probed", pytest.approx(0.22), 100_000, pytest.approx(200.0), 20.0)
    assert (probes[1][0], probes[1][1]) == ("probed", pytest.approx(1.02))
    assert 0.0 < probes[1][3] < 1e-5
    assert ("probe_failed", 2.0 + PROBE_LIMIT_MS / 1000) in probes
    assert (by_name(result)["policy"].probes, by_name(result)["policy"].probe_bytes) == (10, 1_000_000)


def test_the_delayed_ideal_chooses_for_the_last_request_that_is_over() -> None:
    policy = under_test(Scripted(lambda *_: "no-offload"))
    result = replay(golden(), at_rates(40, 40, 10, 1, 0, 0, 10), policy=policy)
    assert result.delayed is not None

    # At first it knows nothing. At 1 MB/s it expects 43 ms and gives up after 129; at 0 it knows of 1 MB/s already.
    assert [choice and choice.name for choice in result.delayed.choices] == [
        "no-offload",
        "full-offload",
        "full-offload",
        "features.4.0",
        "no-offload",
        "no-offload",
        "no-offload",
    ]
    assert result.delayed.latencies_ms == pytest.approx((60, 25, 70, 129 + 60, 60, 60, 60))
    assert result.delayed.fallbacks == (False, False, False, True, False, False, False)


def test_a_choice_that_is_not_allowed_is_no_answer_of_a_policy() -> None:
    table = golden()
    with pytest.raises(DscError, match="at 0 s the policy chose 'full-offload', which is not allowed"):
        replay(
            table,
            at_rates(1),
            allow=table.without_inputs_sent(),
            policy=under_test(Scripted(lambda *_: "full-offload")),
        )


def test_noise_out_of_range_is_refused() -> None:
    for noise in (-0.1, math.nan, 4.0):
        with pytest.raises(UsageError, match="noise"):
            replay(golden(), at_rates(1), noise=noise)


def test_progress_goes_from_the_first_request_to_the_last() -> None:
    steps: list[Progress] = []
    replay(golden(), at_rates(*[1] * 4500), progress=steps.append)

    assert [step.done for step in steps] == [0, 2000, 4000, 4500]
    assert {step.total for step in steps} == {4500}


# ---- what is shown -----------------------------------------------------------------------------------------


def test_the_text_fits_a_terminal_and_names_every_number() -> None:
    policy = under_test(Scripted(lambda *_: "no-offload", probe_bytes=1000))
    result = replay(golden(), at_rates(1, 10, 40, 0), policy=policy, noise=0.1)
    text = text_of(result, deadline_ms=50)

    assert text.splitlines()[0] == "Gain over the best static choice, no-offload: ideal 21.7 %, policy 0.0 %."
    assert "The policy's mean latency is 27.7 % above the ideal's" in text
    assert "ideal" in text
    assert "> 50" in text
    assert "features.4.0 25.0 %" in text
    assert "The policy sent 4 probes, 0.004 MB in all." in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_text_says_in_words_that_nothing_could_answer() -> None:
    policy = under_test(Scripted(lambda *_: "full-offload"))
    gone = replay(golden(), at_rates(0, 0), allow=["full-offload"], policy=policy)
    assert text_of(gone).splitlines()[1] == "Nothing that is allowed could answer any of the requests."

    policy = under_test(Scripted(lambda *_: "full-offload"))
    waiting = text_of(replay(golden(), at_rates(0, 1), policy=policy))
    assert waiting.splitlines()[1] == "The policy's mean latency is infinitely longer than the ideal's."


def test_against_one_choice_no_other_static_one_is_shown() -> None:
    result = replay(golden(), at_rates(1, 10, 40))
    text = text_of(result, against="features.4.0")

    assert text.startswith("Gain over the static choice, features.4.0: ideal 29.2 %.")
    assert "full-offload" not in text.split("Share of time")[0]
    assert list(replay_json(result, against="features.4.0")["gain"]["ideal"]) == ["features.4.0"]


def test_the_csv_has_one_line_per_request() -> None:
    policy = under_test(Scripted(lambda *_: "full-offload", timeout_ms=100.0))
    rows = list(csv.DictReader(io.StringIO(replay_csv(replay(golden(), at_rates(1, 40), policy=policy)))))

    assert rows[0] == {
        "time_s": "0.0",
        "batch": "1",
        "rate_mb_s": "1",
        "downlink_rate_mb_s": "",
        "server_load": "",
        "queue_ms": "",
        "rtt_ms": "",
        "ideal_choice": "no-offload",
        "ideal_ms": "60.0",
        "policy_choice": "full-offload",
        "policy_ms": "160.0",
        "policy_reason": "best",
        "policy_fallback": "true",
        "static_full-offload_ms": "610.0",
        "static_features.4.0_ms": "178.0",
        "static_no-offload_ms": "60.0",
    }
    assert len(rows) == 2
