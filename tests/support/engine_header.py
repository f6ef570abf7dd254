"""What an engine file says of itself, where a test wants any."""

from __future__ import annotations

from dsc_split._support.records import read_record
from dsc_split.engines._engine_file import EngineDescription

DOCUMENT = {
    "format": "dsc-split/engine",
    "version": 1,
    "library": "tensorrt_rtx",
    "library_version": "1.7.1.116",
    "target": "tensorrt-rtx:sm75",
    "architecture": "sm75",
    "build_fingerprint": {"library": "tensorrt_rtx"},
    "model": "tiny",
    "label": "head features.4.0",
    "graph": "onnx/features.4.0.head.onnx",
    "graph_digest": "0" * 64,
    "profile": {
        "min": 1,
        "opt": 8,
        "max": 64,
        "shapes": {"input": {"min": [1, 3, 8, 8], "opt": [8, 3, 8, 8], "max": [64, 3, 8, 8]}},
    },
    "inputs": [{"name": "input", "dtype": "float32", "shape": ["batch", 3, 8, 8]}],
    "outputs": [{"name": "y", "dtype": "float16", "shape": ["batch", None]}],
    "precision": {"layers": {"float16": 120}, "tf32": False},
    "memory": {"activation_bytes": {"64": 1024}, "scratch_bytes": 0, "weights_bytes": 12},
    "rewritten": None,
}
"""As it stands in a file, without what is said of the plan."""

HEADER = read_record(DOCUMENT, EngineDescription)
"""The same, as a record."""
