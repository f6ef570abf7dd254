"""The common part of TensorRT and TensorRT for RTX: build, cache and load engines."""

from __future__ import annotations

import abc
import functools
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from msgspec import UNSET, UnsetType

from dsc_split._support.files import new_file
from dsc_split._support.hashing import sha256_file
from dsc_split._support.records import Facts
from dsc_split._support.sizes import size_text
from dsc_split.bundles._records import BuilderMemory, EnginePrecision, Rewritten
from dsc_split.engines._base import Backend, BuildJob, BuiltEngine, Engine
from dsc_split.engines._cache import EngineCache, cache_folder
from dsc_split.engines._engine_file import (
    FORMAT,
    REBUILD,
    VERSION,
    EngineDescription,
    EngineHeader,
    PlanProfile,
    read_header,
    read_plan,
    write_plan,
)
from dsc_split.engines._fingerprint import gpu, system
from dsc_split.engines._options import BuildOptions
from dsc_split.engines._source import EngineSource
from dsc_split.engines.side._batches import DEFAULT_BATCHES
from dsc_split.engines.tensorrt._build import BuiltPlan, Shapes, build_plan, profile_shapes
from dsc_split.engines.tensorrt._library import Trt, TrtLibrary, open_library
from dsc_split.engines.tensorrt._network import ParsedNetwork, parse_network
from dsc_split.errors import (
    BackendError,
    BackendUnavailable,
    EngineFileError,
    EngineMismatch,
    OutOfMemoryError,
)

if TYPE_CHECKING:
    from dsc_split.engines.gpu._cuda import CudaLayer

__all__ = ["TrtBackend"]

logger = logging.getLogger(__name__)

NOT_CAPTURABLE = "REQUIRE_USER_ALLOCATION is not compatible"
"""Part of TensorRT for RTX's message about a network that fits no CUDA graph: its shapes depend on data, say."""
BUILDER_VERSION = 1
"""Increase it when the same graph and options are built differently: cached engines are then built again."""


@dataclass(frozen=True, kw_only=True)
class _NetworkBuild:
    """A plan, and the network that it was built from."""

    profile: tuple[int, int, int]
    """Smallest, best and largest batch size."""
    shapes: Shapes
    """Shapes of the inputs at these batch sizes."""
    parsed: ParsedNetwork
    """The network."""
    built: BuiltPlan
    """The plan."""


