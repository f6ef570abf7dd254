"""A manifest with every key, as a document; and what tests ask of manifests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from msgspec import UnsetType

from dsc_split._support.records import read_record
from dsc_split.bundle import FORMAT, VERSION, Bundle
from dsc_split.bundles._manifest import DIGEST, encode_document, encode_manifest
from dsc_split.bundles._records import Manifest

T = TypeVar("T")

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


def stated(value: T | UnsetType | None) -> T:
    """Return a value that a record has to state."""
    assert value is not None
    assert not isinstance(value, UnsetType)
    return value


def document_of(bundle: Bundle) -> dict[str, Any]:
    """Read a bundle's manifest as it is in its file."""
    document: dict[str, Any] = json.loads(bundle.storage.read("manifest.json"))
    return document


@contextmanager
def edited(bundle: Bundle) -> Iterator[dict[str, Any]]:
    """Change a bundle's manifest as a document: ``with edited(bundle) as document: del document["samples"]``."""
    with bundle.edit() as draft:
        document = json.loads(encode_manifest(draft.manifest))
        del document[DIGEST]
        yield document
        draft.manifest = read_record(document, Manifest)
        draft.touch()


def write_document(bundle: Bundle, document: dict[str, Any]) -> None:
    """Write a document to a manifest's file as it is, though it may be none that a bundle can have."""
    (bundle.path / "manifest.json").write_bytes(encode_document(document))


def targets_of(document: dict[str, Any], side: str) -> list[dict[str, Any]]:
    """Return the targets of a side in a manifest's document."""
    found: list[dict[str, Any]] = document.get("targets", {})[side]
    return found
