"""Measure every engine of a bundle at every batch size."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsc_split._support.progress import Progress, ProgressListener, silent
from dsc_split._support.records import to_document
from dsc_split.benchmarks.cells._cells import MEASURED_STATUSES, STATUSES, Cell, CellStore, Question
from dsc_split.benchmarks.sweep._clocks import locked_clocks
from dsc_split.benchmarks.sweep._tasks import BenchSettings, make_cell, make_jobs, measured_side
from dsc_split.benchmarks.sweep.executors._executor import Executor, Job, JobResult
from dsc_split.benchmarks.sweep.executors._table import EXECUTORS
from dsc_split.engines.side._batches import choose_batches
from dsc_split.engines.side._fit import fit_here
from dsc_split.engines.side._load import SideEngines
from dsc_split.engines.side._sides import SIDES, record_target
from dsc_split.errors import BackendError, UsageError
from dsc_split.lookup_table import Side

if TYPE_CHECKING:
    from dsc_split.bundle import Bundle

__all__ = ["BenchResult", "bench_bundle"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """The result of :func:`bench_bundle`."""

    measured: dict[str, Side]
    """By side: the target that was measured, and its run fingerprint."""
    batches: tuple[int, ...]
    """Batch sizes that were measured."""
    cells: tuple[Cell, ...]
    """Every cell that was asked for, reused ones first."""
    reused: int
    """How many cells were there already, and precise enough."""

    @property
    def targets(self) -> dict[str, str]:
        """By side: the target that was measured."""
        return {side: part.target for side, part in self.measured.items()}

    @property
    def counts(self) -> dict[str, int]:
        """Number of cells by status."""
        found = Counter(cell.status for cell in self.cells)
        return {status: found[status] for status in STATUSES}

    @property
    def marked(self) -> tuple[Cell, ...]:
        """Cells whose GPU was throttled, or whose clock moved."""
        return tuple(cell for cell in self.cells if cell.marks)

    @property
    def loosest_interval(self) -> float:
        """Largest half-width of a 95 % confidence interval, as a share of its median."""
        measured = [cell.latency_ms for cell in self.cells if cell.latency_ms and cell.latency_ms.median]
        return max((latency.ci[1] / latency.median - 1 for latency in measured), default=0.0)

    def to_json(self) -> dict[str, object]:
        """Return the result without raw samples."""
        named = ("graph", "target", "batch", "status", "reason", "latency_ms", "compute_ms", "emulated", "marks")
        return {
            "targets": self.targets,
            "batches": list(self.batches),
            "counts": self.counts,
            "reused": self.reused,
            "cells": [{name: to_document(getattr(cell, name)) for name in named} for cell in self.cells],
        }


def bench_bundle(
    bundle: Bundle,
    *,
    sides: Sequence[str] | None = None,
    device: str | None = None,
    server: str | None = None,
    batches: Sequence[int] | None = None,
    settings: BenchSettings | None = None,
    stale: bool = False,
    fallback: bool = False,
    executor: Executor | None = None,
    progress: ProgressListener = silent,
) -> BenchResult:
    """Time every engine of a bundle at every batch size, host to host, and write one cell for each.

    A cell is written as soon as it is done, so a run that was stopped can continue. Existing cells that are precise
    enough are reused; the others are continued.

    Args:
        bundle: The bundle; it is locked meanwhile.
        sides: The sides to measure; default: both, or that of the part if the bundle is the part of one side.
        device: Target of the device; default: the last one recorded for it, else ``onnxruntime:cpu``.
        server: The same for the server.
        batches: Batch sizes; default: 1, 2, 4 ... 64, as far as the model takes them.
        settings: How to measure.
        stale: Measure only the sides whose times in the bundle's table do not hold here: they are from a machine of
            another kind, or from another driver, version or power mode. Targets and batch sizes are by default those
            of the table.
        fallback: Measure the ONNX pair on ONNX Runtime if a target's engines cannot run here.
        executor: Runs the jobs; default: this machine, in child processes.
        progress: Called when a cell is done, and when another engine is timed.

    Raises:
        UsageError: A side, target, batch size or clock is unknown or out of range, the bundle is packed, or it is the
            part of the other side.
        BackendUnavailable: A back-end's library or its device is missing.
        BackendError: The clock cannot be locked.
        BundleError: A graph is missing or was changed.
        BundleBusyError: Another command is writing the bundle.
        DscError: A cell cannot be written.
    """
    settings = settings or BenchSettings()
    if stale and sides is None and bundle.manifest.side is None:
        raise UsageError(
            f"{str(bundle.path)!r} has both sides, and this machine may be one of them alone: say which one is to be "
            "timed again here, --side device or --side server, or --side both for one machine."
        )
    sides = _choose_sides(bundle, sides)
    given = {"device": device, "server": server}
    table = bundle.table() if stale else None
    if table is not None:
        given = {"device": device or table.device.target, "server": server or table.server.target}
        batches = [item.batch for item in table.batches] if batches is None else batches
    with bundle.lock():
        if stale:
            sides = [side for side in sides if not fit_here(bundle, side, given[side]).timing_valid]
            if not sides:
                return BenchResult(measured={}, batches=(), cells=(), reused=0)
        engines = {side: _open_engines(bundle, side, given[side], fallback=fallback) for side in SIDES if side in sides}
        found = {side: measured_side(item.backend, settings) for side, item in engines.items()}
        chosen = choose_batches(bundle, batches if batches is not None else _built_batches(engines.values()))
        _require_gpu(settings, engines.values())
        store = CellStore(bundle)
        store.remove_partial()
        with locked_clocks(settings.lock_clocks_mhz):
            for side, item in engines.items():
                record_target(bundle, side, item.backend)
            jobs, reused, earlier = make_jobs(bundle, store, engines, chosen, settings)
            sweep = _Sweep(store, settings, executor or EXECUTORS["local"](), len(reused), earlier, progress)
            cells = sweep.run(jobs)
    return BenchResult(
        measured=found,
        batches=chosen,
        cells=(*reused, *cells),
        reused=len(reused),
    )


def _open_engines(bundle: Bundle, side: str, target: str | None, *, fallback: bool) -> SideEngines:
    """Open a side's engines, and load one if that shows whether to fall back."""
    found = SideEngines(bundle, side, target, fallback=fallback)
    if fallback:
        graph = found.graphs[0]
        with contextlib.suppress(BackendError):  # a cell will report it
            found.load(graph, found.nearest_batch(graph, 1)).close()
    return found


