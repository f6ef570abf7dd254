"""The switching policy: when it switches, how it gets away from a dead server and back, and how good it is."""

import dataclasses
import itertools
import math
import random
from collections.abc import Sequence

import pytest
from tests.support.policies import NO_PROBES, PROBE, QUICK, SPLIT, TABLE, answer, drive, names, policy_at

from dsc_split.errors import UsageError
from dsc_split.lookup_table import BatchTable, State
from dsc_split.serving import Decision, Observation, PolicyParameters, RateEstimator, SwitchPolicy


def switches(decisions: Sequence[Decision]) -> int:
    return sum(a.choice != b.choice for a, b in itertools.pairwise(decisions))


# ---- choosing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "best"), [(2.0, "no-offload"), (10.0, SPLIT), (60.0, "full-offload")])
def test_at_a_known_rate_the_best_choice_of_the_table_is_taken(rate: float, best: str) -> None:
    decision = policy_at(rate).decide(0.0, 1)

    assert (decision.choice.name, decision.reason) == (best, "best")
    assert decision.predicted_ms == pytest.approx(TABLE.pick(1, rate).latency_ms)


def test_before_anything_was_measured_the_device_runs_alone_and_a_probe_finds_the_rate() -> None:
    policy = SwitchPolicy(TABLE)
    first = policy.decide(0.0, 1)

    assert (first.choice.name, first.reason, first.predicted_ms) == ("no-offload", "unknown-rate", 60.0)
    assert (first.timeout_ms, first.probe_bytes) == (math.inf, PROBE)
    assert policy.probed(0.1, PROBE, PROBE / 1e3 / 60.0) == "taken"
    assert policy.decide(0.2, 1).choice.name == "full-offload"


def test_before_anything_was_measured_the_fewest_bytes_go_where_the_device_cannot_run_alone() -> None:
    decision = SwitchPolicy(TABLE, allow=["full-offload", SPLIT]).decide(0.0, 1)

    assert (decision.choice.name, decision.reason) == (SPLIT, "unknown-rate")
    assert decision.predicted_ms == decision.timeout_ms == math.inf


def test_an_initial_rate_is_used_at_once() -> None:
    decision = SwitchPolicy(TABLE, estimator=RateEstimator(initial_rate_mb_s=60.0)).decide(0.0, 1)

    assert (decision.choice.name, decision.reason) == ("full-offload", "best")


def test_hysteresis_stops_flapping_on_a_switch_rate() -> None:
    around = [25.0 * (1.03 if i % 2 else 0.97) for i in range(100)]
    calm = drive(policy_at(25.0, estimator=QUICK), around)
    nervous = drive(policy_at(25.0, PolicyParameters(hysteresis=0.0, dwell_requests=0), estimator=QUICK), around)

    assert switches(calm) == 0
    assert {decision.reason for decision in calm} == {"best", "hysteresis"}
    assert switches(nervous) > 50


def test_a_switch_has_to_earn_its_cost() -> None:
    rates = [20.0] * 3 + [60.0] * 20
    free = drive(policy_at(20.0, estimator=QUICK), rates)
    dear = drive(policy_at(20.0, PolicyParameters(switch_cost_ms=12.0), estimator=QUICK), rates)

    assert names(free)[-1] == "full-offload"
    assert set(names(dear)) == {SPLIT}


def test_a_choice_is_kept_for_a_few_requests_after_a_switch() -> None:
    def later_choices(parameters: PolicyParameters) -> list[tuple[str, str]]:
        policy = policy_at(60.0, parameters, estimator=QUICK)
        assert policy.decide(0.0, 1).choice.name == "full-offload"
        policy.estimator.restart()
        policy.estimator.add(0.1, 1_000_000, 100.0)
        return [(made.choice.name, made.reason) for made in (policy.decide(0.1, 1) for _ in range(3))]

    assert later_choices(PolicyParameters(dwell_requests=3)) == [
        ("full-offload", "dwell"),
        ("full-offload", "dwell"),
        (SPLIT, "best"),
    ]
    assert later_choices(PolicyParameters(dwell_requests=0)) == [(SPLIT, "best")] * 3


def test_dwell_does_not_hold_a_choice_against_another_batch_size() -> None:
    policy = policy_at(27.0, PolicyParameters(hysteresis=0.0))

    assert names([policy.decide(0.0, batch) for batch in (1, 4, 1, 4)]) == ["full-offload", SPLIT] * 2


