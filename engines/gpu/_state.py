"""Read the facts and the state of a GPU, and lock its clock, through NVML.

The library is NVIDIA's ``nvidia-ml-py`` (module ``pynvml``): pure Python, imports without a driver, and works with CUDA
12 and 13; the NVML in ``cuda-bindings`` needs 13. On Jetson NVML reports little, and
:mod:`dsc_split.engines.gpu._jetson` reads the rest.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from dsc_split.engines.gpu._jetson import SYSTEM, jetson_facts, jetson_state
from dsc_split.errors import BackendError, BackendUnavailable, UsageError

__all__ = ["gpu_facts", "gpu_state", "lock_clocks", "unlock_clocks"]

Reading = Any
"""A value from NVML: ``pynvml`` has no types."""

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
"""Reasons for a reduced clock, by bit, named as in ``nvmlClocksEventReason...`` and ``nvmlClocksThrottleReason...``."""


def gpu_state(index: int = 0, *, root: Path = SYSTEM) -> dict[str, Reading]:
    """Read the current state of a GPU.

    Args:
        index: Number of the GPU in CUDA's order.
        root: Root folder of the system.

    Returns:
        ``gpu`` (name), ``sm_clock_mhz``, ``memory_clock_mhz``, ``temperature_c``, ``throttle_reasons``, ``power_w``,
        ``utilisation_percent`` and ``power_mode``, where they can be read; or else ``unreadable`` with the reason.
    """
    state = jetson_state(root)
    try:
        with _device(index) as (nvml, gpu, instance):
            state |= _read_all(
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


def gpu_facts(index: int = 0, *, root: Path = SYSTEM) -> dict[str, Reading]:
    """Return stable facts about a GPU, for a fingerprint; empty where none can be read.

    Args:
        index: Number of the GPU in CUDA's order.
        root: Root folder of the system.
    """
    facts = jetson_facts(root)
    with contextlib.suppress(BackendError), _device(index) as (nvml, gpu, instance):
        sm, memory = nvml.NVML_CLOCK_SM, nvml.NVML_CLOCK_MEM
        facts |= _read_all(
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
    """Lock the SM clock of a GPU at ``mhz``, until it is unlocked or the driver is reloaded.

    Raises:
        UsageError: The GPU does not have this clock.
        BackendUnavailable: There is no GPU, or NVML is missing.
        BackendError: The GPU does not support it, or this user may not do it.
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
            raise BackendError(f"the SM clock cannot be locked at {mhz} MHz: {e}. {_advice(nvml, e.value)}") from e


def unlock_clocks(index: int = 0) -> None:
    """Unlock the SM clock of a GPU.

    Raises:
        BackendUnavailable: There is no GPU, or NVML is missing.
        BackendError: The GPU does not support it, or this user may not do it.
    """
    with _device(index) as (nvml, gpu, _):
        try:
            nvml.nvmlDeviceResetGpuLockedClocks(gpu)
        except nvml.NVMLError as e:
            raise BackendError(
                f"the SM clock cannot be unlocked: {e}. Unlock it: sudo nvidia-smi --reset-gpu-clocks"
            ) from e


def _advice(nvml: ModuleType, error: int) -> str:
    if error == nvml.NVML_ERROR_NO_PERMISSION:
        return "Only root may: run the command with sudo, or leave --lock-clocks out."
    if error == nvml.NVML_ERROR_NOT_SUPPORTED:
        return "Leave --lock-clocks out; on Jetson choose a power mode (nvpmodel) and pin it (jetson_clocks) instead."
    return "Leave --lock-clocks out, or see what nvidia-smi says."


# ---- which GPU ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _device(index: int) -> Iterator[tuple[ModuleType, object, object]]:
    """Yield NVML, the handle of the GPU with CUDA's number ``index``, and the handle of its MIG instance or itself.

    Raises:
        BackendUnavailable: NVML is missing, or does not list this GPU.
    """
    try:
        nvml = importlib.import_module("pynvml")
    except ModuleNotFoundError as e:
        raise BackendUnavailable(
            "'nvidia-ml-py' is not installed; it is needed to read the state of a GPU: pip install nvidia-ml-py"
        ) from e
    try:
        nvml.nvmlInit()  # calls are counted; without nvmlShutdown the library stays loaded for the next reading
        gpu, instance = _find_gpu(nvml, index)
    except nvml.NVMLError as e:
        raise BackendUnavailable(f"NVML finds no GPU {index}: {e}") from e
    yield nvml, gpu, instance


def _find_gpu(nvml: ModuleType, index: int) -> tuple[object, object]:
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
        gpu = _gpu_by_number(nvml, gpus, int(number), index)
    else:  # CUDA accepts the beginning of a UUID
        gpu = next((gpu for gpu in gpus if nvml.nvmlDeviceGetUUID(gpu).startswith(number)), None)
    if gpu is None:
        raise BackendUnavailable(f"NVML lists {len(gpus)} GPUs, and none of them is {number!r}")
    return gpu, gpu


def _gpu_by_number(nvml: ModuleType, gpus: list[object], number: int, index: int) -> object | None:
    """Find a GPU by CUDA's number: NVML counts by bus, and CUDA by speed unless ``CUDA_DEVICE_ORDER`` is set."""
    by_bus = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    if not by_bus and len(gpus) > 1 and len({nvml.nvmlDeviceGetName(gpu) for gpu in gpus}) > 1:
        bus_id = _cuda_bus_id(index)
        if bus_id is None:
            raise BackendUnavailable(
                "there are GPUs of several kinds, and CUDA does not say which is which: "
                "export CUDA_DEVICE_ORDER=PCI_BUS_ID"
            )
        handle: object = nvml.nvmlDeviceGetHandleByPciBusId(bus_id)
        return handle
    return gpus[number] if number < len(gpus) else None


def _cuda_bus_id(index: int) -> str | None:
    """Return the bus of a GPU from CUDA; ``None`` where CUDA does not say."""
    try:
        runtime = importlib.import_module("cuda.bindings.runtime")
    except ImportError:
        return None
    error, bus_id = runtime.cudaDeviceGetPCIBusId(32, index)
    return None if int(error) else bytes(bus_id).rstrip(b"\0").decode()


# ---- readings ----------------------------------------------------------------------------------------------


def _read_all(nvml: ModuleType, readings: Mapping[str, Callable[[], object]]) -> dict[str, Reading]:
    """Call each reading; those that this GPU does not support are left out."""
    values = {}
    for key, read in readings.items():
        with contextlib.suppress(nvml.NVMLError):
            values[key] = read()
    return values


def _throttle_reasons(nvml: ModuleType, gpu: object) -> list[str]:
    """List the reasons for a reduced clock; before driver 535 the function has another name."""
    try:
        bits = nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu)
    except nvml.NVMLError:
        bits = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu)
    return [
        THROTTLE_REASONS[bit] if bit < len(THROTTLE_REASONS) else f"bit {bit}"
        for bit in range(int(bits).bit_length())
        if bits >> bit & 1
    ]
