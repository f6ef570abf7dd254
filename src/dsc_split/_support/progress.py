"""Progress of long work: the library calls a listener, and never prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Progress", "ProgressListener", "silent"]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One step of a long task."""

    stage: str
    """Kind of work: ``export``, ``prove``, ``bench device``, ..."""
    label: str
    """Description of the current step."""
    done: int
    """Finished steps."""
    total: int
    """All steps; 0 where the number is not known."""
    unit: str = "steps"
    """Unit of ``done`` and ``total``."""


ProgressListener = Callable[[Progress], None]
"""Called from the thread that does the work; it must not raise."""


def silent(progress: Progress) -> None:
    """Do nothing: the listener where the caller gives none."""
