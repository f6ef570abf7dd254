"""Which engines are timed together: with a worker that only pretends, so that memory is what the test says."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from dsc_split.benchmarks import BenchSettings, Question
from dsc_split.benchmarks.sweep import _interleave as _group
from dsc_split.benchmarks.sweep._interleave import Group
from dsc_split.benchmarks.sweep._process import WorkerDied
from dsc_split.benchmarks.sweep._tasks import Task
from dsc_split.engines.side._sides import SideGraph
from dsc_split.errors import BackendError, BackendUnavailable, OutOfMemoryError

SETTINGS = BenchSettings(precision_goal=0.02, time_limit_s=1000.0)
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


class PretendedWorker:
    machine: Machine

    def __init__(self, bundle: Path, target: str, memory_limit_bytes: int) -> None:
        self._limit_bytes = memory_limit_bytes
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

    def ask(self, do: str, *, graph: str, **arguments: Any) -> dict[str, Any]:
        assert not self._dead, "a dead worker was asked"
        errors = {"load": self.machine.load_errors, "round": self.machine.round_errors}.get(do, {}).get(graph)
        if errors:
            error = errors.pop(0)
            self._dead = isinstance(error, WorkerDied)
            raise error
        if do == "load":
            size_bytes = self.machine.sizes_bytes.get(graph, 1)
            if self.machine.hard_limit and sum(self._loaded.values()) + size_bytes > self._limit_bytes:
                raise OutOfMemoryError("bad_alloc")
            self._loaded[graph] = size_bytes
            answer = {"call_ms": 60.0, "resident_bytes": sum(self._loaded.values())}
            return {**answer, "engine": {"io": "pinned"}, "device_state": {"sm_clock_mhz": 1500}}
        if do == "unload":
            del self._loaded[graph]
            return {}
        assert graph in self._loaded
        if graph not in self._timed:
            self._timed.append(graph)
        return {"started": "now", "samples_ms": [60.0], "first_after_pause_ms": []}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(PretendedWorker, "machine", machine, raising=False)
    monkeypatch.setattr(_group, "Worker", PretendedWorker)
    return machine


def make_tasks(names: str) -> list[Task]:
    return [
        Task(
            side="device",
            graph=SideGraph(kind="head", path=name, split=None),
            target="onnxruntime:cpu",
            slowdown=1.0,
            threads=None,
            run_fingerprint={},
            question=Question(graph_digest=name, fingerprint="f", batch=1, period_ms=None),
        )
        for name in names
    ]


def run(tasks: list[Task]) -> dict[str, tuple[str, int]]:
    """Measure; gives the last status of each task, and how often its cell was written."""
    results: dict[str, tuple[str, int]] = {}

    def finish(task: Task, status: str, reason: str) -> None:
        task.done = True
        results[task.graph.path] = (status, results.get(task.graph.path, ("", 0))[1] + 1)

    Group(Path("bundle"), SETTINGS, LIMIT_BYTES, finish, lambda task: None).run(tasks)
    return results


def test_all_run_together_where_memory_allows(machine: Machine) -> None:
    results = run(make_tasks("abc"))

    assert results == dict.fromkeys("abc", ("ok", 1))
    assert machine.workers == [["a", "b", "c"]]


@pytest.mark.parametrize("hard_limit", [False, True])
def test_groups_that_do_not_fit_together_have_one_engine_in_common(machine: Machine, hard_limit: bool) -> None:
    machine.sizes_bytes = dict.fromkeys("abcde", 40)
    machine.hard_limit = hard_limit
    tasks = make_tasks("abcde")

    results = run(tasks)

    assert machine.workers == [["a", "b"], ["a", "c"], ["a", "d"], ["a", "e"]]
    assert results == {"a": ("ok", 4), **dict.fromkeys("bcde", ("ok", 1))}
    additional = [bool(item.get("additional")) for item in tasks[0].rounds]
    assert additional == [False] * 5 + [True] * 15


def test_what_the_engine_and_its_device_say_is_kept_apart_from_the_warm_up(machine: Machine) -> None:
    (task,) = make_tasks("a")

    run([task])

    assert task.engine == {"io": "pinned"}
    assert task.device_state == {"sm_clock_mhz": 1500}
    assert task.warm_up == {"call_ms": 60.0, "resident_bytes": 1, "engines_loaded": 1}


def test_engines_that_fill_the_memory_run_alone(machine: Machine) -> None:
    machine.sizes_bytes = dict.fromkeys("abc", 90)

    assert run(make_tasks("abc")) == dict.fromkeys("abc", ("ok", 1))
    assert machine.workers == [["a"], ["b"], ["c"]]


def test_engine_that_does_not_even_fit_alone_is_out_of_memory_and_the_others_go_on(machine: Machine) -> None:
    machine.sizes_bytes = {"b": 101}
    machine.hard_limit = True

    results = run(make_tasks("abcd"))

    assert results["b"] == ("out-of-memory", 1)
    assert all(results[name][0] == "ok" for name in "acd")


def test_crash_costs_one_cell_after_two_tries(machine: Machine) -> None:
    machine.round_errors = {"b": [WorkerDied("SIGSEGV"), WorkerDied("SIGSEGV")]}

    results = run(make_tasks("abc"))

    assert results == {"a": ("ok", 1), "b": ("failed", 1), "c": ("ok", 1)}


def test_crash_that_does_not_come_again_costs_nothing_and_rounds_are_kept(machine: Machine) -> None:
    machine.round_errors = {"b": [WorkerDied("SIGSEGV")]}
    tasks = make_tasks("abc")

    assert run(tasks) == dict.fromkeys("abc", ("ok", 1))
    assert machine.workers == [["a"], ["a", "c"], ["b"]]
    assert [len(task.rounds) for task in tasks] == [5, 5, 5]


def test_failure_without_a_crash_keeps_the_worker(machine: Machine) -> None:
    machine.load_errors = {"a": [BackendError("no such op"), BackendError("no such op")]}

    assert run(make_tasks("ab")) == {"a": ("failed", 1), "b": ("ok", 1)}
    assert machine.workers == [["b"], []]


@pytest.mark.parametrize("when", ["load_errors", "round_errors"])
def test_memory_that_ends_in_a_crowd_is_tried_again_in_a_smaller_one(machine: Machine, when: str) -> None:
    error = type("Killed", (WorkerDied, OutOfMemoryError), {})
    setattr(machine, when, {"c": [error("SIGKILL")]})

    assert {name: status for name, (status, _) in run(make_tasks("abc")).items()} == dict.fromkeys("abc", "ok")


def test_common_engine_that_fails_later_keeps_its_cell(machine: Machine) -> None:
    machine.sizes_bytes = dict.fromkeys("abc", 40)
    tasks = make_tasks("abc")
    machine.round_errors = {"c": [WorkerDied("SIGSEGV")]}

    results = run(tasks)

    assert {name: status for name, (status, _) in results.items()} == dict.fromkeys("abc", "ok")


def test_backend_that_is_not_there_ends_the_run(machine: Machine) -> None:
    machine.load_errors = {"b": [BackendUnavailable("no GPU")]}

    with pytest.raises(BackendUnavailable):
        run(make_tasks("abc"))
