"""A bundle that is made by hand, small enough that measuring it takes no time; and fixtures that give one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dsc_split._support.hashing import sha256_file
from dsc_split.bundle import FORMAT, VERSION, Bundle
from dsc_split.bundles._records import FileEntry

Shape = list[int | str]

X: tuple[str, Shape] = ("x", ["batch", 3, 8, 8])
A: tuple[str, Shape] = ("a", ["batch", 2, 8, 8])
Y: tuple[str, Shape] = ("y", ["batch", 4, 8, 8])


def tensor_entry(name: str, shape: Shape) -> dict[str, Any]:
    per_batch = int(np.prod([size for size in shape if isinstance(size, int)]))
    elements = [per_batch, 0]
    return {"name": name, "dtype": "float32", "shape": shape, "elements_by_batch": elements, "itemsize": 4}


def make_model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[tuple[str, Shape]],
    outputs: Sequence[tuple[str, Shape]],
    **weights: np.ndarray,
) -> onnx.ModelProto:
    def infos(items: Sequence[tuple[str, Shape]]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in items]

    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(list(nodes), "tiny", infos(inputs), infos(outputs), initializers)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("org.example", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def evaluate(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {session.get_inputs()[0].name: x})
    return np.asarray(result)


def tiny_bundle(folder: Path, **manifest_changes: Any) -> Bundle:
    """Make a bundle of ``x -> Conv -> a -> Conv -> y`` with one pair, cut at ``a``."""
    values = np.random.default_rng(0)
    w1 = values.standard_normal((2, 3, 3, 3), dtype=np.float32)
    w2 = values.standard_normal((4, 2, 3, 3), dtype=np.float32)
    first = helper.make_node("Conv", ["x", "w1"], ["a"], pads=[1, 1, 1, 1])
    second = helper.make_node("Conv", ["a", "w2"], ["y"], pads=[1, 1, 1, 1])
    graphs = {
        "onnx/model.onnx": make_model([first, second], [X], [Y], w1=w1, w2=w2),
        "onnx/a.head.onnx": make_model([first], [X], [A], w1=w1),
        "onnx/a.tail.onnx": make_model([second], [A], [Y], w2=w2),
    }
    (folder / "onnx").mkdir(parents=True)
    (folder / "samples").mkdir()
    files = {}
    for path, model in graphs.items():
        (folder / path).write_bytes(model.SerializeToString())
        size = (folder / path).stat().st_size
        files[path] = {"sha256": sha256_file(folder / path), "size": size, "role": "graph"}
    x = values.standard_normal((2, 3, 8, 8), dtype=np.float32)
    a, y = evaluate(graphs["onnx/a.head.onnx"], x), evaluate(graphs["onnx/model.onnx"], x)
    np.savez(folder / "samples/model.npz", **{"input:x": x, "output:y": y})  # type: ignore[arg-type]  # stub flaw
    np.savez(folder / "samples/a.npz", **{"cut:a": a})  # type: ignore[arg-type]  # stub flaw
    split = {
        "name": "a",
        "tensors": [{**tensor_entry(*A), "passthrough": False}],
        "head": "onnx/a.head.onnx",
        "tail": "onnx/a.tail.onnx",
        "early_outputs": [],
        "compressive": True,
        "ratio": 0.667,
    }
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "revision": 1,
        "sealed": False,
        "side": None,
        "left_out": {},
        "pair_id": "sha256:" + 64 * "0",
        "model": {"path": "onnx/model.onnx", "name": "tiny", "weights": {"path": None}},
        "precision": "fp32",
        "batch": {"symbol": "batch", "fixed": None, "max": 64},
        "inputs": [tensor_entry(*X)],
        "outputs": [tensor_entry(*Y)],
        "input_bytes_stated": None,
        "full_offload": True,
        "splits": [split],
        "failed_splits": [],
        "samples": {"batch": 2, "files": {"model": "samples/model.npz", "a": "samples/a.npz"}},
        "targets": {"device": [], "server": []},
        "files": files,
        **manifest_changes,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Bundle.open(folder)


@pytest.fixture
def make_bundle(tmp_path: Path) -> Callable[..., Bundle]:
    """Make the tiny bundle, with entries of its manifest changed."""
    return lambda **changes: tiny_bundle(tmp_path / "bundle", **changes)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """The tiny bundle."""
    return tiny_bundle(tmp_path / "bundle")


@pytest.fixture
def replace_graph() -> Callable[..., Bundle]:
    """Put another graph into a bundle, and list it: ``replace_graph(bundle, path, nodes, inputs, outputs)``."""

    def replace(bundle: Bundle, path: str, *parts: Any, **weights: np.ndarray) -> Bundle:
        nodes, inputs, outputs = parts
        model = make_model(nodes, inputs, outputs, **weights)
        (bundle.path / path).write_bytes(model.SerializeToString())
        size_bytes = (bundle.path / path).stat().st_size
        with bundle.edit() as draft:
            entry = FileEntry(sha256=sha256_file(bundle.path / path), size_bytes=size_bytes, role="graph")
            draft.change(files={**draft.manifest.files, path: entry})
        return Bundle.open(bundle.path)

    return replace
