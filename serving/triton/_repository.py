"""The folders of a model repository: name, check and replace them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dsc_split._support.hashing import sha256_text
from dsc_split.bundles._folders import discard, put_in_place
from dsc_split.errors import UsageError
from dsc_split.table._types import FULL_OFFLOAD

if TYPE_CHECKING:
    from dsc_split.bundle import Bundle

__all__ = ["PARAMETER", "name_prefix", "refuse_foreign", "replace_models", "triton_model_name"]

PARAMETER = "dsc_split_"
"""Prefix of the names of our notes in a model's configuration."""
DIGITS = 12
"""Number of digits of the pair_id in the names of models."""


def triton_model_name(bundle: Bundle, choice: str) -> str:
    """Return the name of the model for a choice; it is the same for the device's and the server's bundle.

    Args:
        bundle: The bundle.
        choice: ``full-offload``, or the name of a cut.

    Raises:
        UsageError: The bundle has no such choice.
    """
    if choice == FULL_OFFLOAD:
        return f"{name_prefix(bundle)}-full"
    names = [split.name for split in bundle.splits]
    if choice not in names:
        raise UsageError(f"no choice {choice!r} is served; known are: {', '.join([FULL_OFFLOAD, *names])}.")
    slugs = [_slug(name).lower() for name in names]
    plain = _slug(choice)
    unique = plain == choice or slugs.count(plain.lower()) == 1
    return f"{name_prefix(bundle)}-{plain if unique else f'{plain}-{sha256_text(choice)[:8]}'}-tail"


def name_prefix(bundle: Bundle) -> str:
    """Return the prefix of the names of all models of a bundle."""
    name = _slug(bundle.manifest.model.title or "model")[:60]
    return f"{name}-{_slug(bundle.manifest.pair_id.removeprefix('sha256:'))[:DIGITS]}"


def _slug(text: str) -> str:
    """Replace the characters of a text that are not safe in a folder's name or in a URL."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._-") or "model"


def refuse_foreign(place: Path, bundle: Bundle) -> None:
    """Refuse to replace folders that are not of this export.

    Raises:
        UsageError: A folder with the name of a model holds something else.
    """
    for choice in (FULL_OFFLOAD, *(split.name for split in bundle.splits)):
        folder = place / triton_model_name(bundle, choice)
        if folder.exists() and not _is_ours(folder, bundle):
            raise UsageError(
                f"{str(folder)!r} is there and not of pair_id {bundle.manifest.pair_id}; it is not touched. "
                "Move it away, or choose another folder."
            )


def replace_models(new: Path, place: Path, bundle: Bundle, names: Sequence[str]) -> None:
    """Move models into the repository, and remove those of the same export that are no longer asked for.

    Raises:
        OSError: The file system refuses.
    """
    for name in names:
        put_in_place(new / name, place / name)
    index = f"{name_prefix(bundle)}.json"
    (new / index).replace(place / index)
    for folder in place.glob(f"{name_prefix(bundle)}-*"):
        if folder.name not in names and _is_ours(folder, bundle):
            discard(folder)


def _is_ours(folder: Path, bundle: Bundle) -> bool:
    """Return whether a model's folder was exported from a bundle with the same pair_id."""
    try:
        config = (folder / "config.pbtxt").read_bytes()
    except OSError:
        return False
    note = f'key: "{PARAMETER}pair_id"\n  value {{ string_value: "{bundle.manifest.pair_id}" }}'
    return not folder.is_symlink() and note.encode() in config
