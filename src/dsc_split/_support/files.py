"""Writing files so that a crash leaves the old one or the new one, never a part of it."""

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
    """Open a file beside ``path`` for writing, and rename it onto ``path`` when the block ends well.

    What a killed process has left of it is written over; two processes that write the same file take turns.

    Raises:
        DscError: The file cannot be written (no space, no permission, no such folder), or a link, a device, a pipe or a
            folder has its name; nothing is left behind.
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
    """Open an empty file that no other process of ours writes; it is locked until it is closed."""
    import fcntl  # whoever only reads tables may do so on systems without it

    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "wb")
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    file.truncate(0)
                    return file
        except BaseException:
            file.close()
            raise
        file.close()  # another process has renamed or removed it meanwhile


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` durable, where the system can."""
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
    """Write ``data`` to ``path``, all or nothing."""
    with new_file(path) as file:
        file.write(data)


def make_folder(path: Path) -> None:
    """Make a folder, and the folders above it; it may exist.

    Raises:
        DscError: It cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise DscError(f"cannot make folder {str(path)!r}: {e.strerror or e}.") from e
