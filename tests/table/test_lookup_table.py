import itertools
import json
import math
import os
import random
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.paths import GOLDEN

from dsc_split.errors import UsageError
from dsc_split.lookup_table import BatchTable, Choice, Link, LookupTable, Row, Side, State


def golden() -> LookupTable:
    return LookupTable.load(GOLDEN)


def row(choice: int, head_ms: float, tail_ms: float, uplink_bytes: int, downlink_bytes: int = 0) -> Row:
    return Row(
        choice=choice,
        head_ms=head_ms,
        head_ci_ms=None,
        head_p95_ms=None,
        tail_ms=tail_ms,
        tail_ci_ms=None,
        tail_p95_ms=None,
        uplink_bytes=uplink_bytes,
        downlink_bytes=downlink_bytes,
    )


def table_of(rows: list[Row], *, link: Link | None = None, local: int | None = None, batch: int = 1) -> LookupTable:
    """Make a table of one batch size; choice ``local`` is no offload, all others are splits."""
    choices = [
        Choice(id=item.choice, kind="no-offload", name="no-offload")
        if item.choice == local
        else Choice(id=item.choice, kind="split", name=f"cut{item.choice}")
        for item in rows
    ]
    side = Side(target="t", fingerprint="f")
    table = LookupTable(
        pair_id="p",
        precision="fp32",
        emulated=None,
        device=side,
        server=side,
        link=link or Link(),
        choices=tuple(choices),
        batches=(BatchTable(batch=batch, rows=tuple(rows), segments=()),),
    )
    first = replace(table.batches[0], segments=table.switch_rates(State(batch=batch)))
    return replace(table, batches=(first,))


# ---- picking -----------------------------------------------------------------------------------------------


def test_golden_picks_are_those_computed_by_hand() -> None:
    # batch 1: full 10 + 600/r, split 28 + 150/r, local 60
    # batch 4: full 30 + 2400/r, split 92 + 600/r, local 200; batch 8: no local row
    table = golden()
    expected = [
        (1, 2.0, "no-offload", 60.0),
        (1, 8.0, "features.4.0", 46.75),
        (1, 40.0, "full-offload", 25.0),
        (4, 5.0, "no-offload", 200.0),
        (4, 16.0, "features.4.0", 129.5),
        (4, 32.0, "full-offload", 105.0),
        (8, 10.0, "features.4.0", 300.0),
        (8, math.inf, "full-offload", 56.0),
    ]

    picks = [(batch, rate, table.pick(batch, rate)) for batch, rate, _, _ in expected]

    assert [(b, r, pick.choice.name, pick.latency_ms) for b, r, pick in picks] == expected


def test_golden_switch_rates_are_those_computed_by_hand() -> None:
    table = golden()

    rates = {
        item.batch: [segment.below_rate_mb_s for segment in table.switch_rates(State(batch=item.batch))]
        for item in table.batches
    }

    assert rates[1] == [pytest.approx(150 / 32), pytest.approx(450 / 18), None]
    assert rates[4] == [pytest.approx(600 / 108), pytest.approx(1800 / 62), None]
    assert rates[8] == [pytest.approx(3600 / 124), None]


def test_the_paper_formulas_hold() -> None:
    # Eq. 4: head + D*c/r + tail; Eq. 5: D/r + whole on the server; Eq. 6: the least of all
    table = golden()
    rate = 7.5
    input_mb, ratio = 0.6, 0.25
    split_ms = 20.0 + 1000 * input_mb * ratio / rate + 8.0
    full_ms = 1000 * input_mb / rate + 10.0

    assert table.latency_ms("features.4.0", State(batch=1, rate_mb_s=rate)) == pytest.approx(split_ms, rel=1e-15)
    assert table.latency_ms("full-offload", State(batch=1, rate_mb_s=rate)) == pytest.approx(full_ms, rel=1e-15)
    assert table.latency_ms("no-offload", State(batch=1, rate_mb_s=rate)) == 60.0
    assert table.pick(1, rate).latency_ms == min(split_ms, full_ms, 60.0)


