from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Sequence

import pytest
from onnx import helper
from tests.support.fake_executor import FakeExecutor, make_result

from dsc_split._support.progress import Progress
from dsc_split._support.records import to_document
from dsc_split.benchmarks import BenchResult, BenchSettings, CellStore, bench_bundle
from dsc_split.benchmarks.sweep.executors._executor import Job, JobResult, no_announcement
from dsc_split.bundle import Bundle
from dsc_split.errors import BackendError, BackendUnavailable, BundleBusyError, UsageError

ONE = "onnxruntime:cpu,threads=1"

CRASH_ONCE = """
import os, pathlib
import onnxruntime
mark = pathlib.Path({mark!r})
class Session(onnxruntime.InferenceSession):
    def run(self, *args, **kwargs):
        if self.get_outputs()[0].name == {output!r} and not mark.exists():
            {before}
            os.abort()
        return super().run(*args, **kwargs)
onnxruntime.InferenceSession = Session
"""


@pytest.mark.usefixtures("fake_executor")
def test_every_engine_of_both_sides_gets_a_cell_at_every_batch(bundle: Bundle, quick: BenchSettings) -> None:
    steps: list[Progress] = []

    result = bench_bundle(
        bundle,
        device=f"{ONE},slowdown=6",
        server=ONE,
        batches=[1, 3],
        settings=quick,
        progress=steps.append,
    )

    assert result.counts == {"ok": 8, "unstable": 0, "out-of-memory": 0, "failed": 0}
    found = {(cell.graph, cell.target, cell.batch) for cell in CellStore(bundle).all()}
    assert found == {
        (graph, target, batch)
        for batch in (1, 3)
        for graph, target in [
            ("onnx/model.onnx", f"{ONE},slowdown=6"),
            ("onnx/a.head.onnx", f"{ONE},slowdown=6"),
            ("onnx/model.onnx", ONE),
            ("onnx/a.tail.onnx", ONE),
        ]
    }
    assert (steps[0].done, steps[0].total, steps[-1].done) == (0, 8, 8)
    assert Bundle.open(bundle.path).targets("device") == (f"{ONE},slowdown=6",)
    assert Bundle.open(bundle.path).targets("server") == (ONE,)


@pytest.mark.usefixtures("fake_executor")
def test_statistics_carry_the_slowdown_and_raw_samples_do_not(bundle: Bundle, quick: BenchSettings) -> None:
    result = bench_bundle(bundle, sides=["device"], device=f"{ONE},slowdown=1000", batches=[1], settings=quick)

    for cell in result.cells:
        assert cell.latency_ms is not None
        assert cell.emulated is not None
        assert cell.emulated["slowdown"] == 1000
        samples_ms = sorted(sample for samples in cell.samples_ms for sample in samples)
        assert cell.latency_ms.n == len(samples_ms)
        assert to_document(cell.latency_ms)["p99"] <= 1000 * samples_ms[-1]
        assert cell.latency_ms.median >= 1000 * samples_ms[0]
        assert len(cell.rounds) >= 5


@pytest.mark.usefixtures("fake_executor")
def test_whole_model_is_measured_once_where_both_sides_are_the_same(bundle: Bundle, quick: BenchSettings) -> None:
    result = bench_bundle(bundle, device=ONE, server=ONE, batches=[1], settings=quick)

    assert sorted(cell.graph for cell in result.cells) == [
        "onnx/a.head.onnx",
        "onnx/a.tail.onnx",
        "onnx/model.onnx",
    ]


@pytest.mark.usefixtures("fake_executor")
def test_second_run_reuses_what_is_precise_enough_and_remembers_the_targets(
    bundle: Bundle, quick: BenchSettings
) -> None:
    first = bench_bundle(bundle, device=ONE, server=ONE, batches=[1], settings=quick)
    second = bench_bundle(Bundle.open(bundle.path), batches=[1, 2], settings=quick)

    assert (first.reused, second.reused) == (0, 3)
    assert second.targets == {"device": ONE, "server": ONE}
    assert len(second.cells) == 6
    assert all(cell in second.cells for cell in first.cells)


@pytest.mark.usefixtures("fake_executor")
def test_looser_cell_is_continued_and_its_rounds_are_kept(bundle: Bundle, quick: BenchSettings) -> None:
    loose = bench_bundle(bundle, sides=["device"], device=ONE, batches=[1], settings=quick)
    tight = dataclasses.replace(quick, precision_goal=1e-9)
    continued = bench_bundle(bundle, sides=["device"], batches=[1], settings=tight)

    for before in loose.cells:
        (after,) = [cell for cell in continued.cells if cell.question == before.question]
        assert after.status == "unstable"
        assert after.reason == "time limit"
        assert after.rounds[: len(before.rounds)] == before.rounds
        assert len(after.rounds) > len(before.rounds)


