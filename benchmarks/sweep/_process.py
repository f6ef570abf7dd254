"""The worker process, seen from outside: ask, wait, and say why it died."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dsc_split.engines._base import OUT_OF_MEMORY_TEXTS
from dsc_split.errors import (
    BackendError,
    BackendUnavailable,
    DscError,
    EngineFileError,
    EngineMismatch,
    OutOfMemoryError,
)

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ERROR_KINDS", "Worker", "WorkerDied"]

logger = logging.getLogger(__name__)

ERROR_KINDS: dict[str, type[DscError]] = {
    "out-of-memory": OutOfMemoryError,
    "unavailable": BackendUnavailable,
    "engine-file": EngineFileError,
    "engine-mismatch": EngineMismatch,
}
"""What a worker calls the errors that mean more than that one cell failed."""

GRACE_S = 5.0
"""Seconds that a worker has to end before it is killed."""


class WorkerDied(BackendError):  # noqa: N818 - what happened, not what is wrong with the caller
    """The worker process ended in the middle of a request."""


class WorkerOutOfMemoryError(WorkerDied, OutOfMemoryError):
    """The worker process ended for want of memory."""


class Worker:
    """A worker process for one target; a context manager that ends it.

    Args:
        bundle: The bundle's folder.
        target: Canonical text of the target.
        memory_limit_bytes: The worker may hold this much memory of its own.
    """

    def __init__(self, bundle: Path, target: str, memory_limit_bytes: int) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        command = [sys.executable, "-m", "dsc_split.benchmarks.sweep._worker"]
        self._process = subprocess.Popen(
            [*command, str(bundle), target, str(memory_limit_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for its answer.

        Raises:
            OutOfMemoryError: Memory ended; :class:`WorkerDied`, too, if the worker did not survive it.
            BackendUnavailable: The back-end or its device is not there.
            EngineFileError: An engine is damaged; EngineMismatch, if it was built for something else.
            BackendError: The back-end failed; :class:`WorkerDied` if the worker did not survive it.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise WorkerDied("the worker process has no pipes.")
        try:
            stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError as e:
            raise self._death() from e
        line = stdout.readline()
        if not line.endswith(b"\n"):
            raise self._death()
        answer: dict[str, Any] = json.loads(line)
        if answer.pop("ok"):
            return answer
        raise ERROR_KINDS.get(answer["kind"], BackendError)(answer["reason"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the worker: it goes when its input ends, and is killed where it does not."""
        process = self._process
        if error is not None:
            process.kill()
        if process.stdin is not None:
            try:
                process.stdin.close()
            except BrokenPipeError:
                logger.debug("worker %d had ended before its input", process.pid)
        try:
            process.wait(timeout=GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
        self._log.close()

    def _death(self) -> WorkerDied:
        """Say how the worker ended: killed and out-of-memory words count as want of memory."""
        status = self._process.wait()
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - 4000))
        words = self._log.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(words) if line.strip()), "it said nothing")
        how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        text = f"worker process {how} ({last[:300]})"
        logger.info("%s", text)
        starved = status == -signal.SIGKILL or any(piece in last.lower() for piece in OUT_OF_MEMORY_TEXTS)
        return WorkerOutOfMemoryError(f"{text}: out of memory.") if starved else WorkerDied(f"{text}.")
