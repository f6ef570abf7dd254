"""The protocol of executors: a sweep gives an executor jobs, and gets results back.

Only the sweep holds the bundle's lock and writes cells. An executor reads the bundle, measures, and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dsc_split.benchmarks.cells._cells import Question, Round

__all__ = ["Executor", "Job", "JobResult", "MemoryEnds", "no_announcement"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One cell to measure, with everything that an executor needs to know."""

    bundle: Path
    """Folder of the bundle."""
    graph: str
    """Path of the graph, relative to the bundle."""
    graph_label: str
    """What the graph is, in words: ``head features.4.0``."""
    side: str
    """The side that asked for it first."""
    target: str
    """Canonical text of the target."""
    run_fingerprint: Mapping[str, object]
    """Everything that the times depend on."""
    question: Question
    """The question of the cell: digest of the graph, digest of the run fingerprint, batch size, period."""
    precision_goal: float
    """Largest half-width of the 95 % confidence interval, as a share of the median."""
    time_limit_s: float
    """Seconds after which it ends, precise or not; only its own calls count."""
    memory_limit_bytes: int | None
    """Memory of the engines that are timed together; ``None``: 80 % of the free memory where it runs."""
    earlier_rounds: tuple[Round, ...] = ()
    """Rounds of an earlier run, to continue."""
    out_of_memory_at: int | None = None
    """Smallest batch size at which this engine ran out of memory in an earlier run; ``None``: none is known."""

    @property
    def batch(self) -> int:
        """Batch size."""
        return self.question.batch

    @property
    def label(self) -> str:
        """The graph and the batch size, in words: ``head features.4.0, batch 8``."""
        return f"{self.graph_label}, batch {self.batch}"


@dataclass(frozen=True, kw_only=True)
class JobResult:
    """How a job ended, and its measurements."""

    job: Job
    """The job."""
    status: str
    """``ok``, ``unstable``, ``out-of-memory`` or ``failed``."""
    reason: str
    """Why it ended: ``precision reached``, ``time limit``, or the error."""
    memory_limit_bytes: int
    """Memory limit of the engines."""
    machine: Mapping[str, object]
    """Facts that do not change during a run: ``host``, ``system`` and ``versions``."""
    end: Mapping[str, object]
    """State of the machine when the job ended."""
    start: Mapping[str, object]
    """State of the machine when the engine was loaded; empty if it was not."""
    rounds: tuple[Round, ...] = ()
    """All rounds, those of an earlier run first."""
    warm_up: Mapping[str, object]
    """Facts about the last warm-up; empty if there was none."""
    engine: Mapping[str, object]
    """Facts that the engine reports."""
    device_state: Mapping[str, object]
    """State of the device after the last warm-up; empty if the back-end does not report it."""


class Executor(Protocol):
    """Runs jobs. ``EXECUTORS`` lists all executors; one conformance test checks every one."""

    def run(self, jobs: Sequence[Job], announce: Callable[[Job], None] = ...) -> Generator[JobResult, None, None]:
        """Run all jobs and yield each result as soon as it is there.

        The executor chooses the order. Every job gets a result. A job that runs again, beside other engines, gets
        another one, and the last one counts. An error of one engine is a result, ``failed`` or ``out-of-memory``.
        Closing the generator stops the running jobs.

        Args:
            jobs: The jobs; each question occurs once.
            announce: Called with a job when it starts or continues.

        Raises:
            BackendUnavailable: The back-end or its device is missing.
            EngineFileError: An engine is damaged, or was built for something else.
        """
        ...


class MemoryEnds:
    """The batch size at which each engine ran out of memory: larger ones need no trial.

    Args:
        jobs: The jobs, with the results of earlier runs.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._batches: dict[tuple[str, str], int] = {}
        for job in jobs:
            if job.out_of_memory_at is not None:
                self._note_batch(job.question, job.out_of_memory_at)

    def note(self, result: JobResult) -> None:
        """Store a result, if it ran out of memory."""
        if result.status == "out-of-memory":
            self._note_batch(result.job.question, result.job.batch)

    def reason(self, job: Job) -> str | None:
        """Return the reason why a job needs no trial; ``None`` if it needs one."""
        batch = self._batches.get((job.question.graph_digest, job.question.fingerprint))
        if batch is None or batch > job.batch:
            return None
        return f"out of memory at batch {batch} already; this one was not tried"

    def _note_batch(self, question: Question, batch: int) -> None:
        key = (question.graph_digest, question.fingerprint)
        self._batches[key] = min(batch, self._batches.get(key, batch))


def no_announcement(job: Job) -> None:
    """Do nothing: the default of ``announce``."""
