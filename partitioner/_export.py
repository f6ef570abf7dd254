"""Export a source into a bundle: graph and weights, pairs, their proof, golden samples, manifest."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from msgspec import UNSET

from dsc_split._support.hashing import sha256_file
from dsc_split._support.optional import require
from dsc_split._support.progress import Progress, ProgressListener, silent
from dsc_split.bundle import Bundle, TensorInfo
from dsc_split.bundles._folders import discard, put_in_place, unfinished_folder
from dsc_split.bundles._lock import lock_folder
from dsc_split.bundles._records import (
    BatchRange,
    Conversion,
    Manifest,
    ModelEntry,
    Provenance,
    SampleFiles,
    SourceFile,
    Targets,
    WeightsEntry,
)
from dsc_split.bundles._samples import load_sample
from dsc_split.errors import BackendError, DscError, ExportError, OutOfMemoryError, UsageError
from dsc_split.partitioner._load import fixed_batch_of, input_infos, load_model
from dsc_split.partitioner._recut import cut_into, output_infos
from dsc_split.partitioner._weights_file import StoredFile, store_graph, store_weights
from dsc_split.partitioner.cuts._select import CutOptions
from dsc_split.partitioner.graph._index import index_graph
from dsc_split.partitioner.graph._opset import fit_opset
from dsc_split.partitioner.graph._shapes import BATCH
from dsc_split.partitioner.precision._conversion import check_precision, convert_to_half, must_convert
from dsc_split.partitioner.precision._float16 import precision_of
from dsc_split.partitioner.proof._proof import (
    TOLERANCE,
    Arrays,
    Reference,
    largest_batch,
    relative_error,
    run_reference,
)
from dsc_split.partitioner.sources._options import LoadedModel, SourceOptions

__all__ = ["ExportOptions", "export_bundle"]

logger = logging.getLogger(__name__)

_EXPORT_TOLERANCE = 1e-3
"""Largest ``max|difference| / max|reference|`` between PyTorch and the exported graph. Their kernels differ, so it is
larger than for the proof of a pair; an export that lost or changed an operation is off by far more."""

_WIDE = ".fp32"
"""Folder of the float32 graph and weights while a float16 bundle is made; the finished bundle does not have it."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What the user says about an export, besides the source's name."""

    source: SourceOptions = field(default_factory=SourceOptions)
    cut: CutOptions = field(default_factory=CutOptions)
    uint8_input: bool = False
    """Whether to put cast, scaling and normalisation into the graph, so that full offload sends 8-bit images."""
    mean: tuple[float, ...] | None = None
    """Mean per channel of inputs in 0..1; by default the model's own."""
    std: tuple[float, ...] | None = None
    """Standard deviation per channel of inputs in 0..1; by default the model's own."""
    input_bytes: int | None = None
    """Bytes that full offload sends per sample, if they are not the inputs' own size: those of a JPEG, for example."""
    full_offload: bool = True
    """Whether inputs may be sent to the server as they are."""
    precision: str | None = None
    """``fp16`` converts a float32 graph as a whole; ``fp32`` refuses a float16 graph; by default a graph is kept."""
    io_precision: str | None = None
    """With ``fp16``: ``fp32`` keeps inputs and outputs as they are; by default they become float16 too."""
    opset_limits: Mapping[str, int] = field(default_factory=dict)
    """Highest opset that each target parses; a graph with a higher opset is converted down, and checked again."""
    command: tuple[str, ...] = ()
    """The words of the command line after the program's name, for the manifest; folders in them are left out."""


def export_bundle(
    source: str,
    output: str | Path,
    options: ExportOptions | None = None,
    *,
    progress: ProgressListener = silent,
) -> Bundle:
    """Export a model into a bundle folder: the whole graph, its pairs, their proof and golden samples.

    Args:
        source: As for :func:`load_model`.
        output: The folder to make. A bundle there is replaced, and its cells are kept; anything else there is an error.
        options: What the user says about the export.
        progress: Told each step.

    Returns:
        The bundle. If there is no useful cut, it has no splits; the choices are then full offload and no offload.

    Raises:
        UsageError: There is no such source, an option does not fit, or ``output`` exists and is no bundle.
        ModelFileError: A model or weights file is damaged, hostile, or does not fit.
        ExportError: PyTorch cannot export the model, or the graph does not compute what it computes.
        CutError: A cut that was named cannot be made, or no pair passed its proof.
        BackendError: ONNX Runtime cannot run the graph.
        DscError: The folder cannot be written.
    """
    options = options or ExportOptions()
    folder = Path(output)
    _check_output(folder)
    place = folder.resolve()
    if options.input_bytes is not None and options.input_bytes < 1:
        raise UsageError(f"--input-bytes is {options.input_bytes}; at least 1 is expected.")
    check_precision(options.precision, options.io_precision)
    require("onnxruntime", extra="cpu", purpose="prove that the graph and its pairs compute what the model computes")
    loaded = load_model(source, options.source, progress=progress)
    with unfinished_folder(place) as partial:
        try:
            _write_bundle(loaded, source, partial, options, progress)
            if Bundle.is_bundle(place):
                with lock_folder(place):
                    put_in_place(partial, place)
            else:
                put_in_place(partial, place)
        except OSError as e:
            raise DscError(f"cannot write {str(folder)!r}: {e.strerror or e}. Nothing was changed.") from e
    return Bundle.open(folder)


