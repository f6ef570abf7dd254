"""What a cell tells about the GPU: a whole run of ``bench`` whose workers have a pretended one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from msgspec import UNSET
from tests.support.fake_executor import FakeExecutor

from dsc_split._support.records import to_document
from dsc_split.benchmarks import BenchSettings, CellStore, bench_bundle
from dsc_split.benchmarks.cells._cells import Statistics
from dsc_split.benchmarks.sweep.executors._table import EXECUTORS
from dsc_split.bundle import Bundle
from dsc_split.engines.gpu._state import gpu_state
from dsc_split.errors import UsageError

ONE = "onnxruntime:cpu,threads=1"
OPTIONS = ["--device", ONE, "--server", f"{ONE},slowdown=2", "--batches", "1", "--precision-goal", "1000"]


def test_cell_holds_the_state_of_the_gpu_the_engine_and_the_compute_time(
    bundle: Bundle, quick: BenchSettings, gpu: Any
) -> None:
    bench_bundle(bundle, sides=["device"], device=f"{ONE},slowdown=2", batches=[1], settings=quick)

    for cell in CellStore(bundle).all():
        environment = to_document(cell.environment)
        for when in ("start", "end"):
            assert environment[when]["gpu"]["sm_clock_mhz"] == 1500
            assert environment[when]["time"]
        assert cell.environment.engine == {"io": "pinned", "cuda_graph": True}
        assert to_document(cell.run_fingerprint)["gpu"]["uuid"] == "GPU-1"
        assert cell.marks == ()
        for part in cell.rounds:
            assert to_document(part)["device_state"]["gpu"] == "Pretended"
            assert part.compute_ms == (0.25,) * len(part.samples_ms)
        samples = sum(len(part.samples_ms) for part in cell.rounds)
        assert cell.compute_ms == Statistics(n=samples, median=0.5, p95=0.5, ci=(0.5, 0.5))


def test_paced_calls_have_compute_times_too(bundle: Bundle, gpu: Any) -> None:
    settings = BenchSettings(precision_goal=1e6, time_limit_s=0.5, period_ms=5.0)

    result = bench_bundle(bundle, sides=["device"], device=ONE, batches=[1], settings=settings)

    parts = [to_document(part) for cell in result.cells for part in cell.rounds]
    assert all(len(part["compute_ms"]) == len(part["samples_ms"]) for part in parts)


def test_cell_without_a_gpu_has_no_marks_no_state_and_no_compute_time(bundle: Bundle, quick: BenchSettings) -> None:
    result = bench_bundle(bundle, sides=["device"], device=ONE, batches=[1], settings=quick)

    for cell in result.cells:
        environment = to_document(cell.environment)
        assert "gpu" not in environment["start"]
        assert "gpu" not in environment["end"]
        assert (cell.environment.engine, cell.marks, cell.compute_ms) == ({}, (), None)
        assert cell.rounds[0].device_state is UNSET


@pytest.fixture
def timed_on_it(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``bench`` make times up, with the state of the pretended GPU."""
    monkeypatch.setitem(EXECUTORS, "local", lambda: FakeExecutor(device_state=gpu_state))


@pytest.mark.usefixtures("timed_on_it")
def test_throttled_gpu_marks_its_cells_and_says_so_once(bundle: Bundle, gpu: Any, dsc: Callable[..., Any]) -> None:
    gpu.change(reasons=0x40)

    done = dsc("bench", bundle.path, *OPTIONS, "--json")

    assert done.exit_code == 0, done.stderr
    assert [cell["marks"] for cell in json.loads(done.stdout)["cells"]] == [["throttled: hw_thermal_slowdown"]] * 4
    assert json.loads(done.stdout)["cells"][0]["compute_ms"]["median"] == 0.25
    assert done.stderr.count("4 of 4 cells were timed while the GPU was not steady") == 1
    shown = dsc("table", bundle.path)
    assert "not steady (throttled: hw_thermal_slowdown)" in " ".join(shown.stderr.split())


@pytest.mark.usefixtures("timed_on_it")
def test_throttled_gpu_of_one_side_is_said_where_there_is_no_table(
    bundle: Bundle, gpu: Any, dsc: Callable[..., Any]
) -> None:
    gpu.change(reasons=0x40)

    done = dsc("bench", bundle.path, "--side", "device", *OPTIONS)

    assert done.stderr.count("2 of 2 cells were timed while the GPU was not steady") == 1


@pytest.mark.usefixtures("timed_on_it")
def test_clock_is_locked_meanwhile_and_is_part_of_the_question(
    bundle: Bundle, gpu: Any, dsc: Callable[..., Any]
) -> None:
    dsc("bench", bundle.path, *OPTIONS, "--side", "device")

    done = dsc("bench", bundle.path, *OPTIONS, "--side", "device", "--lock-clocks", "300")

    assert done.exit_code == 0, done.stderr
    assert "2 cells (2 ok; 0 of them reused)" in done.stdout
    assert gpu.locked is None
    locked = [cell for cell in CellStore(bundle).all() if "locked_sm_clock_mhz" in cell.run_fingerprint]
    assert len(locked) == 2
    for cell in locked:
        assert cell.run_fingerprint["locked_sm_clock_mhz"] == cell.settings.lock_clocks_mhz == 300
        assert to_document(cell.environment)["end"]["gpu"]["sm_clock_mhz"] == 300
        assert cell.marks == ()


def test_clock_that_may_not_be_locked_ends_the_command_before_anything_is_measured(
    bundle: Bundle, gpu: Any, dsc: Callable[..., Any]
) -> None:
    gpu.change(errors={"nvmlDeviceSetGpuLockedClocks": 4})

    done = dsc("bench", bundle.path, *OPTIONS, "--lock-clocks", "300")

    assert done.exit_code == 4
    assert "Only root may: run the command with sudo" in " ".join(done.stderr.split())
    assert list(CellStore(bundle).all()) == []
    assert Bundle.open(bundle.path).targets("device") == ()


def test_clock_is_not_locked_for_targets_without_a_gpu(bundle: Bundle, quick: BenchSettings) -> None:
    settings = BenchSettings(lock_clocks_mhz=300)

    with pytest.raises(UsageError, match=r"no target runs on a GPU: 'onnxruntime:cpu,threads=1'"):
        bench_bundle(bundle, sides=["device"], device=ONE, batches=[1], settings=settings)