@pytest.mark.usefixtures("fake_executor")
def test_again_measures_anew(bundle: Bundle, quick: BenchSettings) -> None:
    first = bench_bundle(bundle, sides=["device"], device=ONE, batches=[1], settings=quick)
    second = bench_bundle(bundle, sides=["device"], batches=[1], settings=dataclasses.replace(quick, again=True))

    assert second.reused == 0
    starts = {item.started for cell in first.cells for item in cell.rounds}
    assert not starts & {item.started for cell in second.cells for item in cell.rounds}


@pytest.mark.usefixtures("fake_executor")
def test_damaged_cell_is_measured_again(bundle: Bundle, quick: BenchSettings) -> None:
    first = bench_bundle(bundle, sides=["device"], device=ONE, batches=[1], settings=quick)
    CellStore(bundle).path(first.cells[0].question).write_text("{}")

    second = bench_bundle(bundle, sides=["device"], batches=[1], settings=quick)

    assert (second.reused, second.counts["ok"]) == (1, 2)
    assert len(list(CellStore(bundle).all())) == 2


@pytest.mark.usefixtures("fake_executor")
def test_paced_calls_are_another_question_with_the_first_after_a_pause_apart(
    bundle: Bundle, quick: BenchSettings
) -> None:
    bench_bundle(bundle, sides=["server"], server=ONE, batches=[1], settings=quick)
    paced = dataclasses.replace(quick, period_ms=20)
    result = bench_bundle(bundle, sides=["server"], batches=[1], settings=paced)

    assert result.reused == 0
    assert len(list(CellStore(bundle).all())) == 4
    for cell in result.cells:
        assert cell.latency_ms is not None
        assert to_document(cell.latency_ms)["first_after_pause"]["n"] == len(cell.rounds)


def test_crash_of_the_runtime_costs_nothing_when_it_does_not_come_again(
    bundle: Bundle, quick: BenchSettings, sabotage: Callable[[str], None]
) -> None:
    mark = str(bundle.path / "crashed")
    sabotage(CRASH_ONCE.format(mark=mark, output="a", before="mark.touch()"))

    result = bench_bundle(bundle, sides=["device"], device=ONE, batches=[1], settings=quick)

    assert (bundle.path / "crashed").exists()
    assert result.counts["ok"] == 2


def test_crash_that_comes_again_costs_that_cell_and_is_tried_again_in_the_next_run(
    bundle: Bundle, quick: BenchSettings, sabotage: Callable[[str], None]
) -> None:
    mark = bundle.path / "crashed"
    sabotage(CRASH_ONCE.format(mark=str(mark), output="a", before="pass"))

    result = bench_bundle(bundle, sides=["device"], device=ONE, batches=[1], settings=quick)

    assert {cell.graph: cell.status for cell in result.cells} == {
        "onnx/model.onnx": "ok",
        "onnx/a.head.onnx": "failed",
    }
    (failed,) = [cell for cell in result.cells if cell.status == "failed"]
    assert "SIGABRT" in failed.reason
    assert failed.latency_ms is None
    mark.touch()
    assert bench_bundle(bundle, sides=["device"], batches=[1], settings=quick).counts["ok"] == 2


def test_crash_of_a_cell_that_is_continued_does_not_cost_what_was_measured(
    bundle: Bundle, quick: BenchSettings, sabotage: Callable[[str], None]
) -> None:
    executor = FakeExecutor()
    first = bench_bundle(bundle, sides=["device"], device=ONE, batches=[1], settings=quick, executor=executor)
    sabotage(CRASH_ONCE.format(mark="/nowhere/at/all", output="a", before="pass"))

    tight = dataclasses.replace(quick, precision_goal=1e-9)
    result = bench_bundle(bundle, sides=["device"], batches=[1], settings=tight)

    (before,) = [cell for cell in first.cells if cell.graph == "onnx/a.head.onnx"]
    assert before in result.cells
    assert CellStore(bundle).get(before.question) == before


def test_end_of_memory_at_a_large_batch_costs_that_cell_and_larger_ones_alone(
    bundle: Bundle, quick: BenchSettings, replace_graph: Callable[..., Bundle]
) -> None:
    # x -> Resize by 256 in both directions -> a: 50 MB for each sample of the batch.
    nodes = [
        helper.make_node("Constant", [], ["s"], value=helper.make_tensor("s", 1, [4], [1.0, 1.0, 256.0, 256.0])),
        helper.make_node("Resize", ["x", "", "s"], ["a"], mode="nearest"),
    ]
    outputs = [("a", ["batch", 3, 2048, 2048])]
    bundle = replace_graph(bundle, "onnx/a.head.onnx", nodes, [("x", ["batch", 3, 8, 8])], outputs)
    settings = dataclasses.replace(quick, memory_limit_bytes=2**30)

    result = bench_bundle(bundle, sides=["device"], device=ONE, batches=[1, 32, 64], settings=settings)

    heads = {cell.batch: cell for cell in result.cells if cell.graph == "onnx/a.head.onnx"}
    assert [heads[batch].status for batch in (1, 32, 64)] == ["ok", "out-of-memory", "out-of-memory"]
    assert "not tried" in heads[64].reason
    assert all(cell.status == "ok" for cell in result.cells if cell.graph == "onnx/model.onnx")
    again = bench_bundle(bundle, sides=["device"], batches=[1, 32, 64], settings=settings)
    assert again.reused == 6


