"""A cache of built engines. The key is all that goes into a build: building twice does not give the same bytes.

An entry is two files: ``DIGEST.json``, the key and the SHA-256 of the engine, and ``DIGEST.plan``, the engine. DIGEST
is the SHA-256 of the key. Processes take a lock, so none reads a file that another one writes or removes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock

from dsc_split._support.files import new_file
from dsc_split._support.hashing import Hasher, sha256_file
from dsc_split._support.records import Count, Facts, Record, Text, read_record, to_document
from dsc_split._support.sizes import parse_size
from dsc_split._support.strict_json import read_json, write_json
from dsc_split.engines._engine_file import read_header
from dsc_split.engines._fingerprint import as_json, fingerprint_digest
from dsc_split.errors import DamagedError, DscError, UsageError

__all__ = ["CacheEntry", "EngineCache", "cache_folder"]

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "DSC_SPLIT_CACHE"
LIMIT_VARIABLE = "DSC_SPLIT_CACHE_LIMIT"
DEFAULT_LIMIT_BYTES = 10 * 2**30
LOCK_TIMEOUT_S = 60.0
"""A process holds the lock while it copies or hashes one engine, which never takes this long."""


class _CacheRecord(Record):
    """The JSON file of an engine in the cache."""

    key: Facts
    """All that the engine depends on."""
    sha256: Text
    """Digest of the engine file."""
    size_bytes: Count
    """Size of the engine file."""
    model: Text
    """Name of its model."""
    label: Text
    """What it computes: ``whole model``, ``head NAME``."""
    target: Text
    """Target that it was built for."""
    library_version: Text
    """Version of the library that built it."""


def cache_folder() -> Path:
    """Return the folder for files that can be made again: ``$DSC_SPLIT_CACHE``, or the user's cache folder."""
    import platformdirs

    chosen = os.environ.get(FOLDER_VARIABLE)
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("dsc-split")


def _limit_bytes() -> int:
    """Return the largest size of the cache in bytes: ``$DSC_SPLIT_CACHE_LIMIT``, or 10 GiB.

    Raises:
        UsageError: The variable is not a size.
    """
    chosen = os.environ.get(LIMIT_VARIABLE)
    if not chosen:
        return DEFAULT_LIMIT_BYTES
    try:
        return parse_size(chosen)
    except ValueError as e:
        raise UsageError(f"${LIMIT_VARIABLE}: {e}") from e


@dataclass(frozen=True, kw_only=True)
class CacheEntry:
    """An engine in the cache."""

    digest: str
    """SHA-256 of its key, 64 hexadecimal digits."""
    model: str
    """Name of its model."""
    label: str
    """What it computes: ``whole model``, ``head NAME``."""
    target: str
    """Target that it was built for."""
    library_version: str
    """Version of the library that built it."""
    size_bytes: int
    """Size of the engine file."""
    used_s: float
    """When it was last written or read, in seconds since 1970."""

    def to_json(self) -> dict[str, object]:
        """Return the entry as plain data."""
        return asdict(self)


