"""Measure every engine of a bundle at every batch size."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsc_split._progress import Progress, ProgressListener, silent
from dsc_split.benchmarks._cells import STATUSES, Cell, CellStore
from dsc_split.benchmarks._clocks import locked_clocks
from dsc_split.benchmarks._environment import available_memory_bytes, live_state, static_environment
from dsc_split.benchmarks._group import Group
from dsc_split.benchmarks._plan import BenchSettings, Task, describe, make_tasks
from dsc_split.engines._batches import choose_batches
from dsc_split.engines._side_engines import SideEngines
from dsc_split.engines._sides import SIDES, record_target
from dsc_split.errors import UsageError

if TYPE_CHECKING:
    from dsc_split.bundle import Bundle

__all__ = ["BenchResult", "bench_bundle"]

logger = logging.getLogger(__name__)

MEMORY_SHARE = 0.8
"""Share of the free memory that engines may hold, where no limit is given."""


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """What :func:`bench_bundle` did."""

    targets: dict[str, str]
    """Side to the target that was measured."""
    batches: tuple[int, ...]
    """Batch sizes that were measured."""
    cells: tuple[Cell, ...]
    """Every cell that was asked for, reused ones first."""
    reused: int
    """How many were there already and good enough."""

    @property
    def counts(self) -> dict[str, int]:
        """Status to the number of cells that ended in it."""
        found = Counter(cell.status for cell in self.cells)
        return {status: found[status] for status in STATUSES}

    @property
    def marked(self) -> tuple[Cell, ...]:
        """Cells whose GPU was throttled, or whose clock moved."""
        return tuple(cell for cell in self.cells if cell.marks)

    @property
    def loosest_interval(self) -> float:
        """Largest half-width of a 95 % confidence interval, as a share of its median."""
        measured = [cell.latency_ms for cell in self.cells if cell.latency_ms and cell.latency_ms["median"]]
        return max((latency["ci"][1] / latency["median"] - 1 for latency in measured), default=0.0)

    def to_json(self) -> dict[str, Any]:
        """Give the result without raw samples."""
        named = ("graph", "target", "batch", "status", "reason", "latency_ms", "compute_ms", "emulated", "marks")
        return {
            "targets": self.targets,
            "batches": list(self.batches),
            "counts": self.counts,
            "reused": self.reused,
            "cells": [{name: getattr(cell, name) for name in named} for cell in self.cells],
        }


def bench_bundle(
    bundle: Bundle,
    *,
    sides: Sequence[str] = SIDES,
    device: str | None = None,
    server: str | None = None,
    batches: Sequence[int] | None = None,
    settings: BenchSettings | None = None,
    progress: ProgressListener = silent,
) -> BenchResult:
    """Time every engine of a bundle, host to host, and write one cell for each and each batch size.

    A cell is written as soon as it is done, so a run that is stopped goes on where it was. Cells that are
    there already and precise enough are reused, looser ones continued.

    Args:
        bundle: The bundle; it is held locked all the while.
        sides: The sides to measure.
        device: Target of the device; the last one recorded for it, else ``onnxruntime:cpu``, where not given.
        server: Target of the server, likewise.
        batches: Batch sizes; 1, 2, 4 ... 64, as far as the model takes them, where not given.
        settings: How to measure.
        progress: Called when a cell is done, and when another engine has its turn.

    Raises:
        UsageError: A side, target, batch size or clock is unknown or out of range.
        BackendUnavailable: A back-end's library or its device is not there.
        BackendError: The clock cannot be locked.
        BundleError: A graph is missing or was changed.
        BundleBusyError: Another command is writing the bundle.
        DscError: A cell cannot be written.
    """
    settings = settings or BenchSettings()
    wrong = [side for side in sides if side not in SIDES]
    if wrong or not sides:
        raise UsageError(f"side {sides[0] if sides else ''!r} is unknown; both, device or server was expected.")
    given = {"device": device, "server": server}
    with bundle.lock():
        engines = {side: SideEngines(bundle, side, given[side]) for side in SIDES if side in sides}
        chosen = choose_batches(bundle, batches if batches is not None else _built_for(engines.values()))
        _require_gpu(settings, engines.values())
        store = CellStore(bundle)
        store.remove_partial()
        with locked_clocks(settings.lock_clocks_mhz):
            for side, found in engines.items():
                record_target(bundle, side, found.backend)
            tasks, reused = make_tasks(bundle, store, engines, chosen, settings)
            cells = _Sweep(bundle, store, settings, tasks, reused, progress).run()
    return BenchResult(
        targets={side: str(found.backend.target) for side, found in engines.items()},
        batches=chosen,
        cells=(*reused, *cells),
        reused=len(reused),
    )


def _built_for(engines: Iterable[SideEngines]) -> tuple[int, ...] | None:
    """Give the batch sizes that all engines were built for; ``None`` where none was built beforehand.

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
    """Refuse to lock the clock where no target runs on a GPU."""
    backends = [found.backend for found in engines]
    if settings.lock_clocks_mhz is None or any("gpu" in backend.run_fingerprint() for backend in backends):
        return
    targets = ", ".join(repr(str(backend.target)) for backend in backends)
    raise UsageError(f"a clock is to be locked, but no target runs on a GPU: {targets}. Leave --lock-clocks out.")


