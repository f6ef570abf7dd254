"""The table of back-ends. The module of a back-end is imported when the back-end is first used."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = ["BACKENDS", "BackendEntry", "Option"]


@dataclass(frozen=True, kw_only=True)
class Option:
    """One ``key=value`` that a target may carry."""

    name: str
    """The key."""
    parse: Callable[[str], int | float | str]
    """Returns the value that the text stands for; raises ``ValueError`` for a wrong text."""
    expected: str
    """Describes the allowed values, for messages."""
    neutral: int | float | str | None
    """The value that means the same as leaving the option out; ``None`` where there is no such value."""
    only: str | None = None
    """The only architecture that has it; ``None``: all have it."""


@dataclass(frozen=True, kw_only=True)
class BackendEntry:
    """Where the code of a back-end is, and what its targets may contain."""

    module: str
    """Module that is imported when the back-end is first used."""
    cls: str
    """Name of the :class:`~dsc_split.engines.Backend` in that module."""
    architectures: Mapping[str, str]
    """Architecture to the extra that brings its library."""
    options: tuple[Option, ...]
    """Options, in the order of a target's canonical text."""
    default: str | None
    """Architecture of a target that names none; ``None`` where a target must name one."""
    otherwise: str = ""
    """Advice for an unknown architecture, as a sentence."""


def _thread_count(text: str) -> int:
    count = int(text)
    if not 1 <= count <= 4096:
        raise ValueError(text)
    return count


def _slowdown(text: str) -> float:
    factor = float(text)
    if not (math.isfinite(factor) and factor >= 1):
        raise ValueError(text)
    return factor


THREADS = Option(name="threads", parse=_thread_count, expected="a whole number from 1 to 4096", neutral=None)


def _io(text: str) -> str:
    if text not in ("pinned", "mapped"):
        raise ValueError(text)
    return text


IO = Option(name="io", parse=_io, expected="pinned or mapped", neutral="pinned")
"""``pinned``: inputs and outputs are copied from and to page-locked memory. ``mapped``: the GPU reads and writes that
memory itself, without copies, which is faster where it shares its memory with the processor (Jetson)."""
SLOWDOWN = Option(name="slowdown", parse=_slowdown, expected="a number from 1", neutral=1.0)
"""Every back-end takes it: dsc-split emulates slower machines, not the library."""

BACKENDS: dict[str, BackendEntry] = {
    "onnxruntime": BackendEntry(
        module="dsc_split.engines.onnxruntime._backend",
        cls="OnnxRuntimeBackend",
        architectures={"cpu": "cpu", "cuda": "gpu"},
        options=(THREADS, dataclasses.replace(IO, only="cuda"), SLOWDOWN),
        default="cpu",
    ),
    "tensorrt": BackendEntry(
        module="dsc_split.engines.tensorrt._libraries",
        cls="TensorRTBackend",
        architectures={"cuda": "tensorrt"},
        options=(IO, SLOWDOWN),
        default="cuda",
    ),
    "tensorrt-rtx": BackendEntry(
        module="dsc_split.engines.tensorrt._libraries",
        cls="TensorRTRTXBackend",
        architectures=dict.fromkeys(("sm75", "sm80", "sm86", "sm89", "sm120", "sm121"), "rtx"),
        options=(IO, SLOWDOWN),
        default=None,
        otherwise="For other GPUs, such as Jetson's or Hopper, use 'tensorrt' on the machine itself.",
    ),
}
