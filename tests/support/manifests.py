"""A manifest with every key, as a document."""

from __future__ import annotations

from typing import Any

from dsc_split.bundle import FORMAT, VERSION

TENSOR = {"name": "x", "dtype": "float32", "shape": ["batch", 3], "elements_by_batch": [3, 0], "itemsize": 4}
TARGET = {"target": "onnxruntime:cpu", "fingerprint": {}, "id": "onnxruntime-cpu-0"}
WEIGHTS = {"path": "onnx/weights.data", "origin": "a file"}
OPTIONS = {
    "batches": [1, 4],
    "opt_batch": None,
    "per_batch": False,
    "gemm": "sum",
    "workspace_bytes": None,
    "timing_cache_sha256": None,
    "device_memory_bytes": None,
}
SPLIT = {
    "name": "a",
    "tensors": [{**TENSOR, "passthrough": True}],
    "head": "onnx/a.head.onnx",
    "tail": "onnx/a.tail.onnx",
    "early_outputs": ["e"],
}
MANIFEST: dict[str, Any] = {
    "format": FORMAT,
    "version": VERSION,
    "revision": 7,
    "sealed": False,
    "side": None,
    "left_out": {"onnx/a.tail.onnx": {"sha256": 64 * "1", "size": 1, "role": "tail"}},
    "pair_id": "sha256:0",
    "model": {"path": "onnx/model.onnx", "name": "tiny", "opset": {"": 18}, "weights": WEIGHTS},
    "precision": "fp32",
    "batch": {"fixed": 4, "max": 4},
    "inputs": [TENSOR],
    "outputs": [TENSOR],
    "input_bytes_stated": 100,
    "full_offload": True,
    "splits": [SPLIT],
    "failed_splits": [{}],
    "samples": {"batch": 2, "files": {"model": "samples/model.npz"}},
    "targets": {"device": [TARGET], "server": [TARGET]},
    "files": {"onnx/model.onnx": {"sha256": 64 * "0", "size": 1, "role": "model"}},
    "notes": ["a note"],
}
