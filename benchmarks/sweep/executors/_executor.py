"""The seam between a sweep and what runs it: jobs go in, results come out, one protocol for every executor.

The sweep alone holds the bundle's lock and writes cells. An executor reads the bundle, measures, and writes nothing.
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
    """One cell to measure, with all that an executor needs to know."""

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
    """What the timing depends on."""
    question: Question
    """What the cell answers: digest of the graph, digest of the run fingerprint, batch size, period."""
    precision_goal: float
    """Largest half-width of the 95 % confidence interval, as a share of the median."""
    time_limit_s: float
    """Seconds after which it is done in any case; only its own calls count."""
    memory_limit_bytes: int | None
    """Memory of the engines that are timed together; ``None``: 80 % of what is free on the machine that runs it."""
    earlier_rounds: tuple[Round, ...] = ()
    """Rounds of an earlier run, to go on from."""
    out_of_memory_at: int | None = None
    """Smallest batch size at which an earlier run found that memory ends for this engine; ``None``: none is known."""

    @property
    def batch(self) -> int:
        """Batch size."""
        return self.question.batch

    @property
    def label(self) -> str:
        """What is being measured, in words."""
        return f"{self.graph_label}, batch {self.batch}"


@dataclass(frozen=True, kw_only=True)
class JobResult:
    """How a job ended, and what was measured."""

    job: Job
    """The job."""
    status: str
    """``ok``, ``unstable``, ``out-of-memory`` or ``failed``."""
    reason: str
    """Why it ended: ``precision reached``, ``time limit``, or the error."""
    memory_limit_bytes: int
    """Memory that the engines could hold."""
    machine: Mapping[str, object]
    """What does not change during a run: ``host``, ``system`` and ``versions``."""
    end: Mapping[str, object]
    """State of the machine when the job ended."""
    start: Mapping[str, object]
    """State of the machine when the engine was loaded; empty where none was."""
    rounds: tuple[Round, ...] = ()
    """All rounds, those of an earlier run first."""
    warm_up: Mapping[str, object]
    """How the last warm-up went; empty where there was none."""
    engine: Mapping[str, object]
    """What the engine says about itself."""
    device_state: Mapping[str, object]
    """State of the device after the last warm-up; empty where the back-end does not tell."""


class Executor(Protocol):
    """Runs jobs. ``EXECUTORS`` lists those that there are; the tests have one conformance test for all."""

    def run(self, jobs: Sequence[Job], announce: Callable[[Job], None] = ...) -> Generator[JobResult, None, None]:
        """Run all jobs and yield each result as soon as it is there.

        The order is the executor's own. Every job gets a result; one that was run again, beside other engines, gets
        another, and the last one counts. An error of one engine is a result, ``failed`` or ``out-of-memory``. Closing
        the generator ends what is running.

        Args:
            jobs: What to run; no question is there twice.
            announce: Called with a job when it is its turn.

        Raises:
            BackendUnavailable: The back-end or its device is not there.
            EngineFileError: An engine is damaged, or was built for something else.
        """
        ...


class MemoryEnds:
    """At which batch size memory ended for each engine: a larger one need not be tried.

    Args:
        jobs: The jobs, with what earlier runs found.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._batches: dict[tuple[str, str], int] = {}
        for job in jobs:
            if job.out_of_memory_at is not None:
                self._note(job.question, job.out_of_memory_at)

    def note(self, result: JobResult) -> None:
        """Remember a result, if it ran out of memory."""
        if result.status == "out-of-memory":
            self._note(result.job.question, result.job.batch)

    def reason(self, job: Job) -> str | None:
        """Say why a job need not be tried; ``None`` where it has to be."""
        batch = self._batches.get((job.question.graph_digest, job.question.fingerprint))
        if batch is None or batch > job.batch:
            return None
        return f"out of memory at batch {batch} already; this one was not tried"

    def _note(self, question: Question, batch: int) -> None:
        key = (question.graph_digest, question.fingerprint)
        self._batches[key] = min(batch, self._batches.get(key, batch))


def no_announcement(job: Job) -> None:
    """Ignore whose turn it is."""
