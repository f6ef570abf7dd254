"""Examine this machine: its hardware, which targets work, what is missing, and the command that installs it."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import psutil

from dsc_split import __version__
from dsc_split.engines._backends import BACKENDS
from dsc_split.engines._base import Backend
from dsc_split.engines._fingerprint import processor_name, usable_threads
from dsc_split.engines._registry import get_backend
from dsc_split.engines.gpu._jetson import SYSTEM, first_line
from dsc_split.engines.gpu._list import Gpu, list_gpus
from dsc_split.errors import BackendUnavailable, DscError

__all__ = ["Examination", "OptionalPackage", "TargetState", "examine"]

ONNX_RUNTIMES = frozenset({"onnxruntime", "onnxruntime-gpu"})
"""Distributions of the same module: only one of them can be installed."""

OF_JETPACK_6 = frozenset({"jetson"})
NOT_OF_JETPACK_6 = frozenset({"rtx", "tensorrt"})
"""Extras for JetPack 6 only, and extras for all other machines only."""
JETPACK_6 = 36
"""Its release of Jetson Linux; later ones have CUDA 13, like other machines."""

JETPACK_6_TENSORRT = (
    "sudo apt-get install python3-libnvinfer && python3 -m venv --system-site-packages .venv && "
    ".venv/bin/pip install 'dsc-split[jetson]'"
)
"""On JetPack 6, TensorRT comes with the system, for the system's Python."""

COMMAND = re.compile(r"[\s.:]*\b(?:Install[^:]*: )?(?P<pip>(?:pip uninstall \S+; )?pip install [^\s;]+)\s*$")
"""End of the messages about missing packages."""


@dataclass(frozen=True, kw_only=True)
class OptionalPackage:
    """A package that only some parts of dsc-split need."""

    name: str
    """Name of the distribution: ``onnxruntime-gpu``."""
    version: str | None
    """``None`` where it is not installed."""
    extra: str
    """The extra of dsc-split that installs it."""

    in_the_way: str | None = None
    """An installed distribution of the same module, which must be removed first."""

    @property
    def pip(self) -> str:
        """The command that installs it."""
        first = f"pip uninstall {self.in_the_way}; " if self.in_the_way else ""
        return f"{first}pip install 'dsc-split[{self.extra}]'"


@dataclass(frozen=True, kw_only=True)
class TargetState:
    """Whether a target works on this machine."""

    target: str
    """The target: ``tensorrt-rtx:sm75``."""
    builds: bool
    """Whether engine files can be built for it here; false where graphs themselves are loaded."""
    runs: bool
    """Whether engines for it can be run here."""
    library: str | None
    """Library and version; ``None`` where they are unknown."""
    why: str
    """Why it does not run or build; empty where it runs."""
    mend: str | None
    """The command that may help; ``None`` where no package is missing."""

    @property
    def works(self) -> bool:
        """Whether it builds or runs here."""
        return self.builds or self.runs


@dataclass(frozen=True, kw_only=True)
class Examination:
    """The result of :func:`examine`."""

    dsc_split: str
    """Version of this package."""
    python: str
    """Version of Python, and its implementation."""
    platform: str
    """Operating system, its version, and the machine's architecture."""
    processor: str
    """Name of the processor."""
    cores: int | None
    """Physical cores; ``None`` where that is unknown."""
    usable_cores: int
    """Logical cores that this process may run on."""
    memory_bytes: int
    """Memory of the machine."""
    available_memory_bytes: int
    """Memory that can be used without swapping."""
    jetson: int | None
    """Release of Jetson Linux: 36 is JetPack 6, 38 is JetPack 7; ``None`` on other machines."""
    gpus: tuple[Gpu, ...]
    """GPUs of this machine, also those that cannot be used."""
    no_gpu: str
    """Why no GPU was found; empty where one was."""
    cuda_driver: str | None
    """Newest CUDA that the driver supports: ``13.0``; ``None`` without a driver."""
    targets: tuple[TargetState, ...]
    """State of each target."""
    packages: tuple[OptionalPackage, ...]
    """Packages of the extras, in alphabetical order."""
    onnxruntime_providers: tuple[str, ...]
    """Execution providers that the installed ONNX Runtime was built with; empty without ONNX Runtime."""
    torch_cuda_devices: tuple[str, ...]
    """Names of the GPUs that PyTorch sees; empty without PyTorch."""
    problems: tuple[str, ...]
    """Installed packages that cannot be imported, each with its error."""

    @property
    def exit_code(self) -> int:
        """5 if no target works, 1 if an installed package is broken, else 0."""
        if not any(state.works for state in self.targets):
            return BackendUnavailable.exit_code
        return DscError.exit_code if self.problems else 0

    def to_json(self) -> dict[str, object]:
        """Return the examination as plain data, packages with their pip commands."""
        packages = [{**asdict(package), "pip": package.pip} for package in self.packages]
        targets = [{**asdict(state), "works": state.works} for state in self.targets]
        return {**asdict(self), "packages": packages, "targets": targets}


