"""Read power mode, clocks, temperature and throttling of a Jetson from system files: NVML does not report them there.

``root`` is the root folder of the system. Values that cannot be read are left out.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

__all__ = ["first_line", "jetson_facts", "jetson_state", "power_mode"]

SYSTEM = Path("/")

GPU_CLOCK = re.compile(r"gpu|\.g[a-z]\d+b$")
"""Name of the GPU's folder under ``/sys/class/devfreq``: ``17000000.gpu``, ``17000000.ga10b``, ``gpu-gpc-0``."""


def first_line(path: Path) -> str | None:
    """Return the first line of a system file; ``None`` where it cannot be read."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return None
    lines = text.replace("\0", "").strip().splitlines()
    return lines[0].strip() if lines else None


def power_mode(root: Path = SYSTEM) -> str | None:
    """Return the power mode from nvpmodel's files or output, ``MODE_15W (0002)``; ``None`` on other machines."""
    status = first_line(root / "var/lib/nvpmodel/status")
    if status is None:
        return _nvpmodel_power_mode()
    number = status.removeprefix("pmode:")
    if not number.isdigit():
        return status
    for line in _read_lines(root / "etc/nvpmodel.conf"):
        match = re.search(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)", line)
        if match and int(match[1]) == int(number):
            return f"{match[2]} ({number})"
    return status


def jetson_state(root: Path = SYSTEM) -> dict[str, object]:
    """Read the current state of a Jetson's GPU, with the keys of ``gpu_state``; empty on other machines."""
    clock = _gpu_clock(root)
    if clock is None:
        return {}
    memory_hz = _read_int(root / "sys/kernel/debug/bpmp/debug/clk/emc/rate")  # only root can read it
    state = {
        "sm_clock_mhz": _mhz(_read_int(clock / "cur_freq")),
        "memory_clock_mhz": _mhz(memory_hz),
        "temperature_c": _gpu_temperature(root),
        "throttle_reasons": _throttle_reasons(root),
        "power_mode": power_mode(root),
        "clocks_pinned": _clocks_pinned(clock),
    }
    return {key: value for key, value in state.items() if value is not None}


def jetson_facts(root: Path = SYSTEM) -> dict[str, object]:
    """Return the clock limits of a Jetson's GPU; empty on other machines."""
    clock = _gpu_clock(root)
    if clock is None:
        return {}
    facts = {"max_sm_clock_mhz": _mhz(_read_int(clock / "max_freq")), "clocks_pinned": _clocks_pinned(clock)}
    return {key: value for key, value in facts.items() if value is not None}


def _gpu_clock(root: Path) -> Path | None:
    return next((path for path in _entries(root / "sys/class/devfreq") if GPU_CLOCK.search(path.name)), None)


def _clocks_pinned(clock: Path) -> bool | None:
    """Return whether ``jetson_clocks`` is active: the lowest clock then equals the highest one."""
    lowest, highest = _read_int(clock / "min_freq"), _read_int(clock / "max_freq")
    return None if lowest is None or highest is None else lowest == highest


def _gpu_temperature(root: Path) -> float | None:
    for zone in _entries(root / "sys/class/thermal"):
        if "gpu" in (first_line(zone / "type") or "").lower() and zone.name.startswith("thermal_zone"):
            millidegrees = _read_int(zone / "temp")
            if millidegrees is not None:
                return millidegrees / 1000
    return None


def _throttle_reasons(root: Path) -> list[str]:
    """List the kernel's cooling devices that reduce a clock: ``gpu-throttle-alert``."""
    reasons = []
    for device in _entries(root / "sys/class/thermal"):
        kind = first_line(device / "type") or ""
        if device.name.startswith("cooling_device") and "throttle" in kind and _read_int(device / "cur_state"):
            reasons.append(kind)
    return reasons


def _nvpmodel_power_mode() -> str | None:
    try:
        done = subprocess.run(["nvpmodel", "-q"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"Power Mode:\s*(\S+)", done.stdout)
    return match[1] if match else None


def _mhz(hertz: int | None) -> int | None:
    return None if hertz is None else round(hertz / 1e6)


def _read_int(path: Path) -> int | None:
    text = first_line(path) or ""
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _entries(folder: Path) -> Iterator[Path]:
    try:
        yield from sorted(folder.iterdir())
    except OSError:
        return
