"""Load a source as a normalised graph: ``cuts`` and ``export`` start from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dsc_split._support.progress import Progress, ProgressListener, silent
from dsc_split.bundle import TensorInfo
from dsc_split.bundles._samples import load_sample, make_inputs
from dsc_split.errors import UsageError
from dsc_split.partitioner.cuts._find import CutList, find_cuts
from dsc_split.partitioner.cuts._select import CutOptions
from dsc_split.partitioner.graph._normalize import normalize
from dsc_split.partitioner.graph._shapes import BATCH, tensor_info
from dsc_split.partitioner.sources._options import LoadedModel, SourceOptions
from dsc_split.partitioner.sources._sources import load_source

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["fixed_batch_of", "input_infos", "list_cuts", "load_model"]


def load_model(
    source: str, options: SourceOptions | None = None, *, progress: ProgressListener = silent
) -> LoadedModel:
    """Load a model from any kind of source and normalise its graph.

    Args:
        source: ``torchvision:NAME``, ``timm:NAME``, ``FILE.py:FUNCTION``, ``package.module:FUNCTION``,
            ``MODEL.pt2`` or ``MODEL.onnx``.
        options: What the user says about it.
        progress: Told each step.

    Raises:
        UsageError: No such source, or an option that does not fit it.
        ModelFileError: A model or weights file is damaged, hostile, or does not fit.
        ExportError: PyTorch cannot export the model.
        BackendUnavailable: A package that the source needs is not installed.
    """
    options = options or SourceOptions()
    loaded = load_source(source, options, progress=progress)
    model = loaded.model
    model.graph.name = loaded.name
    progress(Progress(stage="load", label="shapes", done=0, total=0))
    sample = load_sample(options.sample) if options.sample else None
    infos = input_infos(model)

    def run(graph: bytes, batch: int, seed: int, names: Sequence[str]) -> Mapping[str, object]:
        from dsc_split.partitioner.proof._reference import open_session, run_session

        session = open_session(graph, weights_folder=_weights_folder(model))
        return run_session(session, make_inputs(infos, batch, seed, None if seed else sample), loaded.name)

    normalize(model, fixed_batch=fixed_batch_of(model), run=run)
    return replace(loaded, batch_symbol=BATCH if fixed_batch_of(model) is None else None)


def list_cuts(
    source: str,
    options: SourceOptions | None = None,
    cut: CutOptions | None = None,
    *,
    input_bytes: int | None = None,
    progress: ProgressListener = silent,
) -> CutList:
    """Load a model and list its cuts; see :func:`load_model` and :func:`find_cuts` for arguments and errors."""
    cut = cut or CutOptions()
    model = load_model(source, options, progress=progress).model
    return find_cuts(
        model,
        modules=cut.modules,
        ratio=cut.ratio,
        max_tensors=cut.max_tensors,
        input_bytes=input_bytes,
        fixed_batch=fixed_batch_of(model),
    )


def input_infos(model: ir.Model) -> tuple[TensorInfo, ...]:
    """Describe the inputs of a graph.

    Raises:
        UsageError: The size or type of an input is not known.
    """
    infos = []
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        info = tensor_info(value)
        if info is None:
            raise UsageError(
                f"the size of input {value.name!r} is not known. Give it: --input-shape {value.name}=3,224,224"
            )
        infos.append(info)
    return tuple(infos)


def fixed_batch_of(model: ir.Model) -> int | None:
    """Return the only batch size that a graph takes, or ``None`` where the batch is a symbol.

    Without a symbol, the batch size is the first dimension of every input, if they agree; else it is 1.
    """
    shapes = [
        list(value.shape) for value in model.graph.inputs if value.shape is not None and not value.is_initializer()
    ]
    if any(not isinstance(dim, int) for shape in shapes for dim in shape):
        return None
    first = {shape[0] for shape in shapes if shape}
    size = first.pop() if len(first) == 1 else 1
    return size if isinstance(size, int) and size > 0 else 1


def _weights_folder(model: ir.Model) -> Path | None:
    import onnx_ir as ir

    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                return Path(value.const_value.base_dir)
    return None
