"""Lock a bundle folder, so that one process writes it at a time."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from dsc_split._support.files import write_bytes
from dsc_split.errors import BundleBusyError, DscError

__all__ = ["lock_folder"]


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock a bundle folder for writing during the block, without waiting.

    Raises:
        BundleBusyError: Another process has the lock; the message names its process id.
        DscError: The lock file cannot be written.
    """
    from filelock import FileLock, Timeout  # programs that only read tables may lack this package

    lock_path = folder / ".lock"
    holder_path = folder / ".lock.holder"
    lock = FileLock(lock_path)
    try:
        lock.acquire(timeout=0)
    except Timeout as e:
        raise BundleBusyError(
            f"bundle {str(folder)!r} is being written by another dsc-split ({_holder(holder_path)}). "
            "Wait for it to end, or stop it."
        ) from e
    except OSError as e:
        raise DscError(f"bundle {str(folder)!r} cannot be locked for writing: {e.strerror or e}.") from e
    try:
        with contextlib.suppress(DscError):
            write_bytes(holder_path, json.dumps({"pid": os.getpid()}).encode())
        yield
    finally:
        holder_path.unlink(missing_ok=True)
        lock.release()


def _holder(path: Path) -> str:
    try:
        return f"process {int(json.loads(path.read_text())['pid'])}"
    except (OSError, ValueError, KeyError, TypeError):
        return "process unknown"
