"""The manifest of a bundle: its file form, its versions, and the form of every key that is read anywhere."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from dsc_split._support.checks import (
    count,
    entries,
    fail,
    fields,
    flag,
    integer,
    items,
    number,
    one_of,
    or_null,
    positive,
    some_object,
    text,
)
from dsc_split._support.files import body_digest, read_json
from dsc_split.errors import BundleError, DamagedError

__all__ = [
    "ENVELOPE",
    "FORMAT",
    "MANIFEST",
    "SEALED_ROLES",
    "VERSION",
    "check_manifest",
    "encode_manifest",
    "parse_manifest",
]

FORMAT = "dsc-split/bundle"
VERSION = 2
MANIFEST = "manifest.json"
ENVELOPE = "manifest.dsse.json"
"""File of the signatures over the manifest's bytes."""
SEALED_ROLES = ("cell", "memory", "table")
"""Roles of files that come and go while a bundle is worked on: it lists them only when it is sealed, as `pack` does."""
DIGEST = "body_sha256"


def encode_manifest(manifest: Mapping[str, Any]) -> bytes:
    """Give a manifest's one file form: sorted keys, an indent of 1, ASCII, with the digest of all the rest."""
    body = {key: value for key, value in manifest.items() if key != DIGEST}
    document = {**body, DIGEST: body_digest(body)}
    return json.dumps(document, indent=1, sort_keys=True, ensure_ascii=True, allow_nan=False).encode() + b"\n"


def parse_manifest(data: bytes, what: str) -> dict[str, Any]:
    """Read a manifest, bring it to the newest version, and check its form.

    Args:
        data: The file.
        what: What it is, in words, for messages.

    Raises:
        BundleError: It is damaged, changed by hand, or of a newer version.
    """
    manifest = read_json(data, what, BundleError)
    if manifest.get("format") != FORMAT:
        raise BundleError(f"{what} has format {manifest.get('format')!r}; {FORMAT!r} was expected.")
    version = manifest.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BundleError(f"{what} has version {version!r}; a whole number from 1 was expected.")
    if version > VERSION:
        raise BundleError(f"{what} has version {version}; this dsc-split reads up to {VERSION}. Update dsc-split.")
    stated = manifest.pop(DIGEST, None)
    if stated is not None and stated != body_digest(manifest):
        raise BundleError(f"{what} is not what its own SHA-256 says: it was changed or damaged. Export it again.")
    try:
        for older in range(version, VERSION):
            manifest = _MIGRATIONS[older](manifest)
        check_manifest(manifest)
    except DamagedError as e:
        raise BundleError(f"{what}: {e} Export it again.") from e
    return manifest


def _from_version_1(manifest: dict[str, Any]) -> dict[str, Any]:
    """Version 2 tells sealed bundles from open ones, parts of a bundle from whole ones, and new from old."""
    return {**manifest, "version": 2, "revision": 0, "sealed": False, "side": None, "left_out": {}}


_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_version_1}
"""Version to what makes the next one of it. A manifest that was migrated is written in the newest version."""


def check_manifest(manifest: Mapping[str, Any]) -> None:
    """Refuse a manifest that lacks a key, or has something else there. Unknown keys are left alone.

    Raises:
        DamagedError: The message names the place, what stands there, and what was expected.
    """
    _MANIFEST(manifest, "")
    for key in ("name", "head", "tail"):
        seen: set[str] = set()
        for i, split in enumerate(manifest["splits"]):
            if split[key].lower() in seen:
                fail(split[key], f"splits[{i}].{key}", "one that no other split has, whatever its case")
            seen.add(split[key].lower())


def _digest(value: Any, where: str) -> None:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{64}", value):
        fail(value, where, "64 hexadecimal digits")


def _cut_name(value: Any, where: str) -> None:
    text(value, where)
    if not value.isprintable() or set(value) & set("/\\"):
        fail(value, where, "a name that a file can have")


def _dimension(value: Any, where: str) -> None:
    (text if isinstance(value, str) else count)(value, where)


_TENSOR = {
    "name": text,
    "dtype": text,
    "shape": items(_dimension),
    "elements_by_batch": items(integer, at_least=2, at_most=2),
    "itemsize": count,
}
_SPLIT = {
    "name": _cut_name,
    "tensors": items(fields({**_TENSOR, "passthrough": flag})),
    "head": text,
    "tail": text,
    "early_outputs": items(text),
}
_CONVERSION = {
    "from": one_of("fp32"),
    "io_precision": one_of("fp32", "fp16"),
    "weights_converted": count,
    "weights_overflowed": count,
    "weights_vanished": count,
    "kept_float32": items(fields({"name": or_null(text), "op_type": text, "reason": text})),
    "max_abs_error": or_null(number),
    "max_rel_error": or_null(number),
}
_BUILD_OPTIONS = {
    "batches": items(positive, at_least=1),
    "opt_batch": or_null(positive),
    "per_batch": flag,
    "gemm": one_of("conv", "sum", "fp16"),
    "workspace_bytes": or_null(positive),
    "timing_cache_sha256": or_null(text),
    "device_memory_bytes": or_null(positive),
}
_ENGINE = {
    "graph": text,
    "graph_digest": text,
    "path": text,
    "profile": items(positive, at_least=3, at_most=3),
    "memory": some_object,
    "rewritten": or_null(fields({"converted": items(text), "summed": items(text), "halved": items(text)})),
    "lowered": or_null(text),
}
_TARGETS = items(
    fields(
        {"target": text, "fingerprint": some_object, "id": text},
        {
            "options": fields(_BUILD_OPTIONS),
            "engines": items(fields(_ENGINE)),
            "failed": items(fields({"graph": text, "reason": text})),
            "check": some_object,
        },
    )
)

_FILES = entries(fields({"sha256": _digest, "size": count}, {"role": text}))

_MANIFEST = fields(
    {
        "pair_id": text,
        "revision": count,
        "sealed": flag,
        "side": or_null(one_of("device", "server")),
        "model": fields(
            {"path": text, "weights": fields({"path": or_null(text)}, {"origin": text})},
            {"name": text, "opset": entries(count)},
        ),
        "precision": one_of("fp32", "fp16"),
        "batch": fields({"fixed": or_null(positive), "max": positive}),
        "inputs": items(fields(_TENSOR)),
        "outputs": items(fields(_TENSOR)),
        "input_bytes_stated": or_null(count),
        "full_offload": flag,
        "splits": items(fields(_SPLIT)),
        "failed_splits": items(some_object),
        "targets": fields({"device": _TARGETS, "server": _TARGETS}),
        "files": _FILES,
        "left_out": _FILES,
    },
    {
        "notes": items(text),
        "conversion": fields(_CONVERSION),
        "provenance": some_object,
        "released": count,
        "samples": fields({}, {"batch": positive, "files": entries(text)}),
    },
)