class _Sweep:
    """One run over all tasks."""

    def __init__(
        self,
        bundle: Bundle,
        store: CellStore,
        settings: BenchSettings,
        tasks: Sequence[Task],
        reused: Sequence[Cell],
        progress: ProgressListener,
    ) -> None:
        self._bundle = bundle
        self._store = store
        self._settings = settings
        self._tasks = tasks
        self._progress = progress
        self._reused = len(reused)
        self._memory_limit_bytes = settings.memory_limit_bytes or int(MEMORY_SHARE * available_memory_bytes())
        self._static = static_environment()
        self._cells: dict[str, Cell] = {}
        self._exhausted: dict[tuple[str, str], int] = {}
        """Graph digest and fingerprint to the smallest batch at which memory ended."""
        for cell in reused:
            if cell.status == "out-of-memory":
                self._note_exhausted(cell)

    def run(self) -> list[Cell]:
        """Measure all tasks, small batches first, and give their cells."""
        if self._tasks:
            logger.info("%d cells to measure, %d reused", len(self._tasks), self._reused)
        groups: dict[tuple[str, int], list[Task]] = {}
        for task in self._tasks:
            groups.setdefault((task.question.fingerprint, task.question.batch), []).append(task)
        for tasks in groups.values():
            for task in tasks:
                self._skip_if_exhausted(task)
            group = Group(self._bundle.path, self._settings, self._memory_limit_bytes, self._finish, self._announce)
            group.run(tasks)
        if self._tasks:
            self._announce(self._tasks[-1])
        return list(self._cells.values())

    def _announce(self, task: Task) -> None:
        label = f"{task.side}: {task.label}"
        done, total = self._reused + len(self._cells), self._reused + len(self._tasks)
        self._progress(Progress(stage="bench", label=label, done=done, total=total))

    def _finish(self, task: Task, status: str, reason: str) -> None:
        """Write a task's cell; again, if it was timed again beside others.

        A cell of an earlier run that has times is not given up for an error: it could only not be continued.
        """
        task.done = True
        if status not in ("ok", "unstable") and task.earlier is not None and task.earlier.latency_ms:
            logger.warning("%s: its cell stays as it was: %s: %s", task.label, status, reason)
            self._cells[task.question.key] = task.earlier
            return
        environment = {**self._static, "end": live_state()}
        settings = describe(self._settings, self._memory_limit_bytes)
        cell = task.cell(status, reason, settings, environment)
        self._store.put(cell)
        self._cells[cell.question.key] = cell
        if status == "out-of-memory":
            self._note_exhausted(cell)

    def _note_exhausted(self, cell: Cell) -> None:
        key = (cell.question.graph_digest, cell.question.fingerprint)
        self._exhausted[key] = min(cell.batch, self._exhausted.get(key, cell.batch))

    def _skip_if_exhausted(self, task: Task) -> None:
        """Mark a task whose engine ran out of memory at a smaller batch: a larger one need not be tried."""
        at = self._exhausted.get((task.question.graph_digest, task.question.fingerprint))
        if at is not None and at <= task.question.batch:
            self._finish(task, "out-of-memory", f"out of memory at batch {at} already; this one was not tried")