def test_t_is_evaluated_in_the_stated_order_to_the_last_bit() -> None:
    link = Link(
        c0_ms=0.61,
        c1_ms_per_mb=2.83,
        rtt_ms=7.7,
        round_trips=1.5,
        count_downlink=True,
        downlink_rate_mb_s=33.3,
    )
    table = table_of([row(3, 14.4, 66.1, 258048, 4123)], link=link)
    numbers = random.Random(2)
    for _ in range(200):
        rate, rtt, load, queue = (numbers.uniform(0.1, 90.0) for _ in range(4))
        up, down = 258048 / 1e6, 4123 / 1e6
        own = 14.4 + (66.1 * 1.0 + 0.0 + 7.7 * 1.5 + 0.61 + 2.83 * (up + down) + 1000 * (up / rate + down / 33.3))
        given = 14.4 + (66.1 * load + queue + rtt * 1.5 + 0.61 + 2.83 * (up + down) + 1000 * (up / rate + down / 5.5))

        assert table.pick(1, rate).latency_ms == own
        assert (
            table.latency_ms(
                3, State(batch=1, rate_mb_s=rate, rtt_ms=rtt, server_load=load, queue_ms=queue, downlink_rate_mb_s=5.5)
            )
            == given
        )


def test_the_terms_add_up_and_the_ranking_begins_with_the_pick() -> None:
    link = Link(c0_ms=0.5, c1_ms_per_mb=2.0, rtt_ms=10.0, count_downlink=True)
    table = replace(golden(), link=link)
    pick = table.pick(4, 12.0, server_load=1.5, queue_ms=3.0)

    assert pick.ranking[0] == pick.terms
    assert [terms.latency_ms for terms in pick.ranking] == sorted(terms.latency_ms for terms in pick.ranking)
    for terms in pick.ranking:
        parts = terms.head_ms + terms.uplink_ms + terms.network_ms + terms.queue_ms
        assert parts + terms.tail_ms + terms.downlink_ms == pytest.approx(terms.latency_ms, rel=1e-12)
    split = next(terms for terms in pick.ranking if terms.choice.kind == "split")
    assert (split.tail_ms, split.queue_ms) == (33.0, 3.0)
    assert split.downlink_ms == pytest.approx(16 / 12)
    assert split.network_ms == pytest.approx(10.0 + 0.5 + 2.0 * 0.616)


def test_of_equal_choices_the_smaller_uplink_wins_then_the_lower_id() -> None:
    assert table_of([row(1, 5.0, 5.0, 200), row(2, 5.0, 5.0, 100)]).pick(1, math.inf).choice.id == 2
    assert table_of([row(1, 5.0, 5.0, 100), row(2, 5.0, 5.0, 100)]).pick(1, 3.0).choice.id == 1


def test_at_rate_0_only_what_sends_nothing_can_answer() -> None:
    table = golden()
    pick = table.pick(1, 0.0)

    assert (pick.choice.name, pick.latency_ms, pick.runner_up, pick.tie) == ("no-offload", 60.0, None, False)
    assert pick.margin_ms == math.inf
    assert table.latency_ms("full-offload", State(batch=1, rate_mb_s=0)) == math.inf
    with pytest.raises(UsageError, match="nothing can be sent"):
        table.pick(1, 0.0, allow=["full-offload", "features.4.0"])
    with pytest.raises(UsageError, match="batch 8"):
        table.pick(8, 0.0)


def test_a_choice_that_sends_0_bytes_is_still_infinite_at_rate_0() -> None:
    with pytest.raises(UsageError, match="nothing can be sent"):
        table_of([row(1, 1.0, 1.0, 0)]).pick(1, 0.0)


