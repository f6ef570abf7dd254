"""What a benchmark has to measure: settings, batch sizes, and one task per cell that is not there yet."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dsc_split._support.numbers import number
from dsc_split.benchmarks.cells._caveats import find_marks
from dsc_split.benchmarks.cells._cells import Cell, CellStore, Question
from dsc_split.benchmarks.sweep._statistics import MIN_ROUNDS, MIN_ROUNDS_AT_LIMIT, is_precise, summarise
from dsc_split.benchmarks.sweep._timer import TIMER
from dsc_split.engines._fingerprint import fingerprint_digest
from dsc_split.engines.side._sides import SideGraph
from dsc_split.lookup_table import Side

if TYPE_CHECKING:
    from dsc_split.bundle import Bundle
    from dsc_split.engines import BackendLike, SideEngines

__all__ = ["ROUND_MS", "BenchSettings", "Task", "make_tasks", "measured_side"]

ROUND_MS = 50.0
"""A round has as many calls as fit into this time, and at least one."""
MAX_CALLS = 200
"""A round has at most this many calls: every one of them is stored."""
MAX_PACED_ROUND_MS = 500.0
"""A round of paced calls lasts about this long at most."""
MAX_WARM_UP_MS = 2000.0
LOCKED = "locked_sm_clock_mhz"
"""Key of the run fingerprint."""


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """How to measure."""

    precision_goal: float = 0.02
    """Largest half-width of a cell's 95 % confidence interval, as a share of its median."""
    time_limit_s: float = 10.0
    """Seconds after which a cell is done in any case; only its own calls count."""
    period_ms: float | None = None
    """Milliseconds between the starts of two calls, as a camera would ask; ``None``: at once."""
    memory_limit_bytes: int | None = None
    """Memory of the engines that are timed together; ``None``: 80 % of what is free."""
    again: bool = False
    """Measure anew what has been measured already."""
    lock_clocks_mhz: int | None = None
    """Clock in MHz at which the GPU's SMs are held; ``None``: they go their own way."""

    def __post_init__(self) -> None:
        """Refuse numbers out of range.

        Raises:
            UsageError: A number is not finite, or not above zero.
        """
        for name in ("precision_goal", "time_limit_s", "period_ms", "memory_limit_bytes", "lock_clocks_mhz"):
            value = getattr(self, name)
            if value is not None:
                number(name, value, above=0.0, most=sys.float_info.max, expected="a finite number above 0 was expected")

    @property
    def warm_up_ms(self) -> float:
        """Milliseconds that a warm-up may take, two calls excepted."""
        return min(MAX_WARM_UP_MS, 250.0 * self.time_limit_s)


