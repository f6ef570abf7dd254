"""Load a source as an ONNX graph in memory: the kinds of source, and the module that loads each."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dsc_split._support.progress import Progress, ProgressListener, silent
from dsc_split.errors import UsageError
from dsc_split.partitioner.sources._options import LoadedModel, SourceOptions, parse_input_shapes

if TYPE_CHECKING:
    from dsc_split.partitioner.sources._torch_model import TorchModel

__all__ = ["KINDS", "load_source"]

KINDS = "torchvision:NAME, timm:NAME, FILE.py:FUNCTION, package.module:FUNCTION, MODEL.pt2 or MODEL.onnx"


def load_source(source: str, options: SourceOptions, *, progress: ProgressListener = silent) -> LoadedModel:
    """Load a model from any kind of source.

    Args:
        source: One of :data:`KINDS`.
        options: What the user says about it.
        progress: Told each step.

    Raises:
        UsageError: There is no such kind, model, file or function; a function returns no module; or the options
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


def _export(
    load: Callable[[], TorchModel], source: str, options: SourceOptions, progress: ProgressListener
) -> LoadedModel:
    """Load a PyTorch model and export it; nothing that PyTorch prints reaches the terminal."""
    from dsc_split._support.optional import require

    for package in ("torch", "onnx", "onnx_ir", "onnxscript"):
        require(package, extra="export", purpose=f"load {source!r}")
    from dsc_split.partitioner.sources._quiet import quiet
    from dsc_split.partitioner.sources._torch_export import export_model

    with quiet():
        model = load()
    progress(Progress(stage="export", label=source, done=0, total=0))
    with quiet():
        return export_model(model, options)


def _did_you_mean_a_model(source: str) -> str:
    """Suggest what the user may have meant by a source of unknown kind."""
    kind, colon, name = source.partition(":")
    if colon:
        nearest = difflib.get_close_matches(kind, ["torchvision", "timm"], n=1)
        return f" Did you mean '{nearest[0]}:{name}'?" if nearest else ""
    if source.endswith(".py"):
        return f" Did you mean '{source}:FUNCTION'?"
    if re.fullmatch(r"[\w.]+", source):
        return f" There is no folder of that name either; a model is named with its library, 'torchvision:{source}'."
    return ""