def test_a_downlink_of_rate_0_counts_only_where_the_way_back_is_counted() -> None:
    plain = table_of([row(1, 1.0, 1.0, 1000, 50)])
    counted = table_of([row(1, 1.0, 1.0, 1000, 50), row(2, 1.0, 1.0, 1000, 0)], link=Link(count_downlink=True))

    assert plain.pick(1, 1.0, downlink_rate_mb_s=0.0).latency_ms == 3.0
    assert counted.latency_ms(1, State(batch=1, rate_mb_s=1.0, downlink_rate_mb_s=0.0)) == math.inf
    assert counted.latency_ms(2, State(batch=1, rate_mb_s=1.0, downlink_rate_mb_s=0.0)) == 3.0
    with pytest.raises(UsageError, match="any data rate"):
        counted.switch_rates(State(batch=1, downlink_rate_mb_s=0.0, allow=[1]))


@pytest.mark.parametrize("rate", [math.nan, -1.0, -math.inf, "fast", None, 10**400], ids=str)
def test_a_rate_that_is_no_rate_is_a_usage_error(rate: Any) -> None:
    with pytest.raises(UsageError, match="data rate"):
        golden().pick(1, rate)


@pytest.mark.parametrize("name", ["rtt_ms", "server_load", "queue_ms", "downlink_rate_mb_s"])
@pytest.mark.parametrize("value", [math.nan, -0.5])
def test_another_number_out_of_range_is_a_usage_error(name: str, value: float) -> None:
    given: dict[str, Any] = {name: value}
    with pytest.raises(UsageError, match="out of range"):
        golden().pick(1, 1.0, **given)


def test_an_infinite_server_load_is_refused_with_what_to_do() -> None:
    with pytest.raises(UsageError, match="allow 'no-offload' alone"):
        golden().pick(1, 1.0, server_load=math.inf)


@pytest.mark.parametrize("batch", [0, -1, 1.5, "1", True, None], ids=str)
def test_a_batch_that_is_no_batch_size_is_a_usage_error(batch: Any) -> None:
    with pytest.raises(UsageError, match="batch size"):
        golden().pick(batch, 1.0, queue_ms=0.0)


@pytest.mark.parametrize("batch", [True, 1.0, [1], None, "1"])
def test_what_is_no_whole_number_is_refused_also_where_its_lines_are_known(batch: Any) -> None:
    table = golden()
    table.pick(1, 8.0)

    with pytest.raises(UsageError, match="is no batch size; a whole number from 1 was expected"):
        table.pick(batch, 8.0)


def test_numbers_of_numpy_are_numbers() -> None:
    pick = golden().pick(np.int64(4), np.float64(16.0), percentile=np.int64(95))

    assert json.loads(json.dumps(pick.to_json()))["batch"] == 4


def test_numbers_of_thousands_of_digits_are_refused_in_short() -> None:
    with pytest.raises(UsageError, match="data rate a number of thousands of digits is no number"):
        golden().pick(1, 10**5000)
    with pytest.raises(UsageError, match="batch a number of thousands of digits is larger than every measured one"):
        golden().pick(10**5000, 1.0)


def test_allow_may_be_used_up_and_changed_later() -> None:
    allowed = ["no-offload"]

    pick = golden().pick(1, 8.0, allow=(name for name in allowed))
    kept = golden().pick(1, 8.0, allow=allowed)
    allowed.clear()

    assert [terms.choice.name for terms in pick.ranking] == ["no-offload"]
    assert [terms.choice.name for terms in kept.ranking] == ["no-offload"]
    with pytest.raises(UsageError, match="'allow' takes a collection of choices, by name or id; got 3"):
        golden().pick(1, 8.0, allow=3)  # type: ignore[call-overload]  # what is tested


@pytest.mark.parametrize("source", [None, 5, object()])
def test_what_can_be_no_table_is_a_usage_error(source: Any) -> None:
    with pytest.raises(UsageError, match="a path or the bytes of a table were expected"):
        LookupTable.load(source)


def test_a_path_that_no_system_takes_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no lookup table"):
        LookupTable.load("x" * 5000)
    with pytest.raises(UsageError, match="no lookup table"):
        LookupTable.load("x\0y")


def test_picks_can_be_told_apart_and_collected() -> None:
    table = golden()

    assert len({table.pick(1, 8.0), table.pick(1, 8.0), table.pick(1, 9.0)}) == 2


