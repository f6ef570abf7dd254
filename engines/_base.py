"""The base of all back-ends and engines: checks, messages, emulation. A back-end writes the private methods."""

from __future__ import annotations

import abc
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from dsc_split._support.memory import says_out_of_memory
from dsc_split.engines._fingerprint import machine
from dsc_split.errors import BackendError, BackendUnavailable, DscError, OutOfMemoryError

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Self

    from dsc_split._support.records import Facts
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
    """What dsc-split uses of an engine."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Inputs, in order."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Outputs, in order."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute the outputs, by name."""

    def bind(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """Return a call without arguments that computes from host memory to host memory."""

    def errors(self) -> contextlib.AbstractContextManager[None]:
        """Turn errors of the bound call into errors of dsc-split."""

    def close(self) -> None:
        """Free the memory of the engine."""


@dataclass(frozen=True, kw_only=True)
class BuildJob:
    """One graph to build an engine from."""

    graph: Path
    """The ONNX file, its weights beside it."""
    source: EngineSource
    """The graph as checked bytes."""
    label: str
    """What the graph is: ``whole model``, ``head NAME``."""
    model: str
    """Name of its model."""
    path: str
    """Path of the graph, relative to the bundle."""
    digest: str
    """Digest of the graph with its weights, 64 hexadecimal digits."""
    precision: str
    """Precision of the graph: ``fp32`` or ``fp16``."""
    kept_float32: tuple[str, ...] | None
    """Nodes that stayed float32 when the graph was converted to float16; ``None`` where it was not converted."""
    tensors: Mapping[str, TensorInfo]
    """Known inputs and outputs by name; the graph may have only some of them."""
    profile: tuple[int, int, int]
    """Smallest, best and largest batch size."""
    feeds: Callable[[], Mapping[str, np.ndarray]]
    """Makes inputs to try the graph on."""
    output: Path
    """File for a new engine; never one that the manifest lists."""
    listed: Path | None
    """File of the engine that the manifest lists for this graph; ``None`` where it lists none."""
    listed_sha256: str | None
    """Digest of that file, from the manifest."""
    tell: Callable[[str], None]
    """Called with the name of each phase."""


@dataclass(frozen=True, kw_only=True)
class BuiltEngine:
    """A written engine file."""

    path: Path
    """The file."""
    sha256: str
    """Digest of the file, 64 hexadecimal digits."""
    size_bytes: int
    """Size of the file."""
    facts: EngineFacts
    """Facts for the manifest: profile, memory, precision, rewritten operations."""
    cached: bool
    """Whether it was built earlier, and was reused."""


class BackendLike(Protocol):
    """What dsc-split uses of a back-end; any object with these members can be one."""

    @property
    def target(self) -> Target:
        """The target it was made for."""

    def build_fingerprint(self) -> Facts:
        """Return the facts that an engine depends on."""

    def run_fingerprint(self) -> Facts:
        """Return the facts that a timing depends on."""

    def live_state(self) -> Facts:
        """Read clocks, temperature and throttling of the device, as they are now."""

    @property
    def compiles(self) -> bool:
        """Whether engines are built into files; if not, the graph itself is loaded."""

    @property
    def options(self) -> BuildOptions | None:
        """How engines are built; ``None`` where the user did not say."""

    def build(self, job: BuildJob) -> BuiltEngine | None:
        """Build the engine file; return ``None`` where the graph itself is loaded."""

    def load(
        self, source: Path | EngineSource, /, *, sha256: str | None = None, digest: str | None = None
    ) -> EngineLike:
        """Load an engine file, or a graph.

        Files of a bundle come as :class:`EngineSource`; for a library that needs a path, use its ``written()``.
        """


class Backend(abc.ABC):
    """One library on one architecture. Builds engines from graphs, and loads engines.

    A subclass writes ``_require``, ``_build_facts`` and ``_load``; also ``_build`` if it builds engine files.

    Attributes:
        target: The target it was made for.
        extra: The extra of this package that brings the library.
        options: How engines are built; ``None`` where the user did not say.
    """

    compiles: bool = False
    """Whether engines are built into files; if not, the graph itself is loaded."""

    def __init__(self, target: Target, *, extra: str, options: BuildOptions | None = None) -> None:
        self.target = target
        self.extra = extra
        self.options = options
        self._require()

    # ---- public --------------------------------------------------------------------------------------------

    def build_fingerprint(self) -> Facts:
        """Return the facts that an engine depends on: library, version, architecture, build options."""
        return {"architecture": self.target.architecture, **self._build_facts()}

    def run_fingerprint(self) -> Facts:
        """Return the facts that a timing depends on: those of the engine, the machine, threads and emulation.

        Calls on the same machine return the same facts: none of them changes while the machine runs.

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

    def live_state(self) -> Facts:
        """Read clocks, temperature and throttling of the device, as they are now; may be empty."""
        return {}

    def require_device(self) -> None:  # noqa: B027 - not every back-end has a device that may be missing
        """Check that engines can run here; building them may need less.

        Raises:
            BackendUnavailable: There is no device, or no driver.
        """

    def build(self, job: BuildJob) -> BuiltEngine | None:
        """Build the engine file and, where it can run here, load it once as a check.

        Returns:
            The file; ``None`` where :meth:`load` takes the graph itself.

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
            source: The engine file, or the graph where no engine files are built. Either checked bytes, or a path,
                whose file is used without a check.
            sha256: Digest of the file, from the manifest. An engine file with another digest is refused before the
                library reads any of it.
            digest: Digest of the graph with its weights. An engine that was built from another graph is refused.

        Raises:
            BackendError: The file is not there, holds an operator that the back-end lacks, or is damaged.
            BackendUnavailable: The device cannot be used.
            EngineFileError: The engine file is damaged; EngineMismatch, if it was built for something else.
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
    def _build_facts(self) -> Facts:
        """Return ``library``, ``version`` and every option that changes the engine."""

    @abc.abstractmethod
    def _load(self, source: Path | EngineSource, sha256: str | None, digest: str | None) -> Engine:
        """Load an engine; errors of the library may be raised as they are."""

    def _device_facts(self) -> Facts:
        """Return facts about the device that :func:`machine` does not have."""
        return {}

    def _build(self, job: BuildJob) -> BuiltEngine | None:
        """Build an engine file; without engine files, check that the graph loads."""
        self.load(job.source).close()
        return None

    def _explain(self, text: str) -> str:
        """Return a clearer text for an error of the library; by default, the same text."""
        return text

    # ---- shared --------------------------------------------------------------------------------------------

    def _require_file(self, path: Path) -> None:
        if not path.is_file():
            raise BackendError(f"{self.target}: there is no file {str(path)!r} to load. Export or build it again.")

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Turn any exception of the library into a BackendError or OutOfMemoryError that quotes it."""
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
    """One subgraph, loaded on one target. As a context manager, it is closed at the end of the block.

    A subclass writes ``_bind``, ``_run`` and ``_close``.

    Attributes:
        inputs: Inputs, in order.
        outputs: Outputs, in order.
        facts: How it runs; recorded with a measurement.
    """

    def __init__(
        self, backend: Backend, name: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.facts: Facts = {}
        self._backend = backend
        self._name = name

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute the outputs, by name. On an emulated target, then sleep until the slower machine would be done.

        Raises:
            BackendError: An input is missing, unknown, or of another type or rank; or the library fails.
            OutOfMemoryError: There is too little memory.
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
        """Return a call without arguments that computes from host memory to host memory.

        It runs at full speed, also on an emulated target, and raises the errors of the library as they are.

        Args:
            inputs: Arrays that stay in memory between calls. The outputs are in memory when the call returns.

        Raises:
            BackendError: An input is missing, unknown, or of another type or rank.
        """
        self._check(inputs)
        return self._bind(inputs)

    def errors(self) -> contextlib.AbstractContextManager[None]:
        """Turn errors of the bound call into errors of dsc-split; put it around a timed loop."""
        return self._backend._errors(f"cannot run {self._name!r}")

    def close(self) -> None:
        """Free the memory of the engine; it cannot be used afterwards."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abc.abstractmethod
    def _run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute the outputs from checked inputs."""

    @abc.abstractmethod
    def _bind(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """Return the call of :meth:`bind`, from checked inputs."""

    @abc.abstractmethod
    def _close(self) -> None:
        """Free the memory of the engine."""

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
