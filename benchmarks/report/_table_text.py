"""A lookup table and its answers for the terminal (Rich), and as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from dsc_split.benchmarks.report._phrases import (
    DEFAULT_RATES_MB_S,
    emulation_text,
    link_text,
    number_text,
    percent_text,
    segments_text,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

    from dsc_split.lookup_table import LookupTable, Pick, TableContent

__all__ = [
    "CSV_COLUMNS",
    "choice_style",
    "columns",
    "fact_lines",
    "render_pick",
    "render_table",
    "table_csv",
]

_STYLES = ("green", "yellow", "magenta", "cyan", "red", "bright_green", "bright_magenta", "bright_cyan")
"""Styles of splits, used in turn; full offload and no offload have others."""
MAX_WIDTH = 160
"""Largest width of a grid, in characters, even if the output is wider."""

CSV_COLUMNS = (
    "batch",
    "id",
    "kind",
    "choice",
    "head_ms",
    "head_ci_low_ms",
    "head_ci_high_ms",
    "head_p95_ms",
    "tail_ms",
    "tail_ci_low_ms",
    "tail_ci_high_ms",
    "tail_p95_ms",
    "uplink_bytes",
    "downlink_bytes",
    "timing_valid",
    "best_from_mb_s",
    "best_below_mb_s",
)
"""Columns of :func:`table_csv`: one line per batch size and choice. A choice is the best from the data rate
``best_from_mb_s`` to below ``best_below_mb_s``, which may be ``inf``; both are empty if it is never the best."""


# ---- the table ---------------------------------------------------------------------------------------------


def render_table(
    table: LookupTable, *, rates_mb_s: Sequence[float] = DEFAULT_RATES_MB_S, width: int = 80
) -> RenderableType:
    """Show the best choice by batch size and data rate, with targets and link.

    Every field has the best choice and how much longer the next one takes; ``~`` marks a tie. If the names do not fit
    into ``width`` characters, the fields have ids; if these do not fit either, the data rates are spread over several
    grids, one below the other.
    """
    picks = [[table.pick(item.batch, rate) for rate in rates_mb_s] for item in table.batches]
    names = {choice.id: choice.name for choice in table.choices}
    grid = _grid(table, rates_mb_s, picks, names)
    width = min(width, MAX_WIDTH)
    by_id = _widest(grid) > width
    if by_id:
        names = {choice.id: f"#{choice.id}" for choice in table.choices}
        grid = _stacked_grids(table, rates_mb_s, picks, names, width)
    parts = [
        *fact_lines(table),
        Text(),
        Text("Best choice by batch size and data rate in MB/s, and how much longer the next one takes;"),
        Text("~ marks a tie: the difference is smaller than its uncertainty."),
        Text(),
        *grid,
        Text(),
        *_legend_lines(table, by_id=by_id),
        Text("Where the best choice changes:"),
        *columns([[Text(f"batch {item.batch}"), Text(segments_text(names, item.segments))] for item in table.batches]),
    ]
    stale = sum(not row.timing_valid for item in table.batches for row in item.rows)
    if stale:
        parts.append(Text(f"{stale} rows hold times of another machine: measure them again.", style="yellow"))
    return Group(*parts)


def _grid(
    table: LookupTable, rates_mb_s: Sequence[float], picks: list[list[Pick]], names: Mapping[int, str]
) -> list[Text]:
    head = [Text("batch", style="bold"), *(Text(number_text(rate), style="bold") for rate in rates_mb_s)]
    lines = [
        [
            Text(str(item.batch), style="bold"),
            *(Text(_field_text(pick, names), style=choice_style(table, pick.choice.id)) for pick in line),
        ]
        for item, line in zip(table.batches, picks, strict=True)
    ]
    return columns([head, *lines], right=range(1))


def _stacked_grids(
    table: LookupTable,
    rates_mb_s: Sequence[float],
    picks: list[list[Pick]],
    names: Mapping[int, str],
    width: int,
) -> list[Text]:
    """Spread the data rates over as few grids as fit into ``width``, one below the other."""
    lines: list[Text] = []
    for count in range(1, len(rates_mb_s) + 1):
        lines, share = [], math.ceil(len(rates_mb_s) / count)
        for start in range(0, len(rates_mb_s), share):
            part = slice(start, start + share)
            lines += [
                *([Text()] if lines else []),
                *_grid(table, rates_mb_s[part], [row[part] for row in picks], names),
            ]
        if _widest(lines) <= width:
            break
    return lines


def _widest(lines: Sequence[Text]) -> int:
    return max(line.cell_len for line in lines)


def columns(lines: Sequence[Sequence[Text]], *, right: Container[int] = ()) -> list[Text]:
    """Align the fields of lines in columns, with two spaces between and none at the end.

    Args:
        lines: The fields of each line; all lines have the same number.
        right: Columns to align to the right.
    """
    widths = [max(field.cell_len for field in column) for column in zip(*lines, strict=True)]
    result = []
    for line in lines:
        text = Text(overflow="fold")
        for i, (field, width) in enumerate(zip(line, widths, strict=True)):
            blanks = " " * (width - field.cell_len)
            text.append(blanks if i in right else "")
            text.append_text(field)
            text.append("" if i in right or i == len(line) - 1 else blanks)
            text.append("" if i == len(line) - 1 else "  ")
        text.rstrip()
        result.append(text)
    return result


def _field_text(pick: Pick, names: Mapping[int, str]) -> str:
    margin = f" {percent_text(pick.margin_ratio)}" if math.isfinite(pick.margin_ratio) else ""
    return f"{'~' if pick.tie else ''}{names[pick.choice.id]}{margin}"


def choice_style(table: TableContent, choice_id: int) -> str:
    splits = [choice.id for choice in table.choices if choice.kind == "split"]
    if choice_id in splits:
        return _STYLES[splits.index(choice_id) % len(_STYLES)]
    uses_server = any(choice.id == choice_id and choice.uses_server for choice in table.choices)
    return "bold blue" if uses_server else "bold"


def fact_lines(table: LookupTable) -> list[Text]:
    facts = [
        [Text("device"), Text(f"{table.device.target} [{table.device.fingerprint[:12]}]")],
        [Text("server"), Text(f"{table.server.target} [{table.server.fingerprint[:12]}]")],
        [Text("link"), Text(link_text(table))],
    ]
    if table.emulated is not None:
        facts.append([Text(word, style="bold yellow") for word in ("emulated", emulation_text(table))])
    return columns(facts)


def _legend_lines(table: LookupTable, *, by_id: bool) -> list[Text]:
    """Return lines about choices that are never the best or not measured; with ids, a line for every choice.

    The last line is empty; there are no lines if there is nothing to say.
    """
    best = {segment.choice for item in table.batches for segment in item.segments}
    measured = {row.choice for item in table.batches for row in item.rows}
    remarks = {
        choice.id: "" if choice.id in best else "never the best" if choice.id in measured else "not measured"
        for choice in table.choices
    }
    if by_id:
        lines = [
            [
                Text(f"#{choice.id}", style=choice_style(table, choice.id)),
                Text(choice.name, style=choice_style(table, choice.id)),
                Text(remarks[choice.id]),
            ]
            for choice in table.choices
        ]
        return [*columns(lines, right=range(1)), Text()]
    result = []
    for remark in ("never the best", "not measured"):
        names = [choice.name for choice in table.choices if remarks[choice.id] == remark]
        if names:
            result.append(Text(f"{remark.capitalize()}: {', '.join(names)}"))
    return [*result, Text()] if result else []


def table_csv(table: LookupTable) -> str:
    """Return the terms of every choice at every batch size as CSV, with :data:`CSV_COLUMNS`."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for item in table.batches:
        ranges: dict[int, tuple[float, float]] = {}
        start = 0.0
        for segment in item.segments:
            end = math.inf if segment.below_rate_mb_s is None else segment.below_rate_mb_s
            ranges[segment.choice] = (start, end)
            start = end
        for row in item.rows:
            choice = table.choice(row.choice)
            writer.writerow(
                [
                    item.batch,
                    choice.id,
                    choice.kind,
                    choice.name,
                    row.head_ms,
                    *(row.head_ci_ms or ("", "")),
                    row.head_p95_ms,
                    row.tail_ms,
                    *(row.tail_ci_ms or ("", "")),
                    row.tail_p95_ms,
                    row.uplink_bytes,
                    row.downlink_bytes,
                    "true" if row.timing_valid else "false",
                    *ranges.get(row.choice, ("", "")),
                ]
            )
    return file.getvalue()


