"""Build a side's engines for a target."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import UNSET
from msgspec.structs import asdict, replace

from dsc_split._support.files import make_folder
from dsc_split._support.progress import Progress, ProgressListener, silent
from dsc_split.bundle import Bundle
from dsc_split.bundles._records import BuilderMemory, EngineEntry, FailedEngine, FileEntry, TargetEntry
from dsc_split.engines._base import BuildJob, BuiltEngine
from dsc_split.engines._fingerprint import target_id
from dsc_split.engines._opset import highest_opset
from dsc_split.engines._options import BuildOptions
from dsc_split.engines._registry import get_backend
from dsc_split.engines._source import GraphReader
from dsc_split.engines.side._batches import choose_batches
from dsc_split.engines.side._inputs import engine_inputs
from dsc_split.engines.side._sides import SideGraph, new_entry, put_last, record_target, recorded_here, side_graphs
from dsc_split.errors import BackendError, BackendUnavailable, BundleError, UsageError

if TYPE_CHECKING:
    from dsc_split.engines._base import BackendLike
    from dsc_split.engines._target import Target

__all__ = ["BuildResult", "BuildRow", "build_engines"]

logger = logging.getLogger(__name__)

TRIED_ON = 2
"""Batch size at which a rewritten graph is compared with the original."""


@dataclass(frozen=True, kw_only=True)
class BuildRow:
    """One engine that was built, or failed."""

    graph: str
    """Path of the graph, relative to the bundle."""
    label: str
    """What it computes: ``whole model``, ``head NAME``."""
    build_s: float
    """Seconds that the build took."""
    reason: str
    """Why the build failed; empty where it succeeded."""
    path: str | None
    """Path of the engine, relative to the bundle; ``None`` without an engine file."""
    cached: bool
    """Whether an earlier build was reused, from the bundle or the cache."""
    profile: tuple[int, int, int] | None
    """Smallest, best and largest batch size; ``None`` without an engine file."""
    size_bytes: int | None
    """Size of the engine's file."""
    memory: BuilderMemory | None
    """Memory that the library reported; ``None`` without an engine file."""
    lowered: str | None
    """Why it was built for smaller batches than requested; ``None`` where it was not."""
    notes: tuple[str, ...]
    """Notes for the user: rewritten operators."""


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """The result of :func:`build_engines`."""

    side: str
    """``device`` or ``server``."""
    target: str
    """The target, in its canonical text."""
    id: str
    """Name of the target's folder: a slug and 12 digits of the build fingerprint."""
    rows: tuple[BuildRow, ...]
    """One per engine, those of the whole model first."""

    @property
    def failed(self) -> tuple[BuildRow, ...]:
        """The rows that failed."""
        return tuple(row for row in self.rows if row.reason)


def build_engines(
    bundle: Bundle,
    side: str,
    target: str | Target | BackendLike,
    options: BuildOptions | None = None,
    *,
    progress: ProgressListener = silent,
) -> BuildResult:
    """Build every graph of a side for a target, and record the target with its engines.

    An engine that fails becomes a row with the reason. The target is recorded if at least one engine was built;
    earlier engines for the same target are replaced.

    Args:
        bundle: The bundle.
        side: ``device`` or ``server``.
        target: Target of the engines.
        options: How to build; by default, for the default batch sizes.
        progress: Called with each engine and each phase of the library.

    Raises:
        UsageError: The side, the target or an option is unknown or out of range.
        BackendUnavailable: The back-end's library, or the device that it builds on, is missing.
        BundleError: A graph is missing or was changed.
        BundleBusyError: Another command is writing the bundle.
        KeyboardInterrupt: It was interrupted; finished engines are in the cache.
    """
    options = options or BuildOptions(batches=choose_batches(bundle, None))
    choose_batches(bundle, options.batches)
    backend = get_backend(target, options)
    _require_opset(bundle, backend)
    with bundle.lock():
        build = _Build(bundle, side, backend, options, progress)
        try:
            build.run()
            if any(not row.reason for row in build.rows):
                build.record()
        finally:
            _remove_unlisted(Bundle.open(bundle.path))
    return BuildResult(
        side=side,
        target=str(backend.target),
        id=target_id(backend.build_fingerprint()),
        rows=tuple(build.rows),
    )


