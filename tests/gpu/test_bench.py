"""``bench`` on a real GPU: what its cells say of the engine and of the GPU. They skip where there is none."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dsc_split._support.records import to_document
from dsc_split.benchmarks import BenchSettings, bench_bundle, make_table
from dsc_split.bundle import Bundle
from dsc_split.engines.gpu._state import gpu_facts, gpu_state
from dsc_split.errors import BackendError

pytestmark = pytest.mark.gpu

Export = Callable[[str], Bundle]
Build = Callable[[Bundle, str, str], None]
QUICK = BenchSettings(precision_goal=1e6, time_limit_s=2.0)


def test_bench_times_both_sides_and_its_cells_describe_gpu_and_engine(
    target: str, export: Export, build: Build
) -> None:
    bundle = export("fp32")
    for side in ("device", "server"):
        build(bundle, side, target)

    result = bench_bundle(bundle, device=target, server=target, batches=[1, 8], settings=QUICK)

    assert result.counts["ok"] == len(result.cells) > 0
    for cell in result.cells:
        latency_ms, compute_ms = cell.latency_ms, cell.compute_ms
        assert latency_ms is not None
        if target.startswith("tensorrt"):
            assert compute_ms is not None
            assert to_document(cell.environment)["engine"]["cuda_graph"] is True
        if compute_ms is not None:
            assert 0 < compute_ms.median <= latency_ms.median
        assert to_document(cell.settings)["warm_up"]["calls"] >= 2
        assert cell.run_fingerprint["gpu"] == gpu_facts()
        for when in ("start", "end"):
            assert to_document(cell.environment)[when]["gpu"].keys() & {"sm_clock_mhz", "unreadable"}
        assert isinstance(cell.marks, tuple)
    table = make_table(bundle, result.cells, device=result.targets["device"], server=result.targets["server"])
    assert [item.batch for item in table.batches] == [1, 8]


def test_state_of_the_gpu_can_be_read(target: str) -> None:
    state = gpu_state()

    assert "unreadable" not in state
    assert state["sm_clock_mhz"] > 0
    assert 0 < state["temperature_c"] < 120
    assert isinstance(state["throttle_reasons"], list)


def test_locked_clock_is_kept_or_refused_with_what_to_do(target: str, export: Export, build: Build) -> None:
    bundle = export("fp32")
    build(bundle, "device", target)
    mhz = round(gpu_facts()["max_sm_clock_mhz"] * 0.6)
    settings = BenchSettings(precision_goal=1e6, time_limit_s=2.0, lock_clocks_mhz=mhz)

    try:
        result = bench_bundle(bundle, sides=["device"], device=target, batches=[8], settings=settings)
    except BackendError as e:
        assert "Leave --lock-clocks out" in str(e) or "leave --lock-clocks out" in str(e)  # noqa: PT017 - either is right
        pytest.skip(str(e))

    for cell in result.cells:
        assert cell.run_fingerprint["locked_sm_clock_mhz"] == mhz
        assert not [mark for mark in cell.marks if mark.startswith("clock")]