class TrtBackend(Backend):
    """Base of the back-ends of both libraries."""

    compiles = True
    library_name: Literal["tensorrt", "tensorrt_rtx"]
    """Import name of the library."""
    tied_to_system: bool
    """Whether a plan runs only on the operating system and processor architecture of its build."""

    _library: TrtLibrary

    # ---- what differs ----------------------------------------------------------------------------------------

    @abc.abstractmethod
    def _gpu_facts(self) -> Facts:
        """Return the facts about the GPU that engines depend on."""

    @abc.abstractmethod
    def _configure(self, config: Trt, *, capturable: bool) -> None:
        """Set a builder's configuration for the target.

        Args:
            config: The configuration.
            capturable: Whether the engine must fit into a CUDA graph, where the library has this option.
        """

    def _after_build(self, config: Trt) -> None:
        """Save the kernel timings of a build."""

    @property
    @abc.abstractmethod
    def _runs_here(self) -> bool:
        """Whether this machine has the GPU that engines are built for."""

    # ---- the back-end ----------------------------------------------------------------------------------------

    def _require(self) -> None:
        self._library = open_library(self.library_name, self.extra)

    def require_device(self) -> None:
        """Check that there is a GPU with a driver.

        Raises:
            BackendUnavailable: There is none, or the driver is too old.
        """
        self._cuda()

    def live_state(self) -> Facts:
        """Read clocks, temperature and throttling of the GPU."""
        from dsc_split.engines.gpu._state import gpu_state

        return gpu_state()

    def _build_facts(self) -> Facts:
        options = self.options.facts() if self.options is not None else {}
        if self.target.architecture != "sm75":
            options.pop("gemm", None)
        facts = {"library": self._library.name, "version": self._library.version, "options": options}
        return {**facts, **self._gpu_facts()}

    def _device_facts(self) -> Facts:
        return {"gpu": gpu(), "io": self.target.io}

    def _cuda(self) -> CudaLayer:
        from dsc_split.engines.gpu._cuda import open_cuda

        try:
            return open_cuda(extra=self.extra)
        except BackendUnavailable as e:
            raise self._unavailable(str(e)) from e

    # ---- build -----------------------------------------------------------------------------------------------

    def _build(self, job: BuildJob) -> BuiltEngine:
        options = self.options or BuildOptions(batches=DEFAULT_BATCHES)
        path = self._find_listed(job, options)
        cached = path is not None
        if path is None:
            path = job.output
            cache, key = EngineCache(), self._cache_key(job, options)
            cached = _copy_cached(cache.get(key), path) and self._matches_job(job, read_header(path), options)
            if not cached:
                self._build_anew(job, options)
                cache.put(key, path)
        facts = read_header(path).facts
        sha256 = sha256_file(path)
        if self._runs_here:
            job.tell("load")
            self.load(path, sha256=sha256).close()
        return BuiltEngine(path=path, sha256=sha256, size_bytes=path.stat().st_size, facts=facts, cached=cached)

    def _find_listed(self, job: BuildJob, options: BuildOptions) -> Path | None:
        """Return the bundle's engine if it is the requested one and undamaged."""
        path = job.listed
        if path is None or not path.is_file() or sha256_file(path) != job.listed_sha256:
            return None
        try:
            return path if self._matches_job(job, read_header(path), options) else None
        except EngineFileError:
            return None

    def _matches_job(self, job: BuildJob, header: EngineHeader, options: BuildOptions) -> bool:
        """Return whether an engine is the one that a job requests; its file name does not matter."""
        stated = (header.graph, header.graph_digest, header.label, header.build_fingerprint)
        return (
            stated == (job.path, job.digest, job.label, self.build_fingerprint())
            and header.profile.max <= job.profile[2]
            and (header.lowered is not None or header.profile.max == job.profile[2])
            and (not _asks_memory(options) or set(options.batches) <= set(header.memory.activations))
        )

    def _cache_key(self, job: BuildJob, options: BuildOptions) -> Facts:
        return {
            "builder": BUILDER_VERSION,
            "graph": job.path,
            "digest": job.digest,
            "profile": list(job.profile),
            "fingerprint": self.build_fingerprint(),
            "batches": list(options.batches) if options.device_memory_bytes or _asks_memory(options) else None,
            "memory_per_batch": _asks_memory(options),
        }

    def _build_anew(self, job: BuildJob, options: BuildOptions) -> None:
        graph, rewritten = self._prepare_graph(job, options)
        activation_bytes: dict[int, int] = {}
        made, lowered = self._build_largest(job, graph, options, activation_bytes)
        precision = self._precision(job, made)
        if _asks_memory(options):
            for batch in options.batches:
                if batch not in activation_bytes:
                    other = self._build_profile(job, graph, (min(made.profile[0], batch), batch, batch), options)
                    activation_bytes[batch] = other.built.activation_bytes
        parsed, built = made.parsed, made.built
        smallest, best, largest = made.profile
        tied = system() if self.tied_to_system else {}
        description = EngineDescription(
            format=FORMAT,
            version=VERSION,
            library=self.library_name,
            library_version=self._library.version,
            target=f"{self.target.backend}:{self.target.architecture}",
            architecture=self.target.architecture,
            build_fingerprint=self.build_fingerprint(),
            system=tied.get("system", UNSET),
            machine=tied.get("machine", UNSET),
            model=job.model,
            label=job.label,
            graph=job.path,
            graph_digest=job.digest,
            profile=PlanProfile(min=smallest, opt=best, max=largest, shapes=made.shapes),
            inputs=tuple(parsed.describe(tensor, job.tensors) for tensor in parsed.inputs),
            outputs=tuple(parsed.describe(tensor, job.tensors) for tensor in parsed.outputs),
            precision=precision,
            memory=BuilderMemory(
                activation_bytes={str(batch): size for batch, size in activation_bytes.items()},
                scratch_bytes=built.scratch_bytes,
                weights_bytes=built.weights_bytes,
            ),
            rewritten=rewritten,
            lowered=lowered or None,
            notes=_notes(rewritten) if rewritten else (),
        )
        write_plan(job.output, description, built.plan)

    def _build_largest(
        self, job: BuildJob, graph: bytes, options: BuildOptions, activation_bytes: dict[int, int]
    ) -> tuple[_NetworkBuild, str]:
        """Build for the largest batch that fits into the GPU; also return why it is smaller than requested, or ``""``.

        Args:
            job: What to build.
            graph: The graph, rewritten where needed.
            options: How to build.
            activation_bytes: The memory at every batch size that was tried is added to it.

        Raises:
            OutOfMemoryError: No batch fits.
        """
        lowered = ""
        available = options.device_memory_bytes
        profiles = _profiles(job, options)
        for profile in profiles:
            if lowered and profile != profiles[-1] and _is_too_large(profile[2], activation_bytes, available):
                continue
            made = self._build_profile(job, graph, profile, options)
            activation_bytes[profile[2]] = made.built.activation_bytes
            needed = made.built.activation_bytes + made.built.weights_bytes
            if available is None or needed <= available:
                return made, lowered
            lowered = lowered or (
                f"batch {profile[2]} needs {size_text(needed)} for activations and weights, more than the "
                f"{size_text(available)} of the GPU"
            )
        if len(profiles) == 1:
            raise OutOfMemoryError(f"{lowered}.")
        raise OutOfMemoryError(f"{lowered}; not even batch {profile[2]} fits ({size_text(needed)}).")

    def _build_profile(
        self, job: BuildJob, graph: bytes, profile: tuple[int, int, int], options: BuildOptions
    ) -> _NetworkBuild:
        """Build a plan that fits into a CUDA graph or, if that is impossible, one that does not."""
        job.tell("parse")
        parsed = parse_network(self._library, graph, job.graph)
        shapes = profile_shapes(parsed, job.tensors, profile)

        def build(capturable: bool) -> BuiltPlan:
            configure = functools.partial(self._configure, capturable=capturable)
            return build_plan(self._library, parsed, shapes, options, configure, self._after_build, job.tell)

        try:
            built = build(True)
        except BackendError as e:
            if NOT_CAPTURABLE not in str(e):
                raise
            built = build(False)
        return _NetworkBuild(profile=profile, shapes=shapes, parsed=parsed, built=built)

    def _precision(self, job: BuildJob, made: _NetworkBuild) -> EnginePrecision:
        """Return the precision of the network's layers.

        Raises:
            BackendError: It was converted to float16, and layers that take most of the time are float32.
        """
        compute = made.parsed.compute_types()
        if job.kept_float32 is not None:
            wide = [name for name in compute.get("float32", ()) if not _is_kept(name, job.kept_float32)]
            if wide:
                raise BackendError(
                    f"float16 was asked for, and {len(wide)} layers compute in float32, {wide[0]!r} the first. "
                    "Float64 in the graph does that: make it float32 in the model, or export with --precision fp32."
                )
        return EnginePrecision(
            layers=made.parsed.count_types(),
            compute_layers={name: len(layers) for name, layers in compute.items()},
            tf32=made.built.tf32,
        )

    def _prepare_graph(self, job: BuildJob, options: BuildOptions) -> tuple[bytes, Rewritten | None]:
        """Return the graph to build, and what was rewritten in it for the GPU."""
        return job.source.data, None

    # ---- load ------------------------------------------------------------------------------------------------

    def _load(self, source: Path | EngineSource, sha256: str | None, digest: str | None) -> Engine:
        from dsc_split.engines.tensorrt._engine import TensorRTEngine

        file = read_plan(source, sha256=sha256)
        if digest is not None and file.header.graph_digest != digest:
            raise EngineMismatch(
                f"engine {source.name!r} was built from another graph than the bundle's, {file.header.graph!r}. "
                f"{REBUILD}"
            )
        self._require_match(source.name, file.header)
        cuda = self._cuda()
        return TensorRTEngine(
            self,
            source.name,
            file.header,
            file.plan,
            trt=self._library.trt,
            logger=self._library.logger,
            cuda=cuda,
            io=self.target.io,
            runtime_cache=_runtime_cache(file.header.plan_sha256, cuda),
        )

    def _require_match(self, name: str, header: EngineHeader) -> None:
        """Check that an engine was built by this version of the library, for this GPU."""
        expected: Facts = {"library": self._library.name, "library_version": self._library.version}
        expected |= {"architecture": self.target.architecture, **self._gpu_facts()}
        own = {name: getattr(header, name) for name in ("library", "library_version", "architecture")}
        tied = {"system": header.system, "machine": header.machine}
        own |= {name: value for name, value in tied.items() if not isinstance(value, UnsetType)}
        expected |= {name: value for name, value in system().items() if name in own}
        stated = {**header.build_fingerprint, **own}
        wrong = [key for key, value in expected.items() if stated.get(key) != value]
        if not wrong and not self._runs_here:
            raise EngineMismatch(
                f"engine {name!r} was built for {header.target}; found a GPU of compute capability "
                f"{self._cuda().compute_capability}. {REBUILD}"
            )
        if wrong:
            built = ", ".join(f"{key} {stated.get(key)}" for key in wrong)
            found = ", ".join(f"{key} {expected[key]}" for key in wrong)
            raise EngineMismatch(f"engine {name!r} was built for {built}; found {found}. {REBUILD}")