@dataclass(kw_only=True)
class Task:
    """One cell that is being measured. It collects rounds, possibly on top of those of an earlier run."""

    side: str
    """The side that asked for it first."""
    graph: SideGraph
    """What the engine computes."""
    target: str
    """Canonical text of the target."""
    slowdown: float
    """Declared emulation; 1 where there is none."""
    threads: int | None
    """Threads that the target asks for."""
    run_fingerprint: dict[str, Any]
    """What the timing depends on."""
    question: Question
    """What the cell answers."""
    earlier: Cell | None = None
    """What an earlier run wrote; ``None`` where there is nothing, or it is to be measured anew."""
    rounds: list[dict[str, Any]] = field(default_factory=list)
    """Rounds so far, those of an earlier run first."""
    busy_s: float = 0.0
    """Seconds spent on its rounds in this run."""
    warm_up: dict[str, Any] = field(default_factory=dict)
    """How its last warm-up went."""
    start: dict[str, Any] = field(default_factory=dict)
    """State of the machine when it was loaded."""
    device_state: dict[str, Any] = field(default_factory=dict)
    """State of the device after its last warm-up; empty where the back-end does not tell."""
    engine: dict[str, Any] = field(default_factory=dict)
    """What the engine says about itself."""
    next_check: int = MIN_ROUNDS
    """Rounds at which precision is judged next: looking less often is cheaper, and more honest."""
    failures: int = 0
    """How often it failed in this run, for another reason than memory."""
    done: bool = False
    """Whether its cell has been written."""

    @property
    def label(self) -> str:
        """What is being measured, in words."""
        return f"{self.graph.label}, batch {self.question.batch}"

    def calls(self, settings: BenchSettings) -> int:
        """Count the calls of its next round."""
        call_ms = max(float(self.warm_up["call_ms"]), 1e-6)
        count = max(1, min(MAX_CALLS, round(ROUND_MS / call_ms)))
        if settings.period_ms is not None:
            count = max(1, min(count, round(MAX_PACED_ROUND_MS / settings.period_ms)))
        return count

    def verdict(self, settings: BenchSettings) -> tuple[str, str] | None:
        """Say how the cell ended, as status and reason; ``None`` while it needs more rounds."""
        at_limit = self.busy_s >= settings.time_limit_s
        if not at_limit and len(self.rounds) < self.next_check:
            return None
        self.next_check = len(self.rounds) + max(1, len(self.rounds) // 8)
        samples_ms = [item["samples_ms"] for item in self.rounds]
        if is_precise(samples_ms, settings.precision_goal, at_limit=at_limit):
            return "ok", "precision reached"
        if at_limit and len(samples_ms) >= MIN_ROUNDS_AT_LIMIT:
            return "unstable", "time limit"
        return None

    def cell(self, status: str, reason: str, settings: dict[str, Any], environment: dict[str, Any]) -> Cell:
        """Make the cell from what was collected."""
        measured = status in ("ok", "unstable")
        emulated = None
        if self.slowdown > 1:
            how = f"statistics multiplied by {self.slowdown:g}; raw samples are as measured"
            emulated = {"slowdown": self.slowdown, "how": how}
        latency_ms = None
        if measured:
            first = [sample for item in self.rounds for sample in item["first_after_pause_ms"]]
            latency_ms = summarise([item["samples_ms"] for item in self.rounds], first, self.slowdown)
        return Cell(
            question=self.question,
            graph=self.graph.path,
            target=self.target,
            run_fingerprint=self.run_fingerprint,
            emulated=emulated,
            status=status,
            reason=reason,
            latency_ms=latency_ms,
            compute_ms=self._compute_ms() if measured else None,
            rounds=tuple(self.rounds) if measured else (),
            settings={**settings, "threads": self.threads, "warm_up": self.warm_up},
            environment={**environment, **self._environment(environment)},
        )

    def _compute_ms(self) -> dict[str, Any] | None:
        """Summarise what the engine computed between its events; ``None`` where it does not tell."""
        rounds = [item["compute_ms"] for item in self.rounds if item.get("compute_ms")]
        if len(rounds) < MIN_ROUNDS_AT_LIMIT:
            return None
        statistics = summarise(rounds, [], self.slowdown)
        return {name: statistics[name] for name in ("n", "median", "p95", "ci")}

    def _environment(self, environment: dict[str, Any]) -> dict[str, Any]:
        """Give what is known about the device and the engine, with the state of the machine around it."""
        during = [item["device_state"] for item in self.rounds if "device_state" in item]
        states = [state for state in (self.device_state, *during) if state]
        around = {"start": self.start, "end": environment["end"]}
        if states:
            around = {"start": {**self.start, "gpu": states[0]}, "end": {**environment["end"], "gpu": states[-1]}}
        locked_mhz = self.run_fingerprint.get(LOCKED)
        return {**around, "engine": self.engine, "marks": find_marks(states, locked_mhz)}


def describe(settings: BenchSettings, memory_limit_bytes: int) -> dict[str, Any]:
    """Give the settings as they are recorded with every cell."""
    return {
        "precision_goal": settings.precision_goal,
        "time_limit_s": settings.time_limit_s,
        "period_ms": settings.period_ms,
        "memory_limit_bytes": memory_limit_bytes,
        "lock_clocks_mhz": settings.lock_clocks_mhz,
        "warm_up_limit_ms": settings.warm_up_ms,
        "round_ms": ROUND_MS,
        "min_rounds": MIN_ROUNDS,
        "timer": TIMER,
        "first_call_of_a_round": "not a sample: it finds the traces of another engine",
        "inputs": "golden samples, repeated up to the batch size",
    }


def with_locked_clock(fingerprint: dict[str, Any], settings: BenchSettings) -> dict[str, Any]:
    """Put the locked clock into the run fingerprint of a target that runs on a GPU."""
    if settings.lock_clocks_mhz is None or "gpu" not in fingerprint:
        return fingerprint
    return {**fingerprint, LOCKED: settings.lock_clocks_mhz}


def measured_side(backend: BackendLike, settings: BenchSettings) -> Side:
    """Give the target of a back-end, and the run fingerprint that it is measured under."""
    fingerprint = with_locked_clock(backend.run_fingerprint(), settings)
    digest = fingerprint_digest(fingerprint)
    return Side(target=str(backend.target), fingerprint=digest, run_fingerprint=fingerprint)


def make_tasks(
    bundle: Bundle,
    store: CellStore,
    engines: dict[str, SideEngines],
    batches: Sequence[int],
    settings: BenchSettings,
) -> tuple[list[Task], list[Cell]]:
    """List what is to be measured, and the cells that are there already and good enough.

    Args:
        bundle: The bundle.
        store: Its cells.
        engines: The engines of each side that takes part.
        batches: Batch sizes.
        settings: How to measure.

    Returns:
        Tasks in the order in which they run, each question once; and the cells that are reused.
    """
    tasks: dict[Question, Task] = {}
    reused: dict[Question, Cell] = {}
    for side, found in engines.items():
        backend = found.backend
        part = measured_side(backend, settings)
        for batch in batches:
            for graph in found.graphs:
                question = Question(
                    graph_digest=bundle.graph_digest(graph.path),
                    fingerprint=part.fingerprint,
                    batch=batch,
                    period_ms=settings.period_ms,
                )
                if question in tasks or question in reused:
                    continue
                cell = None if settings.again else store.get(question)
                if cell is not None and _is_final(cell, settings):
                    reused[question] = cell
                    continue
                tasks[question] = Task(
                    side=side,
                    graph=graph,
                    target=part.target,
                    slowdown=backend.target.slowdown,
                    threads=backend.target.threads,
                    run_fingerprint=dict(part.run_fingerprint or {}),
                    question=question,
                    earlier=cell,
                    rounds=list(cell.rounds) if cell is not None else [],
                )
    return list(tasks.values()), list(reused.values())


def _is_final(cell: Cell, settings: BenchSettings) -> bool:
    """Tell whether a cell answers its question as well as is asked.

    Memory that ended is final, unless more of it is allowed now than then.
    """
    if cell.status == "out-of-memory":
        allowed_bytes = settings.memory_limit_bytes
        return allowed_bytes is None or allowed_bytes <= cell.settings["memory_limit_bytes"]
    return cell.status == "ok" and is_precise(cell.samples_ms, settings.precision_goal, at_limit=True)
