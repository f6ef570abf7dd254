"""Keep the prints, warnings and logs of PyTorch and its exporter off the user's terminal."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

__all__ = ["quiet"]

logger = logging.getLogger(__name__)

LOUD = ("torch", "torchvision", "timm", "onnxscript", "onnx_ir", "onnx", "huggingface_hub")
"""Packages whose loggers write to the terminal, some with their own handlers."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Turn prints and warnings into our debug messages, and silence the loggers of :data:`LOUD`, until the block ends.

    The standard streams are replaced for the whole process, so other threads should not print meanwhile.
    """
    text = io.StringIO()
    levels = _silence_loggers()
    try:
        with (
            contextlib.redirect_stdout(text),
            contextlib.redirect_stderr(text),
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for line in filter(None, map(str.strip, text.getvalue().splitlines())):
            logger.debug("%s", line)
        for warning in caught:
            logger.debug("%s: %s", warning.category.__name__, warning.message)


def _silence_loggers() -> dict[str, int]:
    """Silence the loggers of :data:`LOUD` and those below them with a level; return the levels from before."""
    names = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] in LOUD]
    levels = {}
    for name in {*LOUD, *names}:
        loud = logging.getLogger(name)
        if name in LOUD or loud.level != logging.NOTSET:
            levels[name] = loud.level
            loud.setLevel(logging.CRITICAL + 1)
    return levels
