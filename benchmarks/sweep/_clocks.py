"""Lock the clock of the GPU during a run, and always unlock it afterwards."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from dsc_split._support.child import Child, ChildOptions
from dsc_split.engines.gpu._state import lock_clocks, unlock_clocks

__all__ = ["ClockGuard", "locked_clocks"]

logger = logging.getLogger(__name__)

OPTIONS = ChildOptions(
    label="the process that locks the clock of the GPU", time_limit_s=60.0, grace_s=20.0, cleans_up=True
)


class ClockGuard:
    """Runs in a child process: it locks the clock, and unlocks it when its parent ends, even if that is killed."""

    def __init__(self) -> None:
        self._locked = False

    def lock(self, mhz: int) -> None:
        """Lock the clock at ``mhz``."""
        lock_clocks(mhz)
        self._locked = True

    def close(self) -> None:
        """Unlock it; after an error the exit status of the process is not 0."""
        if self._locked:
            unlock_clocks()


@contextlib.contextmanager
def locked_clocks(mhz: int | None) -> Iterator[None]:
    """Lock the SM clock of the GPU while the block runs.

    A child process does it. If this process is killed, the child unlocks the clock; if the child is killed, this
    process does.

    Args:
        mhz: The clock in MHz; ``None``: nothing is locked.

    Raises:
        UsageError: The GPU has no such clock.
        BackendUnavailable: There is no GPU, or no NVML.
        BackendError: The GPU cannot do it, the user may not, or the clock cannot be unlocked.
    """
    if mhz is None:
        yield
        return
    guard = Child(OPTIONS, ClockGuard)
    try:
        with guard:
            guard.ask(ClockGuard.lock, mhz)
            logger.info("the SM clock is locked at %d MHz", mhz)
            yield
    finally:
        if guard.status:
            unlock_clocks()
            logger.warning(
                "the process that guards the locked clock ended with status %d; the clock is unlocked", guard.status
            )