def _check_output(folder: Path) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"--output {str(folder)!r} is a file or a link; it is not overwritten. Choose another name.")
    if folder.is_dir() and any(folder.iterdir()) and not Bundle.is_bundle(folder):
        raise UsageError(
            f"--output {str(folder)!r} exists and is no bundle; it is not overwritten. Choose another name."
        )
    if folder.exists() and folder.samefile(Path.cwd()):
        raise UsageError(f"--output {str(folder)!r} is the current folder, which is not replaced. Choose another name.")


def _write_bundle(
    loaded: LoadedModel, source: str, folder: Path, options: ExportOptions, progress: ProgressListener
) -> None:
    model = loaded.model
    converts = must_convert(model, options.precision, options.io_precision)
    graphs, wide = folder / "onnx", folder / _WIDE
    graphs.mkdir()
    if converts:
        wide.mkdir()
    path = (wide if converts else graphs) / "model.onnx"
    progress(Progress(stage="export", label="weights", done=0, total=0))
    weights = store_weights(model, path.with_name("weights.data"))
    stored = store_graph(model, path)
    sample = load_sample(options.source.sample) if options.source.sample else None
    fixed_batch = fixed_batch_of(model)
    batches = (1, 2, 3) if fixed_batch is None else (fixed_batch,)
    infos = input_infos(model)
    progress(Progress(stage="prove", label="the exported graph", done=0, total=0))
    references = _run_at_batches(path, infos, batches, sample)
    random_node = index_graph(model).random_node
    notes = list(loaded.notes)
    opset = model.opset_imports.get("", 1)
    if fit_opset(model, options.opset_limits):
        stored = store_graph(model, path)
        before, references = references, run_reference(path, infos, batches, sample)
        if not random_node:
            _compare_opsets(before, references, opset)
        notes.append(f"the graph was converted from opset {opset} to {model.opset_imports['']}")
    export_error = None if random_node else _compare_with_torch(loaded, references)
    if options.uint8_input:
        stored = _add_uint8_input(loaded, options, path)
        infos = input_infos(model)
        sample = sample if _fits(sample, infos) else None
        references = run_reference(path, infos, batches, sample)
    conversion = None
    if converts:
        progress(Progress(stage="prove", label="the graph in float16", done=0, total=0))
        half = convert_to_half(
            model,
            options.io_precision,
            wide=path,
            folder=graphs,
            references=references,
            batches=batches,
            sample=sample,
            comparable=random_node is None,
        )
        discard(wide)
        stored, weights, references, conversion = half.stored, half.weights, half.references, half.conversion
        notes += half.notes
        path, infos = graphs / "model.onnx", input_infos(model)
    max_batch = fixed_batch or loaded.max_batch
    if fixed_batch is None and max_batch > batches[-1]:
        progress(Progress(stage="prove", label=f"batch {max_batch}", done=0, total=0))
        max_batch, lowered = largest_batch(path, infos, max_batch)
        notes += [f"the largest batch is {max_batch}: {lowered}"] if lowered else []
    if random_node:
        notes.append(f"{random_node.op_type} node {random_node.name!r} answers differently each time")
    manifest = _manifest(
        loaded,
        source,
        options,
        inputs=infos,
        outputs=output_infos(model, references),
        stored=stored,
        weights=weights,
        batch=BatchRange(symbol=loaded.batch_symbol, fixed=fixed_batch, max=max_batch),
        export_error=export_error,
        conversion=conversion,
        notes=notes,
    )
    bundle = Bundle(folder, manifest)
    cut_into(bundle, options.cut, lambda: references, progress=progress)


def _compare_opsets(before: Sequence[Reference], after: Sequence[Reference], opset: int) -> None:
    """Compare the outputs of a graph before and after it was converted down from ``opset``.

    Raises:
        ExportError: They disagree.
    """
    for one, other in zip(before, after, strict=True):
        for name, expected in one.outputs.items():
            _, max_rel = relative_error(other.outputs[name], expected)
            if max_rel > TOLERANCE["fp32"]:
                raise ExportError(
                    f"converted down from opset {opset}, the graph does not compute what it computed: output {name!r} "
                    f"is off by {max_rel:.2g} of its largest value; at most {TOLERANCE['fp32']:g} is expected. Export "
                    "the model with the lower opset from its source."
                )


