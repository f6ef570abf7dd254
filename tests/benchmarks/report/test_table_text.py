import csv
import io
from collections import Counter
from dataclasses import replace

import pytest
from rich.console import Console, RenderableType
from tests.support.paths import GOLDEN

from dsc_split.benchmarks.report._table_text import CSV_COLUMNS, render_pick, render_table, table_csv
from dsc_split.lookup_table import Choice, Link, LookupTable


def golden() -> LookupTable:
    return LookupTable.load(GOLDEN)


def printed(renderable: RenderableType, *, width: int = 300, terminal: bool = False) -> str:
    console = Console(
        file=io.StringIO(), width=width, force_terminal=terminal, color_system="standard" if terminal else None
    )
    console.print(renderable)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]  # it is the StringIO above
    return text


def named(table: LookupTable, name: str) -> LookupTable:
    choices = (table.choices[0], Choice(id=1, kind="split", name=name), table.choices[2])
    return replace(table, choices=choices)


def test_every_field_has_the_best_choice_and_its_margin() -> None:
    text = printed(render_table(golden(), rates_mb_s=[2, 8, 40], width=160))
    lines = [line.split("  ") for line in text.splitlines() if line.lstrip().startswith(("1 ", "8 "))]

    # batch 1 at 2 MB/s: local 60, split 103; at 8: split 46.75, local 60; at 40: full 25, split 31.75
    assert [field.strip() for field in lines[0] if field.strip()] == [
        "1",
        "no-offload 72%",
        "features.4.0 28%",
        "full-offload 27%",
    ]
    assert [field.strip() for field in lines[1] if field.strip()][1].startswith("features.4.0")


def test_nothing_is_cut_off_where_the_terminal_is_narrow() -> None:
    table = named(golden(), "a_module.of_a.deep_network")
    wide, narrow = (printed(render_table(table, width=width), width=width) for width in (160, 40))

    assert "#1 28%" in wide
    assert max(map(len, narrow.splitlines())) <= 40
    assert Counter(wide.split()) - Counter(narrow.split()) == Counter()


def test_a_tie_is_marked() -> None:
    text = printed(render_table(golden(), rates_mb_s=[4.7, 8], width=160))

    assert "~features.4.0 0.1%" in text
    assert "~features.4.0 28%" not in text


def test_a_single_choice_has_no_margin() -> None:
    table = golden()
    lone = replace(table.batches[2], rows=table.batches[2].rows[:1])
    lone = replace(lone, segments=(table.batches[2].segments[-1],))
    text = printed(render_table(replace(table, batches=(lone,)), rates_mb_s=[1], width=80))

    assert "    8  full-offload\n" in text


def test_emulation_targets_and_link_are_said() -> None:
    text = printed(render_table(golden(), width=160))

    assert "emulated  device slowdown 6 (statistics multiplied by 6; raw samples are as measured)" in text
    assert "onnxruntime:cpu,threads=1,slowdown=6 [dddddddddddd]" in text
    assert "paper (no cost but the data rate)" in text
    assert "emulated" not in printed(render_table(replace(golden(), emulated=None), width=160))


def test_what_the_link_costs_is_said() -> None:
    link = Link(
        c0_ms=0.5,
        c1_ms_per_mb=2.0,
        rtt_ms=20.0,
        round_trips=2.0,
        count_downlink=True,
        downlink_rate_mb_s=40.0,
        source="calibrated",
    )
    text = printed(render_table(replace(golden(), link=link), width=160))

    expected = "calibrated (round trip 20 ms x 2, 0.5 ms per request, 2 ms per MB, way back counted at 40 MB/s)"
    assert expected in text


def test_exact_switch_rates_stand_below_the_grid() -> None:
    text = printed(render_table(golden(), width=160))

    assert "batch 1  no-offload below 4.69 MB/s, features.4.0 below 25 MB/s, then full-offload\n" in text
    assert "batch 8  features.4.0 below 29 MB/s, then full-offload\n" in text


def test_names_that_do_not_fit_give_way_to_ids_and_no_grid_line_is_cut() -> None:
    table = named(golden(), "a_very_long_module_path." * 3 + "end")
    wide = printed(render_table(table, width=80), width=80)
    lines = wide.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("batch"))
    grid = lines[head + 1 : head + 4]

    assert [line.split()[0] for line in grid] == ["1", "4", "8"]
    assert all(len(line) <= 80 for line in grid)
    assert "#1 28%" in wide
    assert "#1  a_very_long_module_path." in wide


