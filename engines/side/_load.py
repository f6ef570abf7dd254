"""Find a side's engines in a bundle, check that they fit this machine, and load them."""

from __future__ import annotations

import logging
import shlex
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from msgspec import UNSET, UnsetType

from dsc_split.engines._engine_file import REBUILD
from dsc_split.engines._fingerprint import differences, system
from dsc_split.engines._options import BuildOptions
from dsc_split.engines._registry import get_backend
from dsc_split.engines._source import EngineSource, GraphReader
from dsc_split.engines._target import Target
from dsc_split.engines.side._sides import SideGraph, last_target, recorded_here, recorded_targets, side_graphs
from dsc_split.errors import (
    BackendError,
    BackendUnavailable,
    BundleError,
    EngineFileError,
    EngineMismatch,
    OutOfMemoryError,
    UsageError,
)

if TYPE_CHECKING:
    from dsc_split.bundle import Bundle
    from dsc_split.bundles._records import EngineEntry, TargetEntry
    from dsc_split.engines._base import BackendLike, EngineLike

__all__ = ["UNUSABLE", "SideEngines", "choose_target", "entry_backend", "misfit", "rebuild_command", "target_entry"]

logger = logging.getLogger(__name__)

UNUSABLE = (BackendUnavailable, BundleError, EngineFileError)
"""Errors for engines that were built, but cannot be used here."""


