"""A bundle with everything in it that is packed: external weights, engines of two devices, cells and tables."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
from msgspec.structs import replace
from tests.support.manifests import OPTIONS
from tests.support.paths import GOLDEN
from tests.support.tiny_bundles import tiny_bundle

from dsc_split._support.hashing import sha256_file
from dsc_split._support.records import read_record
from dsc_split._support.strict_json import body_digest, canonical_json
from dsc_split.bundle import Bundle
from dsc_split.bundles._records import EngineEntry, FileEntry, RecordedOptions, TargetEntry, WeightsEntry

OLD, NEW, SERVER = "tensorrt-rtx:sm75", "tensorrt-rtx:sm89", "onnxruntime:cpu"
OLD_ID, NEW_ID, SERVER_ID = "rtx-sm75-000000000000", "rtx-sm89-111111111111", "ort-cpu-222222222222"
OLD_ENGINE, NEW_ENGINE = f"engines/{OLD_ID}/a.head.plan", f"engines/{NEW_ID}/a.head.plan"
TABLE_OF_OLD, TABLE_OF_NEW = (
    f"tables/{device}-aaaaaaaaaaaa--{SERVER_ID}-bbbbbbbbbbbb.json" for device in (OLD_ID, NEW_ID)
)
STARTED = "2026-05-01T00:00:00+00:00"
STARTED_S = 1777593600


def list_file(bundle: Bundle, path: str, data: bytes, role: str) -> None:
    """Put a file into a bundle and its manifest."""
    (bundle.path / path).parent.mkdir(parents=True, exist_ok=True)
    (bundle.path / path).write_bytes(data)
    entry = FileEntry(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data), role=role)
    with bundle.edit() as draft:
        draft.change(files={**draft.manifest.files, path: entry})


def full_bundle(folder: Path, *, seed: int = 0) -> Bundle:
    """Make a bundle of one pair; another seed gives another model of the same form."""
    bundle = tiny_bundle(folder, samples={"batch": 2, "files": {"model": "samples/model.npz", "a": "samples/a.npz"}})
    for name in ("model", "a.head", "a.tail"):
        path = folder / f"onnx/{name}.onnx"
        model = onnx.load(path)
        model.producer_version = str(seed)
        onnx.save(model, path, save_as_external_data=True, location="weights.data", size_threshold=0)
        list_file(bundle, f"onnx/{name}.onnx", path.read_bytes(), name.rpartition(".")[2])
    list_file(bundle, "onnx/weights.data", (folder / "onnx/weights.data").read_bytes(), "weights")
    for name in ("model", "a"):
        list_file(bundle, f"samples/{name}.npz", (folder / f"samples/{name}.npz").read_bytes(), "sample")
    with bundle.edit() as draft:
        draft.change(
            model=replace(draft.manifest.model, weights=WeightsEntry(path="onnx/weights.data", origin="a file"))
        )
    entries = [add_engine(bundle, OLD, OLD_ENGINE), add_engine(bundle, NEW, NEW_ENGINE)]
    with bundle.edit() as draft:
        draft.change(pair_id=bundle.compute_pair_id())
        draft.set_targets("device", entries)
        draft.set_targets("server", [TargetEntry(target=SERVER, fingerprint={}, id=SERVER_ID)])
    for graph, target in (("onnx/a.head.onnx", OLD), ("onnx/a.head.onnx", NEW), ("onnx/a.tail.onnx", SERVER)):
        add_cell(bundle, graph, target)
    (folder / "tables").mkdir()
    for table, device in ((TABLE_OF_OLD, OLD), (TABLE_OF_NEW, NEW)):
        (folder / table).write_bytes(table_of(bundle, device))
    (folder / "table.json").write_bytes(table_of(bundle, NEW))
    return bundle


def add_engine(bundle: Bundle, target: str, path: str) -> TargetEntry:
    """List a made-up engine of the head; gives the target's entry."""
    list_file(bundle, path, f"DSCPLAN for {target}".encode() * 100, "engine")
    head = "onnx/a.head.onnx"
    engine = EngineEntry(graph=head, graph_digest=bundle.graph_digest(head), path=path, profile=(1, 1, 4))
    options = read_record(OPTIONS, RecordedOptions)
    return TargetEntry(
        target=target, fingerprint={}, id=path.split("/")[1], options=options, engines=(engine,), failed=()
    )


def add_cell(bundle: Bundle, graph: str, target: str) -> str:
    """Write a stand-in for a cell, with the keys that packing looks at; return its path."""
    question = {"graph_digest": bundle.graph_digest(graph), "target": target}
    key = hashlib.sha256(canonical_json(question)).hexdigest()
    body = {"key": key, "question": question, "target": target, "rounds": [{"started": STARTED}]}
    path = bundle.path / f"cells/{key}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(canonical_json({**body, "body_sha256": body_digest(body)}) + b"\n")
    return f"cells/{key}.json"


def table_of(bundle: Bundle, device: str) -> bytes:
    """Return a lookup table of the bundle's pairs for a device."""
    table = json.loads(GOLDEN.read_bytes())
    table["pair_id"] = bundle.manifest.pair_id
    table["device"]["target"], table["server"]["target"] = device, SERVER
    return json.dumps(table).encode()


def relist(bundle: Bundle, path: str) -> None:
    """List a file as it is now."""
    size_bytes = (bundle.path / path).stat().st_size
    with bundle.edit() as draft:
        files = draft.manifest.files
        entry = replace(files[path], sha256=sha256_file(bundle.path / path), size_bytes=size_bytes)
        draft.change(files={**files, path: entry})


def make_zip(
    entries: Sequence[dict[str, Any]], *, before: bytes = b"", after: bytes = b"", comment: bytes = b""
) -> bytes:
    """Write a zip file by hand, in which any field may be wrong.

    Args:
        entries: ``name`` and ``data``, and what is to be another than it should: ``flags``, ``method``, ``size``,
            ``packed``, ``crc``, ``date``, ``attributes``, ``extra``, ``offset``, ``local_name``, ``count``.
        before: Bytes in front.
        after: Bytes between the data and the list of files.
        comment: Of the whole file.
    """
    body, directory = before, b""
    for entry in entries:
        name, data = entry["name"].encode(), entry["data"]
        local_name = entry.get("local_name", entry["name"]).encode()
        size = entry.get("size", len(data))
        packed = entry.get("packed", size)
        crc, date, extra = entry.get("crc", zlib.crc32(data)), entry.get("date", 33), entry.get("extra", b"")
        flags = entry.get("flags", 0 if entry["name"].isascii() else 0x800)
        common = struct.pack("<4H3L", flags, entry.get("method", 0), 0, date, crc, packed, size)
        offset = entry.get("offset", len(body))
        body += struct.pack("<4sH", b"PK\3\4", 20) + common + struct.pack("<2H", len(local_name), len(extra))
        body += local_name + extra + data
        directory += struct.pack("<4s2H", b"PK\1\2", 3 << 8 | 20, 20) + common
        attributes = entry.get("attributes", 0o100644 << 16)
        directory += struct.pack("<5H2L", len(name), len(extra), 0, 0, 0, attributes, offset) + name + extra
    body += after
    count = len(entries)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(directory), len(body), len(comment))
    return body + directory + end + comment
