"""A device that has NumPy, TensorRT and CUDA, and neither PyTorch, ONNX nor ONNX Runtime; nor the bundle's graphs.

TensorRT's engines are real, and lie in a real bundle. What loads and runs them there is pretended.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.manifests import stated
from tests.support.tiny_bundles import tiny_bundle

from dsc_split.bundle import Bundle
from dsc_split.engines import BuildOptions, build_engines, check_engines
from dsc_split.engines._engine_file import read_header

rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed: pip install 'dsc-split[rtx]'")

TARGET, SERVER = "tensorrt-rtx:sm75", "onnxruntime:cpu,threads=1"
ABSENT = ["onnx", "onnx_ir", "onnxruntime", "onnxscript", "safetensors", "timm", "torch", "torchvision"]
BATCHES = (1, 4)

AT_START = """
import hashlib, importlib.util, json, sys, types
for name in {absent!r}:
    sys.modules[name] = None

def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]

import numpy as np
fakes = load("fake_cuda", {fakes!r})
from dsc_split.engines.gpu import _cuda
from dsc_split.engines.tensorrt._library import TrtLogger

gpu = fakes.FakeCuda()
_cuda.open_cuda = lambda *, extra, primary=False: gpu
plans = json.loads({plans!r})
weights = dict(np.load({weights!r}))

def convolve(x, w):
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), axis=(2, 3))
    return np.einsum("bchwij,ocij->bohw", windows, w).astype(np.float32)

def head(inputs):
    return {{"a": convolve(inputs["x"], weights["w1"])}}

def model(inputs):
    return {{"y": convolve(head(inputs)["a"], weights["w2"])}}

class Runtime:
    def __init__(self, native):
        self._native = native
    def _real(self, plan):
        compute, output = {{"model": (model, "y"), "head": (head, "a")}}[plans[hashlib.sha256(plan).hexdigest()]]
        logger = TrtLogger()
        logger.native = self._native
        trt = fakes.FakeTrt(cuda=gpu, compute=compute, outputs={{output: fakes.DataType.FLOAT}}, logger=logger)
        return trt.Runtime(self._native)
    def get_engine_validity(self, plan):
        return self._real(plan).get_engine_validity(plan)
    def deserialize_cuda_engine(self, plan):
        return self._real(plan).deserialize_cuda_engine(plan)

class ILogger:
    ERROR, WARNING, INFO, VERBOSE = range(1, 5)
    def __init__(self):
        pass

class TensorRT(types.ModuleType):
    __version__ = {version!r}
    Runtime, ILogger = Runtime, ILogger
    def __getattr__(self, name):
        return getattr(fakes.FakeTrt, name)

sys.modules["tensorrt_rtx"] = TensorRT("tensorrt_rtx")
"""
"""What every Python process on the device does first."""


class Device:
    """The device: ``run("check", ...)`` is a command there."""

    def __init__(self, bundle: Path, environment: dict[str, str]) -> None:
        self.bundle = bundle
        self._environment = environment

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env=self._environment,
        )

    def run(self, command: str, *options: Any) -> str:
        """Run a command on the bundle; gives what it prints."""
        done = self.python("-m", "dsc_split.cli", command, str(self.bundle), *map(str, options))
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def server_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundle where it was made: with graphs, the device's engines, and the server's times."""
    from dsc_split.benchmarks import BenchSettings, bench_bundle

    bundle = tiny_bundle(tmp_path_factory.mktemp("server") / "bundle")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSC_SPLIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        result = build_engines(bundle, "device", TARGET, BuildOptions(batches=BATCHES))
    assert not result.failed
    settings = BenchSettings(precision_goal=1e6, time_limit_s=0.2)
    bench_bundle(bundle, sides=("server",), server=SERVER, batches=BATCHES, settings=settings)
    return Bundle.open(bundle.path)


