"""What every back-end shares: checks, messages, emulation. A back-end writes the private half."""

from __future__ import annotations

import abc
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from dsc_split._support.memory import says_out_of_memory
from dsc_split.engines._fingerprint import machine
from dsc_split.errors import BackendError, BackendUnavailable, DscError, OutOfMemoryError

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Self

    from dsc_split.bundle import TensorInfo
    from dsc_split.bundles._records import EngineFacts
    from dsc_split.engines._options import BuildOptions
    from dsc_split.engines._source import EngineSource
    from dsc_split.engines._target import Target

__all__ = ["Backend", "BackendLike", "BuildJob", "BuiltEngine", "Engine", "EngineLike", "TensorSpec"]


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """An input or output of an engine."""

    name: str
    """Name in the graph."""
    dtype: str
    """Lower-case ONNX element type: ``float32``, ``int64``, ``bool``."""
    shape: tuple[int | str | None, ...]
    """Dimensions; a string is a symbol, ``None`` is unknown."""


class EngineLike(Protocol):
    """What the rest of dsc-split asks of an engine."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Inputs, in order."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Outputs, in order."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute the outputs, by name."""

    def bind(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """Give the bare call, host to host."""

    def errors(self) -> contextlib.AbstractContextManager[None]:
        """Turn what the bare call raises into errors of dsc-split."""

    def close(self) -> None:
        """Free what the engine holds."""


@dataclass(frozen=True, kw_only=True)
class BuildJob:
    """One graph to build an engine from."""

    graph: Path
    """The ONNX file, its weights beside it."""
    source: EngineSource
    """The same, as bytes that were checked."""
    label: str
    """What it is, in words."""
    model: str
    """Name of the model that it is of."""
    path: str
    """Path of the graph, relative to the bundle."""
    digest: str
    """Digest of the graph with its weights, 64 hexadecimal digits."""
    precision: str
    """``fp32`` or ``fp16``: what the graph computes in."""
    kept_float32: tuple[str, ...] | None
    """Nodes that stayed float32 when the graph was converted to float16; ``None`` where it was not converted."""
    tensors: Mapping[str, TensorInfo]
    """What is known of inputs and outputs, by name; the graph may have only some of them."""
    profile: tuple[int, int, int]
    """Smallest, best and largest batch size."""
    feeds: Callable[[], Mapping[str, np.ndarray]]
    """Gives inputs to try the graph on."""
    output: Path
    """Where a new engine goes; never a file that the manifest lists."""
    listed: Path | None
    """The engine that the manifest lists for this graph; ``None`` where it lists none."""
    listed_sha256: str | None
    """Digest that the manifest states for it."""
    tell: Callable[[str], None]
    """Told of what is going on."""


@dataclass(frozen=True, kw_only=True)
class BuiltEngine:
    """An engine's file that was written."""

    path: Path
    """Where it is."""
    sha256: str
    """Digest of the file, 64 hexadecimal digits."""
    size_bytes: int
    """Size of the file."""
    facts: EngineFacts
    """What is known of it: profile, memory, precision, what was rewritten."""
    cached: bool
    """Whether it was there already, and only copied."""


class BackendLike(Protocol):
    """What the rest of dsc-split asks of a back-end; any object that has it may stand for one."""

    @property
    def target(self) -> Target:
        """The target it was made for."""

    def build_fingerprint(self) -> dict[str, Any]:
        """Describe what an engine depends on."""

    def run_fingerprint(self) -> dict[str, Any]:
        """Describe what a timing depends on."""

    def live_state(self) -> dict[str, Any]:
        """Read what changes while an engine runs."""

    @property
    def compiles(self) -> bool:
        """Whether engines are files of their own, made beforehand; else the graph itself is loaded."""

    @property
    def options(self) -> BuildOptions | None:
        """How engines are built, where they are."""

    def build(self, job: BuildJob) -> BuiltEngine | None:
        """Make the engine's file; ``None`` where the graph itself is loaded."""

    def load(
        self, source: Path | EngineSource, /, *, sha256: str | None = None, digest: str | None = None
    ) -> EngineLike:
        """Load an engine's file, or a graph.

        What comes from a bundle comes as :class:`EngineSource`; a library that takes only paths is served by its
        ``written()``.
        """


class Backend(abc.ABC):
    """One library on one architecture: builds engines from graphs, and loads them.

    A subclass writes ``_require``, ``_build_facts``, ``_load``, and ``_build`` where it compiles beforehand.

    Attributes:
        target: The target it was made for.
        extra: The extra of this package that brings the library.
        options: How engines are built, where they are compiled beforehand.
    """

    compiles: bool = False
    """Whether engines are files of their own, made beforehand; else the graph itself is loaded."""

    def __init__(self, target: Target, *, extra: str, options: BuildOptions | None = None) -> None:
        self.target = target
        self.extra = extra
        self.options = options
        self._require()

    # ---- public --------------------------------------------------------------------------------------------

    def build_fingerprint(self) -> dict[str, Any]:
        """Describe what an engine depends on: library, version, architecture, options of the build."""
        return {"architecture": self.target.architecture, **self._build_facts()}

    def run_fingerprint(self) -> dict[str, Any]:
        """Describe what a timing depends on: the engine's facts, the machine, threads and emulation.

        Two calls on one machine agree: nothing in it is live.

        Raises:
            BackendUnavailable: There is no such device here.
        """
        self.require_device()
        return {
            **self.build_fingerprint(),
            **machine(),
            **self._device_facts(),
            "threads": self.target.threads,
            "slowdown": self.target.slowdown,
        }

    def live_state(self) -> dict[str, Any]:
        """Read what changes while an engine runs: clocks, temperature, what holds the device back; may be empty."""
        return {}

    def require_device(self) -> None:  # noqa: B027 - not every back-end has a device that may be missing
        """See whether engines can run here; building them may need less.

        Raises:
            BackendUnavailable: There is no device, or no driver.
        """

    def build(self, job: BuildJob) -> BuiltEngine | None:
        """Make the engine's file, and prove that it loads where it can be loaded.

        Returns:
            The file; ``None`` where nothing is compiled, and :meth:`load` takes the graph itself.

        Raises:
            BackendError: The graph is not there, or the back-end cannot run it.
            OutOfMemoryError: It does not fit.
        """
        self._require_file(job.graph)
        with self._errors(f"cannot build {job.graph.name!r}"):
            return self._build(job)

    def load(self, source: Path | EngineSource, *, sha256: str | None = None, digest: str | None = None) -> Engine:
        """Load what :meth:`build` made.

        Args:
            source: The engine's file, or the graph where nothing is compiled; as bytes that were checked, or as a
                path, whose file is then taken as it is.
            sha256: Digest of the file, from the manifest. An engine's file that has another one is refused before
                a byte of it reaches the library.
            digest: Digest of the graph, with its weights, that the engine must have been built from; likewise.

        Raises:
            BackendError: The file is not there, holds an operator that the back-end lacks, or is damaged.
            BackendUnavailable: The device cannot be used.
            EngineFileError: The engine's file is damaged; EngineMismatch, if it was built for something else.
            OutOfMemoryError: It does not fit.
        """
        if isinstance(source, Path):
            self._require_file(source)
        with self._errors(f"cannot load {source.name!r}"):
            return self._load(source, sha256, digest)

    # ---- a back-end writes these ---------------------------------------------------------------------------

    @abc.abstractmethod
    def _require(self) -> None:
        """Raise :class:`BackendUnavailable` where the library or its device is not there."""

    @abc.abstractmethod
    def _build_facts(self) -> dict[str, Any]:
        """Give ``library``, ``version`` and every option that changes what is built."""

    @abc.abstractmethod
    def _load(self, source: Path | EngineSource, sha256: str | None, digest: str | None) -> Engine:
        """Load an engine; the library's own errors may escape."""

    def _device_facts(self) -> dict[str, Any]:
        """Describe the device beyond the machine it is in."""
        return {}

    def _build(self, job: BuildJob) -> BuiltEngine | None:
        """Compile a graph; here, a back-end that compiles when it loads."""
        self.load(job.source).close()
        return None

    def _explain(self, text: str) -> str:
        """Turn the library's words into a sentence; the words themselves where there is nothing better."""
        return text

    # ---- shared --------------------------------------------------------------------------------------------

    def _require_file(self, path: Path) -> None:
        if not path.is_file():
            raise BackendError(f"{self.target}: there is no file {str(path)!r} to load. Export or build it again.")

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Turn whatever a native library raises into an error of ours, with its words in it."""
        try:
            yield
        except DscError:
            raise
        except Exception as e:
            text = " ".join(str(e).split()) or type(e).__name__
            if isinstance(e, MemoryError) or says_out_of_memory(text):
                raise OutOfMemoryError(f"{self.target} {what}: out of memory ({text}).") from e
            raise BackendError(f"{self.target} {what}: {self._explain(text)}") from e

    def _unavailable(self, why: str) -> BackendUnavailable:
        return BackendUnavailable(f"target {str(self.target)!r} cannot be used: {why}")


class Engine(abc.ABC):
    """One subgraph, loaded on one target; a context manager that closes itself.

    A subclass writes ``_bind``, ``_run`` and ``_close``.

    Attributes:
        inputs: Inputs, in order.
        outputs: Outputs, in order.
        facts: How it runs, for the record of a measurement.
    """

    def __init__(
        self, backend: Backend, name: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.facts: dict[str, Any] = {}
        self._backend = backend
        self._name = name

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute the outputs, by name; on an emulated target, sleep what the real one would take longer.

        Raises:
            BackendError: An input is missing, unknown, or of another type or rank; or the library fails.
            OutOfMemoryError: Memory ends.
        """
        self._check(inputs)
        start = time.perf_counter()
        with self.errors():
            outputs = self._run(inputs)
        slowdown = self._backend.target.slowdown
        if slowdown > 1:
            time.sleep((slowdown - 1) * (time.perf_counter() - start))
        return outputs

    def bind(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """Give the bare call, host to host, at full speed, with errors as the library raises them.

        Args:
            inputs: Arrays that stay in memory between calls. The outputs are in memory when the call returns.

        Raises:
            BackendError: An input is missing, unknown, or of another type or rank.
        """
        self._check(inputs)
        return self._bind(inputs)

    def errors(self) -> contextlib.AbstractContextManager[None]:
        """Turn what the bare call raises into errors of dsc-split, around a timed loop."""
        return self._backend._errors(f"cannot run {self._name!r}")

    def close(self) -> None:
        """Free what the engine holds; it cannot be used afterwards."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abc.abstractmethod
    def _run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute the outputs, by name."""

    @abc.abstractmethod
    def _bind(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """Give the bare call."""

    @abc.abstractmethod
    def _close(self) -> None:
        """Free what the engine holds."""

    def _check(self, inputs: Mapping[str, np.ndarray]) -> None:
        known = {spec.name: spec for spec in self.inputs}
        wrong = sorted(set(known) ^ set(inputs))
        if wrong:
            raise BackendError(
                f"{self._name!r} was given inputs {sorted(inputs)}; {sorted(known)} were expected. "
                f"Missing or unknown: {', '.join(wrong)}."
            )
        for name, spec in known.items():
            array = inputs[name]
            if array.dtype.name != spec.dtype or array.ndim != len(spec.shape):
                raise BackendError(
                    f"input {name!r} of {self._name!r} is {array.dtype.name} with {array.ndim} dimensions; "
                    f"{spec.dtype} with {len(spec.shape)} was expected."
                )