def test_a_batch_larger_than_all_measured_is_a_usage_error_with_the_command() -> None:
    with pytest.raises(UsageError, match=r"batch 9 is larger .*\(1, 4, 8\).*--batches 1,4,8,9"):
        golden().pick(9, 1.0)


def test_a_batch_in_between_takes_the_times_of_the_next_larger_and_its_own_bytes() -> None:
    pick = golden().pick(3, 16.0)

    assert (pick.measured_batch, pick.choice.name) == (4, "features.4.0")
    assert pick.terms.uplink_bytes == 3 * 150000
    assert pick.latency_ms == 70.0 + (22.0 + 1000 * (0.45 / 16.0))


def test_bytes_without_a_batch_axis_are_not_scaled() -> None:
    # 1000 bytes per sample and 64 that every request sends
    rows = {batch: (row(1, 1.0, 1.0, 1000 * batch + 64),) for batch in (2, 8)}
    table = table_of([row(1, 1.0, 1.0, 2064)], batch=2)
    segments = table.batches[0].segments
    table = replace(table, batches=tuple(BatchTable(batch=b, rows=rows[b], segments=segments) for b in (2, 8)))

    assert [table.pick(batch, 1.0).terms.uplink_bytes for batch in (1, 2, 5, 8)] == [1064, 2064, 5064, 8064]


def test_with_one_measured_batch_the_bytes_are_in_proportion() -> None:
    assert table_of([row(1, 1.0, 1.0, 8000)], batch=8).pick(3, 1.0).terms.uplink_bytes == 3000


def test_allow_takes_names_and_ids_and_refuses_what_is_unknown() -> None:
    table = golden()

    assert table.pick(1, 40.0, allow=["features.4.0", 2]).choice.name == "features.4.0"
    assert table.pick(1, 40.0, allow={2}).choice.name == "no-offload"
    with pytest.raises(UsageError, match=r"unknown choice 'features.5.0'; the table has 'full-offload'"):
        table.pick(1, 40.0, allow=["features.5.0"])
    with pytest.raises(UsageError, match="unknown choice True"):
        table.pick(1, 40.0, allow=[True])
    with pytest.raises(UsageError, match="takes a collection"):
        table.pick(1, 40.0, allow="no-offload")
    with pytest.raises(UsageError, match="none of the choices that are allowed has a row at batch 8"):
        table.pick(8, 40.0, allow=["no-offload"])


def test_the_95th_percentile_compares_the_sums_of_both_sides() -> None:
    # batch 1: p95 of full offload 0 + 12.5, of the split as the file has them, of local as the file has it
    table = golden()
    rows = {item.choice: item for item in table.batches[0].rows}
    split = rows[1]
    assert split.head_p95_ms is not None
    assert split.tail_p95_ms is not None
    rate = 7.5

    pick = table.pick(1, rate, percentile=95)

    assert table.latency_ms("full-offload", State(batch=1, rate_mb_s=rate, percentile=95)) == 12.5 + 1000.0 * (
        0.6 / rate
    )
    split_ms = split.head_p95_ms + (split.tail_p95_ms + 1000.0 * (0.15 / rate))
    assert table.latency_ms("features.4.0", State(batch=1, rate_mb_s=rate, percentile=95)) == split_ms
    assert (pick.choice.name, pick.latency_ms) == ("features.4.0", split_ms)
    assert table.pick(1, rate, percentile=50).latency_ms == table.pick(1, rate).latency_ms < split_ms
    assert pick.to_json()["percentile"] == 95
    assert pick.segments == table.switch_rates(State(batch=1, percentile=95)) != table.switch_rates(State(batch=1))


def test_a_choice_without_95th_percentiles_is_left_out_there() -> None:
    known = replace(row(1, 5.0, 5.0, 1000), head_p95_ms=7.0, tail_p95_ms=9.0)
    table = table_of([row(0, 1.0, 1.0, 1000), known])

    assert table.pick(1, math.inf).choice.id == 0
    assert table.pick(1, math.inf, percentile=95).choice.id == 1
    with pytest.raises(UsageError, match="no choice that is allowed has 95th percentiles at batch 1"):
        table.pick(1, 8.0, percentile=95, allow=[0])


