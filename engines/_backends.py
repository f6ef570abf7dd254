"""The back-ends there are: one explicit table. Their modules are imported when they are asked for."""

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
    """Turns the text into a value; raises ``ValueError`` where it is none."""
    expected: str
    """What the value must be, in words, for messages."""
    neutral: int | float | str | None
    """The value that means the same as leaving the option out; ``None`` where there is no such value."""
    only: str | None = None
    """The architecture that has it; ``None``: all of the back-end."""


@dataclass(frozen=True, kw_only=True)
class BackendEntry:
    """Where a back-end lives and what its targets may say."""

    module: str
    """Module that is imported when the back-end is first used."""
    cls: str
    """Name of the :class:`~dsc_split.engines.Backend` in that module."""
    architectures: Mapping[str, str]
    """Architecture to the extra that brings its library."""
    options: tuple[Option, ...]
    """Options, in the order in which a target's text gives them."""
    default: str | None
    """Architecture where a target names none; ``None`` where it has to name one."""
    otherwise: str = ""
    """What to do about an architecture that it has not, as a sentence."""


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
"""Every back-end takes it: emulation belongs to the target, not to the library."""

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