# ---- one answer --------------------------------------------------------------------------------------------


def render_pick(pick: Pick) -> RenderableType:
    """Explain an answer: first a line with only the choice, then the reasons, all terms, and the switch rates."""
    table = pick.table
    parts = [
        Text(pick.choice.name, style=f"bold {choice_style(table, pick.choice.id)}"),
        Text(_state_text(pick)),
        Text(_margin_text(pick), style="yellow" if pick.tie else ""),
    ]
    if table.emulated is not None:
        parts.append(Text(f"Emulated: {emulation_text(table)}.", style="bold yellow"))
    if pick.state.percentile == 95:
        parts.append(Text(_P95_TEXT))
    if not pick.timing_valid:
        parts.append(Text("Its times were taken elsewhere; measure again: dsc-split bench BUNDLE", style="yellow"))
    names = {choice.id: choice.name for choice in table.choices}
    parts += [Text(), *_term_lines(pick), Text()]
    parts.append(Text(f"By data rate, all else as asked: {segments_text(names, pick.segments)}."))
    return Group(*parts)


_P95_TEXT = (
    "With the 95th percentiles of head and tail. Their sum is not the 95th percentile of the whole but a bound: at "
    "least 90 % of the requests keep it."
)


def _state_text(pick: Pick) -> str:
    given = (
        ("downlink", pick.state.downlink_rate_mb_s, "MB/s"),
        ("round trip", pick.state.rtt_ms, "ms"),
        ("server load", pick.state.server_load, "times"),
        ("queue", pick.state.queue_ms, "ms"),
    )
    extra = [f"{name} {number_text(value)} {unit}" for name, value, unit in given if value is not None]
    state = ", ".join([f"batch {pick.batch} at {number_text(pick.rate_mb_s)} MB/s", *extra])
    if pick.measured_batch != pick.batch:
        state += f" (not measured; with the times of batch {pick.measured_batch} and the bytes of batch {pick.batch})"
    return f"{state}: {number_text(pick.latency_ms)} ms."


