"""What a GPU is, what it does right now, and its clock locked: read and written through NVML.

The library is ``nvidia-ml-py`` (module ``pynvml``): NVIDIA's own, pure Python, imports without a driver, and one
package serves CUDA 12 and 13, whereas the NVML in ``cuda-bindings`` came with 13 alone. On Jetson NVML answers
little; the rest comes from :mod:`dsc_split.engines.gpu._jetson`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dsc_split.engines.gpu._jetson import SYSTEM, jetson_facts, jetson_state
from dsc_split.errors import BackendError, BackendUnavailable, UsageError

__all__ = ["gpu_facts", "gpu_state", "lock_clocks", "unlock_clocks"]

THROTTLE_REASONS = (
    "gpu_idle",
    "applications_clocks_setting",
    "sw_power_cap",
    "hw_slowdown",
    "sync_boost",
    "sw_thermal_slowdown",
    "hw_thermal_slowdown",
    "hw_power_brake_slowdown",
    "display_clock_setting",
    "board_limit",
    "reliability",
)
"""What holds a clock down, by bit, as ``nvmlClocksEventReason...`` and ``nvmlClocksThrottleReason...`` name it."""


def gpu_state(index: int = 0, *, root: Path = SYSTEM) -> dict[str, Any]:
    """Read what a GPU does right now.

    Args:
        index: Number of the GPU as CUDA counts.
        root: Root folder of the system.

    Returns:
        ``gpu`` (name), ``sm_clock_mhz``, ``memory_clock_mhz``, ``temperature_c``, ``throttle_reasons``,
        ``power_w``, ``utilisation_percent``, ``power_mode``, each where it can be read; ``unreadable``, with the
        reason, where nothing can.
    """
    state = jetson_state(root)
    try:
        with _device(index) as (nvml, gpu, instance):
            state |= _readings(
                nvml,
                {
                    "gpu": lambda: nvml.nvmlDeviceGetName(instance),
                    "sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
                    "memory_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
                    "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
                    "throttle_reasons": lambda: _throttle_reasons(nvml, gpu),
                    "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
                    "utilisation_percent": lambda: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
                },
            )
    except BackendError as e:
        return state or {"unreadable": str(e)}
    return state or {"unreadable": "NVML answers nothing about this GPU"}


def gpu_facts(index: int = 0, *, root: Path = SYSTEM) -> dict[str, Any]:
    """Describe what a GPU is: stable facts, fit for a fingerprint; empty where nothing can be read.

    Args:
        index: Number of the GPU as CUDA counts.
        root: Root folder of the system.
    """
    facts = jetson_facts(root)
    with contextlib.suppress(BackendError), _device(index) as (nvml, gpu, instance):
        sm, memory = nvml.NVML_CLOCK_SM, nvml.NVML_CLOCK_MEM
        facts |= _readings(
            nvml,
            {
                "name": lambda: nvml.nvmlDeviceGetName(instance),
                "uuid": lambda: nvml.nvmlDeviceGetUUID(instance),
                "driver_version": nvml.nvmlSystemGetDriverVersion,
                "compute_capability": lambda: "{}.{}".format(*nvml.nvmlDeviceGetCudaComputeCapability(gpu)),
                "power_limit_w": lambda: nvml.nvmlDeviceGetPowerManagementLimit(gpu) / 1000,
                "max_sm_clock_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(gpu, sm),
                "max_memory_clock_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(gpu, memory),
                "application_sm_clock_mhz": lambda: nvml.nvmlDeviceGetApplicationsClock(gpu, sm),
                "application_memory_clock_mhz": lambda: nvml.nvmlDeviceGetApplicationsClock(gpu, memory),
                "ecc": lambda: bool(nvml.nvmlDeviceGetEccMode(gpu)[0]),
            },
        )
    return facts


# ---- locked clocks -----------------------------------------------------------------------------------------


def lock_clocks(mhz: int, index: int = 0) -> None:
    """Hold the SM clock of a GPU at ``mhz``, until it is unlocked or the driver is loaded anew.

    Raises:
        UsageError: The GPU has no such clock.
        BackendUnavailable: There is no GPU, or NVML is not there.
        BackendError: The GPU cannot do it, or it is not permitted.
    """
    with _device(index) as (nvml, gpu, _):
        known: list[int] = []
        with contextlib.suppress(nvml.NVMLError):
            fastest_mhz = max(nvml.nvmlDeviceGetSupportedMemoryClocks(gpu))
            known = nvml.nvmlDeviceGetSupportedGraphicsClocks(gpu, fastest_mhz)
        if known and not min(known) <= mhz <= max(known):
            raise UsageError(
                f"the SM clock cannot be locked at {mhz} MHz: this GPU takes {min(known)} to {max(known)} MHz."
            )
        try:
            nvml.nvmlDeviceSetGpuLockedClocks(gpu, mhz, mhz)
        except nvml.NVMLError as e:
            raise BackendError(f"the SM clock cannot be locked at {mhz} MHz: {e}. {_remedy(nvml, e)}") from e


def unlock_clocks(index: int = 0) -> None:
    """Let the SM clock of a GPU go its own way again.

    Raises:
        BackendUnavailable: There is no GPU, or NVML is not there.
        BackendError: It cannot be done, or is not permitted.
    """
    with _device(index) as (nvml, gpu, _):
        try:
            nvml.nvmlDeviceResetGpuLockedClocks(gpu)
        except nvml.NVMLError as e:
            raise BackendError(
                f"the SM clock cannot be unlocked: {e}. Unlock it: sudo nvidia-smi --reset-gpu-clocks"
            ) from e


def _remedy(nvml: Any, error: Any) -> str:
    if error.value == nvml.NVML_ERROR_NO_PERMISSION:
        return "Only root may: run the command with sudo, or leave --lock-clocks out."
    if error.value == nvml.NVML_ERROR_NOT_SUPPORTED:
        return "Leave --lock-clocks out; on Jetson choose a power mode (nvpmodel) and pin it (jetson_clocks) instead."
    return "Leave --lock-clocks out, or see what nvidia-smi says."


# ---- which GPU ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _device(index: int) -> Iterator[tuple[Any, Any, Any]]:
    """Give NVML, the handle of the GPU that CUDA counts as ``index``, and that of its MIG instance or itself.

    Raises:
        BackendUnavailable: NVML is not there, or has no such GPU.
    """
    try:
        nvml = importlib.import_module("pynvml")
    except ModuleNotFoundError as e:
        raise BackendUnavailable(
            "'nvidia-ml-py' is not installed; it is needed to read the state of a GPU: pip install nvidia-ml-py"
        ) from e
    try:
        nvml.nvmlInit()  # it counts; the first one loads the library, and the last one stays for the next reading
        gpu, instance = _handles(nvml, index)
    except nvml.NVMLError as e:
        raise BackendUnavailable(f"NVML finds no GPU {index}: {e}") from e
    yield nvml, gpu, instance


def _handles(nvml: Any, index: int) -> tuple[Any, Any]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    number = str(index)
    if visible is not None:
        entries = [entry.strip() for entry in visible.split(",")][: index + 1]
        if len(entries) <= index or "-1" in entries or "" in entries:
            raise BackendUnavailable(f"CUDA_VISIBLE_DEVICES={visible!r} shows no GPU {index}")
        number = entries[index]
    if number.startswith("MIG-"):
        instance = nvml.nvmlDeviceGetHandleByUUID(number)
        return nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(instance), instance
    gpus = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    if number.isdigit():
        gpu = _numbered(nvml, gpus, int(number), index)
    else:  # CUDA takes the beginning of a UUID for the whole
        gpu = next((gpu for gpu in gpus if nvml.nvmlDeviceGetUUID(gpu).startswith(number)), None)
    if gpu is None:
        raise BackendUnavailable(f"NVML lists {len(gpus)} GPUs, and none of them is {number!r}")
    return gpu, gpu


def _numbered(nvml: Any, gpus: list[Any], number: int, index: int) -> Any:
    """Find a GPU by CUDA's number: NVML counts by bus, CUDA by speed unless it is told otherwise."""
    by_bus = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    if not by_bus and len(gpus) > 1 and len({nvml.nvmlDeviceGetName(gpu) for gpu in gpus}) > 1:
        bus_id = _cuda_bus_id(index)
        if bus_id is None:
            raise BackendUnavailable(
                "there are GPUs of several kinds, and CUDA does not say which is which: "
                "export CUDA_DEVICE_ORDER=PCI_BUS_ID"
            )
        return nvml.nvmlDeviceGetHandleByPciBusId(bus_id)
    return gpus[number] if number < len(gpus) else None


def _cuda_bus_id(index: int) -> str | None:
    """Ask CUDA for the bus of a GPU; ``None`` where it does not say."""
    try:
        runtime = importlib.import_module("cuda.bindings.runtime")
    except ImportError:
        return None
    error, bus_id = runtime.cudaDeviceGetPCIBusId(32, index)
    return None if int(error) else bytes(bus_id).rstrip(b"\0").decode()


# ---- readings ----------------------------------------------------------------------------------------------


def _readings(nvml: Any, readings: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Read what NVML tells; what it does not tell on this GPU is left out."""
    values = {}
    for key, read in readings.items():
        with contextlib.suppress(nvml.NVMLError):
            values[key] = read()
    return values


def _throttle_reasons(nvml: Any, gpu: Any) -> list[str]:
    """Name what holds the clock down; drivers before 535 know the function by another name."""
    try:
        bits = nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu)
    except nvml.NVMLError:
        bits = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu)
    return [
        THROTTLE_REASONS[bit] if bit < len(THROTTLE_REASONS) else f"bit {bit}"
        for bit in range(int(bits).bit_length())
        if bits >> bit & 1
    ]
