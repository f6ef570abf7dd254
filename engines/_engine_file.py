"""Engine files: what was built and for what, in front of the bytes that the library takes.

::

    b"DSCPLAN" | 1 byte: version of this layout | u32, little-endian: length of the JSON | JSON, UTF-8 | plan

A plan is native code to the library that loads it, so every check is made before a byte of it is handed out.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dsc_split._support.checks import (
    Check,
    count,
    entries,
    fail,
    fields,
    flag,
    items,
    one_of,
    or_null,
    positive,
    some_object,
    text,
)
from dsc_split._support.files import canonical_json, new_file, read_json
from dsc_split.engines._source import EngineSource
from dsc_split.errors import DamagedError, EngineFileError

__all__ = ["REBUILD", "PlanFile", "export_raw", "read_header", "read_plan", "write_plan"]

REBUILD = "Build it again: dsc-split build BUNDLE --side SIDE --target TARGET"
"""What to do about an engine that cannot be used."""

MAGIC = b"DSCPLAN"
VERSION = 1
"""Of the layout, in the byte after the magic, and of the JSON."""
MAX_HEADER_BYTES = 16 * 1024 * 1024
"""A longer JSON is refused before it is parsed."""

_PREFIX = struct.Struct("<7sBI")


@dataclass(frozen=True, kw_only=True)
class PlanFile:
    """An engine file whose every byte was checked."""

    header: dict[str, Any]
    """What the file says of itself."""
    plan: memoryview
    """What the library takes; read-only, and the very bytes that were checked."""


def write_plan(path: Path, header: Mapping[str, Any], plan: bytes | memoryview) -> tuple[str, int]:
    """Write an engine file, all or nothing.

    Args:
        path: The file; a file there is replaced.
        header: What the file says of itself, without ``plan_bytes`` and ``plan_sha256``, which are filled in.
        plan: What the library built.

    Returns:
        SHA-256 of the file, 64 hexadecimal digits, and its size in bytes.

    Raises:
        EngineFileError: The header has not the form that readers expect.
        DscError: The file cannot be written.
    """
    plan = memoryview(plan).cast("B")
    document = canonical_json({**header, "plan_bytes": len(plan), "plan_sha256": hashlib.sha256(plan).hexdigest()})
    _check_header(json.loads(document), path)
    digest, size_bytes = hashlib.sha256(), 0
    with new_file(path) as file:
        for part in (_PREFIX.pack(MAGIC, VERSION, len(document)), document, plan):
            digest.update(part)
            size_bytes += file.write(part)
    return digest.hexdigest(), size_bytes


def read_header(path: Path) -> dict[str, Any]:
    """Read what an engine file says of itself, and see that the file is as long as it should be.

    Raises:
        EngineFileError: The file is damaged, or of a newer format.
    """
    try:
        with path.open("rb") as file:
            header, start = _read_header(file, path)
            _check_size(path, start + header["plan_bytes"], file.seek(0, 2))
            return header
    except OSError as e:
        raise _damaged(path, f"it cannot be read: {e.strerror or e}") from e


def read_plan(source: Path | EngineSource, *, sha256: str | None = None) -> PlanFile:
    """Read an engine file into memory, once, and check all of it.

    Args:
        source: The file, or its bytes.
        sha256: What the file must hash to, from a manifest that is trusted; ``None``: it is taken at its own word.

    Raises:
        EngineFileError: The file is damaged, of a newer format, or not the one that is meant.
    """
    if isinstance(source, EngineSource):
        path, data, found = Path(source.name), source.data, source.sha256
    else:
        path, data, found = source, _read_bytes(source), None
    if sha256 is not None:
        _check_digest(path, "its SHA-256", found or hashlib.sha256(data).hexdigest(), sha256)
    header, start = _read_header(io.BytesIO(data), path)
    _check_size(path, start + header["plan_bytes"], len(data))
    plan = memoryview(data)[start:]
    _check_digest(path, "the SHA-256 of its plan", hashlib.sha256(plan).hexdigest(), header["plan_sha256"])
    return PlanFile(header=header, plan=plan)


def export_raw(path: Path, output: Path) -> None:
    """Write the bare plan of an engine file, for tools of the library's own.

    Raises:
        EngineFileError: The engine file is damaged, or of a newer format.
        DscError: The output cannot be written.
    """
    plan = read_plan(path).plan
    with new_file(output) as file:
        file.write(plan)


# ---- reading -----------------------------------------------------------------------------------------------


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise _damaged(path, f"it cannot be read: {e.strerror or e}") from e


def _read_header(file: BinaryIO, path: Path) -> tuple[dict[str, Any], int]:
    """Read and check the header of an open file; returns it, and where the plan starts."""
    prefix = file.read(_PREFIX.size)
    if not prefix.startswith(MAGIC):
        raise _damaged(path, f"it begins with {prefix[: len(MAGIC)]!r}; {MAGIC!r} was expected")
    if len(prefix) < _PREFIX.size:
        raise _damaged(path, f"it ends after {len(prefix)} bytes")
    _, version, length = _PREFIX.unpack(prefix)
    if version > VERSION:
        raise _newer(path, version)
    if version != VERSION:
        raise _damaged(path, f"its version is {version}; {VERSION} was expected")
    if length > MAX_HEADER_BYTES:
        raise _damaged(path, f"its header has {length} bytes; at most {MAX_HEADER_BYTES} are read")
    data = file.read(length)
    if len(data) < length:
        raise _damaged(path, f"it ends in the header, after {len(prefix) + len(data)} bytes")
    header = read_json(data, f"the header of engine file {str(path)!r}", _with_advice)
    _check_header(header, path)
    return header, len(prefix) + length


def _check_size(path: Path, expected_bytes: int, found_bytes: int) -> None:
    if found_bytes != expected_bytes:
        raise _damaged(path, f"it has {found_bytes} bytes; {expected_bytes} were expected")


def _check_digest(path: Path, what: str, found: str, expected: str) -> None:
    if found != expected:
        raise _damaged(path, f"{what} is {found}; {expected} was expected")


def _check_header(header: dict[str, Any], path: Path) -> None:
    version = header.get("version")
    if header.get("format") == "dsc-split/engine" and type(version) is int and version > VERSION:
        raise _newer(path, version)
    try:
        _HEADER(header, "")
        _check_profile(header["profile"], "profile")
        for place in ("inputs", "outputs"):
            names = [tensor["name"] for tensor in header[place]]
            if len(set(names)) < len(names):
                fail(names, place, "each name once")
    except DamagedError as e:
        raise EngineFileError(f"engine file {str(path)!r}: header: {e} {REBUILD}") from e


def _damaged(path: Path, fault: str) -> EngineFileError:
    return EngineFileError(f"engine file {str(path)!r} is damaged: {fault}. {REBUILD}")


def _newer(path: Path, version: int) -> EngineFileError:
    return EngineFileError(
        f"engine file {str(path)!r} is of version {version}; this dsc-split reads version {VERSION}. "
        f"Install a newer dsc-split, or build it again here."
    )


def _with_advice(fault: str) -> EngineFileError:
    return EngineFileError(f"{fault} {REBUILD}")


# ---- the form of the header --------------------------------------------------------------------------------


def _version(value: Any, where: str) -> None:
    if type(value) is not int or value != VERSION:
        fail(value, where, str(VERSION))


def _digest(value: Any, where: str) -> None:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{64}", value):
        fail(value, where, "64 hexadecimal digits")


def _dimension(value: Any, where: str) -> None:
    (text if isinstance(value, str) else or_null(count))(value, where)


def _bytes(value: Any, where: str) -> None:
    """Take a number of bytes, or one for each batch size."""
    (entries(count) if isinstance(value, Mapping) else count)(value, where)


def _bounds(check: Check) -> Mapping[str, Check]:
    return {"min": check, "opt": check, "max": check}


def _check_profile(profile: Mapping[str, Any], where: str) -> None:
    """Refuse bounds that are out of order, or of different ranks."""
    shapes = {f"{where}.shapes[{name!r}]": shape for name, shape in profile["shapes"].items()}
    batches = {bound: [profile[bound]] for bound in ("min", "opt", "max")}
    for place, bounds in {where: batches, **shapes}.items():
        low, best, high = (bounds[bound] for bound in ("min", "opt", "max"))
        ranks = {len(low), len(best), len(high)}
        if len(ranks) > 1 or any(not a <= b <= c for a, b, c in zip(low, best, high, strict=True)):
            fail([low, best, high], place, "min, opt and max in ascending order")
        if math.prod(high) > 2**53:
            fail(high, place, "a tensor that a GPU can hold")


_DTYPES = "bfloat16 bool float16 float32 float64 int16 int32 int64 int8 uint16 uint32 uint64 uint8".split()

_TENSORS = items(fields({"name": text, "dtype": one_of(*_DTYPES), "shape": items(_dimension)}), at_least=1)

_HEADER = fields(
    {
        "format": one_of("dsc-split/engine"),
        "version": _version,
        "library": one_of("tensorrt", "tensorrt_rtx"),
        "library_version": text,
        "target": text,
        "architecture": text,
        "build_fingerprint": some_object,
        "model": text,
        "label": text,
        "graph": text,
        "graph_digest": _digest,
        "profile": fields({**_bounds(positive), "shapes": entries(fields(_bounds(items(count))))}),
        "inputs": _TENSORS,
        "outputs": _TENSORS,
        "precision": fields({"layers": entries(count), "tf32": flag}),
        "memory": entries(_bytes),
        "rewritten": or_null(some_object),
        "plan_bytes": positive,
        "plan_sha256": _digest,
    },
    {"system": text, "machine": text},
)
