"""The timer: the clock around the bare call, and nothing else in between."""

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
"""What is recorded with every cell."""

ROUND_MS = 50.0
"""A round has as many calls as fit into this time, and at least one."""
MAX_CALLS = 200
"""A round has at most this many calls: every one of them is stored."""
MAX_PACED_ROUND_MS = 500.0
"""A round of paced calls lasts about this long at most."""
MAX_WARM_UP_MS = 2000.0
"""A warm-up takes this long at most, two calls excepted."""
WINDOW_NS = 20_000_000
"""Calls of one warm-up window last at least this long together, or are one call."""
AGREEMENT = 0.05
"""Warm-up ends when the means of the last windows differ from that of the very last by at most this share."""
WINDOWS, JIT_WINDOWS = 2, 3
"""So many windows have to agree; the second number holds where the library may still be compiling."""
JIT_SPAN_NS = 500_000_000
"""They last at least this long together, then: a kernel that was compiled meanwhile takes over within it."""


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


def count_calls(call_ms: float, period_ms: float | None) -> int:
    """Return how many calls a round has.

    Args:
        call_ms: Milliseconds that one call takes.
        period_ms: Milliseconds between the starts of two calls; ``None`` where they follow at once.
    """
    count = max(1, min(MAX_CALLS, round(ROUND_MS / call_ms)))
    if period_ms is not None:
        count = max(1, min(count, round(MAX_PACED_ROUND_MS / period_ms)))
    return count


def warm_up_limit_ms(time_limit_s: float) -> float:
    """Return the milliseconds that a warm-up may take, two calls excepted, for a cell's time limit in seconds."""
    return min(MAX_WARM_UP_MS, 250.0 * time_limit_s)


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


def time_calls(call: Callable[[], object], count: int, *, after: Callable[[], object] | None = None) -> list[int]:
    """Time ``count`` calls in a row; returns nanoseconds.

    Args:
        call: The bare call.
        count: Number of calls.
        after: Called after each call, when the clock has been read.
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
    """Time calls that start every ``period_ms``, as a camera would ask; returns nanoseconds.

    The first call starts after one whole period of rest. A call that is late skips the starts it has missed.

    Args:
        call: The bare call.
        count: Number of calls.
        period_ms: Milliseconds between two starts.
        after: Called after each call, when the clock has been read.
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
    """Call until the last windows of calls agree in their means, or the time allowed is over; at least twice.

    Two windows are enough where everything was compiled beforehand. A library that compiles while it runs puts
    faster kernels in place as they become ready: then three windows that last half a second together are asked for.

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
    """Tell whether so many of the last windows, of so long together, have about the same mean."""
    _, last_ns = windows[-1]
    agreeing = list(
        itertools.takewhile(lambda window: abs(window[1] - last_ns) <= AGREEMENT * last_ns, reversed(windows))
    )
    return len(agreeing) >= at_least and sum(length_ns for length_ns, _ in agreeing) >= span_ns
