"""The options of a source, and the model that is loaded from it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dsc_split.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

__all__ = ["InputShape", "LoadedModel", "SourceOptions", "parse_input_shapes"]


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What the user says about a source, besides its name."""

    input_shapes: tuple[str, ...] = ()
    """Texts ``[NAME=]3,224,224``, per sample; the word ``batch`` marks the batch axis, by default the first."""
    sample: Path | None = None
    """An ``.npz`` file with real inputs by name."""
    weights: str | None = None
    """A file, ``pretrained`` (may download) or ``random``; ``None``: from a local cache, else random from ``seed``."""
    max_batch: int = 64
    """Largest batch size that the graph must take."""
    seed: int = 0
    """Seed of random weights and of random inputs."""
    calibrate: bool = True
    """Whether to recalibrate BatchNorm statistics if the weights are only initialised."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A source as an ONNX graph in memory, with facts about it."""

    model: ir.Model
    """The graph; weights may be lazy, and share memory with the PyTorch module."""
    name: str
    """Readable name, e.g. ``efficientnet_b4``."""
    batch_symbol: str | None
    """Name of the batch dimension; ``None`` if the batch size is fixed."""
    max_batch: int
    """Largest batch size that the source allows, up to the one asked for; the fixed batch size if it is fixed."""
    weights_origin: str
    """Where the weights came from, in words for the manifest."""
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None
    """Mean and standard deviation per channel, of inputs in 0..1, from the model's own configuration."""
    reference: Callable[[Mapping[str, np.ndarray]], list[np.ndarray]] | None
    """The PyTorch forward from inputs by name to outputs in the graph's order; ``None`` for ONNX sources."""
    notes: tuple[str, ...] = ()
    """Sentences the user should read, e.g. why the batch is fixed; the manifest keeps them."""


@dataclass(frozen=True, kw_only=True)
class InputShape:
    """One ``--input-shape``."""

    name: str | None
    """Name of the input; ``None`` means the only one."""
    dims: tuple[int | None, ...]
    """All dimensions; ``None`` marks the batch axis."""

    @property
    def batch_axis(self) -> int:
        """The axis of the batch, from 0."""
        return self.dims.index(None)

    def at(self, batch: int) -> tuple[int, ...]:
        """Return the shape at a batch size."""
        return tuple(batch if dim is None else dim for dim in self.dims)


def parse_input_shapes(texts: tuple[str, ...]) -> tuple[InputShape, ...]:
    """Read the texts of ``--input-shape``.

    Raises:
        UsageError: A text is malformed, or two are for the same input.
    """
    shapes = tuple(_parse_input_shape(text) for text in texts)
    names = [shape.name for shape in shapes]
    for name in names:
        if names.count(name) > 1:
            which = "without a name" if name is None else f"for input {name!r}"
            raise UsageError(f"--input-shape stands {names.count(name)} times {which}; give one for each input.")
    return shapes


def _parse_input_shape(text: str) -> InputShape:
    name, equals, numbers = text.rpartition("=")
    words = [word.strip() for word in numbers.split(",")]
    dims: list[int | None] = []
    for word in words:
        if word == "batch":
            dims.append(None)
        elif re.fullmatch(r"[0-9]{1,9}", word) and int(word) > 0:
            dims.append(int(word))
        else:
            raise UsageError(
                f"--input-shape {text!r}: {word!r} is no dimension. Give whole numbers from 1, separated by "
                "commas, as in 3,224,224 or NAME=16,batch,8."
            )
    if dims.count(None) > 1:
        raise UsageError(f"--input-shape {text!r}: the word 'batch' may stand on one axis only.")
    if equals and not name.strip():
        raise UsageError(f"--input-shape {text!r}: no input is named before '='.")
    if None not in dims:
        dims.insert(0, None)
    return InputShape(name=name.strip() if equals else None, dims=tuple(dims))
