"""Verify a bundle, file by file: its files are those of its manifest, and contain nothing that is not allowed."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO

from dsc_split._support.hashing import Hasher
from dsc_split._support.progress import Progress, ProgressListener, silent
from dsc_split.bundle import Bundle
from dsc_split.bundles._archive import Archive, name_faults
from dsc_split.bundles._manifest import ENVELOPE, MANIFEST, is_canonical, parse_manifest, version_of
from dsc_split.bundles._open import open_storage
from dsc_split.bundles._records import VERSION, FileEntry, Manifest
from dsc_split.bundles._storage import Folder, Storage
from dsc_split.errors import BundleError
from dsc_split.shipping._file_checks import (
    PICKLES,
    graph_faults,
    is_record,
    is_table,
    record_fault,
    samples_fault,
    table_fault,
)

if TYPE_CHECKING:
    from dsc_split.shipping._signature import Trust

__all__ = ["Verification", "VerifyResult", "VerifyRow", "engine_files", "progress_in_mb", "verify_bundle"]

REPORT = "report.html"
MAX_CONTENT_BYTES = 2**31
"""Larger graphs, samples and tables are refused, because their contents are checked in memory."""

Sink = Callable[[str], AbstractContextManager[BinaryIO]]


@dataclass(frozen=True, kw_only=True)
class VerifyRow:
    """One fault of a bundle."""

    path: str
    """The file, relative to the bundle."""
    fault: str
    """The fault, as a predicate after the file's name: ``is missing``."""


@dataclass(frozen=True, kw_only=True)
class VerifyResult:
    """The result of :func:`verify_bundle`."""

    path: str
    """The bundle."""
    pair_id: str | None
    """Id that its heads and tails share; ``None`` where the manifest cannot be read."""
    revision: int | None
    """Its revision; ``None`` where the manifest cannot be read."""
    side: str | None
    """The side of a part; ``None`` for a whole bundle, or where the manifest cannot be read."""
    sealed: bool
    """Whether its manifest lists every file."""
    files: int
    """Number of files that were checked, without the manifest and the signatures."""
    size_bytes: int
    """Total size of these files."""
    rows: tuple[VerifyRow, ...]
    """All faults, sorted by path."""
    notes: tuple[str, ...]
    """Notes for the user that are no faults."""
    signed_by: tuple[str, ...]
    """Names of the trusted keys that signed it."""
    is_signed: bool = False
    """Whether it has signatures, by any key."""

    @property
    def ok(self) -> bool:
        """Whether there are no faults."""
        return not self.rows

    def to_json(self) -> dict[str, object]:
        """Return the result as plain data for JSON."""
        return {"ok": self.ok, **asdict(self)}


def verify_bundle(
    source: str | os.PathLike[str],
    *,
    trust: Trust | None = None,
    min_revision: int | None = None,
    progress: ProgressListener = silent,
) -> VerifyResult:
    """Check every byte of a bundle, and list all faults.

    Args:
        source: The folder or the packed file.
        trust: Which signatures are enough; ``None``: no signature is required.
        min_revision: A lower revision is a fault.
        progress: Called with the number of MB read.

    Raises:
        UsageError: There is no bundle, or a key's file cannot be read.
    """
    try:
        storage = open_storage(Path(source))
    except BundleError as e:
        return VerifyResult(
            path=str(source), pair_id=None, revision=None, side=None, sealed=False, files=0, size_bytes=0,
            rows=(VerifyRow(path=Path(source).name, fault=str(e)),), notes=(), signed_by=(),
        )  # fmt: skip
    check = Verification(storage)
    try:
        check.signature(trust)
    except BundleError as e:
        check.fault(ENVELOPE if ENVELOPE in storage.names() else MANIFEST, str(e))
    if check.manifest(min_revision):
        check.lists()
        check.files(progress)
    return check.result()


