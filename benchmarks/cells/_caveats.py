"""Marks of a cell whose times are doubtful: the GPU was throttled, or its clock moved."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsc_split.benchmarks.cells._cells import Cell

__all__ = ["describe_marks", "find_marks"]

HARMLESS_REASONS = ("gpu_idle", "applications_clocks_setting", "display_clock_setting")
"""Reasons for a lower clock that are no throttling: the GPU is idle, or somebody set its clock."""
STEADY = 0.1
"""A clock is steady if all readings are within this share of their median."""


def find_marks(states: Iterable[Mapping[str, object]], locked_mhz: int | None = None) -> list[str]:
    """List what was wrong with the GPU, in words: ``throttled: sw_thermal_slowdown``.

    Args:
        states: Results of ``gpu_state``, the first one from after the warm-up.
        locked_mhz: The locked SM clock; ``None`` if it was not locked.
    """
    states = list(states)
    listed = [state.get("throttle_reasons") for state in states]
    reasons = dict.fromkeys(reason for part in listed if isinstance(part, (list, tuple)) for reason in part)
    marks = [f"throttled: {reason}" for reason in reasons if reason not in HARMLESS_REASONS]
    clocks_mhz = [clock for state in states if isinstance(clock := state.get("sm_clock_mhz"), (int, float))]
    if not clocks_mhz:
        return marks
    median_mhz = statistics.median(clocks_mhz)
    if not _is_near(clocks_mhz, median_mhz):
        marks.append(f"clock ramping: {min(clocks_mhz):g} to {max(clocks_mhz):g} MHz")
    if locked_mhz is not None and not _is_near([median_mhz], locked_mhz):
        marks.append(f"clock not as locked: {median_mhz:g} MHz instead of {locked_mhz} MHz")
    return marks


def describe_marks(marked: Sequence[Cell], total: int) -> str:
    """Return a sentence, without its full stop, about the marked cells among ``total``."""
    marks = ", ".join(dict.fromkeys(mark for cell in marked for mark in cell.marks))
    return f"{len(marked)} of {total} cells were timed while the GPU was not steady ({marks})"


def _is_near(clocks_mhz: Sequence[float], expected_mhz: float) -> bool:
    return all(abs(clock_mhz - expected_mhz) <= STEADY * expected_mhz for clock_mhz in clocks_mhz)
