"""An executor for tests: it answers in this process, from a function or with times that a seed makes up."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Generator, Sequence
from datetime import datetime, timedelta, timezone

from msgspec import UNSET

from dsc_split.benchmarks.cells._cells import Round
from dsc_split.benchmarks.sweep._environment import live_state, static_environment
from dsc_split.benchmarks.sweep._statistics import MIN_ROUNDS_AT_LIMIT, is_precise
from dsc_split.benchmarks.sweep._timer import count_calls
from dsc_split.benchmarks.sweep.executors._executor import Job, JobResult, MemoryEnds, no_announcement

__all__ = ["FakeExecutor", "make_result"]

MEMORY_LIMIT_BYTES = 2**32
NOISE = 0.01
"""Standard deviation of a made-up time, as a share of its mean."""
STARTS = itertools.count()


class FakeExecutor:
    """Runs jobs without running anything.

    Args:
        answer: Makes the result of a job; made-up times, where not given.
        seed: Of the times that are made up.
        device_state: State of the device after each round, where it tells.

    Attributes:
        tried: Jobs that were answered with times or by the function, in order.
        closed: How often the generator came to its end, or was closed before it.
    """

    def __init__(
        self,
        answer: Callable[[Job], JobResult] | None = None,
        *,
        seed: int = 0,
        device_state: Callable[[], dict[str, object]] = dict,
    ) -> None:
        self._answer = answer or self._make_up
        self._seed = seed
        self._device_state = device_state
        self.tried: list[Job] = []
        self.closed = 0

    def run(
        self, jobs: Sequence[Job], announce: Callable[[Job], None] = no_announcement
    ) -> Generator[JobResult, None, None]:
        ends = MemoryEnds(jobs)
        try:
            for job in jobs:
                announce(job)
                reason = ends.reason(job)
                if reason is None:
                    self.tried.append(job)
                result = self._answer(job) if reason is None else make_result(job, "out-of-memory", reason)
                ends.note(result)
                yield result
        finally:
            self.closed += 1

    def _make_up(self, job: Job) -> JobResult:
        chance = random.Random(f"{self._seed} {job.question.key} {len(job.earlier_rounds)}")
        call_ms = job.batch * (0.2 + int(job.question.graph_digest[:4], 16) / 2**16)
        count = count_calls(call_ms, job.question.period_ms)
        rounds, busy_s = list(job.earlier_rounds), 0.0
        while True:
            samples_ms = [call_ms * max(0.5, chance.gauss(1.0, NOISE)) for _ in range(count)]
            rounds.append(make_round(samples_ms, self._device_state(), paced=job.question.period_ms is not None))
            busy_s += sum(samples_ms) / 1e3
            at_limit = busy_s >= job.time_limit_s
            if is_precise([item.samples_ms for item in rounds], job.precision_goal, at_limit=at_limit):
                return make_result(job, "ok", "precision reached", rounds, self._device_state())
            if at_limit and len(rounds) >= MIN_ROUNDS_AT_LIMIT:
                return make_result(job, "unstable", "time limit", rounds, self._device_state())


def make_round(samples_ms: list[float], device_state: dict[str, object], *, paced: bool) -> Round:
    """Make a round; no two begin at the same time."""
    started = datetime.now(timezone.utc) + timedelta(milliseconds=next(STARTS))
    return Round(
        started=started.isoformat(timespec="milliseconds"),
        samples_ms=tuple(samples_ms),
        first_after_pause_ms=(2 * samples_ms[0],) if paced else (),
        compute_ms=(0.25,) * len(samples_ms) if device_state else UNSET,
        device_state=device_state or UNSET,
    )


def make_result(
    job: Job, status: str, reason: str, rounds: Sequence[Round] = (), device_state: dict[str, object] | None = None
) -> JobResult:
    """Make the result of a job on this machine."""
    warm = {"calls": 2, "busy_ms": 1.0, "call_ms": 0.5, "stable": True, "resident_bytes": 1, "engines_loaded": 1}
    return JobResult(
        job=job,
        status=status,
        reason=reason,
        memory_limit_bytes=job.memory_limit_bytes or MEMORY_LIMIT_BYTES,
        machine=static_environment(),
        start=live_state(),
        end=live_state(),
        rounds=tuple(rounds),
        warm_up=warm if rounds else {},
        engine={},
        device_state=device_state or {},
    )
