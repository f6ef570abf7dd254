"""Packages that only some parts need: imported where they are used, with the pip command when they are missing."""

from __future__ import annotations

import importlib
from typing import Any

from dsc_split.errors import BackendUnavailable

__all__ = ["require"]


def require(module: str, *, extra: str, purpose: str) -> Any:
    """Import an optional module.

    Args:
        module: Dotted import name.
        extra: The extra of this package that brings it.
        purpose: What it is needed for, to end the sentence "... is needed to ...".

    Raises:
        BackendUnavailable: The package is not installed. A module that is there and fails over another missing
            one raises its own error: that is not for us to explain away.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        package = module.partition(".")[0]
        if e.name is None or e.name.partition(".")[0] != package:
            raise
        raise BackendUnavailable(
            f"{package!r} is not installed; it is needed to {purpose}. Install it: pip install 'dsc-split[{extra}]'"
        ) from e