def test_the_percentile_of_the_parameters_is_what_is_compared() -> None:
    decision = policy_at(10.0, PolicyParameters(percentile=95)).decide(0.0, 1)

    assert decision.predicted_ms == TABLE.pick(1, 10.0, percentile=95).latency_ms != TABLE.pick(1, 10.0).latency_ms


def test_a_masked_choice_is_never_taken_and_nothing_to_fall_back_on_is_said() -> None:
    policy = policy_at(2.0, allow=["full-offload", SPLIT])
    decision = policy.decide(0.0, 1)

    assert (decision.choice.name, decision.timeout_ms) == (SPLIT, math.inf)
    policy.failed(1.0, decision.choice)
    assert policy.decide(1.0, 1).choice.name == SPLIT


def test_a_batch_size_without_a_row_for_the_device_has_nothing_to_fall_back_on() -> None:
    first, *others = TABLE.batches
    without = BatchTable(batch=1, rows=first.rows[:2], segments=())
    policy = policy_at(10.0, table=dataclasses.replace(TABLE, batches=(without, *others)))

    assert policy.decide(0.0, 1).timeout_ms == math.inf
    assert policy.decide(0.0, 4).timeout_ms < math.inf
    policy.failed(0.1, SPLIT)
    assert policy.decide(0.2, 1).choice.name == SPLIT
    assert policy.decide(0.2, 4).choice.name == "no-offload"


# ---- probing -----------------------------------------------------------------------------------------------


def test_without_probes_the_links_return_is_never_seen_and_with_them_it_is() -> None:
    rates = [1.0] * 20 + [60.0] * 40
    blind = drive(policy_at(1.0, NO_PROBES), rates)
    seeing = drive(policy_at(1.0), rates)

    assert set(names(blind)) == {"no-offload"}
    assert names(seeing)[:20] == ["no-offload"] * 20
    assert names(seeing)[-20:] == ["full-offload"] * 20


def test_probes_back_off_while_they_bring_nothing_new_and_are_quick_again_after_a_change() -> None:
    policy = policy_at(1.0)
    still = [i for i, decision in enumerate(drive(policy, [1.0] * 100)) if decision.probe_bytes]
    gaps = [b - a for a, b in itertools.pairwise(still)]
    changed = [i for i, decision in enumerate(drive(policy, [2.5] * 30, start_s=100.0)) if decision.probe_bytes]

    assert gaps == sorted(gaps)
    assert (gaps[0], gaps[-1]) == (4, 10)
    assert [b - a for a, b in itertools.pairwise(changed)][:4] == [2, 2, 4, 8]


@pytest.mark.parametrize("period_s", [0.002, 0.1, 1.0])
def test_a_device_that_stays_alone_sends_as_many_probes_whatever_its_request_rate(period_s: float) -> None:
    policy = policy_at(1.0)
    times = []
    for i in range(round(60.0 / period_s)):
        if size := policy.decide(i * period_s, 1).probe_bytes:
            times.append(i * period_s)
            policy.probed(i * period_s, size, size / 1e3)

    assert times == pytest.approx([0.0, 4.0, 12.0, 22.0, 32.0, 42.0, 52.0], abs=0.02)


def test_one_probe_is_out_at_a_time_and_one_that_nobody_reports_fails_after_its_timeout() -> None:
    policy = policy_at(1.0)
    decisions = {i / 10: policy.decide(i / 10, 1) for i in range(70)}

    assert [time_s for time_s, made in decisions.items() if made.probe_bytes] == [0.0, 6.0]
    assert min(time_s for time_s, made in decisions.items() if made.reason == "server-down") == 5.0
    policy.probe_failed(7.0)
    assert not any(policy.decide(7.0 + i / 10, 1).probe_bytes for i in range(20))
    assert policy.decide(9.0, 1).probe_bytes == PROBE


def test_what_is_said_of_a_probe_that_is_not_out_is_a_sample_at_most() -> None:
    policy = policy_at(60.0)
    policy.probe_failed(1.0)
    assert policy.decide(1.0, 1).reason == "best"
    policy.failed(1.0, "full-offload")
    for _ in range(5):
        policy.probe_failed(1.5)
    assert policy.probed(1.6, PROBE, PROBE / 1e3 / 2.0, rtt_ms=500.0) == "reset"

    assert policy.decide(1.9, 1).reason == "server-down"
    assert policy.decide(2.0, 1).probe_bytes == PROBE
    policy.probed(2.1, PROBE, PROBE / 1e3 / 60.0)
    policy.probed(2.2, PROBE, PROBE / 1e3 / 60.0)
    assert policy.decide(2.2, 1).predicted_ms == pytest.approx(TABLE.pick(1, 60.0).latency_ms)


