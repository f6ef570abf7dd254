"""The form of a bundle's manifest: every key that is read anywhere, checked once when the manifest is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsc_split._form import (
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

__all__ = ["check_manifest"]


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
    "name": text,
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

_MANIFEST = fields(
    {
        "pair_id": text,
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
        "files": entries(fields({"sha256": text, "size": count})),
    },
    {
        "notes": items(text),
        "conversion": fields(_CONVERSION),
        "samples": fields({}, {"batch": positive, "files": entries(text)}),
    },
)
