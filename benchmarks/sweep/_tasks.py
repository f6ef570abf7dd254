"""The tasks of a benchmark: settings, one job for each missing cell, and the cell of its result."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from msgspec import UnsetType

from dsc_split._support.numbers import number
from dsc_split._support.records import read_record
from dsc_split.benchmarks.cells._caveats import find_marks
from dsc_split.benchmarks.cells._cells import (
    MEASURED_STATUSES,
    Cell,
    CellEnvironment,
    CellSettings,
    CellStore,
    Question,
    Round,
    Statistics,
)
from dsc_split.benchmarks.sweep._statistics import (
    MIN_ROUNDS,
    MIN_ROUNDS_AT_LIMIT,
    is_precise,
    summarise,
    summarise_compute,
)
from dsc_split.benchmarks.sweep._timer import ROUND_MS, TIMER, warm_up_limit_ms
from dsc_split.benchmarks.sweep.executors._executor import Job, JobResult
from dsc_split.engines._fingerprint import LOCKED_CLOCK, fingerprint_digest
from dsc_split.engines._target import Target
from dsc_split.lookup_table import Side

if TYPE_CHECKING:
    from dsc_split.bundle import Bundle
    from dsc_split.engines import BackendLike, SideEngines

__all__ = ["BenchSettings", "make_cell", "make_jobs", "measured_side"]


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """How to measure."""

    precision_goal: float = 0.02
    """Largest half-width of a cell's 95 % confidence interval, as a share of its median."""
    time_limit_s: float = 10.0
    """Seconds after which a cell ends, precise or not; only its own calls count."""
    period_ms: float | None = None
    """Milliseconds between the starts of two calls, as of a camera; ``None``: each starts right after the last."""
    memory_limit_bytes: int | None = None
    """Memory of the engines that are timed together; ``None``: 80 % of the free memory."""
    again: bool = False
    """Measure again what is measured already."""
    lock_clocks_mhz: int | None = None
    """Clock in MHz to lock the GPU's SMs at; ``None``: do not lock it."""

    def __post_init__(self) -> None:
        """Refuse numbers out of range.

        Raises:
            UsageError: A number is not finite, or not above 0.
        """
        for name in ("precision_goal", "time_limit_s", "period_ms", "memory_limit_bytes", "lock_clocks_mhz"):
            value = getattr(self, name)
            if value is not None:
                number(name, value, above=0.0, most=sys.float_info.max, expected="a finite number above 0 was expected")


def with_locked_clock(fingerprint: dict[str, object], settings: BenchSettings) -> dict[str, object]:
    """Add the locked clock to the run fingerprint of a target that runs on a GPU."""
    if settings.lock_clocks_mhz is None or "gpu" not in fingerprint:
        return fingerprint
    return {**fingerprint, LOCKED_CLOCK: settings.lock_clocks_mhz}


def measured_side(backend: BackendLike, settings: BenchSettings) -> Side:
    """Return the target of a back-end, and its run fingerprint with the locked clock."""
    fingerprint = with_locked_clock(backend.run_fingerprint(), settings)
    digest = fingerprint_digest(fingerprint)
    return Side(target=str(backend.target), fingerprint=digest, run_fingerprint=fingerprint)


def make_jobs(
    bundle: Bundle,
    store: CellStore,
    engines: dict[str, SideEngines],
    batches: Sequence[int],
    settings: BenchSettings,
) -> tuple[list[Job], list[Cell], dict[Question, Cell]]:
    """List the cells to measure, and those that are there already.

    Args:
        bundle: The bundle.
        store: Its cells.
        engines: The engines of each side that takes part.
        batches: Batch sizes.
        settings: How to measure.

    Returns:
        Jobs, small batches first and each question once; cells that are precise enough; and the other cells, which
        are to be continued, by question.
    """
    jobs: dict[Question, Job] = {}
    reused: dict[Question, Cell] = {}
    earlier: dict[Question, Cell] = {}
    for side, found in engines.items():
        part = measured_side(found.backend, settings)
        for batch in batches:
            for graph in found.graphs:
                question = Question(
                    graph_digest=bundle.graph_digest(graph.path),
                    fingerprint=part.fingerprint,
                    batch=batch,
                    period_ms=settings.period_ms,
                )
                if question in jobs or question in reused:
                    continue
                cell = None if settings.again else store.get(question)
                if cell is not None and _is_final(cell, settings):
                    reused[question] = cell
                    continue
                if cell is not None:
                    earlier[question] = cell
                jobs[question] = Job(
                    bundle=bundle.path,
                    graph=graph.path,
                    graph_label=graph.label,
                    side=side,
                    target=part.target,
                    run_fingerprint=part.run_fingerprint or {},
                    question=question,
                    precision_goal=settings.precision_goal,
                    time_limit_s=settings.time_limit_s,
                    memory_limit_bytes=settings.memory_limit_bytes,
                    earlier_rounds=cell.rounds if cell is not None else (),
                    out_of_memory_at=_out_of_memory_at(question, reused.values()),
                )
    return list(jobs.values()), list(reused.values()), earlier