class EngineCache:
    """A folder of built engines, safe for several processes at once.

    Attributes:
        folder: Folder of the entries; made with the first entry.
        limit_bytes: Beyond this size, the least recently used entries are removed.
    """

    def __init__(self, folder: Path | None = None, limit_bytes: int | None = None) -> None:
        self.folder = cache_folder() / "engines" if folder is None else folder
        self.limit_bytes = _limit_bytes() if limit_bytes is None else limit_bytes

    def get(self, key: Mapping[str, object]) -> Path | None:
        """Return the file of an engine, and mark it as used now.

        Args:
            key: All that the engine depends on, as plain data.

        Returns:
            The unchanged file, or ``None``. A damaged entry is removed.
        """
        digest = fingerprint_digest(key)
        with self._warn_on_error("read"):
            if not self.folder.is_dir():
                return None
            with self._lock():
                if not self._record_path(digest).exists():
                    return None
                record, path = self._read_record(digest), self._plan_path(digest)
                if record is not None and record.key == as_json(key) and _is_intact(path, record):
                    with contextlib.suppress(OSError):
                        os.utime(self._record_path(digest))
                    return path
                logger.warning("the engine cache held a damaged entry, %s; it is removed", digest[:12])
                self._remove(digest)
        return None

    def put(self, key: Mapping[str, object], path: Path) -> None:
        """Copy an engine file into the cache; log a warning where that fails.

        Args:
            key: All that the engine depends on, as plain data.
            path: An engine file.
        """
        with self._warn_on_error("written"):
            header = read_header(path)
            size_bytes = path.stat().st_size
            if size_bytes > self.limit_bytes:
                logger.info("%s is larger than the limit of the engine cache, and not kept", path.name)
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            digest = fingerprint_digest(key)
            with self._lock():
                self._record_path(digest).unlink(missing_ok=True)
                with path.open("rb") as source, new_file(self._plan_path(digest)) as copy, Hasher() as hasher:
                    sha256 = hasher.read(source, copy).sha256
                record = _CacheRecord(
                    key=as_json(key),
                    sha256=sha256,
                    size_bytes=size_bytes,
                    model=header.model,
                    label=header.label,
                    target=header.target,
                    library_version=header.library_version,
                )
                write_json(self._record_path(digest), to_document(record))
                self._trim()

    def entries(self) -> tuple[CacheEntry, ...]:
        """List the entries, the last used one first; other files in the folder are left out."""
        found = []
        for digest in self._digests():
            record = self._read_record(digest)
            if record is None:
                continue
            with contextlib.suppress(OSError):
                found.append(
                    CacheEntry(
                        digest=digest,
                        model=record.model,
                        label=record.label,
                        target=record.target,
                        library_version=record.library_version,
                        size_bytes=record.size_bytes,
                        used_s=self._record_path(digest).stat().st_mtime,
                    )
                )
        return tuple(sorted(found, key=lambda entry: (-entry.used_s, entry.digest)))

    def clear(self) -> int:
        """Remove every engine, and the files of interrupted builds.

        Returns:
            Number of freed bytes.

        Raises:
            DscError: The cache cannot be locked.
        """
        if not self.folder.is_dir():
            return 0
        try:
            with self._lock():
                return sum(_remove(path) for path in self._files())
        except OSError as e:
            raise DscError(f"engine cache {str(self.folder)!r} cannot be emptied: {e.strerror or e}.") from e

    # ---- files -----------------------------------------------------------------------------------------------

    def _record_path(self, digest: str) -> Path:
        return self.folder / f"{digest}.json"

    def _plan_path(self, digest: str) -> Path:
        return self.folder / f"{digest}.plan"

    def _lock(self) -> contextlib.AbstractContextManager[object]:
        return FileLock(self.folder / ".lock", timeout=LOCK_TIMEOUT_S)

    @contextlib.contextmanager
    def _warn_on_error(self, what: str) -> Iterator[None]:
        """Log errors of the folder as a warning: a build goes on without its cache."""
        try:
            yield
        except (OSError, DscError) as e:
            logger.warning("the engine cache %r cannot be %s: %s", str(self.folder), what, e)

    def _files(self) -> list[Path]:
        """List the cache's files in the folder: entries, incomplete entries, and unfinished files."""
        try:
            found = list(self.folder.iterdir())
        except OSError:
            return []
        return [path for path in found if _is_ours(path)]

    def _digests(self) -> list[str]:
        return [path.stem for path in self._files() if path.suffix == ".json" and not path.name.startswith(".")]

    def _read_record(self, digest: str) -> _CacheRecord | None:
        try:
            return read_record(read_json(self._record_path(digest), "cache entry", DamagedError), _CacheRecord)
        except DamagedError as e:
            logger.debug("cache entry %s: %s", digest, e)
            return None

    def _remove(self, digest: str) -> None:
        for path in (self._record_path(digest), self._plan_path(digest)):
            _remove(path)

    def _trim(self) -> None:
        """Remove incomplete entries, then the least recently used ones beyond the limit. The caller holds the lock."""
        entries = self.entries()
        whole = {path for entry in entries for path in (self._record_path(entry.digest), self._plan_path(entry.digest))}
        for path in self._files():
            if path not in whole:
                _remove(path)
        total_bytes = 0
        for entry in entries:
            total_bytes += entry.size_bytes
            if total_bytes > self.limit_bytes:
                self._remove(entry.digest)


def _is_intact(path: Path, record: _CacheRecord) -> bool:
    """Return whether an engine file has the size and digest of its record."""
    try:
        return (path.stat().st_size, sha256_file(path)) == (record.size_bytes, record.sha256)
    except OSError:
        return False


def _is_ours(path: Path) -> bool:
    """Return whether this module wrote a file; the folder may also have links, folders and other files."""
    name = path.name.lstrip(".")
    digest, _, rest = name.partition(".")
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        return False
    if not (rest in ("json", "plan") or rest.endswith(".partial")):
        return False
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _remove(path: Path) -> int:
    """Remove a file; return its size, or 0 where it cannot be removed."""
    try:
        size_bytes = path.lstat().st_size
        path.unlink()
    except OSError as e:
        logger.debug("%s stays: %s", path, e)
        return 0
    return size_bytes
