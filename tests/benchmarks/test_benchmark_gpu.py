"""What the example that compares with trtexec does without a GPU: reading what that tool prints."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsc_split.errors import DscError

SUMMARY = """\
[11/23/2026-13:00:00] [I] === Performance summary ===
[11/23/2026-13:00:00] [I] Throughput: 1651.08 qps
[11/23/2026-13:00:00] [I] Latency: min = 0.71 ms, max = 0.9 ms, mean = 0.72 ms, median = 0.718 ms, percentile(90%) = 0.73 ms
[11/23/2026-13:00:00] [I] Enqueue Time: min = 0.01 ms, max = 0.02 ms, mean = 0.01 ms, median = 0.0123 ms
[11/23/2026-13:00:00] [I] H2D Latency: min = 0.05 ms, max = 0.06 ms, mean = 0.05 ms, median = 0.0512 ms
[11/23/2026-13:00:00] [I] GPU Compute Time: min = 0.6 ms, max = 0.7 ms, mean = 0.6 ms, median = 0.6042 ms
[11/23/2026-13:00:00] [I] D2H Latency: min = 0.06 ms, max = 0.06 ms, mean = 0.06 ms, median = 0.0625 ms
"""  # noqa: E501 - as it is printed


@pytest.fixture
def example(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("benchmark_gpu", root / "examples/benchmark_gpu/run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmark_gpu", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_summary_of_the_tool_is_read(example: Any) -> None:
    times = example.read_summary(SUMMARY)

    assert (times.host_ms, times.compute_ms) == (0.718, 0.6042)


def test_tool_that_fails_is_quoted(example: Any) -> None:
    with pytest.raises(DscError, match="Unknown option"):
        example.read_summary("[E] Unknown option: --loadEngine")


def test_tool_gets_plan_and_shapes(example: Any, tmp_path: Path) -> None:
    tool = tmp_path / "trtexec"
    (tmp_path / "summary").write_text(SUMMARY)
    tool.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\ncat {tmp_path}/summary\n')
    tool.chmod(0o755)
    inputs = {"x": np.zeros((8, 3, 4, 4)), "mask": np.zeros(8)}

    assert example.time_by_tool(str(tool), tmp_path / "bare.plan", inputs).host_ms == 0.718

    words = (tmp_path / "arguments").read_text().split()
    assert f"--loadEngine={tmp_path}/bare.plan" in words
    assert "--shapes=x:8x3x4x4,mask:8" in words
    assert "--useCudaGraph" in words


def test_without_a_gpu_there_is_nothing_to_time(
    example: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(example, "gpu_facts", dict)
    monkeypatch.setattr(example, "gpu_state", lambda: {"unreadable": "there is no driver"})

    assert list(example.usable_targets()) == []
    assert capsys.readouterr().out == "no GPU to time: there is no driver\n"
