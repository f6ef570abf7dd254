"""What every executor must do: those of the table, and the fake one that other tests use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.support.children import children_with
from tests.support.fake_executor import FakeExecutor

from dsc_split.benchmarks import BenchSettings, Cell, CellStore
from dsc_split.benchmarks.cells._cells import STATUSES
from dsc_split.benchmarks.sweep._tasks import make_cell, make_jobs
from dsc_split.benchmarks.sweep.executors._executor import Executor, Job
from dsc_split.benchmarks.sweep.executors._table import EXECUTORS
from dsc_split.bundle import Bundle
from dsc_split.engines import SideEngines

ONE = "onnxruntime:cpu,threads=1"
ALL: dict[str, Callable[[], Executor]] = {**EXECUTORS, "fake": FakeExecutor}


@pytest.fixture(params=ALL)
def executor(request: pytest.FixtureRequest) -> Executor:
    return ALL[request.param]()


def jobs_of(bundle: Bundle, batches: list[int], **settings: Any) -> list[Job]:
    """Make the jobs of both sides, each with a target of its own."""
    targets = {"device": f"{ONE},slowdown=2", "server": ONE}
    engines = {side: SideEngines(bundle, side, target) for side, target in targets.items()}
    chosen = BenchSettings(**{"precision_goal": 1e6, "time_limit_s": 0.2, **settings})
    jobs, reused, earlier = make_jobs(bundle, CellStore(bundle), engines, batches, chosen)
    assert (reused, earlier) == ([], {})
    return jobs


def test_every_job_has_a_result_that_makes_a_cell_and_is_announced_first(executor: Executor, bundle: Bundle) -> None:
    jobs = jobs_of(bundle, [1, 2])
    left = set(range(len(jobs)))
    announced: list[Job] = []
    before = sorted(bundle.path.rglob("*"))

    for result in executor.run(jobs, announced.append):
        assert result.job in announced
        assert result.status == "ok"
        assert result.memory_limit_bytes > 0
        assert set(result.machine) == {"host", "system", "versions"}
        assert str(result.start["time"]) <= str(result.end["time"])
        assert "engines_loaded" in result.warm_up
        cell = make_cell(result, BenchSettings())
        assert Cell.parse(cell.encode(), cell.question.key, "the cell") == cell
        left.discard(jobs.index(result.job))

    assert left == set()
    assert sorted(bundle.path.rglob("*")) == before, "it wrote into the bundle"


def test_no_job_is_no_result(executor: Executor) -> None:
    assert list(executor.run([])) == []


def test_rounds_of_an_earlier_run_are_kept_and_continued_and_paced_calls_have_the_first_apart(
    executor: Executor, bundle: Bundle
) -> None:
    job, *_ = jobs_of(bundle, [1], period_ms=5.0)
    (first,) = executor.run([job])
    more = {"precision_goal": 1e-9, "time_limit_s": 0.1, "earlier_rounds": first.rounds}

    (result,) = executor.run([Job(**{**vars(job), **more})])

    assert (result.status, result.reason) == ("unstable", "time limit")
    assert result.rounds[: len(first.rounds)] == first.rounds
    assert len(result.rounds) > len(first.rounds)
    assert all(len(item.first_after_pause_ms) == 1 for item in result.rounds)


def test_engine_that_ran_out_of_memory_at_a_smaller_batch_is_not_tried(executor: Executor, bundle: Bundle) -> None:
    small, large = (Job(**{**vars(job), "out_of_memory_at": 2}) for job in jobs_of(bundle, [1, 3])[:3:2])

    results = {result.job.batch: result for result in executor.run([small, large])}

    assert results[1].status == "ok"
    assert (results[3].status, results[3].rounds) == ("out-of-memory", ())
    assert results[3].reason == "out of memory at batch 2 already; this one was not tried"


def test_closed_in_the_middle_nothing_is_left_running(executor: Executor, bundle: Bundle) -> None:
    results = executor.run(jobs_of(bundle, [1, 2]))
    assert next(results).status in STATUSES

    results.close()

    assert children_with("Bench", str(bundle.path)) == []