def examine(root: Path = SYSTEM) -> Examination:
    """Examine this machine. Imports ONNX Runtime, TensorRT and PyTorch where installed: that takes seconds.

    Args:
        root: Root folder of the system.
    """
    problems: list[str] = []
    memory = psutil.virtual_memory()
    jetson = _jetson_release(root)
    jetpack_6 = jetson is not None and jetson <= JETPACK_6
    gpus, cuda_driver, no_gpu = list_gpus(jetson=jetson is not None)
    return Examination(
        dsc_split=__version__,
        python=f"{platform.python_version()} ({platform.python_implementation()})",
        platform=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=processor_name(),
        cores=psutil.cpu_count(logical=False),
        usable_cores=usable_threads() or os.cpu_count() or 1,
        memory_bytes=memory.total,
        available_memory_bytes=memory.available,
        jetson=jetson,
        gpus=gpus,
        no_gpu=no_gpu,
        cuda_driver=cuda_driver,
        packages=_packages(jetpack_6),
        onnxruntime_providers=_onnxruntime_providers(),
        torch_cuda_devices=_torch_cuda_devices(problems),
        targets=tuple(
            _try_target(f"{name}:{architecture}", gpus, jetpack_6, problems)
            for name, entry in BACKENDS.items()
            for architecture in entry.architectures
        ),
        problems=tuple(dict.fromkeys(problems)),
    )


# ---- targets -----------------------------------------------------------------------------------------------


def _try_target(target: str, gpus: tuple[Gpu, ...], jetpack_6: bool, problems: list[str]) -> TargetState:
    """Make the back-end of a target, and check its device."""
    builds = runs = False
    library = mend = None
    why = ""
    try:
        backend = get_backend(target)
        facts = backend.build_fingerprint()
        library = f"{facts['library']} {facts['version']}"
        builds = backend.compiles
        if isinstance(backend, Backend):
            backend.require_device()
        why = _why_unfit(target, gpus)
        runs = not why
    except DscError as e:
        why, mend = _split_message(str(e), target)
        if isinstance(e.__cause__, (ImportError, OSError)) and "is not installed" not in str(e):
            problems.append(str(e))
    except Exception as e:  # A broken installation can raise anything; the examination goes on.
        why = f"{type(e).__name__}: {e}"
        problems.append(f"back-end {target.partition(':')[0]!r} cannot be tried: {why}")
    if jetpack_6 and mend and target.startswith("tensorrt"):
        mend = JETPACK_6_TENSORRT if target.startswith("tensorrt:") else None
    return TargetState(target=target, builds=builds, runs=runs, library=library, why=why, mend=mend)


def _why_unfit(target: str, gpus: tuple[Gpu, ...]) -> str:
    """Return why no GPU can run a target; empty where one can, or where none is needed."""
    architecture = target.partition(":")[2]
    if architecture == "cpu" or any(target in gpu.targets for gpu in gpus):
        return ""
    found = ", ".join(f"{gpu.name} ({gpu.architecture.upper()})" for gpu in gpus)
    return f"it needs another GPU than {found}" if gpus else "no GPU was seen"


def _split_message(message: str, target: str) -> tuple[str, str | None]:
    """Split a message about a missing package into the reason and the command."""
    message = message.removeprefix(f"target {target!r} cannot be used: ").removesuffix(": dsc-split doctor")
    match = COMMAND.search(message)
    return (message[: match.start()], match["pip"]) if match else (message.rstrip("."), None)


# ---- the machine -------------------------------------------------------------------------------------------


def _jetson_release(root: Path) -> int | None:
    match = re.match(r"# R(\d+) ", first_line(root / "etc/nv_tegra_release") or "")
    return int(match[1]) if match else None


# ---- packages ----------------------------------------------------------------------------------------------


def _packages(jetpack_6: bool) -> tuple[OptionalPackage, ...]:
    """List the packages of dsc-split's extras, from its metadata, each with the smallest extra that has it."""
    try:
        requirements = importlib.metadata.requires("dsc-split") or []
    except importlib.metadata.PackageNotFoundError:
        return ()  # Run from a source tree that was never installed.
    left_out = NOT_OF_JETPACK_6 if jetpack_6 else OF_JETPACK_6
    names_by_extra: dict[str, set[str]] = {}
    for requirement in requirements:
        match = re.match(r"""([A-Za-z0-9._-]+).*;.*\bextra\s*==\s*['"]([A-Za-z0-9._-]+)['"]""", requirement)
        if match is None or match[1] == "dsc-split" or match[2] in {"dev", *left_out}:
            continue
        names_by_extra.setdefault(match[2], set()).add(match[1])
    extra_of: dict[str, str] = {}
    # The extra `gpu` comes last: it excludes `cpu`, which most users have.
    for extra, names in sorted(names_by_extra.items(), key=lambda item: (item[0] == "gpu", len(item[1]), item[0])):
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


def _import(module: str, problems: list[str]) -> ModuleType | None:
    """Import an optional module; return ``None`` where it is missing, or broken, which is added to ``problems``."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        if not (isinstance(e, ModuleNotFoundError) and e.name == module):
            problems.append(f"{module!r} is installed and cannot be imported: {e}. Install it again.")
    except OSError as e:  # A shared library that does not load.
        problems.append(f"{module!r} is installed and cannot be loaded: {e}. Install it again.")
    return None


def _onnxruntime_providers() -> tuple[str, ...]:
    onnxruntime = _import("onnxruntime", [])  # its targets report its problems
    return () if onnxruntime is None else tuple(onnxruntime.get_available_providers())


def _torch_cuda_devices(problems: list[str]) -> tuple[str, ...]:
    torch = _import("torch", problems)
    if torch is None or not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
