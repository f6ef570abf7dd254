"""Find the back-end of a target. Only this file imports the modules of back-ends."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from dsc_split.engines._backends import BACKENDS
from dsc_split.engines._base import Backend
from dsc_split.engines._target import Target
from dsc_split.errors import UsageError

if TYPE_CHECKING:
    from dsc_split.engines._base import BackendLike
    from dsc_split.engines._options import BuildOptions

__all__ = ["get_backend"]


def get_backend(target: str | Target | BackendLike, options: BuildOptions | None = None) -> BackendLike:
    """Return the back-end for a target; its library must be installed.

    Args:
        target: A target, its text, or a back-end, which is returned unchanged.
        options: How its engines are built; used by back-ends that build engine files.

    Raises:
        UsageError: The text names no known back-end, architecture or option.
        BackendUnavailable: The library is not installed, or lacks the device.
    """
    if isinstance(target, str):
        target = Target.parse(target)
    if not isinstance(target, Target):
        return target
    entry = BACKENDS[target.backend]
    cls = getattr(importlib.import_module(entry.module), entry.cls)
    backend = cls(target, extra=entry.architectures[target.architecture], options=options)
    if not isinstance(backend, Backend):
        raise UsageError(f"back-end {target.backend!r} is registered as {entry.cls!r}, which is no Backend.")
    return backend
