"""The clock of the GPU, locked for the time of a run and always unlocked after it."""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
from collections.abc import Iterator

from dsc_split.engines.gpu._state import unlock_clocks
from dsc_split.errors import BackendError, BackendUnavailable, UsageError

__all__ = ["locked_clocks"]

logger = logging.getLogger(__name__)

GRACE_S = 20.0
"""Seconds that unlocking may take."""


@contextlib.contextmanager
def locked_clocks(mhz: int | None) -> Iterator[None]:
    """Hold the SM clock of the GPU while the block runs.

    A process of its own does it, so that the clock is unlocked even where this one is killed; where that process
    was killed, this one unlocks.

    Args:
        mhz: The clock in MHz; ``None``: nothing is locked.

    Raises:
        UsageError: The GPU has no such clock.
        BackendUnavailable: There is no GPU, or NVML is not there.
        BackendError: The GPU cannot do it, it is not permitted, or the clock cannot be unlocked.
    """
    if mhz is None:
        yield
        return
    guard = subprocess.Popen(
        [sys.executable, "-m", "dsc_split.benchmarks.sweep._clock_guard", str(mhz)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C and a closed terminal are not for it
    )
    try:
        _confirm(guard)
        logger.info("the SM clock is locked at %d MHz", mhz)
        yield
    finally:
        _end(guard)


def _confirm(guard: subprocess.Popen[bytes]) -> None:
    line = guard.stdout.readline() if guard.stdout is not None else b""
    if not line.endswith(b"\n"):
        raise BackendError("the process that locks the clock of the GPU ended without an answer.")
    answer = json.loads(line)
    if not answer["ok"]:
        kinds = {"usage": UsageError, "unavailable": BackendUnavailable}
        raise kinds.get(answer["kind"], BackendError)(answer["reason"])


def _end(guard: subprocess.Popen[bytes]) -> None:
    """Let the guard unlock and end; where it did not, unlock here."""
    for pipe in (guard.stdin, guard.stdout):
        if pipe is not None:
            pipe.close()
    try:
        status = guard.wait(timeout=GRACE_S)
    except subprocess.TimeoutExpired:
        guard.kill()
        status = guard.wait()
    if status:
        unlock_clocks()
        logger.warning("the process that guards the locked clock ended with status %d; the clock is unlocked", status)