def make_cell(result: JobResult, settings: BenchSettings) -> Cell:
    """Make the cell of a result."""
    job, measured = result.job, result.status in MEASURED_STATUSES
    target = Target.parse(job.target)
    emulated = None
    if target.slowdown > 1:
        how = f"statistics multiplied by {target.slowdown:g}; raw samples are as measured"
        emulated = {"slowdown": target.slowdown, "how": how}
    latency_ms = None
    if measured:
        first = [sample for item in result.rounds for sample in item.first_after_pause_ms]
        latency_ms = summarise([item.samples_ms for item in result.rounds], first, target.slowdown)
    return Cell(
        question=job.question,
        graph=job.graph,
        target=job.target,
        run_fingerprint=dict(job.run_fingerprint),
        emulated=emulated,
        status=result.status,
        reason=result.reason,
        latency_ms=latency_ms,
        compute_ms=_compute_ms(result.rounds, target.slowdown) if measured else None,
        rounds=result.rounds if measured else (),
        settings=CellSettings(
            precision_goal=settings.precision_goal,
            time_limit_s=settings.time_limit_s,
            period_ms=settings.period_ms,
            memory_limit_bytes=result.memory_limit_bytes,
            lock_clocks_mhz=settings.lock_clocks_mhz,
            warm_up_limit_ms=warm_up_limit_ms(settings.time_limit_s),
            round_ms=ROUND_MS,
            min_rounds=MIN_ROUNDS,
            timer=TIMER,
            first_call_of_a_round="not a sample: it finds the traces of another engine",
            inputs="golden samples, repeated up to the batch size",
            threads=target.threads,
            warm_up=dict(result.warm_up),
        ),
        environment=_describe_environment(result),
    )


def _compute_ms(rounds: Sequence[Round], slowdown: float) -> Statistics | None:
    """Summarise the times between the engine's events; ``None`` if it has none."""
    told = [item.compute_ms for item in rounds if not isinstance(item.compute_ms, UnsetType) and item.compute_ms]
    return summarise_compute(told, slowdown) if len(told) >= MIN_ROUNDS_AT_LIMIT else None


def _describe_environment(result: JobResult) -> CellEnvironment:
    """Return the facts about machine, device and engine, and their state before and after."""
    during = [item.device_state for item in result.rounds if not isinstance(item.device_state, UnsetType)]
    states = [state for state in (dict(result.device_state), *during) if state]
    start, end = dict(result.start), dict(result.end)
    if states:
        start["gpu"], end["gpu"] = states[0], states[-1]
    locked_mhz = result.job.run_fingerprint.get(LOCKED_CLOCK)
    marks = find_marks(states, locked_mhz if isinstance(locked_mhz, int) else None)
    around = {"start": start, "end": end, "engine": dict(result.engine), "marks": marks}
    return read_record({**result.machine, **around}, CellEnvironment)


def _out_of_memory_at(question: Question, cells: Iterable[Cell]) -> int | None:
    """Return the smallest batch size at which a question's engine ran out of memory; ``None`` if it did not."""
    ends = [
        cell.batch
        for cell in cells
        if cell.status == "out-of-memory"
        and cell.question.graph_digest == question.graph_digest
        and cell.question.fingerprint == question.fingerprint
    ]
    return min(ends, default=None)


def _is_final(cell: Cell, settings: BenchSettings) -> bool:
    """Return whether a cell needs no more measuring.

    "Out of memory" is final, unless more memory is allowed now.
    """
    if cell.status == "out-of-memory":
        allowed_bytes = settings.memory_limit_bytes
        return allowed_bytes is None or allowed_bytes <= cell.settings.memory_limit_bytes
    return cell.status == "ok" and is_precise(cell.samples_ms, settings.precision_goal, at_limit=True)