def test_an_executor_is_asked_for_what_is_not_answered_and_each_result_is_written_when_it_comes(
    bundle: Bundle, quick: BenchSettings
) -> None:
    executor = FakeExecutor()
    written: list[int] = []

    bench_bundle(
        bundle,
        device=ONE,
        server=ONE,
        batches=[1],
        settings=quick,
        executor=executor,
        progress=lambda step: written.append(len(list(CellStore(bundle).all()))),
    )
    bench_bundle(bundle, batches=[1, 2], settings=quick, executor=executor)

    assert written == [0, 1, 2, 3]
    assert [(job.graph, job.batch) for job in executor.tried] == [
        (graph, batch) for batch in (1, 2) for graph in ("onnx/model.onnx", "onnx/a.head.onnx", "onnx/a.tail.onnx")
    ]


def test_a_run_that_ends_early_keeps_what_was_finished_and_closes_the_executor(
    bundle: Bundle, quick: BenchSettings
) -> None:
    def interrupt_second(step: Progress) -> None:
        if step.done:
            raise KeyboardInterrupt

    executor = FakeExecutor()
    with pytest.raises(KeyboardInterrupt):
        bench_bundle(bundle, device=ONE, batches=[1], settings=quick, executor=executor, progress=interrupt_second)

    assert executor.closed == 1
    assert len(list(CellStore(bundle).all())) == 1
    with Bundle.open(bundle.path).lock():
        pass
    assert bench_bundle(bundle, device=ONE, batches=[1], settings=quick, executor=FakeExecutor()).reused == 1


def test_an_error_of_the_executor_reaches_the_caller(bundle: Bundle, quick: BenchSettings) -> None:
    def unavailable(job: Job) -> JobResult:
        raise BackendUnavailable(f"no GPU for {job.label}")

    with pytest.raises(BackendUnavailable, match="no GPU for whole model, batch 1"):
        bench_bundle(bundle, device=ONE, batches=[1], settings=quick, executor=FakeExecutor(unavailable))


def test_an_executor_that_leaves_a_job_out_is_an_error(bundle: Bundle, quick: BenchSettings) -> None:
    class Forgetful(FakeExecutor):
        def run(
            self, jobs: Sequence[Job], announce: Callable[[Job], None] = no_announcement
        ) -> Generator[JobResult, None, None]:
            return super().run(jobs[1:], announce)

    with pytest.raises(BackendError, match="no result for whole model, batch 1"):
        bench_bundle(bundle, sides=["device"], device=ONE, batches=[1], settings=quick, executor=Forgetful())
    assert len(list(CellStore(bundle).all())) == 1


def test_memory_that_ended_is_final_and_larger_batches_are_not_tried_in_a_later_run(
    bundle: Bundle, quick: BenchSettings
) -> None:
    def starved(job: Job) -> JobResult:
        return make_result(job, "out-of-memory", "bad_alloc")

    def bench(batches: list[int], executor: FakeExecutor, limit_bytes: int | None = None) -> BenchResult:
        settings = dataclasses.replace(quick, memory_limit_bytes=limit_bytes)
        return bench_bundle(bundle, sides=["device"], batches=batches, settings=settings, executor=executor)

    bench([4], FakeExecutor(starved))
    executor = FakeExecutor()
    result = bench([2, 4, 8], executor)

    assert {job.batch for job in executor.tried} == {2}
    assert {cell.batch: cell.status for cell in result.cells} == {2: "ok", 4: "out-of-memory", 8: "out-of-memory"}
    assert result.reused == 2
    more = bench([2, 4, 8], FakeExecutor(), limit_bytes=2**40)
    assert (more.reused, more.counts["ok"]) == (2, 6)


def test_what_cannot_be_measured_is_refused_before_anything_is_written(bundle: Bundle, quick: BenchSettings) -> None:
    with pytest.raises(UsageError, match="larger than 64"):
        bench_bundle(bundle, batches=[65], settings=quick)
    with pytest.raises(UsageError, match="both, device or server"):
        bench_bundle(bundle, sides=["cloud"], settings=quick)
    with pytest.raises(UsageError, match="unknown back-end"):
        bench_bundle(bundle, device="tenserrt", settings=quick)
    with bundle.lock(), pytest.raises(BundleBusyError):
        bench_bundle(Bundle.open(bundle.path), batches=[1], settings=quick)
    assert not (bundle.path / "cells").exists()
