"""A bundle that is made by hand, small enough that measuring it takes no time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dsc_split._files import sha256_file
from dsc_split.benchmarks import BenchSettings
from dsc_split.bundle import FORMAT, VERSION, Bundle

QUICK = BenchSettings(precision_goal=1e6, time_limit_s=0.5)
"""Any spread is precise enough: five short rounds and done."""

FEATURES = "onnx/a.head.onnx"


def _tensor(name: str, shape: list[int | str], per_batch: int) -> dict[str, Any]:
    elements = [per_batch, 0]
    return {"name": name, "dtype": "float32", "shape": shape, "elements_by_batch": elements, "itemsize": 4}


X = ("x", ["batch", 3, 8, 8], 192)
A = ("a", ["batch", 2, 8, 8], 128)
Y = ("y", ["batch", 4, 8, 8], 256)


def graph_model(
    nodes: list[onnx.NodeProto],
    inputs: list[tuple[str, list[int | str], int]],
    outputs: list[tuple[str, list[int | str], int]],
    weights: dict[str, np.ndarray],
) -> onnx.ModelProto:
    def info(item: tuple[str, list[int | str], int]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(item[0], TensorProto.FLOAT, item[1])

    used = {name for node in nodes for name in node.input}
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items() if name in used]
    graph = helper.make_graph(nodes, "tiny", [info(i) for i in inputs], [info(o) for o in outputs], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def tiny_bundle(folder: Path, **manifest_changes: Any) -> Bundle:
    """Make a bundle of ``x -> Conv -> a -> Conv -> y`` with one pair, cut at ``a``."""
    values = np.random.default_rng(0)
    weights = {
        "w1": values.standard_normal((2, 3, 3, 3), dtype=np.float32),
        "w2": values.standard_normal((4, 2, 3, 3), dtype=np.float32),
    }
    first = helper.make_node("Conv", ["x", "w1"], ["a"], pads=[1, 1, 1, 1])
    second = helper.make_node("Conv", ["a", "w2"], ["y"], pads=[1, 1, 1, 1])
    graphs = {
        "onnx/model.onnx": graph_model([first, second], [X], [Y], weights),
        "onnx/a.head.onnx": graph_model([first], [X], [A], weights),
        "onnx/a.tail.onnx": graph_model([second], [A], [Y], weights),
    }
    (folder / "onnx").mkdir(parents=True)
    (folder / "samples").mkdir()
    files = {}
    for path, model in graphs.items():
        (folder / path).write_bytes(model.SerializeToString())
        files[path] = {"sha256": sha256_file(folder / path), "size": (folder / path).stat().st_size, "role": "graph"}
    x = values.standard_normal((2, 3, 8, 8), dtype=np.float32)
    a, y = _evaluate(graphs["onnx/a.head.onnx"], x), _evaluate(graphs["onnx/model.onnx"], x)
    np.savez(folder / "samples/model.npz", **{"input:x": x, "output:y": y})
    np.savez(folder / "samples/a.npz", **{"cut:a": a})
    split = {"name": "a", "tensors": [_tensor(*A)], "head": "onnx/a.head.onnx", "tail": "onnx/a.tail.onnx"}
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "pair_id": "sha256:" + 64 * "0",
        "model": {"path": "onnx/model.onnx", "name": "tiny", "weights": {"path": None}},
        "precision": "fp32",
        "batch": {"symbol": "batch", "fixed": None, "max": 64},
        "inputs": [_tensor(*X)],
        "outputs": [_tensor(*Y)],
        "input_bytes_stated": None,
        "full_offload": True,
        "splits": [{**split, "early_outputs": [], "compressive": True, "ratio": 0.667}],
        "failed_splits": [],
        "samples": {"batch": 2, "files": {"model": "samples/model.npz", "a": "samples/a.npz"}},
        "targets": {"device": [], "server": []},
        "files": files,
        **manifest_changes,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Bundle.open(folder)


def replace_graph(bundle: Bundle, path: str, model: onnx.ModelProto) -> Bundle:
    """Put another graph into a bundle, and list it."""
    (bundle.path / path).write_bytes(model.SerializeToString())
    bundle.manifest["files"][path]["sha256"] = sha256_file(bundle.path / path)
    bundle.save()
    return Bundle.open(bundle.path)


def _evaluate(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {session.get_inputs()[0].name: x})
    return np.asarray(result)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return tiny_bundle(tmp_path / "bundle")


@pytest.fixture
def make_bundle(tmp_path: Path) -> Callable[..., Bundle]:
    return lambda **changes: tiny_bundle(tmp_path / "bundle", **changes)