@pytest.fixture(scope="module")
def device(root: Path, server_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Device:
    """The device, with a copy of the bundle that has no graphs."""
    import onnx
    from onnx import numpy_helper

    folder = tmp_path_factory.mktemp("device")
    shutil.copytree(server_bundle.path, folder / "bundle")
    shutil.rmtree(folder / "bundle/onnx")
    tensors = onnx.load(server_bundle.model_path).graph.initializer
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in tensors}
    np.savez(folder / "weights.npz", **weights)  # type: ignore[arg-type]  # stub flaw
    headers = [read_header(path) for path in server_bundle.path.glob("engines/*/*.plan")]
    plans = {header.plan_sha256: header.label.split()[0].replace("whole", "model") for header in headers}
    (folder / "start").mkdir()
    (folder / "start/sitecustomize.py").write_text(
        AT_START.format(
            absent=[*ABSENT, "cuda"],
            fakes=str(root / "tests/support/fake_cuda.py"),
            plans=json.dumps(plans),
            weights=str(folder / "weights.npz"),
            version=rtx.__version__,
        )
    )
    environment = {"PYTHONPATH": str(folder / "start"), "DSC_SPLIT_CACHE": str(folder / "cache")}
    return Device(folder / "bundle", {**os.environ, **environment})


@pytest.fixture(scope="module")
def measured(device: Device) -> Device:
    """The device, its engines timed."""
    limits = ("--precision-goal", 1000, "--time-limit", 0.2)
    document = json.loads(device.run("bench", "--side", "device", *limits, "--json"))
    assert document["counts"]["ok"] == 4, document
    return device


def test_frameworks_are_absent_there(device: Device) -> None:
    program = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)"
    for name in ("onnx", "torch", "onnxruntime"):
        assert "ModuleNotFoundError" in device.python("-c", program, name).stderr


def test_engines_are_checked_there(device: Device) -> None:
    text = device.run("check", "--side", "device")

    assert "whole model: passed" in text
    assert "head a: passed" in text
    (entry,) = Bundle.open(device.bundle).manifest.targets.device
    assert entry.target == TARGET
    assert stated(entry.check).passed


def test_what_heads_give_there_is_proven_with_the_tails_of_the_server(
    device: Device, server_bundle: Bundle, tmp_path: Path
) -> None:
    file = tmp_path / "device.npz"

    document = json.loads(device.run("check", "--side", "device", "--save-tensors", file, "--json"))
    result = check_engines(server_bundle, "server", SERVER, against=file)

    assert document["passed"]
    assert result.passed
    assert [row.label for row in result.rows] == ["whole model", "tail a"]


def test_engines_are_timed_there_and_the_table_is_written(measured: Device) -> None:
    cells = [json.loads(path.read_text()) for path in (measured.bundle / "cells").glob("*.json")]
    ours = [cell for cell in cells if cell["target"] == TARGET]
    assert sorted((cell["graph"], cell["question"]["batch"]) for cell in ours) == [
        (graph, batch) for graph in ("onnx/a.head.onnx", "onnx/model.onnx") for batch in BATCHES
    ]
    for cell in ours:
        engine = cell["environment"]["engine"]
        assert engine["file"] == Path(cell["graph"]).name.replace(".onnx", ".plan")
        assert engine["io"] == "pinned"
        assert engine["cuda_graph"] is True
        assert cell["compute_ms"]["median"] > 0
    table = json.loads((measured.bundle / "table.json").read_text())
    assert [batch["batch"] for batch in table["batches"]] == list(BATCHES)


def test_the_table_is_shown_and_a_split_is_picked_there(measured: Device) -> None:
    assert "a" in measured.run("table")
    picked = json.loads(measured.run("pick", "--batch", 4, "--rate", 100, "--json"))
    assert picked["batch"] == 4


def test_table_and_engines_are_loaded_there_as_a_program_would(measured: Device) -> None:
    program = """
import sys
import numpy as np
from dsc_split import LookupTable
from dsc_split.bundle import Bundle
from dsc_split.engines import SideEngines
table = LookupTable.load(sys.argv[1] + "/table.json")
engines = SideEngines(Bundle.open(sys.argv[1]), "device")
outputs = {}
for graph in engines.graphs:
    with engines.load(graph, 3) as engine:
        outputs |= engine.run({"x": np.ones((3, 3, 8, 8), np.float32)})
print(sorted((name, array.shape) for name, array in outputs.items()))
print(sorted(name for name in ("onnx", "onnxruntime", "torch") if sys.modules.get(name)))
"""
    done = measured.python("-c", program, str(measured.bundle))

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[('a', (3, 2, 8, 8)), ('y', (3, 4, 8, 8))]", "[]"]


def test_a_target_that_loads_graphs_says_what_is_missing_there(device: Device) -> None:
    arguments = ("check", str(device.bundle), "--side", "device", "--target", "onnxruntime:cpu")

    done = device.python("-m", "dsc_split.cli", *arguments)

    assert done.returncode == 5
    assert "pip install 'dsc-split[cpu]'" in done.stderr
