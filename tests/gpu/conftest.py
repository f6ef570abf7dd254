"""Engines on a real GPU: a small model, exported once, and every target that may run it here."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dsc_split.bundle import Bundle
from dsc_split.engines import EngineLike, build_engines, get_backend
from dsc_split.engines._backends import BACKENDS
from dsc_split.engines._options import BuildOptions
from dsc_split.engines.gpu._state import gpu_facts, gpu_state
from dsc_split.engines.side._load import SideEngines
from dsc_split.errors import BackendUnavailable

if TYPE_CHECKING:
    import onnx

BATCHES = (1, 2, 8)
TENSORRT = ("tensorrt", "tensorrt-rtx")

Export = Callable[[str], Bundle]
Build = Callable[[Bundle, str, str], None]
Load = Callable[[Bundle, str], EngineLike]


def usable(name: str) -> str:
    """Return a target's text, complete; skips the test, with the reason, where it cannot run here."""
    try:
        text = name if name != "tensorrt-rtx" else f"tensorrt-rtx:{rtx_architecture()}"
        get_backend(text).run_fingerprint()
    except BackendUnavailable as e:
        pytest.skip(str(e))
    return text


def rtx_architecture() -> str:
    """Name this machine's GPU as TensorRT for RTX does, which has to be told."""
    known = BACKENDS["tensorrt-rtx"].architectures
    get_backend(f"tensorrt-rtx:{next(iter(known))}").run_fingerprint()  # are the library and a driver there?
    capability = gpu_facts().get("compute_capability")
    if capability is None:
        raise BackendUnavailable(gpu_state().get("unreadable", "NVML does not tell the GPU's compute capability"))
    architecture = f"sm{capability.replace('.', '')}"
    if architecture not in known:
        raise BackendUnavailable(f"this GPU is {architecture}; TensorRT for RTX builds for {', '.join(known)}")
    return architecture


@pytest.fixture(params=[*TENSORRT, "onnxruntime:cuda"])
def target(request: pytest.FixtureRequest) -> str:
    """Every target with a GPU, in turn."""
    return usable(request.param)


@pytest.fixture(params=TENSORRT)
def tensorrt(request: pytest.FixtureRequest) -> str:
    """Every TensorRT target, in turn."""
    return usable(request.param)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of bundles that were exported already, by precision."""
    return tmp_path_factory.mktemp("exported")


@pytest.fixture
def export(exported: Path, tmp_path: Path) -> Export:
    """Return a fresh copy of the small model's bundle: ``export("fp16")``."""

    def give(precision: str) -> Bundle:
        folder = exported / precision
        if not folder.exists():
            import onnx

            from dsc_split.partitioner import ExportOptions, export_bundle

            model = exported / "small.onnx"
            onnx.save(small_model(), model)
            options: dict[str, Any] = {} if precision == "fp32" else {"precision": precision}
            export_bundle(str(model), folder, ExportOptions(**options))
        return Bundle.open(shutil.copytree(folder, tmp_path / precision))

    return give


@pytest.fixture
def build() -> Build:
    """Build a side's engines, all of them: ``build(bundle, "device", target)``."""

    def give(bundle: Bundle, side: str, target: str) -> None:
        result = build_engines(bundle, side, target, BuildOptions(batches=BATCHES))
        assert [row.reason for row in result.rows if row.reason] == []

    return give


@pytest.fixture
def load(build: Build) -> Iterator[Load]:
    """Build the device's engines and load the whole model's: ``load(bundle, target)``; it is closed by itself."""
    with contextlib.ExitStack() as engines:

        def give(bundle: Bundle, target: str) -> EngineLike:
            build(bundle, "device", target)
            side = SideEngines(bundle, "device", target)
            engine = side.load(side.graphs[0], BATCHES[-1])
            engines.callback(engine.close)
            return engine

        yield give


def small_model() -> onnx.ModelProto:
    """Make ``x -> Conv, Relu -> Conv, Relu (small) -> Conv, Relu -> mean -> Gemm -> y``."""
    from onnx import TensorProto, helper, numpy_helper

    values = np.random.default_rng(0)
    channels = (3, 16, 4, 32)
    nodes, weights, last = [], [], "x"
    for i, (before, after) in enumerate(itertools.pairwise(channels)):
        kernel = values.standard_normal((after, before, 3, 3), dtype=np.float32) / (9 * before) ** 0.5
        weights.append(numpy_helper.from_array(kernel, f"w{i}"))
        nodes.append(
            helper.make_node("Conv", [last, f"w{i}"], [f"c{i}"], pads=[1] * 4, strides=[2, 2], name=f"conv{i}")
        )
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"r{i}"], name=f"relu{i}"))
        last = f"r{i}"
    matrix = values.standard_normal((channels[-1], 10), dtype=np.float32) / channels[-1] ** 0.5
    weights.append(numpy_helper.from_array(matrix, "w"))
    nodes.append(helper.make_node("GlobalAveragePool", [last], ["pooled"], name="pool"))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"], name="flatten"))
    nodes.append(helper.make_node("Gemm", ["flat", "w"], ["y"], name="classifier"))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 64, 64])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 10])
    graph = helper.make_graph(nodes, "small", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
