"""From what the user names to an ONNX graph in memory: the kinds of source, and which module loads each."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dsc_split._support.progress import Progress, ProgressListener, silent
from dsc_split.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

__all__ = ["InputShape", "LoadedModel", "SourceOptions", "load_source", "parse_input_shapes"]

KINDS = "torchvision:NAME, timm:NAME, FILE.py:FUNCTION, package.module:FUNCTION, MODEL.pt2 or MODEL.onnx"


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What the user says about a source, besides its name."""

    input_shapes: tuple[str, ...] = ()
    """Texts ``[NAME=]3,224,224``, per sample; the word ``batch`` puts the batch there instead of in front."""
    sample: Path | None = None
    """An ``.npz`` file with real inputs by name."""
    weights: str | None = None
    """A file, ``pretrained`` (may download) or ``random``; ``None``: from a local cache, else seeded."""
    max_batch: int = 64
    """Largest batch size the graph must take."""
    seed: int = 0
    """Seed of the initialisation and of made-up inputs."""
    calibrate: bool = True
    """Whether BatchNorm statistics are recalibrated where the weights are only initialised."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A source as an ONNX graph in memory, and what is known about it."""

    model: ir.Model
    """The graph; weights may be lazy, and share memory with the PyTorch module."""
    name: str
    """Readable name, e.g. ``efficientnet_b4``."""
    batch_symbol: str | None
    """Name of the dimension that is the batch; ``None``: the batch size is fixed."""
    max_batch: int
    """Largest batch size that the source allows, up to the one asked for; the fixed one where it is fixed."""
    weights_origin: str
    """Where the weights came from, as the manifest says it."""
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
    """Which input; ``None``: the only one."""
    dims: tuple[int | None, ...]
    """All dimensions; ``None`` stands on the batch axis."""

    @property
    def batch_axis(self) -> int:
        """The axis of the batch, from 0."""
        return self.dims.index(None)

    def at(self, batch: int) -> tuple[int, ...]:
        """Give the shape at a batch size."""
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


def load_source(source: str, options: SourceOptions, *, progress: ProgressListener = silent) -> LoadedModel:
    """Load a model from any kind of source.

    Args:
        source: What the user named; see :data:`KINDS`.
        options: What the user said about it.
        progress: Told what is going on.

    Raises:
        UsageError: No such kind, model, file or function; a function that returns no module; options that
            do not fit the source.
        ModelFileError: A model or weights file is damaged or does not fit.
        ExportError: The model cannot be turned into an ONNX graph.
        BackendUnavailable: A package that the kind needs is not installed.
    """
    parse_input_shapes(options.input_shapes)
    if options.max_batch < 1:
        raise UsageError(f"--max-batch {options.max_batch} is out of range: it must be at least 1.")
    progress(Progress(stage="load", label=source, done=0, total=0))
    kind, _, rest = source.partition(":")
    if kind in ("torchvision", "timm") and rest:
        from dsc_split.partitioner.sources import _zoo

        load = _zoo.load_torchvision if kind == "torchvision" else _zoo.load_timm
        return _export(lambda: load(rest, options), source, options, progress)
    suffix = Path(source).suffix.lower()
    if suffix in (".onnx", ".pt2"):
        path = Path(source)
        if not path.is_file():
            raise UsageError(f"no such model file: {source!r}.")
        if options.weights is not None:
            raise UsageError(f"--weights does not go with {source!r}: its weights are in the model file.")
        if suffix == ".onnx":
            from dsc_split.partitioner.sources._onnx_source import load_onnx

            return load_onnx(path, options)
        from dsc_split.partitioner.sources import _torch_source

        return _export(lambda: _torch_source.load_program(path), source, options, progress)
    where, colon, function = source.rpartition(":")
    if colon and function and (where.endswith(".py") or re.fullmatch(r"\w+(\.\w+)*", where)):
        from dsc_split.partitioner.sources import _torch_source

        return _export(lambda: _torch_source.load_function(where, function, options), source, options, progress)
    raise UsageError(f"unknown source {source!r}: give {KINDS}.{_did_you_mean_a_model(source)}")


def _export(load: Callable[[], object], source: str, options: SourceOptions, progress: ProgressListener) -> LoadedModel:
    """Load a PyTorch model and export it, with all that PyTorch has to say kept from the terminal."""
    from dsc_split._support.optional import require

    for package in ("torch", "onnx", "onnx_ir", "onnxscript"):
        require(package, extra="export", purpose=f"load {source!r}")
    from dsc_split.partitioner.sources._quiet import quiet
    from dsc_split.partitioner.sources._torch_export import export_model
    from dsc_split.partitioner.sources._torch_source import TorchModel

    with quiet():
        model = load()
    assert isinstance(model, TorchModel)
    progress(Progress(stage="export", label=source, done=0, total=0))
    with quiet():
        return export_model(model, options)


def _did_you_mean_a_model(source: str) -> str:
    """Guess what a source of no kind was meant to be."""
    kind, colon, name = source.partition(":")
    if colon:
        nearest = difflib.get_close_matches(kind, ["torchvision", "timm"], n=1)
        return f" Did you mean '{nearest[0]}:{name}'?" if nearest else ""
    if source.endswith(".py"):
        return f" Did you mean '{source}:FUNCTION'?"
    if re.fullmatch(r"[\w.]+", source):
        return f" There is no folder of that name either; a model is named with its library, 'torchvision:{source}'."
    return ""