def _runtime_cache(plan_sha256: str, cuda: CudaLayer) -> Path | None:
    """Return the file for code that TensorRT for RTX compiles from a plan for this GPU; ``None`` without a folder."""
    folder = cache_folder() / "runtime"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        logger.warning("what is compiled for this GPU cannot be kept in %r: %s", str(folder), e)
        return None
    return folder / f"{plan_sha256[:32]}-{cuda.name.replace(' ', '-')}-{cuda.compute_capability}.cache"


def _copy_cached(source: Path | None, output: Path) -> bool:
    """Copy an engine from the cache; return whether it was there: another process may just have removed it."""
    if source is None:
        return False
    try:
        opened = source.open("rb")
    except FileNotFoundError:
        return False
    with opened, new_file(output) as file:
        shutil.copyfileobj(opened, file)
    return True


def _profiles(job: BuildJob, options: BuildOptions) -> list[tuple[int, int, int]]:
    """List the requested profile and, where memory is limited, profiles for smaller batches in descending order."""
    smallest, best, largest = job.profile
    smaller = sorted((size for size in options.batches if size < largest), reverse=True)
    lower = [(min(smallest, batch), min(best, batch), batch) for batch in smaller]
    lowers = options.device_memory_bytes is not None and not options.per_batch
    return [job.profile, *(lower if lowers else [])]


def _asks_memory(options: BuildOptions) -> bool:
    """Return whether to measure other batch sizes; with an engine for each, that is not needed."""
    return options.memory_per_batch and not options.per_batch


def _is_too_large(batch: int, activation_bytes: dict[int, int], available: int | None) -> bool:
    """Return whether a batch size is surely too large: activations grow like the batch, within a factor of 1.5."""
    tried = min(activation_bytes)
    return available is not None and activation_bytes[tried] * batch / tried > 1.5 * available


def _is_kept(layer: str, kept: tuple[str, ...]) -> bool:
    """Return whether a layer is from a node that stays float32: the parser may add words to the node's name."""
    return layer.partition(" ")[0] in kept or layer in kept


def _notes(rewritten: Rewritten) -> tuple[str, ...]:
    """Describe the rewritten operations."""
    forms = (
        (rewritten.converted, "equal convolutions"),
        (rewritten.summed, "equal multiplications and sums, whose speed has not been measured"),
        (rewritten.halved, "float16"),
    )
    return tuple(f"{len(names)} became {form}" for names, form in forms if names)
