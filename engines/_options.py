"""How engines are built, by back-ends that compile before they run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from msgspec.structs import asdict

from dsc_split.bundles._records import GemmPolicy, RecordedOptions
from dsc_split.errors import UsageError

__all__ = ["GEMM_POLICIES", "BuildOptions"]

GEMM_POLICIES: tuple[str, ...] = get_args(GemmPolicy)
"""What becomes of a float32 matrix product where the GPU has none (SM75): an equal 1x1 convolution; where there is no
such, for both factors are computed, also an equal product and sum; or, there, float16."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What the user says about a build."""

    batches: tuple[int, ...]
    """Batch sizes that the engines will run at, ascending."""
    opt_batch: int | None = None
    """The batch size to be fastest at; ``None``: the middle one of ``batches``."""
    per_batch: bool = False
    """Whether every batch size gets an engine of its own."""
    gemm: GemmPolicy = "sum"
    """One of :data:`GEMM_POLICIES`."""
    workspace_bytes: int | None = None
    """Scratch memory that one layer may take; ``None`` leaves it to the library."""
    timing_cache: Path | None = None
    """File of kernel timings that full TensorRT reads and extends; ``None``: one in the cache folder."""
    timing_cache_sha256: str | None = None
    """Digest that ``timing_cache`` must have; it is then read, and never written."""
    memory_per_batch: bool = False
    """Whether the memory at every batch size is asked of the builder, which takes a build each, thrown away."""
    device_memory_bytes: int | None = None
    """Memory of the GPU that the engines are for, where it is not this machine's; ``None``: not looked at."""

    def __post_init__(self) -> None:
        """Refuse options that do not fit together.

        Raises:
            UsageError: A number is out of range, or an option lacks another one.
        """
        if not self.batches or not all(map(_is_count, self.batches)) or list(self.batches) != sorted(set(self.batches)):
            raise UsageError(f"batches are {list(self.batches)}; ascending whole numbers from 1 were expected.")
        counts = {
            "--opt-batch": self.opt_batch,
            "workspace_bytes": self.workspace_bytes,
            "device_memory_bytes": self.device_memory_bytes,
        }
        for name, value in counts.items():
            if value is not None and not _is_count(value):
                raise UsageError(f"{name} is {value!r}; a whole number from 1 was expected.")
        if self.opt_batch is not None and not self.batches[0] <= self.opt_batch <= self.batches[-1]:
            limits = f"{self.batches[0]} to {self.batches[-1]}"
            raise UsageError(f"--opt-batch is {self.opt_batch}; a batch size from {limits} was expected.")
        if self.opt_batch is not None and self.per_batch:
            raise UsageError("--opt-batch has no meaning with --engine-per-batch: each engine has one batch size.")
        if self.gemm not in GEMM_POLICIES:
            raise UsageError(f"--gemm is {self.gemm!r}; {' or '.join(GEMM_POLICIES)} was expected.")
        if self.timing_cache_sha256 is not None and self.timing_cache is None:
            raise UsageError("--timing-cache-sha256 pins a file: name it with --timing-cache FILE.")

    def profiles(self) -> tuple[tuple[int, int, int], ...]:
        """Return the ``(min, opt, max)`` batch sizes of each engine of a graph.

        An engine for one batch size takes smaller ones, too: for a shape without any freedom, TensorRT for RTX
        writes broadcast weights out in full, and a plan of 4 MB becomes one of hundreds (float32, SM75).
        """
        if self.per_batch:
            return tuple((1, batch, batch) for batch in self.batches)
        opt = self.opt_batch or self.batches[len(self.batches) // 2]
        return ((self.batches[0], opt, self.batches[-1]),)

    def facts(self) -> dict[str, Any]:
        """Return what shapes an engine, for the fingerprint of a build."""
        profile: Any = "one per batch size" if self.per_batch else list(self.profiles()[0])
        facts = {
            "profile": profile,
            "gemm": self.gemm,
            "workspace_bytes": self.workspace_bytes,
            "timing_cache_sha256": self.timing_cache_sha256,
            "device_memory_bytes": self.device_memory_bytes,
        }
        return {key: value for key, value in facts.items() if value is not None}

    def recorded(self) -> RecordedOptions:
        """Return what a manifest says of them: what is needed to find the engines again."""
        return RecordedOptions(**{name: getattr(self, name) for name in RecordedOptions.__struct_fields__})

    @classmethod
    def of_record(cls, record: RecordedOptions) -> BuildOptions:
        """Return the options that a manifest says engines were built with.

        Raises:
            UsageError: The options do not fit together.
        """
        return cls(timing_cache=Path() if record.timing_cache_sha256 is not None else None, **asdict(record))

    def command(self, batches: Sequence[int] | None = None) -> str:
        """Return the options as words of a command line."""
        words = [f"--batches {','.join(map(str, batches or self.batches))}"]
        words += [f"--opt-batch {self.opt_batch}"] if self.opt_batch else []
        words += ["--engine-per-batch"] if self.per_batch else []
        words += [f"--gemm {self.gemm}"] if self.gemm != "sum" else []
        words += [f"--workspace {self.workspace_bytes}"] if self.workspace_bytes else []
        words += [f"--device-memory {self.device_memory_bytes}"] if self.device_memory_bytes else []
        if self.timing_cache_sha256:
            words.append(f"--timing-cache FILE --timing-cache-sha256 {self.timing_cache_sha256}")
        return " ".join(words)


def _is_count(value: object) -> bool:
    """Return whether something is a whole number from 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
