"""Import a TensorRT library and set its logger, of which a process may have only one.

``tensorrt`` and ``tensorrt_rtx`` have nearly the same interface. Where libraries or versions differ, the code checks
for the attribute with ``hasattr``, never for the version.
"""

from __future__ import annotations

import contextlib
import functools
import re
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

from dsc_split._support.optional import require
from dsc_split.errors import BackendUnavailable

__all__ = ["TrtLibrary", "TrtLogger", "interruptible", "open_library"]

Trt = Any
"""The module ``tensorrt`` or ``tensorrt_rtx``, or an object of it: they have no types."""

OLDEST = (10, 3)
"""Oldest version of ``tensorrt`` that works."""

NOISE = re.compile(r"catchCudaError|^\[?checkMacros|The logger passed into|CUDA lazy loading is not enabled", re.I)
"""Errors that are logged on machines without a GPU, and do not concern the build."""

MEMORY_LINE = re.compile(r"^\s*(Total Activation|Max Scratch|Total Weights) Memory: (\d+) bytes")


class TrtLogger:
    """Collects what the library logs, from any of its threads, until it is read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._errors: list[str] = []
        self._memory: dict[str, int] = {}
        self.native: Trt = None
        """The library's logger object, which calls :meth:`note`."""

    def note(self, text: str, *, is_error: bool) -> None:
        """Keep a line if it is an error or a size of memory."""
        if match := MEMORY_LINE.match(text):
            with self._lock:
                name = {"Total Activation": "activation_bytes", "Max Scratch": "scratch_bytes"}
                self._memory[name.get(match[1], "weights_bytes")] = int(match[2])
        elif is_error and not NOISE.search(text):
            with self._lock:
                self._errors.append(" ".join(text.split()))

    def errors(self) -> list[str]:
        """Return the errors since the last call, without duplicates, and drop them."""
        with self._lock:
            errors, self._errors = list(dict.fromkeys(self._errors)), []
        return errors

    def memory(self) -> dict[str, int]:
        """Return the memory that the last build reported, in bytes, and drop it."""
        with self._lock:
            memory, self._memory = self._memory, {}
        return memory


@dataclass(frozen=True, kw_only=True)
class TrtLibrary:
    """An imported TensorRT library."""

    trt: Trt
    """The module."""
    name: str
    """Its import name: ``tensorrt`` or ``tensorrt_rtx``."""
    version: str
    """Full version: major.minor.patch.build."""
    logger: TrtLogger
    """Its logger."""


@functools.lru_cache(maxsize=2)
def open_library(name: str, extra: str) -> TrtLibrary:
    """Import ``tensorrt`` or ``tensorrt_rtx``, and set its logger: the library keeps the first one of a process.

    Raises:
        BackendUnavailable: It is not installed, cannot be loaded, or is too old.
    """
    try:
        trt = require(name, extra=extra, purpose="build and run TensorRT engines")
    except (ImportError, OSError) as e:
        raise BackendUnavailable(
            f"{name!r} is installed and cannot be loaded: {e}. Install it again: pip install 'dsc-split[{extra}]'"
        ) from e
    version = str(trt.__version__)
    if name == "tensorrt" and tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise BackendUnavailable(f"tensorrt is {version}; {oldest} or later was expected. Update it.")
    logger = TrtLogger()
    logger.native = _native_logger(trt, logger)
    return TrtLibrary(trt=trt, name=name, version=version, logger=logger)


def _native_logger(trt: Trt, logger: TrtLogger) -> Trt:
    class Logger(trt.ILogger):  # type: ignore[misc]  # the module is known only at run time
        """Passes every line to a TrtLogger."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Trt, text: str) -> None:
            """Take one line of any severity: the library does not filter."""
            if severity <= trt.ILogger.INFO:
                logger.note(text, is_error=severity <= trt.ILogger.ERROR)

    return Logger()


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Delay an interrupt to the end of the block; yields a function that returns whether there was one.

    The library calls Python to log and to report progress, and ignores exceptions from these calls: an interrupt would
    be lost.

    Raises:
        KeyboardInterrupt: There was one.
    """
    interrupted = threading.Event()

    def remember(number: int, frame: FrameType | None) -> None:
        interrupted.set()

    # Only the main thread may set handlers, and a handler of the user is kept.
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, remember)
    try:
        yield interrupted.is_set
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    if interrupted.is_set():
        raise KeyboardInterrupt
