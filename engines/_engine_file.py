"""Read and write engine files: a description of the engine, followed by the bytes for the library.

::

    b"DSCPLAN" | 1 byte: version of this layout | u32, little-endian: length of the JSON | JSON, UTF-8 | plan

The library runs a plan as native code, so the whole file is checked before the plan is returned.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

from msgspec import UNSET, Meta, UnsetType
from msgspec.structs import asdict

from dsc_split._support.checks import shown
from dsc_split._support.files import new_file
from dsc_split._support.records import Count, Facts, Positive, Record, Sha256, Text, read_record, to_document
from dsc_split._support.strict_json import canonical_json, read_json
from dsc_split.bundles._records import BuilderMemory, EngineFacts, EnginePrecision, Rewritten
from dsc_split.engines._source import EngineSource
from dsc_split.errors import DamagedError, EngineFileError

__all__ = [
    "FORMAT",
    "REBUILD",
    "VERSION",
    "EngineDescription",
    "EngineHeader",
    "PlanFile",
    "PlanProfile",
    "PlanTensor",
    "ShapeBounds",
    "export_raw",
    "read_header",
    "read_plan",
    "write_plan",
]

REBUILD = "Build it again: dsc-split build BUNDLE --side SIDE --target TARGET"
"""Advice for an engine that cannot be used."""

FORMAT: Literal["dsc-split/engine"] = "dsc-split/engine"
MAGIC = b"DSCPLAN"
VERSION: Literal[1] = 1
"""Version of the layout, in the byte after the magic, and of the JSON."""
MAX_HEADER_BYTES = 16 * 1024 * 1024
"""A longer JSON is refused before it is parsed."""

_PREFIX = struct.Struct("<7sBI")


# ---- the header --------------------------------------------------------------------------------------------


class ShapeBounds(Record):
    """Smallest, best and largest shape of an input."""

    min: tuple[Count, ...]
    """The smallest."""
    opt: tuple[Count, ...]
    """The shape to optimise for."""
    max: tuple[Count, ...]
    """The largest."""

    def __post_init__(self) -> None:
        """Check the order and the ranks of the shapes."""
        _require_order(self.min, self.opt, self.max)


class PlanProfile(Record):
    """The batch sizes and shapes of an engine."""

    min: Positive
    """Smallest batch size."""
    opt: Positive
    """Batch size to optimise for."""
    max: Positive
    """Largest batch size."""
    shapes: dict[str, ShapeBounds]
    """Shapes of the inputs at these batch sizes, by name."""

    def __post_init__(self) -> None:
        """Check the order of the batch sizes."""
        _require_order(*((batch,) for batch in self.batches))

    @property
    def batches(self) -> tuple[int, int, int]:
        """Smallest, best and largest batch size."""
        return self.min, self.opt, self.max


class PlanTensor(Record):
    """An input or output of an engine."""

    name: Text
    """Name in the graph."""
    dtype: Literal[
        "bfloat16",
        "bool",
        "float16",
        "float32",
        "float64",
        "int16",
        "int32",
        "int64",
        "int8",
        "uint16",
        "uint32",
        "uint64",
        "uint8",
    ]
    """Lower-case ONNX element type."""
    shape: tuple[Count | Text | None, ...]
    """Dimensions; a string is a symbol, ``None`` is unknown."""


class EngineDescription(Record):
    """What an engine is, its graph, and its target."""

    format: Literal["dsc-split/engine"]
    """Kind of document."""
    version: Literal[1]
    """Version of the format."""
    library: Literal["tensorrt", "tensorrt_rtx"]
    """The library that built it."""
    library_version: Text
    """Its version."""
    target: Text
    """Back-end and architecture: ``tensorrt-rtx:sm75``."""
    architecture: Text
    """Architecture of the target."""
    build_fingerprint: Facts
    """All facts that it depends on."""
    system: Text | UnsetType = UNSET
    """The only operating system that it runs on; unset where it runs on any."""
    machine: Text | UnsetType = UNSET
    """The only processor architecture that it runs on; unset where it runs on any."""
    model: Text
    """Name of its model."""
    label: Text
    """What it computes: ``whole model``, ``head NAME``."""
    graph: Text
    """Path of the graph, relative to the bundle."""
    graph_digest: Sha256
    """Digest of the graph with its weights."""
    profile: PlanProfile
    """Batch sizes and shapes that it takes."""
    inputs: Annotated[tuple[PlanTensor, ...], Meta(min_length=1)]
    """Inputs, in order."""
    outputs: Annotated[tuple[PlanTensor, ...], Meta(min_length=1)]
    """Outputs, in order."""
    precision: EnginePrecision
    """Its precision."""
    memory: BuilderMemory
    """Memory that the library reported at the build."""
    rewritten: Rewritten | None
    """Operations that were rewritten in the graph; ``None`` where none were."""
    lowered: Text | None = None
    """Why it was built for smaller batches than requested; ``None`` where it was not."""
    notes: tuple[str, ...] = ()
    """Notes for the user."""

    def __post_init__(self) -> None:
        """Check that inputs and outputs have different names."""
        for place, tensors in (("inputs", self.inputs), ("outputs", self.outputs)):
            names = [tensor.name for tensor in tensors]
            if len(set(names)) < len(names):
                raise ValueError(f"{place}: got {shown(names)}; expected each name once.")

    @property
    def facts(self) -> EngineFacts:
        """The facts for a manifest."""
        return EngineFacts(
            profile=self.profile.batches,
            memory=self.memory,
            precision=self.precision,
            rewritten=self.rewritten,
            lowered=self.lowered,
            notes=self.notes,
            system=self.system,
            machine=self.machine,
        )


class EngineHeader(EngineDescription):
    """The header of an engine file."""

    plan_bytes: Positive
    """Size of the plan."""
    plan_sha256: Sha256
    """Digest of the plan."""


def _require_order(low: tuple[int, ...], best: tuple[int, ...], high: tuple[int, ...]) -> None:
    """Check that bounds are in order, have the same rank, and are not too large.

    Raises:
        ValueError: They are not.
    """
    ranks = {len(low), len(best), len(high)}
    if len(ranks) > 1 or any(not a <= b <= c for a, b, c in zip(low, best, high, strict=True)):
        found = shown([list(low), list(best), list(high)])
        raise ValueError(f"got {found}; expected min, opt and max in ascending order.")
    if math.prod(high) > 2**53:
        raise ValueError(f"got {shown(list(high))}; expected a tensor that a GPU can hold.")


# ---- files -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PlanFile:
    """A checked engine file."""

    header: EngineHeader
    """The header."""
    plan: memoryview
    """The plan; read-only, and the same bytes that were checked."""


def write_plan(path: Path, description: EngineDescription, plan: bytes | memoryview) -> tuple[str, int]:
    """Write an engine file, all or nothing.

    Args:
        path: The file; an existing one is replaced.
        description: Description of the engine.
        plan: The plan from the library.

    Returns:
        SHA-256 of the file, 64 hexadecimal digits, and its size in bytes.

    Raises:
        EngineFileError: Readers would refuse the description.
        DscError: The file cannot be written.
    """
    plan = memoryview(plan).cast("B")
    plan_sha256 = hashlib.sha256(plan).hexdigest()
    header = EngineHeader(**asdict(description), plan_bytes=len(plan), plan_sha256=plan_sha256)
    document = canonical_json(to_document(header))
    _parse_header(json.loads(document), path)
    digest, size_bytes = hashlib.sha256(), 0
    with new_file(path) as file:
        for part in (_PREFIX.pack(MAGIC, VERSION, len(document)), document, plan):
            digest.update(part)
            size_bytes += file.write(part)
    return digest.hexdigest(), size_bytes


def read_header(path: Path) -> EngineHeader:
    """Read the header of an engine file, and check the size of the file.

    Raises:
        EngineFileError: The file is damaged, or of a newer format.
    """
    try:
        with path.open("rb") as file:
            header, start = _read_header(file, path)
            _check_size(path, start + header.plan_bytes, file.seek(0, 2))
            return header
    except OSError as e:
        raise _damaged(path, f"it cannot be read: {e.strerror or e}") from e


def read_plan(source: Path | EngineSource, *, sha256: str | None = None) -> PlanFile:
    """Read an engine file into memory once, and check all of it.

    Args:
        source: The file, or its bytes.
        sha256: Expected SHA-256 of the file, from a trusted manifest; ``None`` to check only the file's own digest.

    Raises:
        EngineFileError: The file is damaged, of a newer format, or not the expected one.
    """
    if isinstance(source, EngineSource):
        path, data, found = Path(source.name), source.data, source.sha256
    else:
        path, data, found = source, _read_bytes(source), None
    if sha256 is not None:
        _check_digest(path, "its SHA-256", found or hashlib.sha256(data).hexdigest(), sha256)
    header, start = _read_header(io.BytesIO(data), path)
    _check_size(path, start + header.plan_bytes, len(data))
    plan = memoryview(data)[start:]
    _check_digest(path, "the SHA-256 of its plan", hashlib.sha256(plan).hexdigest(), header.plan_sha256)
    return PlanFile(header=header, plan=plan)


def export_raw(path: Path, output: Path) -> None:
    """Write the plan of an engine file without the header, for the library's own tools.

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


