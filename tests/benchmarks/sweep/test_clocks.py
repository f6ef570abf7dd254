"""The locked clock: it is unlocked however the run ends. The guard is a real process, NVML a pretended one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from tests.support.children import children_with

from dsc_split.benchmarks.sweep._clocks import locked_clocks
from dsc_split.errors import BackendError, BackendUnavailable, UsageError

HOLD = """
import time
from dsc_split.benchmarks.sweep._clocks import locked_clocks
with locked_clocks(300):
    print("locked", flush=True)
    time.sleep(60)
"""


def wait_until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def guards() -> list[psutil.Process]:
    mine = psutil.Process().children(recursive=True)
    return [process for process in children_with("ClockGuard") if process in mine]


def test_nothing_is_started_where_nothing_is_to_be_locked(gpu: Any) -> None:
    with locked_clocks(None):
        assert guards() == []


def test_clock_is_locked_inside_the_block_alone(gpu: Any) -> None:
    with locked_clocks(300):
        assert gpu.locked == [300, 300]
    assert gpu.locked is None
    assert guards() == []


def test_clock_is_unlocked_after_an_error(gpu: Any) -> None:
    with pytest.raises(ZeroDivisionError), locked_clocks(300):
        raise ZeroDivisionError
    assert gpu.locked is None


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_clock_is_unlocked_after_a_signal(gpu: Any, number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        assert gpu.locked == [300, 300]
        process.send_signal(number)

    wait_until(lambda: gpu.locked is None)


def test_ctrl_c_for_the_whole_terminal_does_not_reach_the_guard(gpu: Any) -> None:
    with locked_clocks(300):
        (guard,) = guards()
        assert os.getpgid(guard.pid) != os.getpgid(0)
        guard.send_signal(signal.SIGTERM)
        guard.send_signal(signal.SIGINT)
        time.sleep(0.1)
        assert gpu.locked == [300, 300]
    assert gpu.locked is None


def test_guard_that_was_killed_is_stood_in_for(gpu: Any, caplog: pytest.LogCaptureFixture) -> None:
    with locked_clocks(300):
        (guard,) = guards()
        guard.kill()
    assert gpu.locked is None
    assert "ended with status -9" in caplog.text


@pytest.mark.parametrize(
    ("mhz", "errors", "error", "words"),
    [
        (9000, {}, UsageError, "300 to 2100 MHz"),
        (300, {"nvmlInit": 12}, BackendUnavailable, "NVML Shared Library Not Found"),
        (300, {"nvmlDeviceSetGpuLockedClocks": 4}, BackendError, "Only root may"),
    ],
)
def test_clock_that_cannot_be_locked_is_refused_before_the_block_runs(
    gpu: Any, mhz: int, errors: dict[str, int], error: type[Exception], words: str
) -> None:
    gpu.change(errors=errors)

    with pytest.raises(error, match=words), locked_clocks(mhz):
        pytest.fail("the block ran")
    assert gpu.locked is None
    assert guards() == []


def test_clock_that_cannot_be_unlocked_is_an_error_that_says_what_to_do(gpu: Any) -> None:
    with pytest.raises(BackendError, match="sudo nvidia-smi --reset-gpu-clocks"), locked_clocks(300):
        gpu.change(errors={"nvmlDeviceResetGpuLockedClocks": 4})
    gpu.change(locked=None)