@pytest.mark.parametrize("percentile", [0, 90, 99, 0.95, math.nan])
def test_another_percentile_is_a_usage_error(percentile: float) -> None:
    with pytest.raises(UsageError, match=r"percentile .* 50, the median, or 95 was expected"):
        golden().pick(1, 8.0, percentile=percentile)


def test_a_pick_says_that_its_times_are_from_elsewhere() -> None:
    table = golden()
    batch = table.batches[0]
    stale = replace(table, batches=(replace(batch, rows=tuple(replace(r, timing_valid=False) for r in batch.rows)),))

    assert table.pick(1, 8.0).timing_valid
    assert not stale.pick(1, 8.0).timing_valid
    assert stale.pick(1, 8.0).to_json()["timing_valid"] is False


def test_server_load_and_queue_move_the_choice_to_the_device() -> None:
    table = golden()

    assert table.pick(1, 40.0).choice.name == "full-offload"
    assert table.pick(1, 40.0, server_load=4.0).choice.name == "full-offload"
    assert table.pick(1, 40.0, server_load=12.0).choice.name == "no-offload"
    assert table.pick(1, 40.0, queue_ms=36.0).choice.name == "no-offload"
    assert table.pick(1, 8.0, rtt_ms=20.0).choice.name == "no-offload"


def test_a_margin_below_the_uncertainty_of_both_choices_is_a_tie() -> None:
    # half-widths at batch 1: local 1.5; split 0.3 and 0.4, so 0.5 together
    pick = golden().pick(1, 4.7)

    assert pick.runner_up is not None
    assert {pick.choice.name, pick.runner_up.name} == {"features.4.0", "no-offload"}
    assert pick.uncertainty_ms == pytest.approx(math.sqrt(1.5**2 + 0.3**2 + 0.4**2))
    assert pick.margin_ms == pytest.approx(60.0 - (28.0 + 150 / 4.7))
    assert pick.tie
    assert not golden().pick(1, 8.0).tie


def test_server_load_widens_the_interval_of_the_tail() -> None:
    pick = golden().pick(1, 4.7, server_load=1.1)

    assert pick.uncertainty_ms == pytest.approx(math.sqrt(1.5**2 + 0.3**2 + 0.44**2))


def test_a_pick_says_from_where_to_where_it_holds() -> None:
    pick = golden().pick(1, 8.0)

    assert pick.best_from_mb_s == pytest.approx(4.6875)
    assert pick.best_below_mb_s == pytest.approx(25.0)
    assert golden().pick(1, 1.0).best_from_mb_s == 0.0
    assert golden().pick(1, 99.0).best_below_mb_s == math.inf


def test_a_pick_is_plain_data_without_infinities() -> None:
    document = json.loads(json.dumps(golden().pick(1, 0.0).to_json(), allow_nan=False))

    assert (document["choice"], document["margin_ms"], document["runner_up"]) == ("no-offload", None, None)
    assert [item["latency_ms"] for item in document["choices"]] == [60.0, None, None]


def test_a_pick_whose_uncertainty_overflows_is_plain_data_too() -> None:
    measured = replace(row(0, 1.0, 50.0, 1000), tail_ci_ms=(10.0, 90.0))
    table = table_of([measured, row(1, 60.0, 0.0, 0)], local=1)
    document = json.loads(json.dumps(table.pick(1, 8.0, server_load=1e306).to_json(), allow_nan=False))

    assert (document["choice"], document["uncertainty_ms"]) == ("no-offload", None)


# ---- the envelope ------------------------------------------------------------------------------------------

times = st.floats(0.0, 1e4)
sizes = st.integers(0, 10**8)
rates = st.floats(1e-3, 1e5)
links = st.builds(
    Link,
    c0_ms=st.floats(0.0, 10.0),
    c1_ms_per_mb=st.floats(0.0, 10.0),
    rtt_ms=st.floats(0.0, 100.0),
    count_downlink=st.booleans(),
    downlink_rate_mb_s=st.none() | st.floats(0.1, 100.0),
)


