"""A target: back-end, architecture and options, as one line of text."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from dsc_split.engines._backends import BACKENDS
from dsc_split.errors import UsageError

__all__ = ["Target"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A target: ``BACKEND[:ARCHITECTURE][,key=value]...``.

    ::

        Target.parse("onnxruntime:cpu,threads=1,slowdown=6")

    ``str()`` returns the canonical text: with the architecture, and options in a fixed order.
    """

    backend: str
    """Name in the table of back-ends: ``onnxruntime``."""
    architecture: str
    """What the back-end runs on: ``cpu``, ``cuda``."""
    options: tuple[tuple[str, int | float | str], ...] = ()
    """The given options, in canonical order."""

    @classmethod
    def parse(cls, text: str) -> Target:
        """Return the target of a text.

        Raises:
            UsageError: The back-end, architecture or an option is unknown, given twice, or out of range.
        """
        head, *pairs = (part.strip() for part in text.split(","))
        backend, colon, architecture = head.partition(":")
        if backend not in BACKENDS:
            raise UsageError(f"target {text!r}: unknown back-end {backend!r}. {_hint(backend, BACKENDS)}")
        entry = BACKENDS[backend]
        if not colon:
            if entry.default is None:
                known_names = ", ".join(f"{backend}:{name}" for name in entry.architectures)
                raise UsageError(f"target {text!r}: name the GPU that it is for. Known: {known_names}.")
            architecture = entry.default
        if architecture not in entry.architectures:
            hint = entry.otherwise or _hint(architecture, entry.architectures)
            raise UsageError(f"target {text!r}: back-end {backend!r} has no architecture {architecture!r}. {hint}")
        known = {option.name: option for option in entry.options if option.only in (None, architecture)}
        given: dict[str, int | float | str] = {}
        for pair in pairs:
            name, _, value = (part.strip() for part in pair.partition("="))
            if name not in known:
                hint = _hint(name, known)
                raise UsageError(f"target {text!r}: {backend}:{architecture} has no option {name!r}. {hint}")
            if name in given:
                raise UsageError(f"target {text!r}: option {name!r} is given twice. Give it once.")
            try:
                given[name] = known[name].parse(value)
            except ValueError as e:
                raise UsageError(
                    f"target {text!r}: option {name!r} is {value!r}; {known[name].expected} was expected."
                ) from e
        options = tuple(
            (option.name, given[option.name])
            for option in entry.options
            if option.name in given and given[option.name] != option.neutral
        )
        return cls(backend=backend, architecture=architecture, options=options)

    def __str__(self) -> str:
        options = "".join(f",{name}={_text(value)}" for name, value in self.options)
        return f"{self.backend}:{self.architecture}{options}"

    @property
    def threads(self) -> int | None:
        """Threads that one engine may use; ``None`` leaves it to the library."""
        value = dict(self.options).get("threads")
        return None if value is None else int(value)

    @property
    def io(self) -> str:
        """How inputs and outputs reach a GPU: ``pinned`` or ``mapped``."""
        return str(dict(self.options).get("io", "pinned"))

    @property
    def slowdown(self) -> float:
        """How many times slower than this machine the emulated machine is; 1 without emulation."""
        return float(dict(self.options).get("slowdown", 1.0))


def _text(value: int | float | str) -> str:
    if isinstance(value, str):
        return value
    return repr(int(value)) if value == int(value) else repr(value)


def _hint(word: str, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1)
    listed = f"Known: {', '.join(names)}."
    return f"Did you mean {near[0]!r}? {listed}" if near else listed
