"""The TensorRT libraries: which one, which version, and the one logger that a process may have.

``tensorrt`` and ``tensorrt_rtx`` have nearly one interface; where they differ, and where versions do, the attribute is
asked for with ``hasattr``, never the version.
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

OLDEST = (10, 3)
"""Oldest ``tensorrt`` that has all that is used."""

NOISE = re.compile(r"catchCudaError|^\[?checkMacros|The logger passed into|CUDA lazy loading is not enabled", re.I)
"""What is logged as an error wherever there is no GPU, and says nothing of the build."""

MEMORY_LINE = re.compile(r"^\s*(Total Activation|Max Scratch|Total Weights) Memory: (\d+) bytes")


class TrtLogger:
    """What the library has logged and nobody has read yet; may be written from any of its threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._errors: list[str] = []
        self._memory: dict[str, int] = {}
        self.native: Any = None
        """The library's own logger object, which writes here."""

    def note(self, text: str, *, is_error: bool) -> None:
        """Keep what matters of one line."""
        if match := MEMORY_LINE.match(text):
            with self._lock:
                name = {"Total Activation": "activation_bytes", "Max Scratch": "scratch_bytes"}
                self._memory[name.get(match[1], "weights_bytes")] = int(match[2])
        elif is_error and not NOISE.search(text):
            with self._lock:
                self._errors.append(" ".join(text.split()))

    def errors(self) -> list[str]:
        """Give the errors since the last call, each once, and forget them."""
        with self._lock:
            errors, self._errors = list(dict.fromkeys(self._errors)), []
        return errors

    def memory(self) -> dict[str, int]:
        """Give the memory that the last build reported, in bytes, and forget it."""
        with self._lock:
            memory, self._memory = self._memory, {}
        return memory


@dataclass(frozen=True, kw_only=True)
class TrtLibrary:
    """One of the two libraries, imported."""

    trt: Any
    """The module."""
    name: str
    """Its import name: ``tensorrt`` or ``tensorrt_rtx``."""
    version: str
    """Full version: major.minor.patch.build."""
    logger: TrtLogger
    """What it logs."""


@functools.lru_cache(maxsize=2)
def open_library(name: str, extra: str) -> TrtLibrary:
    """Import ``tensorrt`` or ``tensorrt_rtx``, and give it its logger: it takes the first one of a process alone.

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
    if name == "tensorrt" and _numbers(version) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise BackendUnavailable(f"tensorrt is {version}; {oldest} or later was expected. Update it.")
    logger = TrtLogger()
    logger.native = _native_logger(trt, logger)
    return TrtLibrary(trt=trt, name=name, version=version, logger=logger)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _native_logger(trt: Any, logger: TrtLogger) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]  # the module is known at run time alone
        """Hands every line on."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            """Take one line, of whatever severity: the library does not filter."""
            if severity <= trt.ILogger.INFO:
                logger.note(text, is_error=severity <= trt.ILogger.ERROR)

    return Logger()


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Keep an interrupt for the end of the block, and tell whether there was one.

    The library calls Python back, to log and to tell its progress, and swallows what is raised there: an interrupt
    would be lost.

    Raises:
        KeyboardInterrupt: There was one.
    """
    interrupted = threading.Event()

    def remember(number: int, frame: FrameType | None) -> None:
        interrupted.set()

    # Only the main thread may set handlers, and a handler of the user's own stays.
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