def test_no_line_ends_in_blanks_and_a_pipe_gets_no_colours() -> None:
    text = printed(render_table(golden(), width=160))

    assert "\x1b" not in text
    assert [line for line in text.splitlines() if line != line.rstrip()] == []
    assert "\x1b" in printed(render_table(golden(), width=160), terminal=True)


def test_choices_that_are_never_the_best_or_not_measured_are_told_apart() -> None:
    first = golden().batches[0]
    table = replace(golden(), batches=(replace(first, rows=first.rows[1:], segments=first.segments[:1]),))

    names = printed(render_table(table, rates_mb_s=[2], width=160))
    assert "\n\nNever the best: features.4.0\nNot measured: full-offload\n\n" in names
    assert "#" not in names

    ids = printed(render_table(named(table, "a_very_long_module_path." * 3 + "end"), width=80))
    assert "#0  full-offload" in ids
    assert ids.count("not measured\n") == 1
    assert ids.count("never the best\n") == 1
    assert ids.count("#2  no-offload\n") == 1


def test_names_alone_need_no_legend() -> None:
    text = printed(render_table(golden(), rates_mb_s=[2, 8], width=160))

    assert "#" not in text
    assert "ever the best" not in text
    assert "\n\n\n" not in text


def test_times_of_another_machine_are_pointed_out() -> None:
    table = golden()
    stale = replace(table.batches[0], rows=tuple(replace(row, timing_valid=False) for row in table.batches[0].rows))

    text = printed(render_table(replace(table, batches=(stale, *table.batches[1:])), width=160))

    assert "3 rows hold times of another machine" in text


def test_csv_has_every_term_and_the_range_in_which_a_choice_is_the_best() -> None:
    rows = list(csv.DictReader(io.StringIO(table_csv(golden()))))

    assert tuple(rows[0]) == CSV_COLUMNS
    assert [(row["batch"], row["choice"]) for row in rows[:3]] == [
        ("1", "full-offload"),
        ("1", "features.4.0"),
        ("1", "no-offload"),
    ]
    assert (rows[1]["head_ms"], rows[1]["tail_ci_low_ms"], rows[1]["uplink_bytes"]) == ("20.0", "7.6", "150000")
    assert float(rows[1]["best_from_mb_s"]) == pytest.approx(4.6875)
    assert float(rows[1]["best_below_mb_s"]) == pytest.approx(25.0)
    assert (rows[2]["best_from_mb_s"], rows[0]["best_below_mb_s"]) == ("0.0", "inf")
    assert len(rows) == 8


def test_a_pick_names_the_choice_on_the_first_line_and_explains_it() -> None:
    text = printed(render_pick(golden().pick(1, 8.0, queue_ms=1.0, rtt_ms=2.0)))
    lines = text.splitlines()

    assert lines[0] == "features.4.0"
    assert lines[1] == "batch 1 at 8 MB/s, round trip 2 ms, queue 1 ms: 49.75 ms."
    assert lines[2] == (
        "no-offload, the next one, takes 10.25 ms (21 %) longer; that is known with 95 % confidence to 1.581 ms."
    )
    assert lines[3] == "Emulated: device slowdown 6 (statistics multiplied by 6; raw samples are as measured)."
    assert lines[5].split("  ")[0] == "choice"
    assert "network ms" in lines[5]
    assert "downlink ms" not in lines[5]
    assert lines[6].split() == ["features.4.0", "49.75", "20.00", "18.75", "2.00", "1.00", "8.00", "0.15"]
    assert "By data rate, all else as asked: no-offload below 5.17 MB/s" in text


def test_a_pick_that_is_a_tie_says_so() -> None:
    text = printed(render_pick(golden().pick(1, 4.7)))

    assert "A tie with no-offload: it takes 0.08511 ms (0.1 %) longer, which is known with 95 %" in text


def test_a_pick_without_alternative_says_so() -> None:
    text = printed(render_pick(golden().pick(1, 0.0)))

    assert "No other choice that is allowed can answer." in text
    assert "inf" in text


def test_a_pick_of_a_batch_in_between_names_the_batch_whose_times_it_uses() -> None:
    text = printed(render_pick(golden().pick(3, 8.0)))

    assert "batch 3 at 8 MB/s (not measured; with the times of batch 4 and the bytes of batch 3): " in text