def test_requests_that_tell_the_rate_themselves_need_no_probes() -> None:
    assert not any(decision.probe_bytes for decision in drive(policy_at(60.0), [60.0] * 50))


def test_there_is_nothing_to_probe_for_where_only_the_device_is_allowed() -> None:
    decisions = drive(policy_at(60.0, allow=["no-offload"]), [60.0] * 50)

    assert not any(decision.probe_bytes for decision in decisions)


def test_a_probe_that_cannot_tell_the_rate_is_larger_the_next_time() -> None:
    policy = policy_at(3.0)
    sizes = []
    for i in range(0, 100, 10):
        size = policy.decide(float(i), 1).probe_bytes
        policy.probed(i + 0.1, size, size / 1e3 / 2.0, window_limited=True)
        sizes.append(size)

    assert sizes[:4] == [PROBE, 2 * PROBE, 4 * PROBE, 8 * PROBE]
    assert max(sizes) == PolicyParameters().max_probe_bytes
    policy.failed(100.0, SPLIT)
    assert policy.decide(101.1, 1).probe_bytes == PROBE


# ---- failing and coming back -------------------------------------------------------------------------------


def test_after_a_failure_the_device_runs_at_once_and_the_server_returns_with_a_successful_probe() -> None:
    policy = policy_at(60.0)
    policy.failed(10.0, policy.decide(9.9, 1).choice)
    waiting = [policy.decide(10.0 + i / 10, 1) for i in range(10)]

    assert {(made.choice.name, made.reason, made.probe_bytes) for made in waiting} == {("no-offload", "server-down", 0)}
    assert policy.decide(11.0, 1).probe_bytes == PROBE
    assert policy.decide(11.1, 1).reason == "server-down"
    policy.probed(11.2, PROBE, PROBE / 1e3 / 60.0)
    assert policy.decide(11.2, 1).choice.name == "full-offload"


def probe_times(policy: SwitchPolicy, start_s: float, end_s: float, *, answered: bool) -> list[int]:
    """Ask for a decision every tenth of a second; gives when probes were sent, in tenths after the start."""
    times = []
    for i in range(round((end_s - start_s) * 10)):
        time_s = start_s + i / 10
        if size := policy.decide(time_s, 1).probe_bytes:
            times.append(i)
            if answered:
                policy.probed(time_s, size, size / 1e3 / 60.0)
            else:
                policy.probe_failed(time_s)
    return times


def test_the_wait_for_a_dead_server_doubles_up_to_its_limit() -> None:
    policy = policy_at(60.0)
    policy.failed(1.0, "full-offload")
    times = probe_times(policy, 1.0, 140.0, answered=False)

    waits = [b - a for a, b in zip([0, *times], times, strict=False)]
    assert waits == pytest.approx([10, 20, 40, 80, 160, 300, 300, 300], abs=1)


def test_a_server_that_fails_again_right_after_its_return_waits_longer_and_one_that_held_does_not() -> None:
    policy = policy_at(60.0)
    for fails_at_s, waits in ((1.0, 1.0), (2.5, 2.0), (15.5, 4.0), (60.0, 8.0)):
        policy.failed(fails_at_s, "full-offload")
        [only] = probe_times(policy, fails_at_s, fails_at_s + waits + 0.2, answered=True)[:1]
        assert only == pytest.approx(10 * waits, abs=1)
    answer(policy, 70.0, policy.decide(70.0, 1), 1, 60.0)
    policy.failed(71.0, "full-offload")
    assert probe_times(policy, 71.0, 73.0, answered=True) == pytest.approx([10], abs=1)


def test_a_server_whose_probes_alone_are_answered_is_tried_ever_more_rarely() -> None:
    policy = policy_at(60.0)
    in_vain = []
    for i in range(1200):
        time_s = i / 10
        made = policy.decide(time_s, 1)
        if made.probe_bytes:
            policy.probed(time_s + 0.002, made.probe_bytes, made.probe_bytes / 1e3 / 60.0)
        if made.choice.uses_server:
            in_vain.append(time_s)
            policy.failed(time_s + 0.06, made.choice, started_s=time_s)

    assert len(in_vain) <= 8
    assert in_vain[-1] - in_vain[-2] == pytest.approx(30.0, abs=0.5)


