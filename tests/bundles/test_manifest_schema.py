"""The JSON Schemas against the records that they are made from, and the manifest's against the reader."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from tests.support.full_bundles import full_bundle
from tests.support.manifests import MANIFEST, document_of, targets_of
from tests.support.schemas import SCHEMAS, Schema, text_of

from dsc_split.bundle import Bundle
from dsc_split.bundles._manifest import DIGEST, encode_document, parse_manifest
from dsc_split.errors import BundleError
from dsc_split.packing import pack_bundle, verify_bundle

VALUES: list[Any] = [
    *(None, True, False, 0, 1, 3, -1, 1.5, 2**53, 2**53 + 1, "", "text", "fp16", "device", "g" * 64, "0" * 63),
    *([], [1], [1, 2, 3], [-1, 2], {}, {"x": 1}, [None], [{}], ["x"]),
]
CONVERSION = {
    "from": "fp32",
    "io_precision": "fp16",
    "weights_converted": 1,
    "weights_overflowed": 0,
    "weights_vanished": 0,
    "kept_float32": [{"name": None, "op_type": "Pow", "reason": "range"}],
    "max_abs_error": 0.5,
    "max_rel_error": None,
}
CHECK = {
    "side": "device",
    "target": "onnxruntime:cpu",
    "against": "golden samples",
    "fallback_reason": None,
    "rows": [
        {
            "graph": "onnx/model.onnx",
            "label": "whole model",
            "max_abs_error": 0.5,
            "max_rel_error": None,
            "tolerance": 0.1,
            "passed": False,
            "reason": "why",
        }
    ],
    "passed": False,
}
PROVENANCE = {
    "command": "export",
    "versions": {"numpy": "2.0"},
    "source": {"name": "net.onnx", "sha256": None},
    "model_sha256": 64 * "0",
    "weights_sha256": None,
}


@pytest.fixture(scope="module")
def schema() -> Draft202012Validator:
    document = json.loads(files("dsc_split").joinpath("schemas/manifest-2.schema.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(document)
    return Draft202012Validator(document)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A manifest in which every key stands that is read anywhere."""
    found = document_of(full_bundle(tmp_path_factory.mktemp("bundles") / "bundle"))
    found.pop(DIGEST)
    target = targets_of(found, "device")[0]
    engine = target["engines"][0]
    engine["rewritten"], engine["lowered"] = {"converted": ["n"], "summed": [], "halved": []}, "for want of memory"
    options: dict[str, Any] = {"batches": [1, 4], "opt_batch": 4, "per_batch": True, "gemm": "sum"}
    target["options"] = {**options, "workspace_bytes": 1, "timing_cache_sha256": "x", "device_memory_bytes": None}
    target["failed"] = [{"graph": "onnx/model.onnx", "reason": "why"}]
    target["check"] = CHECK
    conversion = {"conversion": CONVERSION, "provenance": PROVENANCE, "failed_splits": [{}], "notes": ["a note"]}
    return {**MANIFEST, **found, **conversion, "released": 1}


def places(value: Any, place: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    if place:
        yield place
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield from places(item, (*place, key))


def taken(manifest: dict[str, Any]) -> bool:
    """Return whether the reader takes a manifest."""
    try:
        parse_manifest(encode_document(manifest), "manifest")
    except BundleError:
        return False
    return True


@pytest.mark.parametrize("each", SCHEMAS, ids=lambda each: each.file)
def test_schema_is_what_the_records_give(each: Schema) -> None:
    text = each.path.read_text(encoding="utf-8")

    assert text == text_of(each), "write it anew: python -m tests.support.schemas"
    Draft202012Validator.check_schema(json.loads(text))


@pytest.mark.parametrize("each", SCHEMAS, ids=lambda each: each.file)
def test_every_key_is_described(each: Schema) -> None:
    definitions = json.loads(text_of(each))["$defs"]

    assert [
        f"{name}.{key}"
        for name, definition in definitions.items()
        for key, entry in definition["properties"].items()
        if "description" not in entry
    ] == []


def test_the_schema_takes_what_dsc_split_writes(tmp_path: Path, schema: Draft202012Validator) -> None:
    bundle = full_bundle(tmp_path / "bundle")
    pack_bundle(bundle, tmp_path / "x.dscb", side="device")
    assert verify_bundle(tmp_path / "x.dscb").ok

    for path in (bundle.path, tmp_path / "x.dscb"):
        document = json.loads(Bundle.open(path).storage.read("manifest.json"))
        assert [error.message for error in schema.iter_errors(document)] == []


@pytest.mark.slow
def test_the_schema_and_the_reader_take_the_same_manifests(
    schema: Draft202012Validator, manifest: dict[str, Any]
) -> None:
    assert schema.is_valid(manifest)
    assert taken(manifest)
    changed = copy.deepcopy(manifest)
    refused = 0
    for index, place in enumerate(places(manifest)):
        if place == ("version",):  # the reader takes older ones, too
            continue
        if place[:2] == ("targets", "server") or any(isinstance(step, int) and step > 0 for step in place):
            continue  # of the same form as what stands before it
        inner: Any = changed
        for key in place[:-1]:
            inner = inner[key]
        before = inner[place[-1]]
        for value in VALUES[index % 2 :: 2]:  # the next place gets the others
            inner[place[-1]] = value
            read = taken(changed)

            assert schema.is_valid(changed) == read, (place, value)
            refused += not read
        inner[place[-1]] = before

    assert refused > 1000


def test_the_schema_and_the_reader_miss_the_same_keys(schema: Draft202012Validator, manifest: dict[str, Any]) -> None:
    for place in places(manifest):
        changed = copy.deepcopy(manifest)
        inner: Any = changed
        for key in place[:-1]:
            inner = inner[key]
        del inner[place[-1]]

        assert schema.is_valid(changed) == taken(changed), place
