"""Write files so that after a crash there is the old file or the complete new one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dsc_split.errors import DscError

__all__ = ["make_folder", "new_file", "write_bytes"]


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file beside ``path`` for writing, and rename it to ``path`` if the block ends without an error.

    An unfinished file of a killed process is overwritten. Two processes that write the same file wait for each other.

    Raises:
        DscError: The file cannot be written (no space, no permission, no such folder), or ``path`` is a link, a device,
            a pipe or a folder. The unfinished file is removed.
    """
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise DscError(f"cannot write {str(path)!r}: it is there, and no regular file. Nothing was changed.")
        partial = path.with_name(f".{path.name}.partial")
        with _open_locked(partial) as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                partial.replace(path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
        _sync_folder(path.parent)
    except OSError as e:
        raise DscError(f"cannot write {str(path)!r}: {e.strerror or e}. Nothing was changed.") from e


def _open_locked(path: Path) -> BinaryIO:
    """Open an empty file with a lock that other processes of dsc-split respect; closing the file unlocks it."""
    import fcntl  # Windows does not have it, and must be able to read tables

    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "wb")
        try:
            with contextlib.suppress(OSError):  # some file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    file.truncate(0)
                    return file
        except BaseException:
            file.close()
            raise
        file.close()  # another process renamed or removed it before it was locked


def _sync_folder(folder: Path) -> None:
    """Write a rename in ``folder`` to the disk, where the system supports that."""
    try:
        fd = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        with contextlib.suppress(OSError):
            os.fsync(fd)
    finally:
        os.close(fd)


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, all or nothing, with the errors of :func:`new_file`."""
    with new_file(path) as file:
        file.write(data)


def make_folder(path: Path) -> None:
    """Make a folder and its parent folders, if they do not exist.

    Raises:
        DscError: A folder cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise DscError(f"cannot make folder {str(path)!r}: {e.strerror or e}.") from e
