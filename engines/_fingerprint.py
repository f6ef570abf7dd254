"""Facts that identify a target on a machine. They are stable: never a current clock, load or temperature."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path

from dsc_split._support.records import Facts
from dsc_split._support.strict_json import canonical_json, read_json
from dsc_split.engines.gpu._jetson import first_line, power_mode
from dsc_split.engines.gpu._state import gpu_facts
from dsc_split.errors import DamagedError

__all__ = [
    "LOCKED_CLOCK",
    "as_json",
    "differences",
    "fingerprint_digest",
    "fingerprint_id",
    "gpu",
    "kind_of",
    "machine",
    "machine_facts",
    "processor_name",
    "system",
    "target_id",
    "usable_threads",
]

LOCKED_CLOCK = "locked_sm_clock_mhz"
"""Key of the clock that ``bench --lock-clocks`` locks while it runs, in MHz."""
_KIND_KEYS = ("library", "architecture", "gpu", "compute_capability")


def fingerprint_digest(fingerprint: Mapping[str, object]) -> str:
    """Return the SHA-256 of a fingerprint: 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(fingerprint)).hexdigest()


def fingerprint_id(fingerprint: Mapping[str, object]) -> str:
    """Return the short name of a fingerprint: the first 12 hexadecimal digits of its SHA-256."""
    return fingerprint_digest(fingerprint)[:12]


def as_json(facts: Mapping[str, object]) -> Facts:
    """Return facts as they are after writing and reading them as JSON: with lists for tuples."""
    return read_json(canonical_json(facts), "facts", DamagedError)


def kind_of(build_fingerprint: Mapping[str, object]) -> tuple[object, ...]:
    """Return the facts by which kinds of machines differ; the version of the library is not one of them."""
    return tuple(build_fingerprint.get(key) for key in _KIND_KEYS)


def machine_facts(run_fingerprint: Mapping[str, object]) -> Facts:
    """Return the facts of a run that another machine of the same kind shares: not its host name, nor a locked clock.

    Two runs that agree in them need the same memory. Times are valid on a machine that agrees in them.
    """
    return {key: value for key, value in run_fingerprint.items() if key not in ("host", LOCKED_CLOCK)}


def differences(recorded: Mapping[str, object], found: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    """Return the keys in which two fingerprints differ, with both values; ``gpu.driver`` is a key within ``gpu``."""
    before, after = _flat(recorded), _flat(found)
    keys = sorted({*before, *after})
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def _flat(facts: Mapping[str, object], prefix: str = "") -> Facts:
    flat: Facts = {}
    for key, value in facts.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def target_id(build_fingerprint: Mapping[str, object]) -> str:
    """Return the name of a target's folder: a readable slug and 12 hexadecimal digits."""
    words = [str(build_fingerprint[key]) for key in ("library", "architecture")]
    slug = re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-")
    return f"{slug[:60]}-{fingerprint_id(build_fingerprint)}"


def machine() -> Facts:
    """Return facts about this machine: processor, cores, clock limits, power mode, name, system."""
    import psutil

    cpu = Path("/sys/devices/system/cpu")
    facts = {
        "host": platform.node(),
        "system": _system_name(),
        "machine": platform.machine(),
        "board": first_line(Path("/proc/device-tree/model")),
        "processor": processor_name(),
        "cores": psutil.cpu_count(logical=False),
        "hardware_threads": psutil.cpu_count(logical=True),
        "usable_threads": usable_threads(),
        "governor": first_line(cpu / "cpu0/cpufreq/scaling_governor"),
        "max_frequency_khz": first_line(cpu / "cpu0/cpufreq/scaling_max_freq"),
        "boost": first_line(cpu / "cpufreq/boost"),
        "no_turbo": first_line(cpu / "intel_pstate/no_turbo"),
        "power_mode": power_mode(),
    }
    return {key: value for key, value in facts.items() if value is not None}


def system() -> dict[str, str]:
    """Return the operating system and the processor's architecture: ``Linux``, ``x86_64``."""
    return {"system": platform.system(), "machine": platform.machine()}


def gpu() -> Facts:
    """Return facts about CUDA's first GPU: name, driver, power and clock limits; empty where unknown."""
    return gpu_facts()


def usable_threads() -> int | None:
    """Count the hardware threads that this process may run on; ``None`` where that is unknown."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else None


def processor_name() -> str:
    """Return the processor's name from /proc/cpuinfo, which says more than ``platform.processor()``."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        text = ""
    for key in ("model name", "Hardware", "CPU part"):
        match = re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE)
        if match:
            return match[1].strip()
    return platform.processor() or "unknown"


def _system_name() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()
