"""Unpack a bundle. The folder appears after all checks have passed; if one fails, no file is left behind."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from dsc_split._support.progress import ProgressListener, silent
from dsc_split.bundle import Bundle
from dsc_split.bundles._archive import Archive
from dsc_split.bundles._folders import put_in_place, unfinished_folder
from dsc_split.bundles._lock import lock_folder
from dsc_split.bundles._manifest import ENVELOPE, MANIFEST
from dsc_split.errors import BundleError, DscError, SignatureError, UsageError
from dsc_split.shipping._verify import Verification, engine_files

if TYPE_CHECKING:
    from dsc_split.bundles._records import Manifest
    from dsc_split.shipping._signature import Trust

__all__ = ["unpack_bundle"]

SHOWN_FAULTS = 3


def unpack_bundle(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    trust: Trust | None = None,
    allow_older: bool = False,
    progress: ProgressListener = silent,
) -> Bundle:
    """Verify a packed bundle, and unpack it into a folder.

    Args:
        source: The packed file.
        output: The folder to make. An existing bundle is replaced unless it is newer; its measurements are kept.
            Other folders and files are not replaced.
        trust: Which signatures are enough. Engines are native code: a bundle with engines must be signed by a trusted
            key, or ``trust`` must allow unsigned bundles.
        allow_older: Whether an older bundle may replace a newer one.
        progress: Called with the number of MB unpacked.

    Returns:
        The bundle in the folder.

    Raises:
        UsageError: There is no such file, or ``output`` must not be replaced, for example because it is no bundle.
        BundleError: The packed bundle is damaged or hostile, or older than the existing one.
        SignatureError: ``trust`` refuses its signatures, or it has engines and no trusted key signed it.
        BundleBusyError: Another command is writing the existing bundle.
        DscError: The folder cannot be written.
    """
    path, folder = Path(source), Path(output)
    if path.is_dir():
        raise UsageError(f"{str(path)!r} is a folder, not a packed bundle. Copy it as it is, or pack it first.")
    if not path.is_file():
        raise UsageError(f"no packed bundle {str(path)!r}: there is no such file. Make one: dsc-split pack BUNDLE")
    archive = Archive(path)
    check = Verification(archive)
    check.signature(trust)
    trusted = bool(check.signed_by) or (trust is not None and trust.allow_unsigned)
    if check.manifest():
        check.lists()
    _refuse_faults(check, path)
    manifest = check.require_bundle().manifest
    if not trusted and (engines := engine_files(manifest)):
        _refuse_code(path, engines)
    _check_place(folder, manifest, allow_older=allow_older)
    place = folder.resolve()
    with unfinished_folder(place) as partial:
        try:
            check.files(progress, lambda name: _create(partial / name))
            _refuse_faults(check, path)
            if not trusted and check.ep_context:
                _refuse_code(path, set(check.ep_context))
            for name, data in ((MANIFEST, check.manifest_data), (ENVELOPE, check.envelope)):
                if data is not None:
                    with _create(partial / name) as file:
                        file.write(data)
            with lock_folder(place) if Bundle.is_bundle(place) else contextlib.nullcontext():
                _check_place(folder, manifest, allow_older=allow_older)
                put_in_place(partial, place)
        except OSError as e:
            raise DscError(f"cannot write {str(folder)!r}: {e.strerror or e}. Nothing was changed.") from e
    return Bundle.open(folder)


@contextlib.contextmanager
def _create(path: Path) -> Iterator[BinaryIO]:
    """Create a file and its folder, and open the file for writing; it must not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _refuse_faults(check: Verification, path: Path) -> None:
    rows = check.result().rows
    if rows:
        named = "; ".join(f"{row.path!r} {row.fault}" for row in rows[:SHOWN_FAULTS])
        more = f"; and {len(rows) - SHOWN_FAULTS} more" if len(rows) > SHOWN_FAULTS else ""
        raise BundleError(
            f"packed bundle {str(path)!r} was not unpacked: {named}{more}. See it all: dsc-split verify {path}"
        )


def _refuse_code(path: Path, files: set[str]) -> None:
    raise SignatureError(
        f"packed bundle {str(path)!r} was not unpacked: {sorted(files)[0]!r} is native code, and {len(files)} files "
        "are in all, which are unpacked only when a key that you trust signed them: give --trust PUBLIC_KEY, or "
        "--allow-unsigned to unpack them all the same."
    )


def _check_place(folder: Path, new: Manifest, *, allow_older: bool) -> None:
    """Raise an error if ``folder`` is no bundle, would lose files to a part of a bundle, or is newer than ``new``."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"--output {str(folder)!r} is a file or a link; it is not replaced. Choose another name.")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not Bundle.is_bundle(folder):
        raise UsageError(f"--output {str(folder)!r} exists and is no bundle; it is not replaced. Choose another name.")
    if folder.samefile(Path.cwd()):
        raise UsageError(f"--output {str(folder)!r} is the current folder, which is not replaced. Choose another name.")
    try:
        manifest = Bundle.open(folder).manifest
    except BundleError as e:
        if allow_older:
            return
        raise BundleError(f"{e} Or give --allow-older to replace it, whatever its revision is.") from e
    if new.side not in (None, manifest.side):
        there = "a whole bundle" if manifest.side is None else f"the {manifest.side}'s part of one"
        raise UsageError(
            f"--output {str(folder)!r} holds {there}, and the packed file the {new.side}'s part: what the folder "
            "has in addition would be lost. Choose another name, or merge: dsc-split merge BUNDLE PACKED"
        )
    if allow_older:
        return
    revision = manifest.revision if manifest.side is None else manifest.released_revision
    if new.revision == revision and manifest.sealed and new != manifest:
        raise BundleError(
            f"the packed bundle and {str(folder)!r} have the same revision, {revision}, and other contents; which is "
            "newer cannot be told. Pack it with a higher --revision, or give --allow-older."
        )
    if new.revision < revision:
        raise BundleError(
            f"the packed bundle has revision {new.revision}, and {str(folder)!r} is newer: {revision}. An older bundle "
            "may have been sent again. Give --allow-older if you want it back."
        )
