"""The timer: the clock around the bare call, and nothing else in between."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

__all__ = ["TIMER", "WarmUp", "time_calls", "time_paced_calls", "warm_up"]

TIMER = "time.perf_counter_ns around the bound call; garbage collection off"
"""What is recorded with every cell."""

WINDOW_NS = 20_000_000
"""Calls of one warm-up window last at least this long together, or are one call."""
AGREEMENT = 0.05
"""Warm-up ends when the means of two windows in a row differ by at most this share."""


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """How a warm-up went."""

    calls: int
    """Calls that were made; none of them is a sample."""
    busy_ms: float
    """Milliseconds they took together."""
    call_ms: float
    """Mean of the last window."""
    stable: bool
    """Whether the last two windows agreed, before the time allowed was over."""


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keep the collector from running between two readings of the clock."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def time_calls(call: Callable[[], object], count: int) -> list[int]:
    """Time ``count`` calls in a row; returns nanoseconds."""
    clock = time.perf_counter_ns
    samples_ns = [0] * count
    with no_garbage_collection():
        for index in range(count):
            start_ns = clock()
            call()
            samples_ns[index] = clock() - start_ns
    return samples_ns


def time_paced_calls(call: Callable[[], object], count: int, period_ms: float) -> list[int]:
    """Time calls that start every ``period_ms``, as a camera would ask; returns nanoseconds.

    The first call starts after one whole period of rest. A call that is late skips the starts it has missed.
    """
    clock = time.perf_counter_ns
    period_ns = max(1, round(period_ms * 1e6))
    samples_ns = [0] * count
    with no_garbage_collection():
        due_ns = clock() + period_ns
        for index in range(count):
            now_ns = clock()
            if now_ns > due_ns:
                due_ns += -((due_ns - now_ns) // period_ns) * period_ns
            while (wait_ns := due_ns - clock()) > 0:
                time.sleep(wait_ns / 1e9)
            start_ns = clock()
            call()
            samples_ns[index] = clock() - start_ns
            due_ns += period_ns
    return samples_ns


def warm_up(call: Callable[[], object], limit_ms: float) -> WarmUp:
    """Call until two windows of calls agree in their means, or the time allowed is over; at least twice."""
    calls, busy_ns, before_ns = 0, 0, 0.0
    while True:
        window: list[int] = []
        while not window or sum(window) < WINDOW_NS:
            window += time_calls(call, 1)
        calls += len(window)
        busy_ns += sum(window)
        mean_ns = statistics.fmean(window)
        stable = abs(mean_ns - before_ns) <= AGREEMENT * mean_ns
        if stable or (before_ns and busy_ns >= limit_ms * 1e6):
            return WarmUp(calls=calls, busy_ms=busy_ns / 1e6, call_ms=mean_ns / 1e6, stable=stable)
        before_ns = mean_ns
