"""Looks at this machine: what is here, what is missing, and the command that brings it."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from dsc_split import __version__

__all__ = ["Examination", "OptionalPackage", "examine"]


@dataclass(frozen=True, kw_only=True)
class OptionalPackage:
    """A package that only some parts need."""

    name: str
    """Name of the distribution: ``onnxruntime-gpu``."""
    version: str | None
    """``None`` where it is not installed."""
    extra: str
    """The extra of this package that brings it."""

    in_the_way: str | None = None
    """An installed distribution that provides the same module, and has to go first."""

    @property
    def pip(self) -> str:
        """The command that installs it."""
        first = f"pip uninstall {self.in_the_way}; " if self.in_the_way else ""
        return f"{first}pip install 'dsc-split[{self.extra}]'"


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What was found on this machine."""

    dsc_split: str
    """Version of this package."""
    python: str
    """Version of Python, and its implementation."""
    platform: str
    """Operating system, its version, and the machine's architecture."""
    processor: str
    """Name of the processor."""
    cores: int | None
    """Physical cores; ``None`` where the system does not tell."""
    usable_cores: int
    """Logical cores that this process may run on."""
    memory_bytes: int
    """Memory of the machine."""
    available_memory_bytes: int
    """Memory that new work can have without swapping."""
    packages: tuple[OptionalPackage, ...]
    """Packages of the extras, in alphabetical order."""
    onnxruntime_providers: tuple[str, ...]
    """Execution providers that the installed ONNX Runtime was built with; empty without ONNX Runtime."""
    torch_cuda_devices: tuple[str, ...]
    """Names of the GPUs that PyTorch sees; empty without PyTorch."""
    problems: tuple[str, ...]
    """Packages that are installed and cannot be imported, each with its error."""

    def to_json(self) -> dict[str, Any]:
        """Give plain data; a package carries its pip command."""
        packages = [{**asdict(package), "pip": package.pip} for package in self.packages]
        return {**asdict(self), "packages": packages}


ONNX_RUNTIMES = frozenset({"onnxruntime", "onnxruntime-gpu"})
"""Distributions of one module: only one of them can be installed."""


def examine() -> Examination:
    """Look at this machine. Imports ONNX Runtime and PyTorch where they are installed: that takes seconds."""
    problems: list[str] = []
    memory = psutil.virtual_memory()
    return Examination(
        dsc_split=__version__,
        python=f"{platform.python_version()} ({platform.python_implementation()})",
        platform=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=_processor(),
        cores=psutil.cpu_count(logical=False),
        usable_cores=_usable_cores(),
        memory_bytes=memory.total,
        available_memory_bytes=memory.available,
        packages=_packages(),
        onnxruntime_providers=_onnxruntime_providers(problems),
        torch_cuda_devices=_torch_cuda_devices(problems),
        problems=tuple(problems),
    )


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    """Name the processor as /proc/cpuinfo does, which knows more than ``platform.processor()``."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() in ("model name", "Model") and value.strip():
                    return value.strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _packages() -> tuple[OptionalPackage, ...]:
    """List what this distribution's extras bring, by its own metadata; each under the smallest such extra."""
    try:
        requirements = importlib.metadata.requires("dsc-split") or []
    except importlib.metadata.PackageNotFoundError:
        return ()  # Run from a source tree that was never installed.
    names_by_extra: dict[str, set[str]] = {}
    for requirement in requirements:
        match = re.match(r"""([A-Za-z0-9._-]+).*;.*\bextra\s*==\s*['"]([A-Za-z0-9._-]+)['"]""", requirement)
        if match is None or match[1] == "dsc-split" or match[2] == "dev":
            continue
        names_by_extra.setdefault(match[2], set()).add(match[1])
    extra_of: dict[str, str] = {}
    for extra, names in sorted(names_by_extra.items(), key=lambda item: len(item[1])):
        for name in names:
            extra_of.setdefault(name, extra)
    return tuple(
        OptionalPackage(
            name=name,
            version=_version(name),
            extra=extra,
            in_the_way=next((other for other in ONNX_RUNTIMES - {name} if _version(other)), None)
            if name in ONNX_RUNTIMES
            else None,
        )
        for name, extra in sorted(extra_of.items())
    )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _import(module: str, problems: list[str]) -> Any:
    """Import an optional module; ``None`` where it is not installed, or is broken, which is noted."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        if not (isinstance(e, ModuleNotFoundError) and e.name == module):
            problems.append(f"{module} is installed and cannot be imported: {e}")
    except OSError as e:  # A shared library that does not load.
        problems.append(f"{module} is installed and cannot be loaded: {e}")
    return None


def _onnxruntime_providers(problems: list[str]) -> tuple[str, ...]:
    onnxruntime = _import("onnxruntime", problems)
    return () if onnxruntime is None else tuple(onnxruntime.get_available_providers())


def _torch_cuda_devices(problems: list[str]) -> tuple[str, ...]:
    torch = _import("torch", problems)
    if torch is None or not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
