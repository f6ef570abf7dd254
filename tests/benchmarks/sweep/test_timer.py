from __future__ import annotations

import gc
import time

import pytest

from dsc_split.benchmarks.sweep import _timer
from dsc_split.benchmarks.sweep._timer import time_calls, time_paced_calls, warm_up


class Clock:
    """A clock that moves only when something takes time."""

    def __init__(self) -> None:
        self.now_ns = 1_000_000_000

    def perf_counter_ns(self) -> int:
        return self.now_ns

    def sleep(self, seconds: float) -> None:
        self.now_ns += round(seconds * 1e9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(_timer, "time", fake)
    return fake


def test_every_call_is_timed_by_itself(clock: Clock) -> None:
    durations = iter([0.003, 0.001, 0.002])

    samples_ns = time_calls(lambda: clock.sleep(next(durations)), 3)

    assert samples_ns == [3_000_000, 1_000_000, 2_000_000]


def test_real_clock_sees_a_real_sleep() -> None:
    (sample_ns,) = time_calls(lambda: time.sleep(0.01), 1)

    assert sample_ns >= 10_000_000


def test_collector_is_off_meanwhile_and_on_afterwards() -> None:
    seen = []

    time_calls(lambda: seen.append(gc.isenabled()), 1)

    assert seen == [False]
    assert gc.isenabled()


def test_paced_calls_start_every_period(clock: Clock) -> None:
    starts = []

    def call() -> None:
        starts.append(clock.now_ns)
        clock.sleep(0.002)

    begin_ns = clock.now_ns
    samples_ns = time_paced_calls(call, 3, 10.0)

    assert [start - begin_ns for start in starts] == [10_000_000, 20_000_000, 30_000_000]
    assert samples_ns == [2_000_000] * 3


def test_late_call_skips_the_starts_it_missed(clock: Clock) -> None:
    starts, durations = [], iter([0.025, 0.001, 0.001])

    def call() -> None:
        starts.append(clock.now_ns)
        clock.sleep(next(durations))

    begin_ns = clock.now_ns
    time_paced_calls(call, 3, 10.0)

    assert [start - begin_ns for start in starts] == [10_000_000, 40_000_000, 50_000_000]


def test_warm_up_goes_on_until_two_windows_agree(clock: Clock) -> None:
    durations = iter([0.5, 0.1, 0.05, 0.05])

    result = warm_up(lambda: clock.sleep(next(durations)), 10_000)

    assert (result.calls, result.stable) == (4, True)
    assert result.call_ms == pytest.approx(50)
    assert result.busy_ms == pytest.approx(700)


def test_warm_up_that_never_settles_ends_in_time_but_calls_twice(clock: Clock) -> None:
    durations = iter([0.4, 0.2, 0.4, 0.2, 0.4, 0.2])

    result = warm_up(lambda: clock.sleep(next(durations)), 1000)
    assert (result.calls, result.stable) == (3, False)

    durations = iter([9.0, 5.0, 1.0])
    assert warm_up(lambda: clock.sleep(next(durations)), 1000).calls == 2


def test_short_calls_are_warmed_up_in_windows(clock: Clock) -> None:
    result = warm_up(lambda: clock.sleep(0.001), 1000)

    assert result.calls == 40
    assert result.stable


def test_what_comes_after_a_call_is_not_timed(clock: Clock) -> None:
    order: list[str] = []

    def call() -> None:
        order.append("call")
        clock.sleep(0.001)

    def after() -> None:
        order.append("after")
        clock.sleep(0.5)

    assert time_calls(call, 2, after=after) == [1_000_000] * 2
    assert time_paced_calls(call, 2, 10.0, after=after) == [1_000_000] * 2
    assert order == ["call", "after"] * 4


def test_warm_up_beside_a_compiler_lasts_until_three_windows_of_half_a_second_agree(clock: Clock) -> None:
    # Two windows of 30 ms agree before the kernel that was compiled meanwhile takes over at a third of the time.
    durations = iter([0.03] * 10 + [0.01] * 1000)

    result = warm_up(lambda: clock.sleep(next(durations)), 10_000, jit=True)

    assert result.stable
    assert result.call_ms == pytest.approx(10)
    assert result.busy_ms == pytest.approx(300 + 500)


def test_warm_up_beside_a_compiler_asks_for_three_long_calls(clock: Clock) -> None:
    assert warm_up(lambda: clock.sleep(0.4), 10_000, jit=True).calls == 3


def test_warm_up_beside_a_compiler_ends_in_time(clock: Clock) -> None:
    result = warm_up(lambda: clock.sleep(0.02), 100, jit=True)

    assert (result.calls, result.stable) == (5, False)
