"""The tiny bundle, settings that are quick, and a pretended GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.fake_executor import FakeExecutor
from tests.support.tiny_bundles import bundle, make_bundle, replace_graph

from dsc_split.benchmarks import BenchSettings
from dsc_split.benchmarks.sweep.executors._table import EXECUTORS

__all__ = ["bundle", "fake_executor", "gpu", "make_bundle", "quick", "replace_graph", "sabotage"]

PRETENDED_GPU = """
from dsc_split.engines._base import Engine
from dsc_split.engines.gpu._state import gpu_state
from dsc_split.engines.onnxruntime._backend import OnnxRuntimeBackend

class Call:
    def __init__(self, bare):
        self._bare = bare
    def __call__(self):
        return self._bare()
    def compute_ms(self):
        return 0.25

bind = Engine.bind
def bind_with_events(self, inputs):
    self.facts = {"io": "pinned", "cuda_graph": True}
    return Call(bind(self, inputs))

Engine.bind = bind_with_events
OnnxRuntimeBackend.live_state = lambda self: gpu_state()
"""
"""What every worker does first: its engines have events, and its back-end a GPU."""


@pytest.fixture
def quick() -> BenchSettings:
    """Any spread is precise enough: five short rounds and done."""
    return BenchSettings(precision_goal=1e6, time_limit_s=0.5)


@pytest.fixture
def fake_executor(monkeypatch: pytest.MonkeyPatch) -> FakeExecutor:
    """Let ``bench`` make times up where no executor is given."""
    executor = FakeExecutor()
    monkeypatch.setitem(EXECUTORS, "local", lambda: executor)
    return executor


@pytest.fixture
def sabotage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Run code at the start of every Python process that is started from now on, thus of every worker."""

    def plant(code: str) -> None:
        folder = tmp_path / "sabotage"
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)

    return plant


class PretendedGpu:
    """A GPU that is a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def change(self, **values: Any) -> None:
        """Set what the GPU answers: ``change(reasons=0x20)``; ``errors={"nvmlInit": 12}`` makes functions fail."""
        errors = values.pop("errors", {})
        (gpu,) = json.loads(self.path.read_text())["gpus"]
        self.path.write_text(json.dumps({"gpus": [{**gpu, **values}], "errors": errors}))

    @property
    def locked(self) -> list[int] | None:
        """What its clock is locked to."""
        (gpu,) = json.loads(self.path.read_text())["gpus"]
        clocks: list[int] | None = gpu.get("locked")
        return clocks


@pytest.fixture
def gpu(root: Path, tmp_path: Path, sabotage: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> PretendedGpu:
    """Give a GPU to this process, and to every one that it starts."""
    from dsc_split.engines.gpu._state import gpu_facts
    from dsc_split.engines.onnxruntime._backend import OnnxRuntimeBackend

    path = tmp_path / "nvml.json"
    gpu = {"name": "Pretended", "uuid": "GPU-1", "sm": 1500, "max_sm": 2100, "max_memory": 7000, "reasons": 0}
    path.write_text(json.dumps({"gpus": [gpu], "errors": {}}))
    monkeypatch.setenv("FAKE_NVML", str(path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    sabotage(PRETENDED_GPU)
    module = tmp_path / "sabotage" / "pynvml.py"
    shutil.copy(root / "tests/data/fake_nvml/pynvml.py", module)
    spec = importlib.util.spec_from_file_location("pynvml", module)
    assert spec is not None
    assert spec.loader is not None
    fake = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fake)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(OnnxRuntimeBackend, "_device_facts", lambda self: {"gpu": gpu_facts()})
    return PretendedGpu(path)