class Verification:
    """Collects the faults of a bundle.

    Attributes:
        bundle: The bundle; ``None`` where its manifest cannot be read.
        rows: The faults.
        ep_context: Paths of graphs that contain compiled code.
        signed_by: Names of the trusted keys that signed the manifest.
    """

    def __init__(self, storage: Storage) -> None:
        self.bundle: Bundle | None = None
        self.rows: list[VerifyRow] = []
        self.ep_context: list[str] = []
        self.signed_by: tuple[str, ...] = ()
        self._storage = storage
        self._notes: list[str] = []
        self._checked_bytes: dict[str, int] = {}

    def fault(self, path: str, fault: str) -> None:
        """Add a fault."""
        self.rows.append(VerifyRow(path=path, fault=fault))

    def result(self) -> VerifyResult:
        """Return the result of the checks so far."""
        manifest = self.bundle.manifest if self.bundle else None
        notes = [*self._notes]
        if self.ep_context:
            names = ", ".join(self.ep_context)
            notes.append(f"EPContext nodes hold compiled code, so these graphs are treated as engines: {names}")
        return VerifyResult(
            path=str(self._storage.path),
            pair_id=manifest.pair_id if manifest else None,
            revision=manifest.revision if manifest else None,
            side=manifest.side if manifest else None,
            sealed=bool(manifest and manifest.sealed),
            files=len(self._checked_bytes),
            size_bytes=sum(self._checked_bytes.values()),
            rows=tuple(sorted(set(self.rows), key=lambda row: (row.path, row.fault))),
            notes=tuple(notes),
            signed_by=self.signed_by,
            is_signed=self._storage.size_bytes(ENVELOPE) is not None,
        )

    # ---- the manifest --------------------------------------------------------------------------------------

    @functools.cached_property
    def manifest_data(self) -> bytes:
        """Bytes of the manifest's file, read once, so that the signed bytes are also parsed and copied."""
        return self._storage.read(MANIFEST)

    @functools.cached_property
    def envelope(self) -> bytes | None:
        """Bytes of the signatures' file, read once; ``None`` where there is none."""
        return self._storage.read(ENVELOPE) if self._storage.size_bytes(ENVELOPE) is not None else None

    def signature(self, trust: Trust | None) -> None:
        """Check the signatures of the manifest, and store the names of the keys in ``signed_by``.

        Raises:
            SignatureError: ``trust`` refuses the signatures.
        """
        from dsc_split.shipping._signature import Trust

        what = f"bundle {str(self._storage.path)!r}"
        self.signed_by = (trust or Trust()).check(self.manifest_data, self.envelope, what)
        if self.envelope is not None and (trust is None or not trust.keys):
            self._notes.append("it is signed; give --trust PUBLIC_KEY to know by whom")

    def manifest(self, min_revision: int | None = None) -> bool:
        """Check the manifest's file; return whether it can be read, so that the other checks are possible."""
        try:
            data = self.manifest_data
            manifest = parse_manifest(data, MANIFEST)
        except BundleError as e:
            self.fault(MANIFEST, str(e))
            return False
        version = version_of(data)
        if version != VERSION:
            self._notes.append(
                f"the manifest is of version {version}, which says less; the next change writes a new one"
            )
        elif not is_canonical(data):
            self.fault(MANIFEST, "is not in its canonical form, byte for byte: it was changed")
        if min_revision is not None and manifest.revision < min_revision:
            self.fault(MANIFEST, f"has revision {manifest.revision}; at least {min_revision} was expected")
        self.bundle = Bundle(self._storage.path, manifest, storage=self._storage)
        return True

    def lists(self) -> None:
        """Check the manifest's contents without the files: names, pair id, graphs, samples, engines, their digests."""
        bundle = self.require_bundle()
        manifest = bundle.manifest
        listed = manifest.all_files
        for path, fault in name_faults([*manifest.files, *manifest.left_out]):
            both = path in manifest.files and path in manifest.left_out
            self.fault(path, "is listed as held and as left out" if both else fault)
        for path in (MANIFEST, ENVELOPE):
            if path in listed:
                self.fault(path, "lists itself")
        weights = manifest.model.weights.path
        of_model = (*manifest.graphs, *manifest.sample_paths.values(), *([weights] if weights else []))
        missing = [path for path in of_model if path not in listed]
        for path in missing:
            self.fault(path, "belongs to the model, and the manifest does not list it")
        if missing:
            return
        if (found := bundle.compute_pair_id()) != manifest.pair_id:
            said = f"pair_id {manifest.pair_id[:19]}..., and its graphs give {found[:19]}..."
            self.fault(MANIFEST, f"says {said}: files of two exports were mixed")
        for entry in manifest.targets:
            for engine in entry.built:
                if engine.path not in listed:
                    self.fault(engine.path, f"is an engine for {entry.target!r}, and the manifest does not list it")
                elif engine.graph not in manifest.graphs:
                    self.fault(engine.path, f"is an engine of {engine.graph!r}, which is no graph of this bundle")
                elif engine.graph_digest != bundle.graph_digest(engine.graph):
                    self.fault(engine.path, f"was built from another {engine.graph!r} than the one that is here")

    # ---- the files -----------------------------------------------------------------------------------------

    def files(self, progress: ProgressListener = silent, sink: Sink | None = None) -> None:
        """Check all files, listed ones first; ``sink`` opens the file to copy a listed file into, by its path."""
        manifest = self.require_bundle().manifest
        listed, there = manifest.files, self._storage.names()
        if isinstance(self._storage, Folder):
            for name in there:
                if fault := _file_fault(self._storage.path / name):
                    self.fault(name, fault)
        tell = progress_in_mb("verify", sum(entry.size_bytes for entry in listed.values()), progress)
        with Hasher() as hasher:
            for path, entry in sorted(listed.items()):
                with contextlib.ExitStack() as stack:
                    copy = stack.enter_context(sink(path)) if sink else None
                    self._check_listed(path, entry, hasher, copy, tell)
        extra = [name for name in there if name not in listed and name not in (MANIFEST, ENVELOPE)]
        for name in extra:
            self._check_unlisted(name, sealed=manifest.sealed)
        kept = sum(manifest.sealed and is_record(name) for name in extra)
        if kept and isinstance(self._storage, Folder):
            self._notes.append(f"{kept} files of cells and memory were written or kept here since it was sealed")

    def _check_listed(
        self, path: str, entry: FileEntry, hasher: Hasher, copy: BinaryIO | None, tell: Callable[[str, int], None]
    ) -> None:
        if path.lower().endswith(PICKLES):
            self.fault(path, "is a pickle, which runs code when it is read; a bundle holds none")
        size_bytes = self._storage.size_bytes(path)
        if size_bytes is None:
            self.fault(path, "is missing, or is no regular file")
            return
        self._checked_bytes[path] = size_bytes
        if size_bytes != entry.size_bytes:
            self.fault(path, f"has {size_bytes} bytes; the manifest says {entry.size_bytes}")
            return
        try:
            if self._has_checked_content(path):
                data = self._storage.read(path, max_bytes=min(size_bytes, MAX_CONTENT_BYTES))
                if copy is not None:
                    copy.write(data)
                tell(path, len(data))
                found, crc_fits = hashlib.sha256(data).hexdigest(), True
            else:
                data = b""
                packed = isinstance(self._storage, Archive)
                with self._storage.open(path) as file:
                    hashed = hasher.read(file, copy, crc=packed, tell=lambda count: tell(path, count))
                found = hashed.sha256
                crc_fits = not isinstance(self._storage, Archive) or hashed.crc32 == self._storage.crc32(path)
        except BundleError as e:
            self.fault(path, str(e))
            return
        if found != entry.sha256:
            self.fault(path, f"has SHA-256 {found[:12]}...; the manifest says {entry.sha256[:12]}...: it was changed")
        elif not crc_fits:
            self.fault(path, "is not what the packed file's checksum says")
        else:
            self._check_content(path, data)

    def _check_unlisted(self, name: str, *, sealed: bool) -> None:
        """Check a file that the manifest does not list; in an unsealed bundle, measurements are never listed."""
        in_folder = isinstance(self._storage, Folder)
        if name.lower().endswith(PICKLES):
            self.fault(name, "is a pickle, which runs code when it is read; a bundle holds none")
        elif sealed and not (is_record(name) and in_folder):
            self.fault(name, "is not listed in the manifest, which lists everything")
        elif is_record(name) or is_table(name):
            try:
                data = self._storage.read(name)
            except BundleError as e:
                self.fault(name, str(e))
                return
            self._checked_bytes[name] = len(data)
            self._check_content(name, data)
        elif name != REPORT:
            self._notes.append(f"{name!r} is no file of a bundle's, and is not looked at")

    def _has_checked_content(self, path: str) -> bool:
        if path.endswith((".onnx", ".npz")) or is_record(path) or is_table(path):
            return True
        return path in self.require_bundle().manifest.graphs

    def _check_content(self, path: str, data: bytes) -> None:
        """Check the contents of a file whose digest is right, by its kind."""
        manifest = self.require_bundle().manifest
        weights = manifest.model.weights.path
        fault = ""
        if is_record(path):
            fault = record_fault(path, data)
        elif is_table(path):
            fault = table_fault(data, manifest.pair_id)
        elif path.endswith(".npz"):
            fault = samples_fault(data)
        elif path.endswith(".onnx") or path in self.require_bundle().manifest.graphs:
            beside = weights is not None and PurePosixPath(weights).parent == PurePosixPath(path).parent
            name = PurePosixPath(weights).name if weights is not None and beside else None
            fault, has_ep_context = graph_faults(data, name)
            if has_ep_context:
                self.ep_context.append(path)
        if fault:
            self.fault(path, fault)

    def require_bundle(self) -> Bundle:
        """Return the bundle.

        Raises:
            BundleError: Its manifest cannot be read.
        """
        if self.bundle is None:
            raise BundleError(f"the manifest of {str(self._storage.path)!r} cannot be read.")
        return self.bundle


