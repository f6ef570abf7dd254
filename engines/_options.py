"""How back-ends build engine files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from dsc_split._support.records import Facts, Record
from dsc_split.bundles._records import GemmPolicy, RecordedOptions
from dsc_split.errors import UsageError

__all__ = ["GEMM_POLICIES", "BuildOptions"]

GEMM_POLICIES: tuple[str, ...] = get_args(GemmPolicy)
"""What replaces a float32 matrix product on a GPU without them (SM75). ``conv``: an equal 1x1 convolution. ``sum`` and
``fp16``: the same and, where both factors are computed, an equal product and sum, or float16."""
_RECORDED = [name for name in RecordedOptions.__struct_fields__ if name not in Record.__struct_fields__]


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How the user wants engines to be built."""

    batches: tuple[int, ...]
    """Batch sizes that the engines run at, ascending."""
    opt_batch: int | None = None
    """Batch size to optimise for; ``None``: the middle one of ``batches``."""
    per_batch: bool = False
    """Whether to build one engine for each batch size."""
    gemm: GemmPolicy = "sum"
    """One of :data:`GEMM_POLICIES`."""
    workspace_bytes: int | None = None
    """Scratch memory that one layer may take; ``None`` leaves it to the library."""
    timing_cache: Path | None = None
    """File of kernel timings that full TensorRT reads and extends; ``None``: one in the cache folder."""
    timing_cache_sha256: str | None = None
    """Digest that ``timing_cache`` must have; the file is then never written."""
    memory_per_batch: bool = False
    """Whether to measure the memory at every batch size; each takes one more build."""
    device_memory_bytes: int | None = None
    """Memory of the GPU that will run the engines, if it is not in this machine; ``None``: no limit."""

    def __post_init__(self) -> None:
        """Refuse options that do not fit together.

        Raises:
            UsageError: A number is out of range, or an option needs another one.
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

        An engine for one batch size also takes smaller ones: for a fixed shape, TensorRT for RTX stores broadcast
        weights in full, and a plan of 4 MB grows to hundreds (float32, SM75).
        """
        if self.per_batch:
            return tuple((1, batch, batch) for batch in self.batches)
        opt = self.opt_batch or self.batches[len(self.batches) // 2]
        return ((self.batches[0], opt, self.batches[-1]),)

    def facts(self) -> Facts:
        """Return the options that change an engine, for the build fingerprint."""
        facts: Facts = {
            "profile": "one per batch size" if self.per_batch else list(self.profiles()[0]),
            "gemm": self.gemm,
            "workspace_bytes": self.workspace_bytes,
            "timing_cache_sha256": self.timing_cache_sha256,
            "device_memory_bytes": self.device_memory_bytes,
        }
        return {key: value for key, value in facts.items() if value is not None}

    def recorded(self) -> RecordedOptions:
        """Return the options for the manifest: those that are needed to find the engines again."""
        return RecordedOptions(**{name: getattr(self, name) for name in _RECORDED})

    @classmethod
    def of_record(cls, record: RecordedOptions) -> BuildOptions:
        """Return the options of a manifest's record.

        Raises:
            UsageError: The options do not fit together.
        """
        timing_cache = Path() if record.timing_cache_sha256 is not None else None
        return cls(timing_cache=timing_cache, **{name: getattr(record, name) for name in _RECORDED})

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
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
