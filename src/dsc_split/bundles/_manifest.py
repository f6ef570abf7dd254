"""Read and write the file of a manifest, and convert older versions."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping

from msgspec.structs import replace

from dsc_split._support.records import read_record, to_document
from dsc_split._support.strict_json import body_digest, read_json
from dsc_split.bundles._records import FORMAT, VERSION, Manifest
from dsc_split.errors import BundleError, DamagedError, UsageError

__all__ = [
    "DIGEST",
    "ENVELOPE",
    "MANIFEST",
    "encode_document",
    "encode_manifest",
    "is_canonical",
    "next_manifest",
    "parse_manifest",
    "version_of",
]

MANIFEST = "manifest.json"
ENVELOPE = "manifest.dsse.json"
"""File with the signatures of the manifest's bytes."""
DIGEST = "body_sha256"
"""Key of the digest of all other keys."""

Document = dict[str, object]


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the bytes of a manifest's file.

    Raises:
        UsageError: A field has a value that could not be read again.
    """
    document = to_document(manifest)
    try:
        read_record(document, Manifest)
    except DamagedError as e:
        raise UsageError(f"a manifest cannot hold this: {e} Nothing was written.") from e
    return encode_document(document)


def encode_document(document: Mapping[str, object]) -> bytes:
    """Return the bytes of a document: sorted keys, an indent of 1, ASCII, and the digest of all other keys."""
    body = {key: value for key, value in document.items() if key != DIGEST}
    stamped = {**body, DIGEST: body_digest(body)}
    return json.dumps(stamped, indent=1, sort_keys=True, ensure_ascii=True, allow_nan=False).encode() + b"\n"


def next_manifest(manifest: Manifest) -> Manifest:
    """Return the manifest to write after a change: not sealed, with a new revision.

    It does not list cells, memory reports and tables. ``released`` keeps the revision of the sealed bundle, so that
    timings on a device do not make the bundle newer than the next release.
    """
    return replace(
        manifest,
        version=VERSION,
        files=manifest.lasting_files,
        sealed=False,
        released=manifest.revision if manifest.sealed else manifest.released,
        revision=max(manifest.revision + 1, int(time.time())),
    )


def parse_manifest(data: bytes, what: str) -> Manifest:
    """Read a manifest, convert it to the newest version, and check it.

    Args:
        data: Bytes of the file.
        what: Name of the file for messages: ``manifest 'b4/manifest.json'``.

    Raises:
        BundleError: It is damaged, changed by hand, or of a newer version.
    """
    document: Document = read_json(data, what, BundleError)
    if document.get("format") != FORMAT:
        raise BundleError(f"{what} has format {document.get('format')!r}; {FORMAT!r} was expected.")
    version = document.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BundleError(f"{what} has version {version!r}; a whole number from 1 was expected.")
    if version > VERSION:
        raise BundleError(f"{what} has version {version}; this dsc-split reads up to {VERSION}. Update dsc-split.")
    stated = document.pop(DIGEST, None)
    if stated is not None and stated != body_digest(document):
        raise BundleError(f"{what} is not what its own SHA-256 says: it was changed or damaged. Export it again.")
    try:
        for older in range(version, VERSION):
            document = _MIGRATIONS[older](document)
        return read_record(document, Manifest)
    except DamagedError as e:
        raise BundleError(f"{what}: {e} Export it again.") from e


def version_of(data: bytes) -> int:
    """Return the version in a manifest's file; :func:`parse_manifest` must have accepted the file."""
    return int(read_json(data, MANIFEST, BundleError)["version"])


def is_canonical(data: bytes) -> bool:
    """Return whether a manifest's file has exactly the bytes that :func:`encode_manifest` writes."""
    return encode_document(read_json(data, MANIFEST, BundleError)) == data


def _from_version_1(document: Document) -> Document:
    """Add the keys of version 2: whether a bundle is sealed, whether it is a part, and its revision."""
    return {**document, "version": 2, "revision": 0, "sealed": False, "side": None, "left_out": {}}


_MIGRATIONS: dict[int, Callable[[Document], Document]] = {1: _from_version_1}
"""Version to the function that converts a document of it to the next version."""