class SideEngines:
    """The engines of one side, on one target.

    Attributes:
        backend: The back-end, with the options that its engines were built with.
        graphs: Graphs of the side, the whole model first.
        fallback_reason: Why the graphs run on ONNX Runtime instead of the engines; ``None`` where they do not.
    """

    def __init__(
        self,
        bundle: Bundle,
        side: str,
        target: str | Target | BackendLike | None = None,
        *,
        fallback: bool = False,
    ) -> None:
        """Find the engines.

        Args:
            bundle: The bundle, a folder or packed.
            side: ``device`` or ``server``.
            target: Target of the engines; by default the side's last recorded one, or else ``onnxruntime:cpu``. If it
                is recorded for several kinds of machine, the engines for this machine are used.
            fallback: Whether to run the graphs on ONNX Runtime if the engines or their library cannot be used here,
                now or when an engine is loaded; a warning is logged.

        Raises:
            UsageError: The side or the target is unknown, or nothing was built for it.
            BackendUnavailable: The back-end's library is missing.
            EngineMismatch: The engines were built by another version of the library, or for another GPU.
            BundleError: A graph or an engine is missing, a graph was changed, or the manifest's options do not fit.
            SignatureError: The bundle is packed, and its engines are not trusted.
        """
        self.fallback_reason: str | None = None
        self._bundle = bundle
        self._side = side
        self._fallback = fallback
        self._reader = GraphReader(bundle)
        self._built: dict[tuple[str, int], EngineEntry] = {}
        self._failed: dict[str, str] = {}
        self.graphs: tuple[SideGraph, ...] = side_graphs(bundle, side, verify=False)
        chosen = choose_target(bundle, side, target)
        try:
            self.backend: BackendLike = self._open_backend(chosen)
        except UNUSABLE as e:
            if not fallback:
                raise
            self._fall_back(chosen, e)

    def load(self, graph: SideGraph, batch: int) -> EngineLike:
        """Load the engine that runs a graph at a batch size.

        Raises:
            BackendError: There is no such engine, or it cannot be loaded.
            OutOfMemoryError: It was built for smaller batches, because memory was too small.
            EngineFileError: Its file is damaged; EngineMismatch, if it is for another machine.
            BackendUnavailable: The device cannot be used.
            BundleError: The graph or the weights were changed, or refer to other files.
        """
        try:
            return self._load_engine(graph, batch)
        except UNUSABLE as e:
            if not self._fallback or self.fallback_reason is not None:
                raise
            self._fall_back(self.backend, e)
        return self._load_engine(graph, batch)

    def nearest_batch(self, graph: SideGraph, batch: int) -> int:
        """Return ``batch``, or the nearest batch size that an engine of a graph was built for."""
        profiles = [engine.profile for (path, _), engine in self._built.items() if path == graph.path]
        near = [min(max(batch, smallest), largest) for smallest, _, largest in profiles]
        return min(near, key=lambda size: abs(size - batch), default=batch)

    def precision(self, graph: SideGraph) -> str:
        """Return the precision of a graph's engine: ``fp16``, or ``fp32`` where no operation is float16."""
        rewritten = [engine.rewritten for (path, _), engine in self._built.items() if path == graph.path]
        halved = any(item and item.halved for item in rewritten)
        return "fp16" if halved else self._bundle.manifest.precision

    # ---- finding -------------------------------------------------------------------------------------------

    def _open_backend(self, target: Target | BackendLike) -> BackendLike:
        """Return the back-end, and check that the bundle's engines are for it."""
        bundle, side = self._bundle, self._side
        entry = target_entry(bundle, side, target)
        backend = entry_backend(bundle, side, target, entry)
        if not backend.compiles:
            side_graphs(bundle, side)
            return backend
        rebuild = rebuild_command(bundle, side, backend)
        if entry is None or isinstance(entry.options, UnsetType) or not (entry.built or entry.failures):
            raise UsageError(
                f"bundle {str(bundle.path)!r} has no engines for target {str(backend.target)!r} "
                f"on side {side!r}. Build them: {rebuild}"
            )
        for engine in entry.built:
            if not bundle.has(engine.path):
                raise BundleError(
                    f"bundle {str(bundle.path)!r} lacks {engine.path!r}, which its manifest lists. "
                    f"Build it again: {rebuild}"
                )
        self._require_fit(backend, entry)
        bundle.require_trust(f"what was built for {str(backend.target)!r}")
        self._built = {(engine.graph, engine.profile[2]): engine for engine in entry.built}
        self._failed = {failed.graph: failed.reason for failed in entry.failures}
        return backend

    def _require_fit(self, backend: BackendLike, entry: TargetEntry) -> None:
        """Check that the engines are for this library and this machine."""
        wrong = misfit(backend, entry)
        if wrong:
            built = ", ".join(f"{key} {recorded!r}" for key, (recorded, _) in wrong.items())
            here = ", ".join(f"{key} {found!r}" for key, (_, found) in wrong.items())
            raise EngineMismatch(
                f"the engines of side {self._side!r} for {str(backend.target)!r} were built for {built}; found {here}. "
                f"Build them again: {rebuild_command(self._bundle, self._side, backend)}"
            )

    def _fall_back(self, target: Target | BackendLike, error: BackendError | BundleError | EngineFileError) -> None:
        """Run the graphs on ONNX Runtime from now on.

        Raises:
            BackendError, BundleError, EngineFileError: This is not possible; ``error`` with the reason added.
        """
        failed = target if isinstance(target, Target) else target.target
        if (failed.backend, failed.architecture) == ("onnxruntime", "cpu"):
            raise error
        try:
            side_graphs(self._bundle, self._side)
            self.backend = _onnx_backend(failed)
        except UNUSABLE as e:
            raise type(error)(f"{error} Nor can the graphs be run instead: {e}") from e
        self.fallback_reason = str(error)
        self._built, self._failed = {}, {}
        logger.warning("%s: the graphs run on %s instead, for %s", self._side, self.backend.target, error)

    # ---- loading -------------------------------------------------------------------------------------------

    def _load_engine(self, graph: SideGraph, batch: int) -> EngineLike:
        bundle = self._bundle
        if not self.backend.compiles:
            return self.backend.load(self._reader.read(graph.path))
        engine = self._find_engine(graph, batch)
        command = f"Build it again: {rebuild_command(bundle, self._side, self.backend)}"
        listed = bundle.manifest.files.get(engine.path)
        if listed is None:
            raise BundleError(f"the manifest does not list {engine.path!r}. {command}")
        digest = bundle.graph_digest(graph.path)
        if engine.graph_digest != digest:
            raise EngineMismatch(f"{engine.path!r} was built from another {graph.path!r}. {command}")
        try:
            data = bundle.read(engine.path)
        except BundleError as e:
            raise EngineFileError(f"engine {engine.path!r} is damaged: {e} {command}") from e
        source = EngineSource(name=PurePosixPath(engine.path).name, data=data, sha256=listed.sha256)
        try:
            return self.backend.load(source, sha256=listed.sha256, digest=digest)
        except EngineFileError as e:
            raise type(e)(str(e).replace(REBUILD, command)) from e

    def _find_engine(self, graph: SideGraph, batch: int) -> EngineEntry:
        sizes = sorted(largest for path, largest in self._built if path == graph.path)
        fitting = [size for size in sizes if size >= batch]
        if fitting:
            return self._built[graph.path, fitting[0]]
        if graph.path in self._failed:
            raise BackendError(f"{graph.label}: there is no engine: {self._failed[graph.path]}")
        rebuild = rebuild_command(self._bundle, self._side, self.backend, batch if sizes else None)
        if not sizes:
            raise BackendError(
                f"{graph.label}: there is no engine for {str(self.backend.target)!r}. Build it: {rebuild}"
            )
        lowered = self._built[graph.path, sizes[-1]].lowered
        if lowered:
            raise OutOfMemoryError(f"{graph.label} was built for batches up to {sizes[-1]}: {lowered}")
        raise BackendError(
            f"{graph.label}: batch {batch} is larger than {sizes[-1]}, the largest that its engine was built for. "
            f"Build it: {rebuild}"
        )


