"""Replace a bundle folder by a finished new one, so that at every moment the old or the new one exists."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from dsc_split.errors import DscError

__all__ = ["discard", "put_in_place", "unfinished_folder"]

_KEPT = ("cells", "memory")
"""Folders that the new bundle takes over: their files name what was measured, so they stay valid."""

_LOCK = ".lock"
"""Lock file of a bundle, as in ``lock_folder``."""

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextlib.contextmanager
def unfinished_folder(folder: Path) -> Iterator[Path]:
    """Make an empty folder beside ``folder``; after the block it is removed, unless it was moved.

    Folders that killed processes left are removed, too. A running process has locked its folder.

    Raises:
        DscError: The folder cannot be made.
    """
    prefix, suffix = f".{folder.name}.", ".partial"
    with contextlib.ExitStack() as stack:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            for path in folder.parent.glob(f"{glob.escape(prefix)}*{suffix}"):
                with _locked(path, wait=False) as is_ours:
                    if is_ours:
                        discard(path)
            while True:
                partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=prefix, suffix=suffix))
                if stack.enter_context(_locked(partial, wait=True)):
                    break  # otherwise another process has removed it before it was locked
        except OSError as e:
            raise DscError(f"cannot make a folder beside {str(folder)!r}: {e.strerror or e}.") from e
        try:
            yield partial
        finally:
            discard(partial)


@contextlib.contextmanager
def _locked(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Lock an unfinished folder during the block; yield whether it exists and this process has the lock."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # it is gone, or is no folder
        yield False
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        is_there = folder.exists() and os.path.samestat(os.fstat(fd), folder.stat())
    except BlockingIOError:
        is_there = False
    except OSError:
        os.close(fd)
        raise
    try:
        yield is_there
    finally:
        os.close(fd)


def put_in_place(new: Path, folder: Path) -> None:
    """Move the finished folder ``new`` to ``folder``; an existing bundle is replaced and removed.

    Raises:
        OSError: The file system refuses; the old folder is then unchanged.
    """
    umask = os.umask(0)
    os.umask(umask)
    new.chmod(0o777 & ~umask)
    (new / _LOCK).unlink(missing_ok=True)
    if not folder.exists():
        new.rename(folder)
        return
    for name in _KEPT:
        if (folder / name).is_dir():
            shutil.copytree(folder / name, new / name, dirs_exist_ok=True, ignore=_skip_existing(new / name))
    if _exchange(new, folder):
        return
    if not any(folder.iterdir()):
        new.rename(folder)
        return
    # This system cannot exchange folders: between two renames the old bundle has another name.
    aside = folder.with_name(f".{folder.name}.old")
    discard(aside)
    folder.rename(aside)
    new.rename(folder)
    discard(aside)


def _skip_existing(folder: Path) -> Callable[[str, list[str]], list[str]]:
    """Return an ``ignore`` function for ``copytree`` that skips files which ``folder`` already has."""
    return lambda _, names: [name for name in names if (folder / name).exists()]


def discard(folder: Path) -> None:
    """Remove a folder, if it exists; errors are ignored."""
    shutil.rmtree(folder, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step with Linux ``renameat2``; return whether that worked."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)
