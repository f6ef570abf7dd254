"""What identifies a target on a machine: stable facts only, never a live frequency, load or temperature."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from dsc_split._files import canonical_json

__all__ = ["fingerprint_digest", "fingerprint_id", "gpu", "machine", "target_id"]


def fingerprint_digest(fingerprint: dict[str, Any]) -> str:
    """Hash a fingerprint; returns 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(fingerprint)).hexdigest()


def fingerprint_id(fingerprint: dict[str, Any]) -> str:
    """Give the short name of a fingerprint: the first 12 hexadecimal digits of its SHA-256."""
    return fingerprint_digest(fingerprint)[:12]


def target_id(build_fingerprint: dict[str, Any]) -> str:
    """Name what was built, safely for a file name: a readable slug and 12 hexadecimal digits."""
    words = [str(build_fingerprint[key]) for key in ("library", "architecture")]
    slug = re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-")
    return f"{slug[:60]}-{fingerprint_id(build_fingerprint)}"


def machine() -> dict[str, Any]:
    """Describe this machine: processor, cores, limits of its clock, power mode, name, system."""
    import psutil

    cpu = Path("/sys/devices/system/cpu")
    affinity = getattr(os, "sched_getaffinity", None)
    facts = {
        "host": platform.node(),
        "system": _system(),
        "machine": platform.machine(),
        "board": _first_line(Path("/proc/device-tree/model")),
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=False),
        "hardware_threads": psutil.cpu_count(logical=True),
        "usable_threads": len(affinity(0)) if affinity else None,
        "governor": _first_line(cpu / "cpu0/cpufreq/scaling_governor"),
        "max_frequency_khz": _first_line(cpu / "cpu0/cpufreq/scaling_max_freq"),
        "boost": _first_line(cpu / "cpufreq/boost"),
        "no_turbo": _first_line(cpu / "intel_pstate/no_turbo"),
        "power_mode": _first_line(Path("/var/lib/nvpmodel/status")),
    }
    return {key: value for key, value in facts.items() if value is not None}


def gpu() -> dict[str, Any]:
    """Describe the GPU that CUDA shows first: name, driver, power and clock limits; empty where unknown."""
    fields = ["name", "uuid", "driver_version", "power.limit", "clocks.max.sm", "clocks.max.memory"]
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    command += ["-i", visible or "0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in done.stdout.splitlines()[0].split(",")] if done.stdout.strip() else []
    return dict(zip(fields, values, strict=False))


def _first_line(path: Path) -> str | None:
    """Read a small file of the system; ``None`` where it is not there or not readable."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return None
    lines = text.replace("\0", "").strip().splitlines()
    return lines[0].strip() if lines else None


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        text = ""
    for key in ("model name", "Hardware", "CPU part"):
        match = re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE)
        if match:
            return match[1].strip()
    return platform.processor() or "unknown"


def _system() -> str:
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = platform.system()
    return name
