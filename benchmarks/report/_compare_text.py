"""A comparison of two lookup tables for the terminal (Rich)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from dsc_split.benchmarks.report._phrases import number_text
from dsc_split.benchmarks.report._table_text import columns

if TYPE_CHECKING:
    from rich.console import RenderableType

    from dsc_split.benchmarks.tables._compare import Comparison, LatencyChange

__all__ = ["render_comparison", "summary_text"]

_STYLES = {"slower": "red", "faster": "green", "gone": "red", "new": "yellow"}


def render_comparison(comparison: Comparison) -> RenderableType:
    """Show what changed: remarks, latencies, choices, switch rates, and a summary in one line."""
    parts = [Text(remark, style="yellow") for remark in comparison.remarks]
    changed = [item for item in comparison.latencies if item.change != "same"]
    if changed:
        heads = ("side", "graph", "batch", "before ms", "after ms", "change", "")
        lines = [[Text(head, style="bold") for head in heads], *map(_latency_line, changed)]
        parts += [*_blank_line(parts), *columns(lines, right=(2, 3, 4, 5))]
    for text in _choice_texts(comparison):
        parts.append(Text(text))
    return Group(*parts, *_blank_line(parts), Text(summary_text(comparison), style="bold"))


def summary_text(comparison: Comparison) -> str:
    """Summarise a comparison in one line."""
    counts = comparison.counts
    same = counts.pop("same")
    parts = [f"{count} {change}" for change, count in counts.items() if count]
    parts.append(f"{same} of {len(comparison.latencies)} latencies the same")
    for count, one, more in (
        (len(comparison.choices), "choice changed", "choices changed"),
        (len(comparison.switches), "switch rate moved", "switch rates moved"),
    ):
        parts += [f"{count} {one if count == 1 else more}"] * bool(count)
    for word, batches in (("gone", comparison.batches_gone), ("new", comparison.batches_new)):
        parts += [f"batch {', '.join(map(str, batches))} {word}"] * bool(batches)
    return ", ".join(parts)


def _blank_line(parts: list[Text]) -> list[Text]:
    return [Text()] if parts else []


def _latency_line(item: LatencyChange) -> list[Text]:
    style = _STYLES[item.change]
    ratio = "" if item.ratio is None else f"{100 * (item.ratio - 1):+.1f}%"
    times = (_time_text(item.before_ms, item.before_ci_ms), _time_text(item.after_ms, item.after_ci_ms))
    stale = " (stale)" if item.stale else ""
    words = (item.side, item.graph, str(item.batch), *times, ratio, item.change + stale)
    return [*(Text(word) for word in words[:5]), *(Text(word, style=style) for word in words[5:])]


def _time_text(median_ms: float | None, interval_ms: tuple[float, float] | None) -> str:
    if median_ms is None:
        return "-"
    if interval_ms is None:
        return number_text(median_ms)
    return f"{number_text(median_ms)} +- {number_text((interval_ms[1] - interval_ms[0]) / 2)}"


def _choice_texts(comparison: Comparison) -> Iterator[str]:
    if comparison.choices or comparison.switches:
        yield ""
    for item in comparison.choices:
        end = "up" if item.below_rate_mb_s is None else f"to {number_text(item.below_rate_mb_s)}"
        start = number_text(item.from_rate_mb_s)
        yield f"batch {item.batch}, {start} MB/s {end}: {item.before} was the best, now {item.after}"
    for moved in comparison.switches:
        yield (
            f"batch {moved.batch}, {moved.below} gives way to {moved.above}: at "
            f"{_rate_text(moved.before_mb_s, moved.before_range_mb_s)} before, "
            f"{_rate_text(moved.after_mb_s, moved.after_range_mb_s)} now"
        )


def _rate_text(rate_mb_s: float, allowed_mb_s: tuple[float, float]) -> str:
    low, high = (number_text(value) if math.isfinite(value) else "no end" for value in allowed_mb_s)
    return f"{number_text(rate_mb_s)} MB/s ({low} to {high})"