@st.composite
def tables(draw: st.DrawFn) -> LookupTable:
    rows = [row(i, draw(times), draw(times), draw(sizes), draw(sizes)) for i in range(draw(st.integers(1, 9)))]
    if draw(st.booleans()):
        rows.append(row(99, draw(times), 0.0, 0))
    return table_of(rows, link=draw(links), local=99)


@settings(max_examples=150)
@given(tables(), st.lists(rates, max_size=8))
def test_the_switch_rates_are_the_lower_envelope_by_brute_force(table: LookupTable, some_rates: list[float]) -> None:
    segments = table.switch_rates(State(batch=1))
    ends = [segment.below_rate_mb_s for segment in segments]

    assert ends[-1] is None
    inner = [end for end in ends if end is not None]
    assert inner == sorted(set(inner))
    assert len({segment.choice for segment in segments}) == len(segments)
    for rate in [*some_rates, *inner, *(rate * 0.9 for rate in inner), *(rate * 1.1 for rate in inner)]:
        chosen = next(s.choice for s in segments if s.below_rate_mb_s is None or rate < s.below_rate_mb_s)
        least = min(table.latency_ms(choice.id, State(batch=1, rate_mb_s=rate)) for choice in table.choices)
        assert table.latency_ms(chosen, State(batch=1, rate_mb_s=rate)) == pytest.approx(least, rel=1e-12)
        assert table.pick(1, rate).latency_ms == least
    assert LookupTable.from_json(json.loads(json.dumps(table.to_json()))) == table


@settings(max_examples=150)
@given(tables())
def test_pick_changes_exactly_at_each_switch_rate(table: LookupTable) -> None:
    segments = table.switch_rates(State(batch=1))
    for before, after in itertools.pairwise(segments):
        rate = before.below_rate_mb_s
        assert rate is not None
        assert table.pick(1, rate).choice.id == after.choice
        assert table.pick(1, math.nextafter(rate, 0.0)).choice.id == before.choice


def test_lines_that_rounding_cannot_tell_apart_still_give_a_table_that_reads_back() -> None:
    numbers = random.Random(5)
    nearly = (0.0, 1.0, 1.0 + 1e-15, 1.0 + 3e-15, 2.0)
    for _ in range(500):
        rows = [
            row(i, numbers.choice(nearly), numbers.choice(nearly), numbers.randrange(3), numbers.randrange(3))
            for i in range(numbers.randint(2, 8))
        ]
        table = table_of(rows, link=Link(count_downlink=numbers.random() < 0.5))

        assert LookupTable.from_json(json.loads(json.dumps(table.to_json(), allow_nan=False))) == table
        for before, after in itertools.pairwise(table.switch_rates(State(batch=1))):
            rate = before.below_rate_mb_s
            assert rate is not None
            assert table.pick(1, rate).choice.id == after.choice
            assert table.pick(1, math.nextafter(rate, 0.0)).choice.id == before.choice


def test_switch_rates_follow_the_question() -> None:
    table = golden()
    plain = table.switch_rates(State(batch=1))

    assert [item.choice for item in table.switch_rates(State(batch=1, allow=["full-offload", "no-offload"]))] == [2, 0]
    assert table.switch_rates(State(batch=1, allow=[2]))[0].below_rate_mb_s is None
    loaded = table.switch_rates(State(batch=1, server_load=2.0))
    assert loaded[0].below_rate_mb_s == pytest.approx(150 / 24)
    assert loaded != plain


def test_a_table_of_many_choices_is_read_in_reasonable_time() -> None:
    numbers = random.Random(1)
    rows = [row(i, numbers.uniform(0, 100), 1.0, numbers.randrange(10**6)) for i in range(300)]
    table = table_of(rows)

    assert LookupTable.from_json(table.to_json()) == table


# ---- cost --------------------------------------------------------------------------------------------------


def test_table_and_policy_need_the_standard_library_alone() -> None:
    code = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "import dsc_split, dsc_split.serving\n"
        "foreign = {name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "assert foreign == {'dsc_split'}, foreign"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env={**os.environ})