def test_a_failure_of_what_was_sent_before_the_server_came_back_does_not_put_it_down() -> None:
    policy = policy_at(60.0)
    policy.failed(1.0, "full-offload", started_s=0.9)
    assert policy.decide(2.0, 1).probe_bytes
    policy.probed(2.1, PROBE, PROBE / 1e3 / 60.0)
    policy.failed(2.2, "full-offload", started_s=0.95)
    policy.observe(Observation(time_s=2.3, choice="full-offload", batch=1, latency_ms=1380.0, head_ms=0.0))

    assert policy.decide(2.3, 1).choice.name == "full-offload"
    policy.failed(2.4, "full-offload", started_s=2.3)
    assert policy.decide(2.4, 1).reason == "server-down"


def test_a_probe_that_was_sent_before_the_server_came_back_does_not_put_it_down() -> None:
    policy = policy_at(60.0)
    made = policy.decide(0.99, 1)
    policy.failed(1.0, made.choice)
    assert policy.decide(2.0, 1).probe_bytes
    answer(policy, 2.5, made, 1, 60.0)
    policy.probe_failed(3.0)

    assert policy.decide(3.0, 1).choice.name == "full-offload"


def test_what_a_late_answer_took_is_no_sample_of_the_rate() -> None:
    policy = policy_at(60.0)
    policy.observe(Observation(time_s=6.0, choice="full-offload", batch=1, latency_ms=6000.0, head_ms=0.0))
    assert policy.decide(7.0, 1).probe_bytes
    policy.probed(7.1, PROBE, PROBE / 1e3 / 60.0)

    assert policy.decide(7.1, 1).choice.name == "full-offload"


def test_requests_that_fail_together_count_as_one_failure() -> None:
    policy = policy_at(60.0)
    policy.failed(1.0, "full-offload")
    assert policy.decide(2.0, 1).probe_bytes
    policy.probed(2.0, PROBE, PROBE / 1e3 / 60.0)
    for i in range(5):
        policy.failed(2.5 + i / 100, "full-offload")

    assert probe_times(policy, 2.5, 5.0, answered=True) == pytest.approx([20], abs=1)


def test_an_answer_in_time_of_a_request_that_was_under_way_says_that_the_server_is_up() -> None:
    policy = policy_at(60.0)
    made = policy.decide(1.0, 1)
    policy.failed(1.0, made.choice)
    assert policy.decide(1.01, 1).reason == "server-down"

    answer(policy, 1.0, made, 1, 60.0)
    assert policy.decide(1.03, 1).reason == "best"


def test_without_probes_the_server_is_simply_tried_again() -> None:
    policy = policy_at(60.0, NO_PROBES)
    policy.failed(1.0, "full-offload")

    assert policy.decide(1.9, 1).reason == "server-down"
    assert policy.decide(2.1, 1).choice.name == "full-offload"


def test_a_probe_that_fails_keeps_the_server_out_although_the_last_rate_was_good() -> None:
    policy = policy_at(1.0)
    assert policy.decide(0.0, 1).probe_bytes
    policy.estimator.restart()
    policy.estimator.add(0.5, 100_000_000, 1e5 / 60.0)
    policy.probe_failed(1.0)

    assert policy.decide(1.0, 1).reason == "server-down"


def test_the_rate_after_an_outage_is_the_probes_alone() -> None:
    policy = policy_at(60.0)
    policy.failed(1.0, "full-offload")
    policy.decide(2.1, 1)
    assert policy.probed(2.2, PROBE, PROBE / 1e3 / 2.0) == "reset"

    assert policy.decide(2.2, 1).choice.name == "no-offload"


def test_the_timeout_is_a_multiple_of_the_prediction_but_not_less_than_the_device_alone() -> None:
    assert policy_at(200.0).decide(0.0, 1).timeout_ms == 60.0
    assert policy_at(10.0).decide(0.0, 1).timeout_ms == pytest.approx(3 * 43.0)
    assert policy_at(10.0, PolicyParameters(deadline_ms=50.0)).decide(0.0, 1).timeout_ms == 50.0
    assert policy_at(2.0).decide(0.0, 1).timeout_ms == math.inf


