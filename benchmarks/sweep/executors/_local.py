"""The executor of this machine: it times engines in child processes.

Engines of one target and batch size form a group. They are loaded in one child process, and one round of each is timed
in turn, so that drift affects all of them alike.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from msgspec import UNSET
from msgspec.structs import replace

from dsc_split._support.child import Child, ChildDied, ChildOptions
from dsc_split._support.memory import default_memory_limit_bytes
from dsc_split._support.records import read_record
from dsc_split.benchmarks.cells._cells import Round
from dsc_split.benchmarks.sweep._environment import live_state, static_environment
from dsc_split.benchmarks.sweep._statistics import MIN_ROUNDS, MIN_ROUNDS_AT_LIMIT, is_precise
from dsc_split.benchmarks.sweep._timer import count_calls, warm_up_limit_ms
from dsc_split.benchmarks.sweep._worker import Bench
from dsc_split.benchmarks.sweep.executors._executor import (
    Job,
    JobResult,
    MemoryEnds,
    no_announcement,
)
from dsc_split.errors import BackendUnavailable, DscError, EngineFileError, OutOfMemoryError

__all__ = ["LocalExecutor"]

logger = logging.getLogger(__name__)

TRIES = 2
"""How often a cell is tried in one run before it counts as failed."""
LOAD_LIMIT_S = 3600.0
"""Seconds that loading an engine and warming it up may take before the child process counts as hung."""
CALL_LIMIT_S = 600.0
"""Seconds that another answer may take, in addition to a hundred times the expected time."""
ENDS_THE_RUN = (BackendUnavailable, EngineFileError)
"""Errors that end the whole run, not only one cell."""


class LocalExecutor:
    """Runs jobs on this machine; only one engine is called at a time."""

    def run(
        self, jobs: Sequence[Job], announce: Callable[[Job], None] = no_announcement
    ) -> Generator[JobResult, None, None]:
        """Run all jobs; see ``Executor``."""
        machine, free_bytes = static_environment(), default_memory_limit_bytes()
        ends = MemoryEnds(jobs)
        groups: dict[tuple[Path, str, int, int], list[Job]] = {}
        for job in jobs:
            limit_bytes = job.memory_limit_bytes or free_bytes
            groups.setdefault((job.bundle, job.question.fingerprint, job.batch, limit_bytes), []).append(job)
        for (*_, limit_bytes), members in groups.items():
            group = _Group(members[0], limit_bytes, machine, announce)
            tasks = []
            for job in members:
                task, reason = _Task(job=job, rounds=list(job.earlier_rounds)), ends.reason(job)
                if reason is None:
                    tasks.append(task)
                else:
                    yield group.finish(task, "out-of-memory", reason)
            for result in group.run(tasks):
                ends.note(result)
                yield result


@dataclass(kw_only=True)
class _Task:
    """A running job. It collects rounds, in addition to those of an earlier run."""

    job: Job
    """The job."""
    rounds: list[Round]
    """Rounds so far, those of an earlier run first."""
    busy_s: float = 0.0
    """Seconds spent on its rounds in this run."""
    call_ms: float = 0.0
    """Milliseconds that one call took at the end of its last warm-up."""
    warm_up: dict[str, object] = field(default_factory=dict)
    """Facts about its last warm-up."""
    start: dict[str, object] = field(default_factory=dict)
    """State of the machine when it was loaded."""
    device_state: dict[str, object] = field(default_factory=dict)
    """State of the device after its last warm-up; empty if the back-end does not report it."""
    engine: dict[str, object] = field(default_factory=dict)
    """Facts that the engine reports."""
    next_check: int = MIN_ROUNDS
    """Number of rounds at which precision is checked next: rare checks cost less and stop by chance less often."""
    failures: int = 0
    """How often it failed in this run."""
    done: bool = False
    """Whether it has a result."""

    def verdict(self) -> tuple[str, str] | None:
        """Return how it ended, as status and reason; ``None`` while it needs more rounds."""
        at_limit = self.busy_s >= self.job.time_limit_s
        if not at_limit and len(self.rounds) < self.next_check:
            return None
        self.next_check = len(self.rounds) + max(1, len(self.rounds) // 8)
        samples_ms = [item.samples_ms for item in self.rounds]
        if is_precise(samples_ms, self.job.precision_goal, at_limit=at_limit):
            return "ok", "precision reached"
        if at_limit and len(samples_ms) >= MIN_ROUNDS_AT_LIMIT:
            return "unstable", "time limit"
        return None


class _Group:
    """All jobs of one target at one batch size.

    As many as fit into memory run together. The others follow in further child processes, each together with one
    engine of the first, which is timed again beside them. A job that fails is tried once more, alone.

    Args:
        job: One of the jobs, for the bundle and the target.
        memory_limit_bytes: Memory limit of the engines of one child process.
        machine: Facts about this machine.
        announce: Called with a job when it starts or continues.
    """

    def __init__(
        self, job: Job, memory_limit_bytes: int, machine: Mapping[str, object], announce: Callable[[Job], None]
    ) -> None:
        self._bundle, self._target = job.bundle, job.target
        self._memory_limit_bytes = memory_limit_bytes
        self._machine = machine
        self._announce = announce
        self._common: _Task | None = None
        self._capacity = 0

    def run(self, tasks: Sequence[_Task]) -> Iterator[JobResult]:
        """Run all tasks; each has a result when this ends.

        Raises:
            BackendUnavailable: The back-end or its device is missing.
            EngineFileError: An engine is damaged, or was built for something else.
        """
        self._common, self._capacity = None, len(tasks)
        while waiting := [task for task in tasks if not task.done]:
            fresh = [task for task in waiting if not task.failures]
            members = fresh[: self._capacity] if fresh else waiting[:1]
            common = self._common if fresh and self._capacity > 1 else None
            if common is not None and common.done:
                members = [common, *members[: self._capacity - 1]]
            yield from self._run_together(members)

    def finish(self, task: _Task, status: str, reason: str) -> JobResult:
        """Make a task's result; a task that is timed again beside others gets another one."""
        task.done = True
        return JobResult(
            job=task.job,
            status=status,
            reason=reason,
            memory_limit_bytes=self._memory_limit_bytes,
            machine=self._machine,
            start=task.start,
            end=live_state(),
            rounds=tuple(task.rounds),
            warm_up=task.warm_up,
            engine=task.engine,
            device_state=task.device_state,
        )

    def _run_together(self, members: list[_Task]) -> Iterator[JobResult]:
        """Load the engines that fit, and time them; the others stay waiting."""
        options = ChildOptions(memory_limit_bytes=self._memory_limit_bytes, time_limit_s=CALL_LIMIT_S)
        with Child(options, Bench, str(self._bundle), self._target) as worker:
            loaded: list[_Task] = []
            for task in members:
                try:
                    fits = self._load(worker, task, loaded)
                except ENDS_THE_RUN:
                    raise
                except DscError as e:
                    yield from self._handle_error(task, e, among=len(loaded) + 1)
                    if isinstance(e, ChildDied):
                        return
                    if isinstance(e, OutOfMemoryError):
                        break
                    continue
                if not fits:
                    break
                loaded.append(task)
            if self._common is None and loaded and len(loaded) < len(members):
                self._common = loaded[0]
            yield from self._time_in_turn(worker, loaded)

    def _load(self, worker: Child[Bench], task: _Task, loaded: list[_Task]) -> bool:
        """Load and warm up one engine; return whether it fits into memory beside the loaded ones."""
        job = task.job
        self._announce(job)
        task.start = live_state()
        warm_up_ms = warm_up_limit_ms(job.time_limit_s)
        answer = worker.ask_within(LOAD_LIMIT_S, Bench.load, job.graph, job.side, job.batch, warm_up_ms)
        resident_bytes = answer["warm_up"]["resident_bytes"]
        if loaded and resident_bytes > self._memory_limit_bytes:
            logger.info("%s does not fit beside %d others: %d bytes", job.label, len(loaded), resident_bytes)
            worker.ask(Bench.unload, job.graph)
            self._capacity = len(loaded)
            return False
        task.device_state, task.engine = answer["device_state"], answer["engine"]
        task.call_ms = max(answer["warm_up"]["call_ms"], 1e-6)
        task.warm_up = {**answer["warm_up"], "engines_loaded": len(loaded) + 1}
        return True

    def _time_in_turn(self, worker: Child[Bench], loaded: list[_Task]) -> Iterator[JobResult]:
        """Run one round of each in turn until every one is done."""
        again = {id(task): len(task.rounds) + MIN_ROUNDS for task in loaded if task.done}
        active = list(loaded)
        while active:
            for task in list(active):
                self._announce(task.job)
                start = time.perf_counter()
                try:
                    self._time_round(worker, task, additional=id(task) in again)
                except ENDS_THE_RUN:
                    raise
                except DscError as e:
                    yield from self._handle_error(task, e, among=len(active))
                    if isinstance(e, ChildDied):
                        return
                    active.remove(task)
                    continue
                verdict = task.verdict()
                task.busy_s += time.perf_counter() - start
                if id(task) in again:
                    enough = len(task.rounds) >= again[id(task)]
                    verdict = (verdict or ("unstable", "time limit")) if enough else None
                if verdict is not None:
                    yield self.finish(task, *verdict)
                    active.remove(task)
                    try:
                        worker.ask(Bench.unload, task.job.graph)
                    except ChildDied as e:
                        logger.warning("%s: its cell is written, but the worker failed after it: %s", task.job.label, e)
                        return

    def _time_round(self, worker: Child[Bench], task: _Task, *, additional: bool) -> None:
        job = task.job
        period_ms = job.question.period_ms
        count = count_calls(task.call_ms, period_ms)
        limit_s = CALL_LIMIT_S + 0.1 * count * max(task.call_ms, period_ms or 0.0)
        answer = worker.ask_within(limit_s, Bench.round, job.graph, job.side, count, period_ms)
        task.rounds.append(replace(read_record(answer, Round), additional=True if additional else UNSET))

    def _handle_error(self, task: _Task, error: DscError, *, among: int) -> Iterator[JobResult]:
        """Yield the result of a task that raised ``error`` among ``among`` loaded engines, if it ends the task.

        If memory ends with several engines loaded, fewer are loaded next time; with one, the task is out of memory.
        """
        logger.info("%s: %s", task.job.label, error)
        if task is self._common:
            self._common = None
        if isinstance(error, OutOfMemoryError) and among > 1:
            self._capacity = among - 1
            return
        if task.done:  # it was timed again beside others; its result stands
            return
        task.failures += 1
        if isinstance(error, OutOfMemoryError):
            yield self.finish(task, "out-of-memory", str(error))
        elif task.failures >= TRIES:
            yield self.finish(task, "failed", str(error))
