"""The manifest's file: how it is written, read, and brought from version to version."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping

from msgspec.structs import replace

from dsc_split._support.records import read_record, to_document
from dsc_split._support.strict_json import body_digest, read_json
from dsc_split.bundles._records import FORMAT, VERSION, Manifest
from dsc_split.errors import BundleError, DamagedError

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
"""File of the signatures over the manifest's bytes."""
DIGEST = "body_sha256"

Document = dict[str, object]


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the bytes of a manifest's file."""
    return encode_document(to_document(manifest))


def encode_document(document: Mapping[str, object]) -> bytes:
    """Return a document's one form: sorted keys, an indent of 1, ASCII, with the digest of all the rest."""
    body = {key: value for key, value in document.items() if key != DIGEST}
    stamped = {**body, DIGEST: body_digest(body)}
    return json.dumps(stamped, indent=1, sort_keys=True, ensure_ascii=True, allow_nan=False).encode() + b"\n"


def next_manifest(manifest: Manifest) -> Manifest:
    """Return a manifest as it is written next: open, with a new revision.

    What was sealed is open again: cells, memory reports and tables are no longer listed. The revision that was sent is
    kept in ``released``, for what is timed on a device makes the bundle no newer than the next release.
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
    """Read a manifest, bring it to the newest version, and check its form.

    Args:
        data: The file.
        what: What it is, in words, for messages.

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
    """Return the version of a manifest's file that :func:`parse_manifest` has read."""
    version = read_json(data, MANIFEST, BundleError)["version"]
    return int(version)


def is_canonical(data: bytes) -> bool:
    """Return whether a manifest's file is in its one form, byte for byte."""
    return encode_document(read_json(data, MANIFEST, BundleError)) == data


def _from_version_1(document: Document) -> Document:
    """Version 2 tells sealed bundles from open ones, parts of a bundle from whole ones, and new from old."""
    return {**document, "version": 2, "revision": 0, "sealed": False, "side": None, "left_out": {}}


_MIGRATIONS: dict[int, Callable[[Document], Document]] = {1: _from_version_1}
"""Version to what makes the next one of it. A manifest that was migrated is written in the newest version."""