def _read_header(file: BinaryIO, path: Path) -> tuple[EngineHeader, int]:
    """Read and check the header of an open file; return it, and the offset of the plan."""
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
    what = f"the header of engine file {str(path)!r}"
    document = read_json(data, what, lambda fault: EngineFileError(f"{fault} {REBUILD}"))
    return _parse_header(document, path), len(prefix) + length


def _check_size(path: Path, expected_bytes: int, found_bytes: int) -> None:
    if found_bytes != expected_bytes:
        raise _damaged(path, f"it has {found_bytes} bytes; {expected_bytes} were expected")


def _check_digest(path: Path, what: str, found: str, expected: str) -> None:
    if found != expected:
        raise _damaged(path, f"{what} is {found}; {expected} was expected")


def _parse_header(document: dict[str, object], path: Path) -> EngineHeader:
    version = document.get("version")
    if document.get("format") == FORMAT and type(version) is int and version > VERSION:
        raise _newer(path, version)
    try:
        return read_record(document, EngineHeader)
    except DamagedError as e:
        raise EngineFileError(f"engine file {str(path)!r}: header: {e} {REBUILD}") from e


def _damaged(path: Path, fault: str) -> EngineFileError:
    return EngineFileError(f"engine file {str(path)!r} is damaged: {fault}. {REBUILD}")


def _newer(path: Path, version: int) -> EngineFileError:
    return EngineFileError(
        f"engine file {str(path)!r} is of version {version}; this dsc-split reads version {VERSION}. "
        f"Install a newer dsc-split, or build it again here."
    )
