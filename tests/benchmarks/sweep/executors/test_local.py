"""Which engines are timed together: with a worker that only pretends, so that memory is what the test says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from dsc_split._support.child import ChildDied, ChildOptions, ChildOutOfMemoryError
from dsc_split.benchmarks import Question
from dsc_split.benchmarks.cells._cells import Round
from dsc_split.benchmarks.sweep._worker import Bench
from dsc_split.benchmarks.sweep.executors import _local
from dsc_split.benchmarks.sweep.executors._executor import Job, JobResult
from dsc_split.benchmarks.sweep.executors._local import LocalExecutor
from dsc_split.errors import BackendError, BackendUnavailable, BundleError, DscError, EngineMismatch, OutOfMemoryError

TARGET = "onnxruntime:cpu"
LIMIT_BYTES = 100


class Machine:
    """What the pretended workers did, and how they behave."""

    def __init__(self) -> None:
        self.sizes_bytes: dict[str, int] = {}
        self.load_errors: dict[str, list[Exception]] = {}
        self.round_errors: dict[str, list[Exception]] = {}
        self.hard_limit = False
        self.workers: list[list[str]] = []
        """For each worker the graphs that got a round there, in the order of their first."""
        self.ended = 0


class PretendedWorker:
    machine: Machine

    def __init__(self, options: ChildOptions, program: type[Bench], bundle: str, target: str) -> None:
        assert (program, bundle, target) == (Bench, "bundle", TARGET)
        assert options.memory_limit_bytes is not None
        self._limit_bytes = options.memory_limit_bytes
        self._loaded: dict[str, int] = {}
        self._timed: list[str] = []
        self._dead = False
        self.machine.workers.append(self._timed)

    def __enter__(self) -> PretendedWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._dead = True
        self.machine.ended += 1

    def ask_within(self, time_limit_s: float, request: Callable[..., Any], graph: str, *arguments: Any) -> Any:
        assert time_limit_s > 100
        return self.ask(request, graph)

    def ask(self, request: Callable[..., Any], graph: str) -> Any:
        assert not self._dead, "a dead worker was asked"
        of = {Bench.load: self.machine.load_errors, Bench.round: self.machine.round_errors}
        errors = of.get(request, {}).get(graph)
        if errors:
            error = errors.pop(0)
            self._dead = isinstance(error, ChildDied)
            raise error
        if request == Bench.load:
            size_bytes = self.machine.sizes_bytes.get(graph, 1)
            if self.machine.hard_limit and sum(self._loaded.values()) + size_bytes > self._limit_bytes:
                raise OutOfMemoryError("bad_alloc")
            self._loaded[graph] = size_bytes
            warm_up = {"call_ms": 60.0, "resident_bytes": sum(self._loaded.values())}
            return {"warm_up": warm_up, "engine": {"io": "pinned"}, "device_state": {"sm_clock_mhz": 1500}}
        if request == Bench.unload:
            del self._loaded[graph]
            return None
        assert graph in self._loaded
        if graph not in self._timed:
            self._timed.append(graph)
        return {"started": "now", "samples_ms": [60.0], "first_after_pause_ms": []}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(PretendedWorker, "machine", machine, raising=False)
    monkeypatch.setattr(_local, "Child", PretendedWorker)
    return machine


def make_jobs(names: str, *, batch: int = 1, **changes: Any) -> list[Job]:
    facts: dict[str, Any] = {"precision_goal": 0.02, "time_limit_s": 1000.0, "memory_limit_bytes": LIMIT_BYTES}
    return [
        Job(
            bundle=Path("bundle"),
            graph=name,
            graph_label=f"head {name}",
            side="device",
            target=TARGET,
            run_fingerprint={},
            question=Question(graph_digest=name, fingerprint="f", batch=batch, period_ms=None),
            **{**facts, **changes},
        )
        for name in names
    ]


def run(jobs: list[Job]) -> dict[str, list[JobResult]]:
    """Measure; returns the results of each graph, in order."""
    results: dict[str, list[JobResult]] = {}
    for result in LocalExecutor().run(jobs):
        results.setdefault(result.job.graph, []).append(result)
    return results


def run_statuses(names: str) -> dict[str, tuple[str, int]]:
    """Measure; returns the last status of each graph, and how many results it has."""
    return {name: (results[-1].status, len(results)) for name, results in run(make_jobs(names)).items()}


def test_all_run_together_where_memory_allows(machine: Machine) -> None:
    assert run_statuses("abc") == dict.fromkeys("abc", ("ok", 1))
    assert machine.workers == [["a", "b", "c"]]


@pytest.mark.parametrize("hard_limit", [False, True])
def test_groups_that_do_not_fit_together_have_one_engine_in_common(machine: Machine, hard_limit: bool) -> None:
    machine.sizes_bytes = dict.fromkeys("abcde", 40)
    machine.hard_limit = hard_limit

    results = run(make_jobs("abcde"))

    assert machine.workers == [["a", "b"], ["a", "c"], ["a", "d"], ["a", "e"]]
    assert {name: len(found) for name, found in results.items()} == {"a": 4, **dict.fromkeys("bcde", 1)}
    assert all(result.status == "ok" for found in results.values() for result in found)
    additional = [item.additional is True for item in results["a"][-1].rounds]
    assert additional == [False] * 5 + [True] * 15


def test_what_the_engine_and_its_device_say_is_kept_apart_from_the_warm_up(machine: Machine) -> None:
    (result,) = run(make_jobs("a"))["a"]

    assert result.engine == {"io": "pinned"}
    assert result.device_state == {"sm_clock_mhz": 1500}
    assert result.warm_up == {"call_ms": 60.0, "resident_bytes": 1, "engines_loaded": 1}


def test_engines_that_fill_the_memory_run_alone(machine: Machine) -> None:
    machine.sizes_bytes = dict.fromkeys("abc", 90)

    assert run_statuses("abc") == dict.fromkeys("abc", ("ok", 1))
    assert machine.workers == [["a"], ["b"], ["c"]]


def test_engine_that_does_not_even_fit_alone_is_out_of_memory_and_the_others_go_on(machine: Machine) -> None:
    machine.sizes_bytes = {"b": 101}
    machine.hard_limit = True

    results = run_statuses("abcd")

    assert results["b"] == ("out-of-memory", 1)
    assert all(results[name][0] == "ok" for name in "acd")


def test_crash_costs_one_cell_after_two_tries(machine: Machine) -> None:
    machine.round_errors = {"b": [ChildDied("SIGSEGV"), ChildDied("SIGSEGV")]}

    results = run_statuses("abc")

    assert results == {"a": ("ok", 1), "b": ("failed", 1), "c": ("ok", 1)}


def test_crash_that_does_not_come_again_costs_nothing_and_rounds_are_kept(machine: Machine) -> None:
    machine.round_errors = {"b": [ChildDied("SIGSEGV")]}

    results = run(make_jobs("abc"))

    assert machine.workers == [["a"], ["a", "c"], ["b"]]
    assert [(item.status, len(item.rounds)) for (item,) in results.values()] == [("ok", 5)] * 3


def test_failure_without_a_crash_keeps_the_worker(machine: Machine) -> None:
    machine.load_errors = {"a": [BackendError("no such op"), BackendError("no such op")]}

    assert run_statuses("ab") == {"a": ("failed", 1), "b": ("ok", 1)}
    assert machine.workers == [["b"], []]


@pytest.mark.parametrize("when", ["load_errors", "round_errors"])
def test_memory_that_ends_in_a_crowd_is_tried_again_in_a_smaller_one(machine: Machine, when: str) -> None:
    setattr(machine, when, {"c": [ChildOutOfMemoryError("SIGKILL")]})

    assert {name: status for name, (status, _) in run_statuses("abc").items()} == dict.fromkeys("abc", "ok")


def test_common_engine_that_fails_later_keeps_its_cell(machine: Machine) -> None:
    machine.sizes_bytes = dict.fromkeys("abc", 40)
    machine.round_errors = {"c": [ChildDied("SIGSEGV")]}

    results = run_statuses("abc")

    assert {name: status for name, (status, _) in results.items()} == dict.fromkeys("abc", "ok")


@pytest.mark.parametrize("error", [BackendUnavailable("no GPU"), EngineMismatch("built for another GPU")])
@pytest.mark.parametrize("when", ["load_errors", "round_errors"])
def test_backend_that_is_not_there_and_an_engine_that_does_not_fit_end_the_run(
    machine: Machine, when: str, error: DscError
) -> None:
    setattr(machine, when, {"b": [error]})

    with pytest.raises(type(error)):
        run(make_jobs("abc"))


def test_damaged_file_costs_the_cells_that_need_it_alone(machine: Machine) -> None:
    machine.load_errors = {"a": [BundleError("no sample"), BundleError("no sample")]}

    assert run_statuses("ab") == {"b": ("ok", 1), "a": ("failed", 1)}


def test_engine_that_ran_out_of_memory_is_not_tried_at_a_larger_batch(machine: Machine) -> None:
    machine.sizes_bytes = {"b": 101}
    machine.hard_limit = True

    results = run([*make_jobs("ab"), *make_jobs("ab", batch=2), *make_jobs("c", batch=2, out_of_memory_at=1)])

    assert [item.status for item in results["b"]] == ["out-of-memory"] * 2
    reasons = {results["b"][1].reason, results["c"][0].reason}
    assert reasons == {"out of memory at batch 1 already; this one was not tried"}
    assert machine.workers == [["a"], [], ["a"]]


def test_rounds_of_an_earlier_run_are_continued(machine: Machine) -> None:
    earlier = (Round(started="then", samples_ms=(60.0,), first_after_pause_ms=()),) * 4

    (result,) = run(make_jobs("a", earlier_rounds=earlier))["a"]

    assert [item.started for item in result.rounds] == ["then"] * 4 + ["now"]


def test_run_that_is_closed_ends_its_worker(machine: Machine) -> None:
    results = LocalExecutor().run(make_jobs("abc"))

    assert next(results).job.graph == "a"
    assert machine.ended == 0
    results.close()
    assert machine.ended == 1
