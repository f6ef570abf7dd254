"""The timer: it reads the clock right before and right after each call."""

from __future__ import annotations

import contextlib
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

__all__ = [
    "ROUND_MS",
    "TIMER",
    "WarmUp",
    "count_calls",
    "time_calls",
    "time_paced_calls",
    "warm_up",
    "warm_up_limit_ms",
]

TIMER = "time.perf_counter_ns around the bound call; garbage collection off"
"""Recorded with every cell."""

ROUND_MS = 50.0
"""A round has as many calls as fit into this time, but at least one."""
MAX_CALLS = 200
"""A round has at most this many calls, because every one is stored."""
MAX_PACED_ROUND_MS = 500.0
"""A round of paced calls lasts at most about this long."""
MAX_WARM_UP_MS = 2000.0
"""A warm-up takes at most this long; two calls are made in any case."""
WINDOW_NS = 20_000_000
"""The calls of one warm-up window last at least this long together."""
AGREEMENT = 0.05
"""Windows agree if their means differ from that of the last window by at most this share."""
WINDOWS, JIT_WINDOWS = 2, 3
"""Number of windows that have to agree; the second is for libraries that compile while they run."""
JIT_SPAN_NS = 500_000_000
"""For those, the windows last at least this long together, so that newly compiled kernels are in use."""


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """How a warm-up went."""

    calls: int
    """Calls that were made; none of them is a sample."""
    busy_ms: float
    """Total milliseconds of these calls."""
    call_ms: float
    """Mean of the last window."""
    stable: bool
    """Whether the last windows agreed before the time limit."""


def count_calls(call_ms: float, period_ms: float | None) -> int:
    """Return how many calls a round has.

    Args:
        call_ms: Milliseconds that one call takes.
        period_ms: Milliseconds between the starts of two calls; ``None``: each starts right after the last.
    """
    count = max(1, min(MAX_CALLS, round(ROUND_MS / call_ms)))
    if period_ms is not None:
        count = max(1, min(count, round(MAX_PACED_ROUND_MS / period_ms)))
    return count


def warm_up_limit_ms(time_limit_s: float) -> float:
    """Return the longest warm-up in milliseconds for a cell's time limit in seconds."""
    return min(MAX_WARM_UP_MS, 250.0 * time_limit_s)


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Turn garbage collection off while the block runs."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def time_calls(call: Callable[[], object], count: int, *, after: Callable[[], object] | None = None) -> list[int]:
    """Time ``count`` calls in a row; return nanoseconds.

    Args:
        call: The bare call.
        count: Number of calls.
        after: Called after each call, outside the measured time.
    """
    clock = time.perf_counter_ns
    samples_ns = [0] * count
    with no_garbage_collection():
        for index in range(count):
            start_ns = clock()
            call()
            samples_ns[index] = clock() - start_ns
            if after is not None:
                after()
    return samples_ns


def time_paced_calls(
    call: Callable[[], object], count: int, period_ms: float, *, after: Callable[[], object] | None = None
) -> list[int]:
    """Time calls that start every ``period_ms``, as with a camera; return nanoseconds.

    The first call starts after one whole period of rest. If a call is late, the missed starts are skipped.

    Args:
        call: The bare call.
        count: Number of calls.
        period_ms: Milliseconds between two starts.
        after: Called after each call, outside the measured time.
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
            if after is not None:
                after()
    return samples_ns


def warm_up(call: Callable[[], object], limit_ms: float, *, jit: bool = False) -> WarmUp:
    """Call until the last windows of calls have about the same mean, or the time is over; at least twice.

    Two windows are enough if everything was compiled in advance. A library that compiles while it runs switches to
    faster kernels when they are ready; then it takes three windows that last half a second together.

    Args:
        call: The bare call.
        limit_ms: Milliseconds allowed; only the calls count.
        jit: Whether the library may compile while it runs.
    """
    calls, busy_ns = 0, 0
    windows: list[tuple[int, float]] = []
    while True:
        window: list[int] = []
        while not window or sum(window) < WINDOW_NS:
            window += time_calls(call, 1)
        calls += len(window)
        busy_ns += sum(window)
        mean_ns = statistics.fmean(window)
        windows.append((sum(window), mean_ns))
        stable = _agree(windows, JIT_WINDOWS, JIT_SPAN_NS) if jit else _agree(windows, WINDOWS, 0)
        if stable or (len(windows) > 1 and busy_ns >= limit_ms * 1e6):
            return WarmUp(calls=calls, busy_ms=busy_ns / 1e6, call_ms=mean_ns / 1e6, stable=stable)


def _agree(windows: list[tuple[int, float]], at_least: int, span_ns: int) -> bool:
    """Return whether the last ``at_least`` windows, of ``span_ns`` together, have about the same mean."""
    _, last_ns = windows[-1]
    agreeing = list(
        itertools.takewhile(lambda window: abs(window[1] - last_ns) <= AGREEMENT * last_ns, reversed(windows))
    )
    return len(agreeing) >= at_least and sum(length_ns for length_ns, _ in agreeing) >= span_ns