def engine_files(manifest: Manifest) -> set[str]:
    """Return the paths of all files that may be native code, by entry, role or folder."""
    named = {engine.path for entry in manifest.targets for engine in entry.built}
    return {
        path
        for path, entry in manifest.files.items()
        if path in named or entry.role == "engine" or path.startswith("engines/")
    }


def progress_in_mb(stage: str, size_bytes: int, progress: ProgressListener) -> Callable[[str, int], None]:
    """Return a function that takes a file's name and a number of bytes read, and calls ``progress`` once per MB."""
    done_bytes, shown_mb = 0, -1

    def tell(name: str, count: int) -> None:
        nonlocal done_bytes, shown_mb
        done_bytes += count
        if (mb := done_bytes // 10**6) != shown_mb:
            shown_mb = mb
            progress(Progress(stage=stage, label=name, done=mb, total=size_bytes // 10**6, unit="MB"))

    return tell


def _file_fault(path: Path) -> str:
    """Return the fault of a folder's file that is not regular or has hard links; an empty text where there is none."""
    state = path.lstat()
    if stat.S_ISLNK(state.st_mode):
        return "is a symbolic link; a bundle holds plain files"
    if not stat.S_ISREG(state.st_mode):
        return "is a device, a pipe or a socket; a bundle holds plain files"
    if state.st_nlink > 1:
        return f"has {state.st_nlink} hard links: what has another name can be changed from there"
    return ""
