"""The state of a machine during a measurement: recorded beside the numbers, never part of a key."""

from __future__ import annotations

import importlib.metadata
import platform
from datetime import datetime, timezone

from dsc_split._support.memory import available_memory_bytes

__all__ = ["library_versions", "live_state", "now", "static_environment"]

LIBRARIES = ("dsc-split", "numpy", "onnxruntime", "onnxruntime-gpu", "psutil")


def now() -> str:
    """Return the time in ISO 8601, UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the installed libraries that take part in a measurement."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def static_environment() -> dict[str, object]:
    """Return the facts that do not change during a run."""
    return {"host": platform.node(), "system": platform.platform(), "versions": library_versions()}


def live_state() -> dict[str, object]:
    """Return load, free memory, clock and temperature, as far as the system reports them."""
    import psutil

    state: dict[str, object] = {"time": now(), "available_memory_bytes": available_memory_bytes()}
    try:
        state["load_1min"] = psutil.getloadavg()[0]
        frequency = psutil.cpu_freq()
        state["frequency_mhz"] = frequency.current if frequency else None
        sensors = getattr(psutil, "sensors_temperatures", dict)  # not on every system
        readings = [reading.current for group in sensors().values() for reading in group]
        state["hottest_sensor_celsius"] = max(readings) if readings else None
    except (OSError, NotImplementedError, RuntimeError) as e:  # psutil raises these if the system has no such reading
        state["unreadable"] = str(e)
    return state
