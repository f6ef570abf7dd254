"""List the GPUs of this machine, and the targets that they can run."""

from __future__ import annotations

import contextlib
import importlib
from dataclasses import dataclass
from types import ModuleType

from dsc_split.engines._backends import BACKENDS

__all__ = ["Gpu", "list_gpus"]

OLDEST_OF_TENSORRT = (7, 5)
"""Oldest compute capability that TensorRT 10 and 11 run on."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU."""

    name: str
    """Product name: ``NVIDIA GeForce RTX 2080 Ti``."""
    architecture: str
    """Compute capability as in targets: ``sm75``."""
    memory_bytes: int
    """Memory of the GPU; the machine's memory where they share it."""
    driver: str | None
    """Version of the driver; ``None`` where it is unknown."""
    targets: tuple[str, ...]
    """Targets that it can run with the right libraries and driver."""
    note: str
    """Targets that it cannot run, and advice; empty where it runs all."""


def list_gpus(*, jetson: bool = False) -> tuple[tuple[Gpu, ...], str | None, str]:
    """List the GPUs that NVML reports, or else CUDA; on Jetson CUDA first, which knows more there.

    Returns:
        The GPUs; the newest CUDA that the driver supports, ``None`` without a driver; why there are no GPUs.
    """
    found, cuda_driver, why = _by_nvml()
    if found and not jetson:
        return found, cuda_driver, why
    by_cuda, driver_of_cuda, why_not_cuda = _by_cuda()
    if by_cuda:
        return by_cuda, driver_of_cuda, ""
    return found, cuda_driver or driver_of_cuda, why if found else f"{why}; {why_not_cuda}"


def _by_nvml() -> tuple[tuple[Gpu, ...], str | None, str]:
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return (), None, "nvidia-ml-py is not installed"
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as e:
        return (), None, f"NVML: {e}"
    try:
        cuda_driver = _version(nvml.nvmlSystemGetCudaDriverVersion_v2())
        driver = nvml.nvmlSystemGetDriverVersion()
        gpus = []
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            name = nvml.nvmlDeviceGetName(handle)
            major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
            gpus.append(_gpu(name, major, minor, _nvml_memory_bytes(nvml, handle), driver))
    except nvml.NVMLError as e:
        return (), None, f"NVML: {e}"
    finally:
        nvml.nvmlShutdown()
    return tuple(gpus), cuda_driver, "" if gpus else "NVML: the driver lists no GPU"


def _nvml_memory_bytes(nvml: ModuleType, handle: object) -> int:
    """Return the memory of a GPU; 0 where it is the machine's, which NVML does not report."""
    with contextlib.suppress(nvml.NVMLError):
        return int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
    return 0


def _by_cuda() -> tuple[tuple[Gpu, ...], str | None, str]:
    try:
        runtime = importlib.import_module("cuda.bindings.runtime")
    except ImportError:
        return (), None, "cuda-bindings is not installed"
    version = runtime.cudaDriverGetVersion()[1]
    error, count = runtime.cudaGetDeviceCount()
    if int(error):
        why = runtime.cudaGetErrorString(error)[1].decode() if version else "there is no driver"
        return (), _version(version), f"CUDA: {why}"
    properties = [runtime.cudaGetDeviceProperties(index)[1] for index in range(count)]
    gpus = tuple(_gpu(gpu.name.decode(), gpu.major, gpu.minor, gpu.totalGlobalMem, None) for gpu in properties)
    return gpus, _version(version), ""


def _version(number: int) -> str | None:
    """Return ``13.0`` for CUDA's 13000; ``None`` for 0."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def _gpu(name: str, major: int, minor: int, memory_bytes: int, driver: str | None) -> Gpu:
    architecture = f"sm{major}{minor}"
    targets, note = ["onnxruntime:cuda"], ""
    if (major, minor) >= OLDEST_OF_TENSORRT:
        targets.append("tensorrt:cuda")
    if architecture in BACKENDS["tensorrt-rtx"].architectures:
        targets.append(f"tensorrt-rtx:{architecture}")
    elif (major, minor) >= OLDEST_OF_TENSORRT:
        note = f"TensorRT for RTX has no {architecture.upper()}: build with full TensorRT on this machine"
    else:
        note = f"{architecture.upper()} is too old for TensorRT"
    return Gpu(
        name=name,
        architecture=architecture,
        memory_bytes=memory_bytes,
        driver=driver,
        targets=tuple(targets),
        note=note,
    )
