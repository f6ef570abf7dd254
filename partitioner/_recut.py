"""Write the pairs of chosen cuts into a bundle, prove each, and store golden samples."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from msgspec import UNSET
from msgspec.structs import asdict, replace

from dsc_split._support.files import write_bytes
from dsc_split._support.hashing import sha256_file
from dsc_split._support.optional import require
from dsc_split._support.progress import Progress, ProgressListener, silent
from dsc_split.bundle import Bundle, Split, TensorInfo
from dsc_split.bundles._folders import discard
from dsc_split.bundles._manifest import ENVELOPE, MANIFEST, encode_manifest, next_manifest
from dsc_split.bundles._records import (
    CrossingTensor,
    FailedSplit,
    FileEntry,
    Manifest,
    Proof,
    SampleFiles,
    TargetEntry,
    Targets,
)
from dsc_split.bundles._samples import golden_samples, strip_prefix
from dsc_split.errors import BackendError, BundleError, CutError, DscError
from dsc_split.partitioner._weights_file import encode_graph, store_bytes
from dsc_split.partitioner.cuts._cut import Cutter
from dsc_split.partitioner.cuts._find import Cut, CutList, find_cuts
from dsc_split.partitioner.cuts._select import CutOptions, select_cuts
from dsc_split.partitioner.graph._shapes import tensor_info
from dsc_split.partitioner.proof._proof import SEEDS, TOLERANCE, Reference, prove_pair, run_reference

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

__all__ = ["bundle_cuts", "cut_bundle", "cut_into", "output_infos"]

logger = logging.getLogger(__name__)

_GOLDEN_BATCH = 2
"""Batch size of the golden samples if the batch is a symbol: the smallest at which a mix-up of samples shows."""


def cut_bundle(bundle: Bundle, options: CutOptions | None = None, *, progress: ProgressListener = silent) -> Bundle:
    """Cut the model of a bundle again, with other options. Measured cells stay; pairs of other cuts are removed.

    Args:
        bundle: The bundle; it is locked meanwhile.
        options: Which cuts to make.
        progress: Told each step.

    Raises:
        BundleBusyError: Another command is writing the bundle.
        CutError: A cut that was named cannot be made, or no pair passed its proof; the bundle is not changed.
        BundleError: The bundle's model is damaged.
        DscError: A file cannot be written.
    """
    options = options or CutOptions()
    with bundle.lock():
        _check_files(bundle, weights_whole=options.prove)

        def run_whole() -> Sequence[Reference]:
            progress(Progress(stage="prove", label="the whole model", done=0, total=0))
            batches = (1, 2, 3) if bundle.fixed_batch is None else (bundle.fixed_batch,)
            return run_reference(bundle.model_path, bundle.inputs, batches, _golden_inputs(bundle))

        cut_into(bundle, options, run_whole if options.prove else None, progress=progress)
    return Bundle.open(bundle.path)


def _golden_inputs(bundle: Bundle) -> dict[str, np.ndarray] | None:
    """Return the inputs of the golden samples, which may be real data; ``None`` if the bundle has none.

    Raises:
        BundleError: The file is damaged.
    """
    samples = golden_samples(bundle, None)
    return None if samples is None else strip_prefix(samples, "input:")


def bundle_cuts(bundle: Bundle, options: CutOptions | None = None, *, input_bytes: int | None = None) -> CutList:
    """List the cuts of a bundle's model; see :func:`find_cuts`.

    Args:
        bundle: The bundle.
        options: How to search for cuts.
        input_bytes: Bytes that full offload sends per sample; by default those that the bundle says.

    Raises:
        BundleError: The bundle's model is damaged.
    """
    return _list_cuts(_read_model(bundle), bundle, options or CutOptions(), input_bytes)[0]


def output_infos(model: ir.Model, references: Sequence[Reference]) -> tuple[TensorInfo, ...]:
    """Describe the outputs of the whole model; an output whose size depends on the data counts as empty."""
    infos = []
    for value in model.graph.outputs:
        info = tensor_info(value)
        if info is None:
            seen = references[0].outputs[value.name or ""] if references else np.zeros(0)
            info = TensorInfo(
                name=value.name or "",
                dtype=str(seen.dtype),
                shape=tuple(f"data_{axis}" for axis in range(seen.ndim)),
                elements_by_batch=(0, 0),
                itemsize=seen.dtype.itemsize,
            )
        infos.append(info)
    return tuple(infos)


def cut_into(
    bundle: Bundle,
    options: CutOptions,
    run_whole: Callable[[], Sequence[Reference]] | None,
    *,
    progress: ProgressListener = silent,
) -> None:
    """Write pairs, samples and manifest into a bundle that the caller has locked.

    Args:
        bundle: Its model and weights are written; its manifest is complete except for the splits.
        options: Which cuts to make.
        run_whole: Runs the whole model, after the cuts are chosen; ``None`` for no proof and no golden samples.
        progress: Told each step.

    Raises:
        CutError: A cut that was named cannot be made, or no pair passed its proof.
        BackendError: ONNX Runtime fails on a pair that was named.
        DscError: A file cannot be written.
    """
    proto = _read_model(bundle)
    found, model = _list_cuts(proto, bundle, options)
    stated = bundle.manifest.input_bytes_stated is not None
    wanted = options.cuts or ("frontier" if stated or not bundle.full_offload else "compressive")
    chosen = select_cuts(found, model, wanted, modules=options.modules)
    references = run_whole() if run_whole is not None else None
    cutter = Cutter(proto, model)
    splits: list[Split] = []
    failed: list[FailedSplit] = []
    contents: dict[str, bytes] = {}
    for done, cut in enumerate(chosen):
        progress(Progress(stage="cut", label=cut.name, done=done, total=len(chosen)))
        pair = cutter.cut(cut)
        head, tail = encode_graph(pair.head), encode_graph(pair.tail)
        split = _split_of(cut)
        proven = split if references is None else _prove(bundle, split, head, tail, references)
        if isinstance(proven, FailedSplit):
            logger.warning("pair %s is left out: %s", cut.name, proven.reason)
            failed.append(proven)
        else:
            splits.append(proven)
            contents |= {split.head: head, split.tail: tail}
    progress(Progress(stage="cut", label="", done=len(chosen), total=len(chosen)))
    if failed and not splits:
        raise CutError(f"no pair passed its proof: {failed[0].name!r} {failed[0].reason}")
    roles = {path: path.rsplit(".", 2)[1] for path in contents}
    samples = SampleFiles()
    if references is not None:
        samples, sample_contents = _make_samples(bundle, splits, contents, references)
        roles |= dict.fromkeys(sample_contents, "sample")
        contents |= sample_contents
    manifest = replace(
        bundle.manifest,
        splits=tuple(splits),
        failed_splits=tuple(failed),
        samples=samples,
        targets=_without_engines(bundle.manifest.targets),
    )
    _replace_files(bundle, manifest, contents, roles)


def _read_model(bundle: Bundle) -> onnx.ModelProto:
    require("onnx", extra="onnx", purpose="read and cut graphs")
    require("onnx_ir", extra="onnx", purpose="read and cut graphs")
    import onnx
    from google.protobuf.message import DecodeError

    path = bundle.model_path
    _check_files(bundle)
    try:
        return onnx.ModelProto.FromString(path.read_bytes())
    except (OSError, DecodeError) as e:
        raise BundleError(f"{str(path)!r} cannot be read: {e}. Export the model again.") from e


def _check_files(bundle: Bundle, *, weights_whole: bool = False) -> None:
    """Refuse a bundle whose graph or weights are not those that the manifest lists.

    Args:
        bundle: The bundle.
        weights_whole: Whether to check the SHA-256 of the weights, or only their size.

    Raises:
        BundleError: A file is missing or was changed.
    """
    model = bundle.manifest.model
    for relative in filter(None, (model.path, model.weights.path)):
        path, listed = bundle.file(relative), bundle.manifest.files.get(relative)
        try:
            size_bytes = path.stat().st_size
            whole = weights_whole or relative == model.path
            if listed is None or size_bytes != listed.size_bytes:
                fault = "size"
            else:
                fault = "SHA-256" if whole and sha256_file(path) != listed.sha256 else ""
        except OSError as e:
            raise BundleError(f"{str(path)!r} cannot be read: {e.strerror or e}. Export the model again.") from e
        if fault:
            raise BundleError(
                f"{str(path)!r} is not what the manifest lists ({fault} differs). Export the model again."
            )


def _list_cuts(
    proto: onnx.ModelProto, bundle: Bundle, options: CutOptions, input_bytes: int | None = None
) -> tuple[CutList, ir.Model]:
    import onnx_ir as ir

    model = ir.serde.deserialize_model(proto)
    found = find_cuts(
        model,
        modules=options.modules,
        ratio=options.ratio,
        max_tensors=options.max_tensors,
        input_bytes=bundle.manifest.input_bytes_stated if input_bytes is None else input_bytes,
        fixed_batch=bundle.fixed_batch,
    )
    return found, model


def _split_of(cut: Cut) -> Split:
    """Return the pair of a cut, without its errors."""
    return Split(
        name=cut.name,
        tensors=tuple(
            CrossingTensor(
                **asdict(tensor.info),
                op_type=tensor.op_type,
                passthrough=tensor.passthrough,
                sample_bytes=tensor.info.size_bytes(1),
            )
            for tensor in cut.tensors
            if tensor.info is not None
        ),
        head=f"onnx/{cut.name}.head.onnx",
        tail=f"onnx/{cut.name}.tail.onnx",
        early_outputs=cut.early_outputs,
        modules=cut.modules,
        position=cut.position,
        sample_elements=cut.elements,
        sample_bytes=cut.size_bytes,
        ratio=cut.ratio,
        natural=cut.natural,
        compressive=cut.compressive,
        frontier=cut.frontier,
        refused=cut.refused,
        reason=cut.reason,
    )


def _prove(
    bundle: Bundle, split: Split, head: bytes, tail: bytes, references: Sequence[Reference]
) -> Split | FailedSplit:
    """Prove one pair; return it with its error, or why it failed."""
    try:
        error = prove_pair(head, tail, split, references, weights_folder=bundle.model_path.parent)
    except BackendError as e:
        return FailedSplit(name=split.name, reason=str(e))
    precision = bundle.manifest.precision
    if error.max_rel <= TOLERANCE[precision]:
        batches = sorted({_batch_of(bundle, reference) for reference in references})
        proof = Proof(seeds=SEEDS, batches=tuple(batches))
        return replace(split, max_abs_error=error.max_abs, max_rel_error=error.max_rel, proof=proof)
    return FailedSplit(
        name=split.name,
        reason=f"is off by {error.max_rel:.2g} of the largest value of output {error.worst_output!r}; "
        f"at most {TOLERANCE[precision]:g} is expected of {precision}",
    )


def _batch_of(bundle: Bundle, reference: Reference) -> int:
    return bundle.batch_of({name: int(array.size) for name, array in reference.inputs.items()})


def _make_samples(
    bundle: Bundle, splits: Sequence[Split], graphs: Mapping[str, bytes], references: Sequence[Reference]
) -> tuple[SampleFiles, dict[str, bytes]]:
    """Encode one run of the reference: inputs and outputs of the whole model, and the tensors that cross each cut.

    Returns:
        The entry of the manifest, and the files' contents by path.
    """
    from dsc_split.partitioner.proof._reference import open_session, run_session

    wanted = _GOLDEN_BATCH if bundle.fixed_batch is None else bundle.fixed_batch
    golden = next((each for each in references if _batch_of(bundle, each) == wanted), references[0])
    arrays = {
        "model": {
            **{f"input:{name}": value for name, value in golden.inputs.items()},
            **{f"output:{name}": value for name, value in golden.outputs.items()},
        }
    }
    for split in splits:
        head = open_session(graphs[split.head], weights_folder=bundle.model_path.parent)
        values = run_session(head, golden.inputs, split.head)
        crossing = [tensor.name for tensor in split.tensors if tensor.name not in split.passthrough]
        arrays[split.name] = {
            **{f"cut:{name}": values[name] for name in crossing},
            **{f"early:{name}": values[name] for name in split.early_outputs},
        }
    paths = {name: f"samples/{name}.npz" for name in arrays}
    contents = {}
    for name, each in arrays.items():
        buffer = io.BytesIO()
        # Strings are Python objects here, which NumPy would pickle.
        plain = {key: value.astype(str) if value.dtype == object else value for key, value in each.items()}
        np.savez(buffer, **plain)  # type: ignore[arg-type]  # the stub takes a name for allow_pickle
        contents[paths[name]] = buffer.getvalue()
    return SampleFiles(batch=_batch_of(bundle, golden), files=paths), contents


def _without_engines(targets: Targets) -> Targets:
    """Return the targets without their engines, which belong to the old graphs.

    If a graph comes back later, its engine is still in the cache.
    """

    def emptied(entry: TargetEntry) -> TargetEntry:
        unchecked = replace(entry, check=UNSET)
        return replace(unchecked, engines=(), failed=()) if entry.is_compiled else unchecked

    return Targets(device=tuple(map(emptied, targets.device)), server=tuple(map(emptied, targets.server)))


def _replace_files(bundle: Bundle, manifest: Manifest, contents: Mapping[str, bytes], roles: Mapping[str, str]) -> None:
    """Write all files to a folder aside, move them into place, the manifest last, and remove those no longer listed.

    Pairs of other options may have the same names, so a bundle that is half old and half new would be wrong.

    Args:
        bundle: The bundle with its old manifest.
        manifest: The new manifest, without its files.
        contents: The files to write, by path.
        roles: The role of each file, by path.
    """
    old_pair_id = bundle.manifest.pair_id
    written: dict[str, FileEntry] = {}
    aside = bundle.path / ".cut.partial"
    discard(aside)
    try:
        for path, data in contents.items():
            (aside / path).parent.mkdir(parents=True, exist_ok=True)
            written[path] = store_bytes(data, aside / path).listed_as(roles[path])
        manifest = next_manifest(_with_files(bundle, manifest, written))
        write_bytes(aside / MANIFEST, encode_manifest(manifest))
        if manifest.pair_id != old_pair_id:  # a table of the old pairs would name graphs that are gone
            if (bundle.path / "table.json").exists():
                logger.warning("the tables are of the pairs there were, and go; give --link and --count again")
            (bundle.path / "table.json").unlink(missing_ok=True)
            discard(bundle.path / "tables")
        for path in [*contents, MANIFEST]:
            (bundle.path / path).parent.mkdir(exist_ok=True)
            (aside / path).replace(bundle.path / path)
    except OSError as e:
        raise DscError(f"cannot write {str(bundle.path)!r}: {e.strerror or e}.") from e
    finally:
        discard(aside)
    bundle.manifest = manifest
    (bundle.path / ENVELOPE).unlink(missing_ok=True)
    for name in bundle.storage.names():  # also files of a run that was stopped
        if name.startswith(("onnx/", "samples/", "engines/")) and name not in manifest.files:
            bundle.file(name).unlink(missing_ok=True)


def _with_files(bundle: Bundle, manifest: Manifest, written: Mapping[str, FileEntry]) -> Manifest:
    """Put the model's files and the written ones into a manifest, and compute its pair_id."""
    model = manifest.model
    kept = {path: entry for path, entry in manifest.files.items() if path in (model.path, model.weights.path)}
    manifest = replace(manifest, files={**kept, **written})
    return replace(manifest, pair_id=Bundle(bundle.path, manifest).compute_pair_id())
