"""Measure the memory of loaded engines: each alone, all together, and the sets that are asked for."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from dsc_split._support.child import Child, ChildOptions
from dsc_split._support.memory import default_memory_limit_bytes
from dsc_split._support.progress import Progress, ProgressListener, silent
from dsc_split.benchmarks.memory._reports import (
    MEASURED,
    EngineMemory,
    MemoryReport,
    SetMemory,
    builder_memory,
    choice_name,
    save_memory,
)
from dsc_split.benchmarks.memory._worker import HeldMemory, Residency
from dsc_split.engines import SideEngines, Target, choose_batches
from dsc_split.engines._fingerprint import fingerprint_digest
from dsc_split.engines.side._sides import last_target
from dsc_split.errors import (
    BackendError,
    BackendUnavailable,
    DscError,
    EngineFileError,
    EngineMismatch,
    OutOfMemoryError,
    TableError,
    UsageError,
)

if TYPE_CHECKING:
    from dsc_split.bundle import Bundle
    from dsc_split.engines.side._sides import SideGraph

__all__ = ["measure_memory"]

logger = logging.getLogger(__name__)

TIME_LIMIT_S = 3600.0
"""Seconds that loading and running engines may take."""
NOTHING: HeldMemory = {"resident_bytes": None, "gpu_bytes": None, "load_ms": None, "first_run_ms": None}
"""The numbers of an engine that could not run."""


def measure_memory(
    bundle: Bundle,
    side: str,
    *,
    target: str | None = None,
    batch: int | None = None,
    sets: Sequence[Collection[str]] = (),
    progress: ProgressListener = silent,
) -> MemoryReport:
    """Measure the memory of a side's engines after one run, and write a report into the bundle.

    Every engine is measured alone and all are measured together, each time in a new process. If nothing can run here,
    the numbers are those of the engines' builder, from the manifest.

    Args:
        bundle: The bundle; it is locked meanwhile.
        side: ``device`` or ``server``.
        target: Runs the engines; default: the side's last recorded target, else ``onnxruntime:cpu``.
        batch: Batch size of the run; default: the largest one of the bundle's table, else the largest that the model
            takes. An engine that runs out of memory runs half as many, and so on.
        sets: Further sets to measure, as names of choices.
        progress: Called when a process starts.

    Raises:
        UsageError: The side, the target, a batch size or a choice is unknown, or nothing was built for the target.
        BackendUnavailable: The target is not available here, and the manifest has no numbers.
        EngineMismatch: The engines do not fit here, and the manifest has no numbers.
        BackendError: No engine could run.
        BundleBusyError: Another command is writing the bundle.
    """
    with bundle.lock():
        try:
            engines = SideEngines(bundle, side, target)
            run_fingerprint = engines.backend.run_fingerprint()
            options = engines.backend.options
            batch = _choose_batch(bundle, batch, None if options is None else options.batches)
            measured, together = _Measurement(bundle, side, engines, progress).run(batch, sets)
        except (BackendUnavailable, EngineMismatch) as e:
            name = last_target(bundle, side) if target is None else str(Target.parse(target))
            told = builder_memory(bundle, side, name, batch)
            if told is None:
                raise
            logger.info("nothing runs here (%s): the numbers are those of the builder", e)
            return told
        report = MemoryReport(
            pair_id=bundle.manifest.pair_id,
            side=side,
            target=str(engines.backend.target),
            fingerprint=fingerprint_digest(run_fingerprint),
            run_fingerprint=run_fingerprint,
            engines=measured,
            sets=together,
        )
        save_memory(bundle, report)
    return report


def _choose_batch(bundle: Bundle, asked: int | None, built: Sequence[int] | None) -> int:
    """Return the batch size to run: as asked, else the largest of the table, of those built for, or of the default."""
    if asked is not None:
        return choose_batches(bundle, [asked])[-1]
    try:
        return bundle.table().batches[-1].batch
    except (TableError, UsageError):  # there is none, it is damaged, or it is of other pairs
        return choose_batches(bundle, built)[-1]


class _Measurement:
    """Measures all engines of a side."""

    def __init__(self, bundle: Bundle, side: str, engines: SideEngines, progress: ProgressListener) -> None:
        self._bundle = bundle
        self._side = side
        self._target = str(engines.backend.target)
        self._graphs = {choice_name(graph, side): graph for graph in engines.graphs}
        self._progress = progress
        self._done = 0
        self._total = 0

    def run(
        self, batch: int, sets: Sequence[Collection[str]]
    ) -> tuple[tuple[EngineMemory, ...], tuple[SetMemory, ...]]:
        """Measure every engine, all together, and the sets.

        Raises:
            UsageError: A set names a choice that has no engine on this side.
            BackendError: No engine could run.
        """
        for name in (name for names in sets for name in names):
            if name not in self._graphs:
                known = ", ".join(map(repr, self._graphs))
                raise UsageError(f"choice {name!r} has no engine on side {self._side!r}; that has {known}.")
        self._total = len(self._graphs) + 1 + len(sets)
        engines = tuple(self._measure_alone(name, graph, batch) for name, graph in self._graphs.items())
        there = {engine.choice: engine for engine in engines if engine.memory_bytes is not None}
        if not there:
            reasons = "; ".join(f"{engine.choice}: {engine.reason}" for engine in engines)
            raise BackendError(f"no engine of the {self._side} could be run. {reasons or 'It has none.'}")
        wanted: dict[frozenset[str], None] = dict.fromkeys([frozenset(there), *map(frozenset, sets)])
        held = [
            self._measure_together([there[name] for name in there if name in names])
            for names in wanted
            if len(names) > 1
        ]
        return engines, tuple(item for item in held if item is not None)

    def _measure_alone(self, name: str, graph: SideGraph, batch: int) -> EngineMemory:
        """Measure one engine, at the largest batch size that fits into memory."""
        answer, reason = NOTHING, ""
        try:
            answer, batch = self._ask_halving(graph, batch)
        except (BackendUnavailable, EngineFileError):
            raise
        except DscError as e:
            reason = str(e)
        return EngineMemory(
            choice=name,
            graph=graph.path,
            graph_digest=self._bundle.graph_digest(graph.path),
            batch=batch,
            resident_bytes=answer["resident_bytes"],
            gpu_bytes=answer["gpu_bytes"],
            load_ms=answer["load_ms"],
            first_run_ms=answer["first_run_ms"],
            source=MEASURED,
            reason=reason,
        )

    def _ask_halving(self, graph: SideGraph, batch: int) -> tuple[HeldMemory, int]:
        self._announce(graph.label)
        while True:
            try:
                return self._ask([(graph.path, batch)]), batch
            except OutOfMemoryError:
                if batch == 1 or self._bundle.fixed_batch is not None:
                    raise
                batch //= 2

    def _measure_together(self, engines: Sequence[EngineMemory]) -> SetMemory | None:
        """Measure a set of engines; ``None`` if they do not fit into memory together."""
        names = tuple(engine.choice for engine in engines)
        self._announce(", ".join(names))
        try:
            answer = self._ask([(engine.graph, engine.batch) for engine in engines])
        except OutOfMemoryError as e:
            logger.warning("%s cannot be kept loaded together: %s", ", ".join(names), e)
            return None
        return SetMemory(
            choices=names, resident_bytes=answer["resident_bytes"], gpu_bytes=answer["gpu_bytes"], source=MEASURED
        )

    def _announce(self, label: str) -> None:
        self._progress(Progress(stage=f"memory {self._side}", label=label, done=self._done, total=self._total))
        self._done += 1

    def _ask(self, engines: Sequence[tuple[str, int]]) -> HeldMemory:
        """Load and run engines in a new process, and return their memory.

        Raises:
            DscError: It failed or died; OutOfMemoryError if memory was too small.
        """
        options = ChildOptions(
            label="the process that held the engines",
            memory_limit_bytes=default_memory_limit_bytes(),
            time_limit_s=TIME_LIMIT_S,
        )
        with Child(options, Residency, str(self._bundle.path), self._side, self._target) as child:
            return child.ask(Residency.hold, engines)