def _choose_sides(bundle: Bundle, sides: Sequence[str] | None) -> Sequence[str]:
    """Return the sides to measure.

    Raises:
        UsageError: One is unknown, or the bundle is the part of the other side.
    """
    only = bundle.manifest.side
    if sides is None:
        return SIDES if only is None else (only,)
    wrong = [side for side in sides if side not in SIDES]
    if wrong or not sides:
        raise UsageError(f"side {sides[0] if sides else ''!r} is unknown; both, device or server was expected.")
    other = [side for side in sides if only not in (None, side)]
    if other:
        raise UsageError(
            f"{str(bundle.path)!r} is the {only}'s part of a bundle: it has not what the {other[0]} runs. "
            f"Time this side, --side {only}, and the {other[0]} with its own part."
        )
    return sides


def _built_batches(engines: Iterable[SideEngines]) -> tuple[int, ...] | None:
    """Return the batch sizes that all engines were built for; ``None`` if no engine is built in advance.

    Raises:
        UsageError: There is no such batch size.
    """
    built = [set(found.backend.options.batches) for found in engines if found.backend.options is not None]
    if not built:
        return None
    common = set.intersection(*built)
    if not common:
        raise UsageError("the engines of device and server have no batch size in common. Build them again: --batches")
    return tuple(sorted(common))


def _require_gpu(settings: BenchSettings, engines: Collection[SideEngines]) -> None:
    """Refuse to lock the clock if no target runs on a GPU."""
    backends = [found.backend for found in engines]
    if settings.lock_clocks_mhz is None or any("gpu" in backend.run_fingerprint() for backend in backends):
        return
    targets = ", ".join(repr(str(backend.target)) for backend in backends)
    raise UsageError(f"a clock is to be locked, but no target runs on a GPU: {targets}. Leave --lock-clocks out.")


class _Sweep:
    """One run over all jobs."""

    def __init__(
        self,
        store: CellStore,
        settings: BenchSettings,
        executor: Executor,
        reused: int,
        earlier: Mapping[Question, Cell],
        progress: ProgressListener,
    ) -> None:
        self._store = store
        self._settings = settings
        self._executor = executor
        self._reused = reused
        self._earlier = earlier
        self._progress = progress
        self._cells: dict[Question, Cell] = {}
        self._total = reused

    def run(self, jobs: Sequence[Job]) -> list[Cell]:
        """Run all jobs, and return their cells; each is written when its result arrives."""
        if not jobs:
            return []
        logger.info("%d cells to measure, %d reused", len(jobs), self._reused)
        self._total = self._reused + len(jobs)
        with contextlib.closing(self._executor.run(jobs, self._announce)) as results:
            for result in results:
                self._write_cell(result)
        left = [job.label for job in jobs if job.question not in self._cells]
        if left:
            raise BackendError(f"the executor gave no result for {', '.join(left)}. Run it again.")
        self._announce(jobs[-1])
        return list(self._cells.values())

    def _announce(self, job: Job) -> None:
        done = self._reused + len(self._cells)
        self._progress(Progress(stage="bench", label=f"{job.side}: {job.label}", done=done, total=self._total))

    def _write_cell(self, result: JobResult) -> None:
        """Write a result's cell; it is written again if the engine is timed again beside others.

        An error does not replace a cell of an earlier run that has times: it only means that it was not continued.
        """
        question = result.job.question
        earlier = self._earlier.get(question)
        if result.status not in MEASURED_STATUSES and earlier is not None and earlier.latency_ms:
            logger.warning("%s: its cell stays as it was: %s: %s", result.job.label, result.status, result.reason)
            self._cells[question] = earlier
            return
        cell = make_cell(result, self._settings)
        self._store.put(cell)
        self._cells[question] = cell