def _run_at_batches(
    path: Path, infos: Sequence[TensorInfo], batches: Sequence[int], sample: Arrays | None
) -> list[Reference]:
    """Run the whole model; raise another error if it runs at the first batch only, though its batch is a symbol.

    Raises:
        ExportError: It runs at the first batch, and not at all others.
        BackendError: It does not run at all.
    """
    try:
        return run_reference(path, infos, batches, sample)
    except OutOfMemoryError:
        raise
    except BackendError as e:
        if len(batches) == 1:
            raise
        run_reference(path, infos, batches[:1], sample)
        shapes = " ".join(
            f"--input-shape {info.name}={','.join(str(batches[0] if dim == BATCH else dim) for dim in info.shape)}"
            for info in infos
        )
        raise ExportError(
            f"the graph takes batch {batches[0]} alone, though its inputs name the batch as free: {e}. "
            f"Export it from the source with a free batch, or fix it here: {shapes}"
        ) from e


def _fits(sample: Arrays | None, infos: Sequence[TensorInfo]) -> bool:
    """Return whether a sample fits the types of the inputs after images became 8-bit."""
    return sample is not None and all(
        np.can_cast(sample[info.name].dtype, info.dtype) for info in infos if info.name in sample
    )


def _add_uint8_input(loaded: LoadedModel, options: ExportOptions, path: Path) -> StoredFile:
    from dsc_split.partitioner._preprocess import add_uint8_input

    own_mean, own_std = loaded.normalisation or (None, None)
    mean, std = options.mean or own_mean, options.std or own_std
    if mean is None or std is None:
        raise UsageError(
            "--uint8-input needs the mean and standard deviation that the model was trained with, and its "
            "configuration has none. Give them for inputs in 0..1: --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225"
        )
    add_uint8_input(loaded.model, mean, std)
    return store_graph(loaded.model, path)


def _compare_with_torch(loaded: LoadedModel, references: Sequence[Reference]) -> float | None:
    """Compare the graph with PyTorch on every batch and seed.

    Raises:
        ExportError: They disagree.
    """
    if loaded.reference is None:
        return None
    worst = 0.0
    for reference in references:
        expected = loaded.reference(reference.inputs)
        for (name, actual), want in zip(reference.outputs.items(), expected, strict=True):
            _, max_rel = relative_error(actual, np.asarray(want).astype(actual.dtype, copy=False))
            batch = next(iter(reference.inputs.values())).shape
            if max_rel > _EXPORT_TOLERANCE:
                raise ExportError(
                    f"the exported graph does not compute what the model computes: output {name!r} is off by "
                    f"{max_rel:.2g} of its largest value (input {list(batch)}); at most "
                    f"{_EXPORT_TOLERANCE:g} is expected. "
                    "A forward that depends on the values or the batch size in Python does that."
                )
            worst = max(worst, max_rel)
    return worst


def _manifest(
    loaded: LoadedModel,
    source: str,
    options: ExportOptions,
    *,
    inputs: Sequence[TensorInfo],
    outputs: Sequence[TensorInfo],
    stored: StoredFile,
    weights: StoredFile | None,
    batch: BatchRange,
    export_error: float | None,
    conversion: Conversion | None,
    notes: Sequence[str],
) -> Manifest:
    """Return the manifest of a bundle whose model is written and that has no pairs yet."""
    files = {"onnx/model.onnx": stored.listed_as("model")}
    if weights is not None:
        files["onnx/weights.data"] = weights.listed_as("weights")
    return Manifest(
        pair_id="",
        revision=0,
        sealed=False,
        side=None,
        model=ModelEntry(
            name=loaded.name,
            source=_without_folder(source),
            path="onnx/model.onnx",
            weights=WeightsEntry(path=None if weights is None else "onnx/weights.data", origin=loaded.weights_origin),
            opset=dict(loaded.model.opset_imports),
            export_max_rel_error=export_error,
            uint8_input=options.uint8_input,
        ),
        precision=precision_of(loaded.model),
        batch=batch,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        input_bytes_stated=options.input_bytes,
        full_offload=options.full_offload,
        splits=(),
        failed_splits=(),
        targets=Targets(device=(), server=()),
        samples=SampleFiles(),
        files=files,
        left_out={},
        notes=tuple(notes),
        conversion=UNSET if conversion is None else conversion,
        provenance=Provenance(
            command=" ".join(map(_without_folder, options.command)),
            versions=_versions(),
            source=SourceFile(name=_without_folder(source), sha256=_source_digest(source)),
            model_sha256=stored.sha256,
            weights_sha256=None if weights is None else weights.sha256,
        ),
    )


def _source_digest(source: str) -> str | None:
    """Hash the file of a source; ``None`` if it is a name in a library."""
    path = next((path for path in (Path(source), Path(source.rpartition(":")[0])) if path.is_file()), None)
    return None if path is None else sha256_file(path)


def _without_folder(source: str) -> str:
    """Return a word of the command line as the manifest has it: the name of a file, without its folder."""
    option, equals, path = source.rpartition("=")
    return f"{option}{equals}{Path(path).name}" if "/" in path or "\\" in path else source


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for package in "dsc-split torch torchvision timm onnx onnx-ir onnxscript onnxruntime numpy".split():
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
