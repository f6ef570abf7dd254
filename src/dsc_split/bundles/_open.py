"""Open the files of a bundle, in a folder or in one packed file."""

from __future__ import annotations

from pathlib import Path

from dsc_split.bundles._archive import Archive
from dsc_split.bundles._storage import Folder, Storage
from dsc_split.errors import UsageError

__all__ = ["open_storage"]


def open_storage(path: Path) -> Storage:
    """Open a bundle's folder or packed file.

    Raises:
        UsageError: There is no such file or folder, or the folder has no manifest.
        BundleError: The packed file is damaged or hostile.
    """
    if path.is_file():
        return Archive(path)
    if not path.is_dir():
        raise UsageError(
            f"no bundle {str(path)!r}: there is no such folder or file. "
            f"Make one: dsc-split export SOURCE --output {path}"
        )
    if not (path / "manifest.json").is_file():
        raise UsageError(
            f"{str(path)!r} is no bundle: it has no manifest.json. Make one: dsc-split export SOURCE --output BUNDLE"
        )
    return Folder(path)