def choose_target(bundle: Bundle, side: str, target: str | Target | BackendLike | None) -> Target | BackendLike:
    """Return ``target``, or by default the side's last recorded one, or else ``onnxruntime:cpu``.

    Raises:
        UsageError: It is unknown.
    """
    if target is None:
        target = last_target(bundle, side)
    return Target.parse(target) if isinstance(target, str) else target


def target_entry(bundle: Bundle, side: str, target: Target | BackendLike) -> TargetEntry | None:
    """Return a target's entry in the manifest: for this kind of machine, or else the newest.

    Raises:
        BackendUnavailable: Several kinds are recorded, and this machine's kind is unknown.
    """
    found = recorded_targets(bundle, side, str(target if isinstance(target, Target) else target.target))
    here = recorded_here(bundle.manifest, side, get_backend(target)) if len(found) > 1 else None
    return here or next(reversed(found), None)


def misfit(backend: BackendLike, entry: TargetEntry) -> dict[str, tuple[object, object]]:
    """Return the facts in which this machine differs from that of the build, with both values.

    An engine that names an operating system runs only there.
    """
    wrong = differences(entry.fingerprint, backend.build_fingerprint())
    for key, value in system().items():
        stated = {getattr(engine, key) for engine in entry.built} - {value, UNSET}
        if stated:
            wrong[key] = (next(iter(stated)), value)
    return wrong


def rebuild_command(bundle: Bundle, side: str, backend: BackendLike, batch: int | None = None) -> str:
    """Return the command that builds the engines with the same options, also for ``batch``."""
    command = _build_command(bundle, side, backend.target)
    options = backend.options
    if options is None:
        return command
    return f"{command} {options.command(sorted({*options.batches, batch}) if batch else None)}"


def entry_backend(bundle: Bundle, side: str, target: Target | BackendLike, entry: TargetEntry | None) -> BackendLike:
    """Return the back-end, with the options that its engines were built with.

    Raises:
        BackendUnavailable: Its library is missing.
        BundleError: The options in the manifest are wrong.
    """
    if entry is None or isinstance(entry.options, UnsetType):
        return get_backend(target)
    try:
        return get_backend(target, BuildOptions.of_record(entry.options))
    except UsageError as e:
        raise BundleError(
            f"manifest {str(bundle.path / 'manifest.json')!r}: the options of target {entry.target!r} on side "
            f"{side!r} are wrong: {e} Build its engines again: {_build_command(bundle, side, entry.target)}"
        ) from e


def _onnx_backend(failed: Target) -> BackendLike:
    """Return ONNX Runtime: on the GPU if the failed target was for one and it can be used, or else on the CPU.

    Raises:
        BackendUnavailable: It is not installed.
    """
    if failed.backend != "onnxruntime":
        try:
            backend = get_backend("onnxruntime:cuda")
            backend.run_fingerprint()  # raises without a GPU
        except BackendUnavailable as e:
            logger.info("the graphs cannot run on the GPU: %s", e)
        else:
            return backend
    return get_backend("onnxruntime:cpu")


def _build_command(bundle: Bundle, side: str, target: object) -> str:
    """Return the command that builds a side's engines with default options."""
    return f"dsc-split build {shlex.quote(str(bundle.path))} --side {side} --target {target}"
