"""What changed between two tables: beyond the intervals, and no more."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from dsc_split.benchmarks import compare_tables
from dsc_split.errors import UsageError
from dsc_split.lookup_table import BatchTable, Choice, Link, LookupTable, Row, Side, State

CHOICES = (
    Choice(id=0, kind="full-offload", name="full-offload"),
    Choice(id=1, kind="split", name="a"),
    Choice(id=2, kind="no-offload", name="no-offload"),
)
TIMES = {0: (0.0, 10.0, 2_000_000), 1: (20.0, 8.0, 200_000), 2: (80.0, 0.0, 0)}
"""Choice to head, tail and bytes: no-offload to 3.8 MB/s, then a, from 100 MB/s on full-offload."""


def row(choice: int, head_ms: float, tail_ms: float, uplink_bytes: int, half: float = 0.01, **changes: Any) -> Row:
    head_ci_ms, tail_ci_ms = ((value * (1 - half), value * (1 + half)) for value in (head_ms, tail_ms))
    row = Row(
        choice=choice,
        head_ms=head_ms,
        head_ci_ms=head_ci_ms,
        head_p95_ms=head_ms,
        tail_ms=tail_ms,
        tail_ci_ms=tail_ci_ms,
        tail_p95_ms=tail_ms,
        uplink_bytes=uplink_bytes,
        downlink_bytes=0,
    )
    return dataclasses.replace(row, **changes)


def table(
    times: dict[int, tuple[float, float, int]] = TIMES,
    *,
    batches: tuple[int, ...] = (1,),
    half: float = 0.01,
    **changes: Any,
) -> LookupTable:
    rows = tuple(row(choice, *terms, half=half) for choice, terms in times.items())
    made = LookupTable(
        **{
            "pair_id": "sha256:1",
            "precision": "fp32",
            "emulated": None,
            "device": Side(target="onnxruntime:cpu", fingerprint="d" * 64, run_fingerprint={"driver": "1"}),
            "server": Side(target="onnxruntime:cpu", fingerprint="e" * 64),
            "link": Link(),
            "choices": CHOICES,
            "batches": tuple(BatchTable(batch=batch, rows=rows, segments=()) for batch in batches),
            **changes,
        }
    )
    return dataclasses.replace(
        made,
        batches=tuple(
            dataclasses.replace(item, segments=made.switch_rates(State(batch=item.batch))) for item in made.batches
        ),
    )


def changes(before: LookupTable, after: LookupTable, **options: Any) -> dict[tuple[str, str], str]:
    found = compare_tables(before, after, **options).latencies
    return {(item.side, item.graph): item.change for item in found if item.change != "same"}


def test_a_table_is_the_same_as_itself() -> None:
    comparison = compare_tables(table(), table())

    assert not comparison.is_changed
    assert (comparison.remarks, comparison.choices, comparison.switches) == ((), (), ())
    assert comparison.counts == {"slower": 0, "faster": 0, "gone": 0, "new": 0, "same": 4}
    assert [(item.side, item.graph) for item in comparison.latencies] == [
        ("device", "head a"),
        ("device", "whole model"),
        ("server", "whole model"),
        ("server", "tail a"),
    ]


def test_slower_and_faster_are_told_by_side_and_graph() -> None:
    after = table({**TIMES, 1: (25.0, 6.0, 200_000)})

    assert changes(table(), after) == {("device", "head a"): "slower", ("server", "tail a"): "faster"}
    assert changes(after, table()) == {("device", "head a"): "faster", ("server", "tail a"): "slower"}


@pytest.mark.parametrize(
    ("head_ms", "half", "tolerance", "change"),
    [
        (20.5, 0.015, 0.02, "same"),  # 2.5 % slower, and the intervals touch
        (20.5, 0.01, 0.1, "same"),
        (20.5, 0.001, 0.02, "slower"),
        (20.5, 0.001, 0.03, "same"),
        (19.5, 0.001, 0.02, "faster"),
    ],
)
def test_a_difference_counts_outside_of_intervals_and_tolerance(
    head_ms: float, half: float, tolerance: float, change: str
) -> None:
    before, after = table(half=half), table({**TIMES, 1: (head_ms, 8.0, 200_000)}, half=half)

    assert changes(before, after, tolerance=tolerance).get(("device", "head a"), "same") == change


def test_a_choice_without_a_row_is_gone_or_new_and_gone_is_not_better() -> None:
    less = table({choice: terms for choice, terms in TIMES.items() if choice != 1})

    gone, new = compare_tables(table(), less), compare_tables(less, table())
    assert (gone.counts["gone"], gone.is_slower) == (2, True)
    assert (new.counts["new"], new.is_slower, new.is_changed) == (2, False, True)
    assert [(item.before, item.after) for item in gone.choices] == [("a", "no-offload"), ("a", "full-offload")]


def test_batch_sizes_of_one_table_alone_are_a_change_but_not_slower() -> None:
    comparison = compare_tables(table(batches=(1, 2)), table(batches=(2, 4)))

    assert (comparison.batches_gone, comparison.batches_new) == ((1,), (4,))
    assert (comparison.is_slower, comparison.is_changed) == (False, True)
    assert {item.batch for item in comparison.latencies} == {2}


def test_a_switch_rate_moved_where_its_terms_say_so() -> None:
    slower_device = table({**TIMES, 2: (100.0, 0.0, 0)})
    (moved,) = compare_tables(table(), slower_device).switches

    assert (moved.batch, moved.below, moved.above) == (1, "no-offload", "a")
    assert moved.before_mb_s == pytest.approx(1000 * 0.2 / (80 - 28))
    assert moved.after_mb_s == pytest.approx(1000 * 0.2 / (100 - 28))
    unsure_ms = (0.8**2 + 0.2**2 + 0.08**2) ** 0.5
    assert moved.before_range_mb_s == pytest.approx((200 / (52 + unsure_ms), 200 / (52 - unsure_ms)))
    assert compare_tables(table(half=0.3), table({**TIMES, 2: (100.0, 0.0, 0)}, half=0.3)).switches == ()
    assert compare_tables(table(), slower_device, tolerance=0.5).switches == ()


def test_another_choice_counts_where_both_tables_are_sure() -> None:
    without_use = {**TIMES, 1: (79.0, 8.0, 200_000)}  # a is slower than no offload at every rate

    (low, high) = compare_tables(table(), table(without_use)).choices
    assert (low.before, low.after, high.before, high.after) == ("a", "no-offload", "a", "full-offload")
    to_device_ms, to_server_ms = (0.8**2 + 0.2**2 + 0.08**2) ** 0.5, (0.2**2 + 0.08**2 + 0.1**2) ** 0.5
    assert low.from_rate_mb_s == pytest.approx(200 / (52 - to_device_ms))
    assert high.below_rate_mb_s == pytest.approx(1800 / (18 + to_server_ms))
    assert compare_tables(table(half=0.9), table(without_use, half=0.9)).choices == ()


def test_another_choice_is_found_where_tables_become_sure_at_high_rates_alone() -> None:
    before, after = (
        table({0: (0.0, 10.0, 2_000_000), 1: (head_ms, 0.1, 200_000)}, half=0.1) for head_ms in (11.5, 8.5)
    )
    (change,) = compare_tables(before, after).choices

    assert (change.before, change.after, change.below_rate_mb_s) == ("full-offload", "a", None)
    assert change.from_rate_mb_s == pytest.approx(1800 / (1.6 - (1.15**2 + 0.01**2 + 1.0**2) ** 0.5))


Times = dict[int, tuple[float, float, int]]


def sure_gain_ms(times: Times, half: float, better: int, other: int, rate_mb_s: float) -> float:
    """What a choice gains on another beyond what is uncertain."""
    if other not in times:
        return math.inf
    both = times[better], times[other]
    gain_ms = total_ms(times, other, rate_mb_s) - total_ms(times, better, rate_mb_s)
    return gain_ms - half * math.sqrt(sum(head_ms**2 + tail_ms**2 for head_ms, tail_ms, _ in both))


def total_ms(times: Times, choice: int, rate_mb_s: float) -> float:
    head_ms, tail_ms, size_bytes = times[choice]
    return head_ms + tail_ms + size_bytes / 1000 / rate_mb_s


def test_other_choices_are_claimed_at_the_very_rates_at_which_both_tables_are_sure() -> None:
    random = Random(0)
    names = ("full-offload", "a", "b", "c", "d", "no-offload")
    choices = tuple(
        Choice(id=i, kind=name if "offload" in name else "split", name=name) for i, name in enumerate(names)
    )
    seen = {"choice": 0, "switch": 0, "unsure": 0}
    for _ in range(100):
        then: Times = {
            i: (random.uniform(1, 60), random.uniform(0.5, 30), int(10 ** random.uniform(4, 6.5))) for i in range(1, 5)
        }
        then |= {0: (0.0, random.uniform(0.5, 30), 2_000_000), 5: (random.uniform(30, 200), 0.0, 0)}
        now = {i: (head_ms * random.uniform(0.6, 1.5), tail_ms, size) for i, (head_ms, tail_ms, size) in then.items()}
        now = {i: terms for i, terms in now.items() if i in (0, 5) or random.random() < 0.9}
        halves = random.uniform(0, 0.2), random.uniform(0, 0.2)
        before, after = (
            table(times, half=half, choices=choices) for times, half in zip((then, now), halves, strict=True)
        )
        found = compare_tables(before, after, tolerance=0.0)
        moved = {frozenset((item.below, item.above)) for item in found.switches}
        for rate_mb_s in (10 ** random.uniform(-1, 4) for _ in range(60)):
            best = min(then, key=lambda i: total_ms(then, i, rate_mb_s))
            best_now = min(now, key=lambda i: total_ms(now, i, rate_mb_s))
            claimed = [
                (item.before, item.after)
                for item in found.choices
                if item.from_rate_mb_s <= rate_mb_s < (item.below_rate_mb_s or math.inf)
            ]
            sure = (
                best != best_now
                and sure_gain_ms(then, halves[0], best, best_now, rate_mb_s) > 0
                and sure_gain_ms(now, halves[1], best_now, best, rate_mb_s) > 0
            )
            pair = names[best], names[best_now]
            if sure and frozenset(pair) not in moved:
                assert claimed == [pair]
                seen["choice"] += 1
            else:
                assert claimed == []
                seen["switch" if sure else "unsure"] += best != best_now
    assert min(seen.values()) > 50, seen


def test_what_makes_tables_less_comparable_is_said_first() -> None:
    device = Side(target="onnxruntime:cpu,threads=1", fingerprint="c" * 64, run_fingerprint={"driver": "2"})
    stale = tuple(
        dataclasses.replace(item, rows=tuple(dataclasses.replace(row, timing_valid=False) for row in item.rows))
        for item in table().batches
    )
    after = table(pair_id="sha256:2", device=device, link=Link(rtt_ms=5.0))
    comparison = compare_tables(table(), dataclasses.replace(after, batches=stale))

    text = "\n".join(comparison.remarks)
    for words in ("other pairs", "another target of the device", "driver '1', then '2'", "rtt_ms 0.0, then 5.0"):
        assert words in text
    assert "4 of 4 latencies were taken on another machine" in text
    assert all(item.stale for item in comparison.latencies)


def test_noise_alone_is_no_change() -> None:
    random = Random(0)
    for _ in range(200):
        noisy = {
            choice: (head_ms * random.uniform(0.995, 1.005), tail_ms * random.uniform(0.995, 1.005), size)
            for choice, (head_ms, tail_ms, size) in TIMES.items()
        }
        assert not compare_tables(table(), table(noisy)).is_changed


def test_a_tolerance_below_zero_is_refused() -> None:
    with pytest.raises(UsageError, match="tolerance is -1"):
        compare_tables(table(), table(), tolerance=-1)


def test_tables_without_a_batch_size_in_common_are_refused() -> None:
    with pytest.raises(UsageError, match=r"batches 1,2, the second 4: .* dsc-split bench BUNDLE --batches 1,2$"):
        compare_tables(table(batches=(1, 2)), table(batches=(4,)))


# ---- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A table, and a slower one."""
    paths = tmp_path / "a.json", tmp_path / "b.json"
    for path, made in zip(paths, (table(), table({**TIMES, 2: (100.0, 0.0, 0)})), strict=True):
        path.write_text(json.dumps(made.to_json()))
    return paths


