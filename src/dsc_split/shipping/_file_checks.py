"""Check the contents of a bundle's files, by kind of file, after their digests were checked."""

from __future__ import annotations

import io
import zipfile
from pathlib import PurePosixPath

from dsc_split._support.strict_json import body_digest, canonical_json, read_json
from dsc_split.bundles._onnx_scan import scan_graph
from dsc_split.errors import DamagedError, DscError
from dsc_split.lookup_table import LookupTable

__all__ = [
    "PICKLES",
    "graph_faults",
    "is_record",
    "is_table",
    "record_fault",
    "role_of",
    "samples_fault",
    "table_fault",
]

PICKLES = (".pickle", ".pkl", ".pt", ".pth")
"""Ends of the names of files that run code when they are read."""

RECORDS = {"cells": "cell", "memory": "memory"}
"""Folder to the role of its files, which are JSON files with a digest of themselves."""


def role_of(name: str) -> str:
    """Return the role of a file that only a sealed bundle lists: ``cell``, ``memory`` or ``table``."""
    return RECORDS.get(PurePosixPath(name).parent.as_posix(), "table")


def is_record(name: str) -> bool:
    """Return whether a path belongs to a cell or a memory report."""
    path = PurePosixPath(name)
    return path.parent.as_posix() in RECORDS and path.suffix == ".json"


def is_table(name: str) -> bool:
    """Return whether a path belongs to a lookup table."""
    path = PurePosixPath(name)
    return name == "table.json" or (path.parent.as_posix() == "tables" and path.suffix == ".json")


def record_fault(name: str, data: bytes) -> str:
    """Return the fault of a cell or a memory report; an empty text where there is none."""
    try:
        document = read_json(data, role_of(name), DamagedError)
    except DamagedError as e:
        return str(e)
    stated = document.pop("body_sha256", None)
    if stated != body_digest(document):
        return "is not what its own SHA-256 says: it was changed or cut short"
    if canonical_json({**document, "body_sha256": stated}) + b"\n" != data:
        return "is not written as it is by dsc-split: it was changed"
    if role_of(name) == "cell" and document.get("key") != PurePosixPath(name).stem:
        return "has the name of another cell"
    return ""


def table_fault(data: bytes, pair_id: str) -> str:
    """Return the fault of a lookup table: it is damaged or of other pairs; an empty text where there is none."""
    try:
        table = LookupTable.load(data)
    except DscError as e:
        return str(e)
    return "" if table.pair_id == pair_id else "is a table of other pairs"


def graph_faults(data: bytes, weights: str | None) -> tuple[str, bool]:
    """Look for external data and compiled code in an ONNX file.

    Args:
        data: Bytes of the file.
        weights: Name of the weights' file, the only one that a graph may refer to; ``None``: no file is allowed.

    Returns:
        The fault, an empty text where there is none, and whether the file contains EPContext nodes.
    """
    try:
        facts = scan_graph(data)
    except DamagedError as e:
        return str(e), False
    foreign = [location for location in facts.locations if location != weights]
    expected = "it may refer to no other file" if weights is None else f"{weights!r} alone was expected"
    fault = f"refers to data in {', '.join(map(repr, foreign))}; {expected}" if foreign else ""
    return fault, facts.has_ep_context


def samples_fault(data: bytes) -> str:
    """Return the fault of a file of samples; an empty text where it contains only plain arrays."""
    from numpy.lib import format as npy

    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for info in archive.infolist():
                name = info.filename
                if info.compress_type != zipfile.ZIP_STORED:
                    return f"holds {name!r} compressed; it may be of any size then, and samples are stored as they are"
                with archive.open(info) as file:
                    version = npy.read_magic(file)
                    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
                    _, _, dtype = read(file)
                if dtype.hasobject:
                    return f"holds Python objects (pickled) in {name!r}; plain arrays alone were expected"
    # On damaged bytes zipfile raises all of these (RuntimeError: encrypted), and NumPy the first three.
    except (ValueError, OSError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile) as e:
        return f"is no file of plain arrays: {e}"
    return ""
