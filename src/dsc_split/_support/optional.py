"""Import optional packages where they are used; if one is missing, the error names the pip command."""

from __future__ import annotations

import importlib
from typing import Any

from dsc_split.errors import BackendUnavailable

__all__ = ["require"]


def require(module: str, *, extra: str, purpose: str) -> Any:
    """Import an optional module.

    Args:
        module: Dotted import name.
        extra: The extra of dsc-split that installs it.
        purpose: The end of the sentence "it is needed to ...".

    Raises:
        BackendUnavailable: The package is not installed.
        ModuleNotFoundError: The package is installed, and another package that it imports is missing.
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
