"""Build a side's engines for a target."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsc_split._progress import Progress, ProgressListener, silent
from dsc_split.engines._fingerprint import target_id
from dsc_split.engines._registry import get_backend
from dsc_split.engines._sides import record_target, side_graphs
from dsc_split.errors import BackendError, BackendUnavailable

if TYPE_CHECKING:
    from dsc_split.bundle import Bundle
    from dsc_split.engines._base import BackendLike
    from dsc_split.engines._target import Target

__all__ = ["BuildResult", "BuildRow", "build_engines"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BuildRow:
    """One graph that was built, or was not."""

    graph: str
    """Path of the graph, relative to the bundle."""
    label: str
    """What it is, in words."""
    build_s: float
    """Seconds it took to build and to load once."""
    reason: str
    """Why it failed; empty where it did not."""


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """What :func:`build_engines` did."""

    side: str
    """``device`` or ``server``."""
    target: str
    """The target, in its canonical text."""
    id: str
    """Name of the target's folder: a slug and 12 digits of the build fingerprint."""
    rows: tuple[BuildRow, ...]
    """One per graph of the side, the whole model first."""

    @property
    def failed(self) -> tuple[BuildRow, ...]:
        """The rows that failed."""
        return tuple(row for row in self.rows if row.reason)


def build_engines(
    bundle: Bundle, side: str, target: str | Target | BackendLike, *, progress: ProgressListener = silent
) -> BuildResult:
    """Build every graph of a side for a target, load each once as a proof, and record the target.

    A graph that fails is a row with its reason; the target is recorded where at least one did not.

    Raises:
        UsageError: The side or the target is unknown.
        BackendUnavailable: The back-end's library or its device is not there.
        BundleError: A graph is missing or was changed.
        BundleBusyError: Another command is writing the bundle.
    """
    backend = get_backend(target)
    with bundle.lock():
        graphs = side_graphs(bundle, side)
        rows = []
        for done, graph in enumerate(graphs):
            progress(Progress(stage=f"build {side}", label=graph.label, done=done, total=len(graphs)))
            start, reason = time.perf_counter(), ""
            try:
                backend.build(bundle.file(graph.path))
            except BackendUnavailable:
                raise
            except BackendError as e:
                reason = str(e)
            build_s = time.perf_counter() - start
            logger.info("built %s for %s in %.2f s: %s", graph.path, backend.target, build_s, reason or "ok")
            rows.append(BuildRow(graph=graph.path, label=graph.label, build_s=build_s, reason=reason))
        progress(Progress(stage=f"build {side}", label="done", done=len(graphs), total=len(graphs)))
        if any(not row.reason for row in rows):
            record_target(bundle, side, backend)
    name = target_id(backend.build_fingerprint())
    return BuildResult(side=side, target=str(backend.target), id=name, rows=tuple(rows))
