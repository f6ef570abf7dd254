"""What a reader must know about a cell before trusting its times: the GPU was throttled, or its clock moved."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsc_split.benchmarks.cells._cells import Cell

__all__ = ["describe_marks", "find_marks"]

HARMLESS_REASONS = ("gpu_idle", "applications_clocks_setting", "display_clock_setting")
"""Reasons for a clock below the highest that are no throttling: idle, or somebody's wish."""
STEADY = 0.1
"""A clock ramps where a reading differs from the median of all by more than this share."""


def find_marks(states: Iterable[Mapping[str, Any]], locked_mhz: int | None = None) -> list[str]:
    """List what was wrong with the GPU, in words.

    Args:
        states: Readings of the GPU, as ``gpu_state`` gives them, the first one after the warm-up.
        locked_mhz: What the SM clock was locked at; ``None`` where it was not.
    """
    states = list(states)
    reasons = dict.fromkeys(reason for state in states for reason in state.get("throttle_reasons", ()))
    marks = [f"throttled: {reason}" for reason in reasons if reason not in HARMLESS_REASONS]
    clocks_mhz = [state["sm_clock_mhz"] for state in states if "sm_clock_mhz" in state]
    if not clocks_mhz:
        return marks
    median_mhz = statistics.median(clocks_mhz)
    if not _is_near(clocks_mhz, median_mhz):
        marks.append(f"clock ramping: {min(clocks_mhz):g} to {max(clocks_mhz):g} MHz")
    if locked_mhz is not None and not _is_near([median_mhz], locked_mhz):
        marks.append(f"clock not as locked: {median_mhz:g} MHz instead of {locked_mhz} MHz")
    return marks


def describe_marks(marked: Sequence[Cell], total: int) -> str:
    """Count the marked cells among ``total``, with their marks, in one sentence without its full stop."""
    marks = ", ".join(dict.fromkeys(mark for cell in marked for mark in cell.marks))
    return f"{len(marked)} of {total} cells were timed while the GPU was not steady ({marks})"


def _is_near(clocks_mhz: Sequence[float], expected_mhz: float) -> bool:
    return all(abs(clock_mhz - expected_mhz) <= STEADY * expected_mhz for clock_mhz in clocks_mhz)