def _require_opset(bundle: Bundle, backend: BackendLike) -> None:
    """Check that the back-end's parser reads the opset of the graphs."""
    facts = backend.build_fingerprint()
    limit = highest_opset(str(facts.get("library")), str(facts.get("version", "")))
    opset = bundle.manifest.model.own_opset
    if limit is not None and opset > limit:
        raise UsageError(
            f"the graphs have opset {opset}; {facts['library']} {facts['version']} reads up to {limit}. Export the "
            f"model again for this target, so that they are converted: --device or --server {backend.target}"
        )


class _Build:
    """Builds all engines of a side, once."""

    def __init__(
        self, bundle: Bundle, side: str, backend: BackendLike, options: BuildOptions, progress: ProgressListener
    ) -> None:
        self.rows: list[BuildRow] = []
        self._bundle = bundle
        self._side = side
        self._backend = backend
        self._options = options
        self._progress = progress
        self._graphs = GraphReader(bundle)
        self._folder = f"engines/{target_id(backend.build_fingerprint())}"
        self._engines: list[EngineEntry] = []
        self._files: dict[str, FileEntry] = {}

    def run(self) -> None:
        """Build the engines one after the other."""
        compiles = self._backend.compiles
        profiles = self._options.profiles() if compiles else ((1, 1, 1),)
        graphs = side_graphs(self._bundle, self._side, whole=compiles)
        _remove_unlisted(self._bundle)
        if compiles:
            make_folder(self._bundle.file(self._folder))
        try:
            for graph in graphs:
                for profile in profiles:
                    self._build_graph(graph, profile, len(graphs) * len(profiles))
        finally:
            with contextlib.suppress(OSError):  # it has engines, or was never made
                self._bundle.file(self._folder).rmdir()
        self._report("done", len(self.rows), len(self.rows))

    def record(self) -> None:
        """Write the target, its engines and their files to the manifest, in place of its earlier engines.

        Files that the manifest lists stay unchanged until the new manifest is written, so an interrupted build leaves
        a valid bundle.
        """
        if not self._backend.compiles:
            record_target(self._bundle, self._side, self._backend)
            return
        entry = replace(
            new_entry(self._backend),
            options=self._options.recorded(),
            engines=tuple(self._engines),
            failed=tuple(FailedEngine(graph=row.graph, reason=row.reason) for row in self.rows if row.reason),
        )
        with self._bundle.edit() as draft:
            manifest = draft.manifest
            before = recorded_here(manifest, self._side, self._backend)
            gone = _paths_of([before]) - _paths_of(other for other in manifest.targets if other is not before)
            kept = {path: listed for path, listed in manifest.files.items() if path not in gone}
            draft.change(files={**kept, **self._files})
            put_last(draft, self._side, entry, before)

    def _build_graph(self, graph: SideGraph, profile: tuple[int, int, int], total: int) -> None:
        label = f"{graph.label}, batch {profile[2]}" if self._options.per_batch else graph.label
        done = len(self.rows)
        self._report(label, done, total)
        start, reason, built = time.perf_counter(), "", None
        try:
            job = self._make_job(graph, profile, lambda phase: self._report(f"{label}: {phase}", done, total))
            built = self._backend.build(job)
        except BackendUnavailable:
            raise
        except (BackendError, BundleError) as e:
            reason = str(e)
        build_s = time.perf_counter() - start
        logger.info("built %s for %s in %.2f s: %s", graph.path, self._backend.target, build_s, reason or "ok")
        engine = self._add_entry(graph, built) if built else None
        self.rows.append(
            BuildRow(
                graph=graph.path,
                label=label,
                build_s=build_s,
                reason=reason,
                path=engine.path if engine else None,
                cached=built.cached if built else False,
                profile=engine.profile if engine else None,
                size_bytes=built.size_bytes if built else None,
                memory=engine.memory if engine else None,
                lowered=engine.lowered if engine else None,
                notes=engine.notes if engine else (),
            )
        )

    def _make_job(self, graph: SideGraph, profile: tuple[int, int, int], tell: Callable[[str], None]) -> BuildJob:
        bundle = self._bundle
        tensors = {info.name: info for info in (*bundle.inputs, *bundle.outputs)}
        if graph.split is not None:
            tensors |= {info.name: info for info in graph.split.tensors}
        names = [info.name for info in bundle.inputs]
        if graph.kind == "tail" and graph.split is not None:
            names = [info.name for info in graph.split.tensors]
        batch = bundle.fixed_batch or min(TRIED_ON, bundle.max_batch)
        output, listed = self._engine_paths(graph, profile[2])
        return BuildJob(
            graph=bundle.file(graph.path),
            source=self._graphs.read(graph.path),
            label=graph.label,
            model=bundle.manifest.model.title or "unnamed",
            path=graph.path,
            digest=bundle.graph_digest(graph.path),
            precision=bundle.manifest.precision,
            kept_float32=_kept_float32(bundle),
            tensors=tensors,
            profile=profile,
            feeds=lambda: engine_inputs(bundle, graph, names, batch),
            output=bundle.file(output),
            listed=bundle.file(listed) if listed else None,
            listed_sha256=bundle.manifest.files[listed].sha256 if listed else None,
            tell=tell,
        )

    def _engine_paths(self, graph: SideGraph, batch: int) -> tuple[str, str | None]:
        """Return the path of a new engine, and of the listed one or ``None``; relative to the bundle.

        The new path is never one that the manifest lists.
        """
        stem = Path(graph.path).name.removesuffix(".onnx")
        stem = f"{stem}.b{batch}" if self._options.per_batch else stem
        manifest = self._bundle.manifest
        ours = _paths_of([recorded_here(manifest, self._side, self._backend)])
        found: list[str] = []
        for number in itertools.count(1):
            name = f"{self._folder}/{stem}.plan" if number == 1 else f"{self._folder}/{stem}.{number}.plan"
            if name not in manifest.files or not self._bundle.has(name):
                break
            found.append(name)
        return name, next((path for path in found if path in ours), found[0] if found else None)

    def _add_entry(self, graph: SideGraph, built: BuiltEngine) -> EngineEntry:
        """Add an engine to the entries for the manifest; return its entry."""
        path = built.path.relative_to(self._bundle.path).as_posix()
        digest = self._bundle.graph_digest(graph.path)
        engine = EngineEntry(graph=graph.path, graph_digest=digest, path=path, **asdict(built.facts))
        self._files[path] = FileEntry(sha256=built.sha256, size_bytes=built.size_bytes, role="engine")
        self._engines.append(engine)
        return engine

    def _report(self, label: str, done: int, total: int) -> None:
        self._progress(Progress(stage=f"build {self._side}", label=label, done=done, total=total))


def _kept_float32(bundle: Bundle) -> tuple[str, ...] | None:
    """List the nodes that stayed float32 in the conversion to float16; ``None`` without a conversion."""
    conversion = bundle.manifest.conversion
    return None if conversion is UNSET else tuple(node.name for node in conversion.kept_float32 if node.name)


def _remove_unlisted(bundle: Bundle) -> None:
    """Remove engines that the manifest does not list: old ones, and files of interrupted builds."""
    for path in sorted(bundle.path.glob("engines/*/*")):
        linked = any(folder.is_symlink() for folder in (path.parent, path.parent.parent))
        listed = path.relative_to(bundle.path).as_posix() in bundle.manifest.files
        if path.suffix in (".plan", ".partial") and not listed and not linked and not path.is_dir():
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it has other engines
                path.parent.rmdir()


def _paths_of(entries: Iterable[TargetEntry | None]) -> set[str]:
    """Return the paths of all engines of some targets."""
    return {engine.path for entry in entries if entry is not None for engine in entry.built}