def test_the_command_prints_a_plain_table_and_one_line_that_sums_it_up(
    files: tuple[Path, Path], dsc: Callable[..., Any]
) -> None:
    done = dsc("compare", *files)

    assert done.exit_code == 1
    assert done.stdout.splitlines() == [
        "side    graph        batch  before ms  after ms  change",
        "device  whole model      1  80 +- 0.8  100 +- 1  +25.0%  slower",
        "",
        "batch 1, no-offload gives way to a: at 3.846 MB/s (3.786 to 3.908) before, 2.778 MB/s (2.739 to 2.818) now",
        "",
        "1 slower, 3 of 4 latencies the same, 1 switch rate moved",
    ]
    document = json.loads(dsc("compare", *files, "--json").stdout)
    assert (document["slower"], document["counts"]["slower"]) == (True, 1)
    assert document["latencies"][1]["ratio"] == 1.25


@pytest.mark.parametrize(
    ("options", "turned", "exit_code"),
    [
        ((), False, 1),
        ((), True, 0),
        (("--fail-on", "change"), True, 1),
        (("--fail-on", "never"), False, 0),
        (("--tolerance", "0.5"), False, 0),
        (("--fail-on", "faster"), False, 2),
        (("--tolerance", "-1"), False, 2),
    ],
)
def test_the_exit_code_is_for_automatic_checks(
    files: tuple[Path, Path], dsc: Callable[..., Any], options: tuple[str, ...], turned: bool, exit_code: int
) -> None:
    before, after = reversed(files) if turned else files

    assert dsc("compare", before, after, *options).exit_code == exit_code


@pytest.mark.parametrize("fail_on", ["slower", "change", "never"])
def test_the_command_fails_where_nothing_can_be_compared(
    files: tuple[Path, Path], dsc: Callable[..., Any], fail_on: str
) -> None:
    files[1].write_text(json.dumps(table(batches=(2,)).to_json()))
    done = dsc("compare", *files, "--fail-on", fail_on)

    assert (done.exit_code, done.stdout) == (2, "")
    assert "the first table has batches 1, the second 2" in done.stderr
