from __future__ import annotations

from typing import Any

import pytest

from dsc_split.benchmarks.cells._caveats import find_marks


def states(*clocks_mhz: float, reasons: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    return [{"sm_clock_mhz": clock_mhz, "throttle_reasons": list(reasons)} for clock_mhz in clocks_mhz]


def test_steady_gpu_has_no_marks() -> None:
    assert find_marks(states(1500, 1485, 1515, 1500)) == []


@pytest.mark.parametrize("readings", [[], [{}], [{"unreadable": "no driver"}], [{"gpu": "Orin"}]])
def test_device_that_does_not_tell_has_no_marks(readings: list[dict[str, Any]]) -> None:
    assert find_marks(readings, locked_mhz=300) == []


def test_one_throttled_reading_marks_the_cell_once_per_reason() -> None:
    readings = states(1500) + states(1500, 1500, reasons=("sw_thermal_slowdown", "sw_power_cap"))

    assert find_marks(readings) == ["throttled: sw_thermal_slowdown", "throttled: sw_power_cap"]


def test_idle_and_wished_for_clocks_are_no_throttling() -> None:
    assert find_marks(states(300, reasons=("gpu_idle", "applications_clocks_setting", "display_clock_setting"))) == []


def test_clock_that_moves_is_marked_with_its_range() -> None:
    assert find_marks(states(300, 1500, 1500)) == ["clock ramping: 300 to 1500 MHz"]
    assert find_marks(states(1500, 1500, 1651)) == ["clock ramping: 1500 to 1651 MHz"]


def test_clock_that_does_not_keep_its_lock_is_marked() -> None:
    assert find_marks(states(300, 300, 300), locked_mhz=300) == []
    assert find_marks(states(1500, 1500), locked_mhz=300) == ["clock not as locked: 1500 MHz instead of 300 MHz"]
