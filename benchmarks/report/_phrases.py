"""Texts about a lookup table that both the terminal and the pictures show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsc_split.lookup_table import LookupTable, Segment, TableContent

__all__ = [
    "DEFAULT_RATES_MB_S",
    "batch_text",
    "emulation_text",
    "link_text",
    "number_text",
    "percent_text",
    "segments_text",
]

DEFAULT_RATES_MB_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
"""The rates of the paper's figures, in MB/s."""


def number_text(value: float) -> str:
    """Format a number with four significant digits."""
    return f"{value:.0f}" if 1000 <= value < 1e7 else f"{value:.4g}"


def percent_text(ratio: float) -> str:
    """Format a ratio in percent; small ones with one decimal."""
    return f"{100 * ratio:.1f}%" if ratio < 0.0995 else f"{100 * ratio:.0f}%"


def batch_text(batch: int, measured_batch: int) -> str:
    """Describe a batch size, and the one whose times are used if it was not measured."""
    return f"batch {batch}" if batch == measured_batch else f"batch {batch} (times of batch {measured_batch})"


def emulation_text(table: TableContent) -> str:
    """Describe what was emulated and how, in one line; empty if nothing was."""
    if table.emulated is None or isinstance(table.emulated, str):
        return table.emulated or ""
    parts = []
    for side, what in table.emulated.items():
        if isinstance(what, Mapping):
            facts = [f"{key} {_value_text(what[key])}" for key in what if key not in ("how", "target")]
            how = f" ({what['how']})" if "how" in what else ""
            what = ", ".join(facts) + how
        parts.append(f"{side} {what}")
    return "; ".join(parts)


def _value_text(value: object) -> str:
    return number_text(value) if isinstance(value, float) else str(value)


def link_text(table: LookupTable) -> str:
    """Describe the cost of the link apart from the rate, and its source."""
    link = table.link
    parts = []
    if link.rtt_ms and link.round_trips:
        trips = f" x {number_text(link.round_trips)}" if link.round_trips != 1 else ""
        parts.append(f"round trip {number_text(link.rtt_ms)} ms{trips}")
    if link.c0_ms:
        parts.append(f"{number_text(link.c0_ms)} ms per request")
    if link.c1_ms_per_mb:
        parts.append(f"{number_text(link.c1_ms_per_mb)} ms per MB")
    if link.count_downlink:
        rate = link.downlink_rate_mb_s
        parts.append("way back counted" + (f" at {number_text(rate)} MB/s" if rate is not None else ""))
    return f"{link.source} ({', '.join(parts) or 'no cost but the data rate'})"


def segments_text(names: Mapping[int, str], segments: Sequence[Segment]) -> str:
    """Describe which choice is the best at which data rates; ``names`` are by id."""
    if len(segments) == 1:
        return f"{names[segments[0].choice]} at every rate"
    parts = [
        f"{names[segment.choice]} below {segment.below_rate_mb_s:.3g} MB/s"
        for segment in segments
        if segment.below_rate_mb_s is not None
    ]
    return f"{', '.join(parts)}, then {names[segments[-1].choice]}"