def test_where_every_choice_misses_the_deadline_the_factor_holds_and_a_miss_is_no_failure() -> None:
    policy = policy_at(10.0, PolicyParameters(deadline_ms=40.0))
    made = policy.decide(0.0, 1)

    assert made.choice.name == SPLIT
    assert made.predicted_ms == pytest.approx(43.0)
    assert made.timeout_ms == pytest.approx(3 * 43.0)
    policy.observe(Observation(time_s=0.05, choice=SPLIT, batch=1, latency_ms=50.0, head_ms=20.0, server_ms=8.0))
    assert policy.decide(0.1, 1).reason != "server-down"


def test_an_answer_that_comes_late_sends_the_next_request_to_the_device() -> None:
    for latency_ms, reason in ((59.0, "best"), (61.0, "server-down")):
        policy = policy_at(60.0)
        made = policy.decide(0.0, 1)
        policy.observe(
            Observation(time_s=0.1, choice=made.choice, batch=1, latency_ms=latency_ms, head_ms=0.0, server_ms=10.0)
        )
        assert policy.decide(0.1, 1).reason == reason


def test_an_outage_costs_one_timeout_and_is_over_soon_after_the_link_is_back() -> None:
    policy = policy_at(60.0)
    lost = 0
    chosen = []
    for i in range(600):
        time_s, dead = i / 10, 100 <= i < 300
        made = policy.decide(time_s, 1)
        chosen.append(made.choice.name)
        if not dead:
            answer(policy, time_s, made, 1, 60.0)
            continue
        if made.choice.uses_server:
            lost += 1
            policy.failed(time_s + made.timeout_ms / 1e3, made.choice)
        if made.probe_bytes:
            policy.probe_failed(time_s + 0.05)

    assert lost == 1
    assert set(chosen[101:300]) == {"no-offload"}
    assert set(chosen[300 + 170 :]) == {"full-offload"}


# ---- how good it is ----------------------------------------------------------------------------------------


def regret(parameters: PolicyParameters | None, *, seed: int) -> float:
    """Give how much more than the best choices' T a policy took on a link that wanders, with 10 % of noise."""
    numbers = random.Random(seed)
    policy = SwitchPolicy(TABLE, parameters)
    taken_ms = best_ms = log = 0.0
    for i in range(3000):
        if i % 6 == 0:
            log = 0.95 * log + numbers.gauss(0.0, 0.25)
        rate_mb_s = 10.0 * math.exp(log)
        made = policy.decide(i / 2, 1)
        answer(policy, i / 2, made, 1, rate_mb_s, noise=numbers.lognormvariate(0.0, 0.1))
        taken_ms += TABLE.latency_ms(made.choice.id, State(batch=1, rate_mb_s=rate_mb_s))
        best_ms += TABLE.pick(1, rate_mb_s).latency_ms
    return taken_ms / best_ms - 1.0


def test_on_a_link_that_wanders_the_policy_is_within_a_few_percent_of_the_best_choices() -> None:
    assert regret(None, seed=1) < 0.03
    assert regret(NO_PROBES, seed=1) > 0.3


def test_another_network_is_probed_at_once_and_known_from_its_first_sample() -> None:
    policy = SwitchPolicy(TABLE)
    probe = policy.decide(0.0, 1).probe_bytes
    policy.probed(0.5, probe, 0.4 * probe / 1e3)
    for i in range(30):
        policy.decide(1.0 + i / 10, 1)

    policy.restart()
    due = policy.decide(4.0, 1).probe_bytes
    policy.probed(4.1, due, 10.0 * due / 1e3)
    estimate = policy.estimator.estimate(4.1)

    assert due > 0
    assert estimate is not None
    assert estimate.rate_mb_s == pytest.approx(0.1)


def test_a_probe_shorter_than_its_round_trip_is_a_fast_link_and_brings_the_server_back() -> None:
    policy = SwitchPolicy(TABLE)
    probe = policy.decide(0.0, 1).probe_bytes

    policy.probed(0.1, probe, -0.2)

    assert policy.decide(0.2, 1).choice.uses_server
    with pytest.raises(UsageError, match="transfer_ms"):
        policy.probed(0.3, probe, math.nan)


def test_what_is_no_table_is_refused_at_once() -> None:
    with pytest.raises(UsageError, match="is no lookup table"):
        SwitchPolicy("table.json")  # type: ignore[arg-type]  # what is tested
