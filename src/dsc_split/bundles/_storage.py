"""Read the files of a bundle: the interface for folders and packed files, and the reader of folders."""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

from dsc_split.errors import BundleError
from dsc_split.table._table import PACKED_SUFFIX

__all__ = ["MAX_READ_BYTES", "SUFFIX", "Folder", "Storage", "is_plain_name", "read_all"]

SUFFIX = PACKED_SUFFIX
"""End of the file name of a packed bundle."""
MAX_READ_BYTES = 64 * 1024 * 1024
"""Largest file that is read without a stated size."""
MAX_NAME_BYTES = 400

_LOCK_FILES = (".lock", ".lock.holder")


class Storage(Protocol):
    """Reads files by their path in the bundle, with ``/`` between folders."""

    path: Path
    """The folder, or the packed file."""

    def names(self) -> tuple[str, ...]:
        """List all files, sorted, without lock files and unfinished files."""

    def size_bytes(self, name: str) -> int | None:
        """Return the size of a file; ``None`` where there is no such regular file."""

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading.

        Raises:
            BundleError: There is no such regular file.
        """

    def read(self, name: str, *, max_bytes: int = MAX_READ_BYTES) -> bytes:
        """Read a whole file.

        Raises:
            BundleError: There is no such regular file, or it has more than ``max_bytes``.
        """


class Folder:
    """Reads a bundle's folder. It does not follow links, and does not open devices and pipes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> tuple[str, ...]:
        """List all files, sorted, also links and devices, without lock files and unfinished files."""
        found = []
        for folder, folders, files in os.walk(self.path):
            folders[:] = [name for name in folders if not name.endswith(".partial")]
            for path in [Path(folder, name) for name in (*files, *folders)]:
                name = path.relative_to(self.path).as_posix()
                is_temporary = name in _LOCK_FILES or name.endswith(".partial")
                if path.is_symlink() or (path.name in files and not is_temporary):
                    found.append(name)
        return tuple(sorted(found))

    def size_bytes(self, name: str) -> int | None:
        """Return the size of a file; ``None`` where there is no such regular file."""
        try:
            state = self._resolve(name).lstat()
        except (OSError, BundleError):
            return None
        return state.st_size if stat.S_ISREG(state.st_mode) else None

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading.

        Raises:
            BundleError: There is no such regular file, or its path contains a link.
        """
        try:
            fd = os.open(self._resolve(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as e:
            raise BundleError(f"{name!r} in {str(self.path)!r} cannot be read: {e.strerror or e}.") from e
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise BundleError(f"{name!r} in {str(self.path)!r} is no regular file.")
        return os.fdopen(fd, "rb")

    def read(self, name: str, *, max_bytes: int = MAX_READ_BYTES) -> bytes:
        """Read a whole file.

        Raises:
            BundleError: There is no such regular file, or it has more than ``max_bytes``.
        """
        with self.open(name) as file:
            return read_all(file, max_bytes, f"{name!r} in {str(self.path)!r}")

    def _resolve(self, name: str) -> Path:
        """Return the path of a file; raise ``BundleError`` for an unsafe name, or if one of its folders is a link."""
        path, folder = self.path / name, self.path
        folders = [folder := folder / part for part in PurePosixPath(name).parts[:-1]]
        if not is_plain_name(name) or any(folder.is_symlink() for folder in folders):
            raise BundleError(f"{name!r} is not a plain file inside the bundle {str(self.path)!r}. Export it again.")
        return path


def read_all(file: BinaryIO, max_bytes: int, what: str) -> bytes:
    """Read an open file to its end.

    Raises:
        BundleError: The file has more than ``max_bytes``, or cannot be read.
    """
    try:
        data = file.read(max_bytes + 1)
    except OSError as e:
        raise BundleError(f"{what} cannot be read: {e.strerror or e}.") from e
    if len(data) > max_bytes:
        raise BundleError(f"{what} has more than {max_bytes} bytes; no more are read.")
    return data


def is_plain_name(name: str) -> bool:
    """Return whether a path is relative, inside the bundle, valid on every system, and not longer than needed."""
    plain = PurePosixPath(name)
    return (
        0 < len(name.encode(errors="replace")) <= MAX_NAME_BYTES
        and name.isprintable()
        and not set(name) & set('\\:*?"<>|')
        and not plain.is_absolute()
        and plain.as_posix() == name != "."
        and not {".", ".."} & set(plain.parts)
    )