def _margin_text(pick: Pick) -> str:
    if pick.runner_up is None:
        return "No other choice that is allowed can answer."
    name, share = pick.runner_up.name, pick.margin_ratio
    percent = f" ({percent_text(share).replace('%', ' %')})" if math.isfinite(share) else ""
    longer = f"takes {number_text(pick.margin_ms)} ms{percent} longer"
    if pick.state.percentile == 95:  # the confidence is that of the medians
        return f"{name}, the next one, {longer}."
    known = f"known with 95 % confidence to {number_text(pick.uncertainty_ms)} ms"
    if pick.tie:
        return f"A tie with {name}: it {longer}, which is {known}. Either may be faster."
    return f"{name}, the next one, {longer}; that is {known}."


def _term_lines(pick: Pick) -> list[Text]:
    """List the terms of every choice, without those that are 0 for all."""
    shown: list[tuple[str, str]] = [
        ("head", "head_ms"),
        ("uplink", "uplink_ms"),
        ("network", "network_ms"),
        ("queue", "queue_ms"),
        ("tail", "tail_ms"),
        ("downlink", "downlink_ms"),
    ]
    ranking = pick.ranking
    always = ("head_ms", "uplink_ms", "tail_ms")
    shown = [(name, key) for name, key in shown if key in always or any(getattr(item, key) for item in ranking)]
    heads = ("choice", "T ms", *(f"{name} ms" for name, _ in shown), "sends MB")
    lines = [[Text(head, style="bold") for head in heads]]
    best_ms = pick.latency_ms
    digits = 2 if best_ms >= 10.0 else 3 if best_ms >= 1.0 else 4
    for item in ranking:
        values = [item.latency_ms, *(getattr(item, key) for _, key in shown)]
        texts = [*(_time_text(value, digits) for value in values), number_text(item.uplink_bytes / 1e6)]
        weight = "bold" if item.choice == pick.choice else ""
        name = Text(item.choice.name, style=f"{weight} {choice_style(pick.table, item.choice.id)}")
        lines.append([name, *(Text(text, style=weight) for text in texts)])
    return columns(lines, right=range(1, len(heads)))


def _time_text(value_ms: float, digits: int) -> str:
    return "0" if value_ms == 0.0 else f"{value_ms:.{digits}f}"
