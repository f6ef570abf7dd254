"""Export the tails of a bundle, and its whole model, as a model repository for Triton."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dsc_split._support.files import new_file, write_bytes
from dsc_split._support.progress import Progress, ProgressListener, silent
from dsc_split._support.strict_json import write_json
from dsc_split.bundle import Bundle, TensorInfo
from dsc_split.bundles._folders import unfinished_folder
from dsc_split.bundles._lock import lock_folder
from dsc_split.errors import BundleError, DscError, UsageError
from dsc_split.serving.triton._config import (
    ModelConfig,
    TensorEntry,
    describe_tensors,
    encode_config,
    stacks_samples,
    unservable,
)
from dsc_split.serving.triton._onnx import Piece, copy_pieces, detach_graph
from dsc_split.serving.triton._plans import choose_targets, find_plans, read_raw_plan
from dsc_split.serving.triton._repository import (
    PARAMETER,
    name_prefix,
    refuse_foreign,
    replace_models,
    triton_model_name,
)
from dsc_split.table._types import FULL_OFFLOAD

if TYPE_CHECKING:
    from dsc_split.bundles._records import TargetEntry
    from dsc_split.serving.triton._plans import Plan

__all__ = ["TritonModel", "TritonResult", "export_triton"]

FORMAT = "dsc-split/triton"
VERSION = 1
BACKENDS = ("onnxruntime", "tensorrt")
ONNX_FILE = "model.onnx"


@dataclass(frozen=True, kw_only=True)
class TritonModel:
    """A model of the repository."""

    name: str
    """Its name, and its folder's."""
    choice: str
    """The choice it serves: ``full-offload``, or the name of a cut."""
    max_batch: int
    """Largest batch size; 0 if samples are not stacked, and shapes are used as they are."""
    inputs: tuple[TensorEntry, ...]
    """``name``, ``datatype`` and ``shape`` of each input in a request."""
    outputs: tuple[TensorEntry, ...]
    """``name``, ``datatype`` and ``shape`` of each output in an answer."""
    passthrough: tuple[str, ...]
    """Inputs of the whole model that the device sends as they are."""
    early_outputs: tuple[str, ...]
    """Outputs of the whole model that are not in the answer, because the head computes them."""
    files: Mapping[str, str]
    """SHA-256 of each file, by path in the model's folder."""
    size_bytes: int
    """Total bytes of these files."""


@dataclass(frozen=True, kw_only=True)
class TritonResult:
    """The model repository that :func:`export_triton` wrote."""

    folder: Path
    """The model repository."""
    index: Path
    """The list of its models, for clients; Triton does not read it."""
    pair_id: str
    """The pair_id of the bundle."""
    backend: str
    """``onnxruntime`` or ``tensorrt``."""
    tensorrt_versions: tuple[str, ...]
    """Versions of TensorRT that built the plans; Triton must have the same version."""
    models: tuple[TritonModel, ...]
    """The models, the whole one first."""
    left_out: Mapping[str, str]
    """Choices that cannot be served, and why."""
    notes: tuple[str, ...]
    """Sentences the user should read."""


@dataclass(frozen=True, kw_only=True)
class _Graph:
    """A graph of the bundle that becomes a model."""

    choice: str
    path: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    passthrough: tuple[str, ...] = ()
    early_outputs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Options:
    """How to serve the models."""

    max_batch: int | None
    instances: int
    max_queue_delay_us: int | None
    expect_trt: str | None


def export_triton(
    bundle: Bundle,
    output: str | Path,
    *,
    target: str | None = None,
    backend: str | None = None,
    expect_trt: str | None = None,
    max_batch: int | None = None,
    instances: int = 1,
    max_queue_delay_us: int | None = 0,
    progress: ProgressListener = silent,
) -> TritonResult:
    """Write a model repository for Triton: one model per tail, and the whole model unless inputs must not be sent.

    Names of models have the bundle's pair_id in them, so one repository can hold several exports. Models of the same
    pair_id are replaced, each in one step; nothing else in the folder is changed.

    Args:
        bundle: The bundle, or the server's part of it; packed or not.
        output: The repository's folder; made if it does not exist.
        target: A target that was built for the server, or the name of its folder under ``engines/``. By default the
            one that was asked for last.
        backend: ``onnxruntime`` serves the ONNX graphs, ``tensorrt`` the plans; by default the back-end of the target.
        expect_trt: Refuse plans that another version of TensorRT built.
        max_batch: Largest batch size to which requests are joined; by default the one that was proven, or built.
        instances: Number of copies of each model that run at once on each GPU.
        max_queue_delay_us: Microseconds that a request may wait for others; ``None``: requests are never joined.
        progress: Told which model is being written.

    Raises:
        UsageError: An option or the target does not fit, Triton does not load the engines of the target, or a folder
            of the same name holds something else.
        BundleError: The pair_id is not that of the graphs, or a file is missing or not the one in the manifest.
        SignatureError: The bundle is packed and not trusted, and has plans.
        EngineFileError: A plan is damaged, or was built from another graph.
        EngineMismatch: A plan was built by another version than ``expect_trt``.
        BackendUnavailable: The package ``onnx``, which ONNX models need, is not installed.
        DscError: The folder cannot be written. Each model in it is then the old one or the new one.
    """
    _check_pair_id(bundle)
    options = _Options(
        max_batch=max_batch, instances=instances, max_queue_delay_us=max_queue_delay_us, expect_trt=expect_trt
    )
    _check_options(bundle, options)
    targets = _choose(bundle, target, backend)
    if expect_trt is not None and not targets:
        raise UsageError("--expect-trt has no meaning for ONNX graphs: leave it out, or name a target of TensorRT.")
    place = Path(output).resolve()
    _check_output(bundle, place)
    export = _Export(bundle, targets, options, progress)
    with unfinished_folder(place) as partial:
        try:
            export.write(partial)
            place.mkdir(exist_ok=True)
            with lock_folder(place):
                replace_models(partial, place, bundle, [model.name for model in export.models])
        except OSError as e:
            raise DscError(f"cannot write {str(place)!r}: {e.strerror or e}.") from e
    return export.result(place)


# ---- before anything is written ----------------------------------------------------------------------------


def _check_pair_id(bundle: Bundle) -> None:
    """Refuse a pair_id that does not fit the graphs: it is in the models' names, and decides which are replaced."""
    said, found = bundle.manifest.pair_id, bundle.compute_pair_id()
    if said != found:
        raise BundleError(
            f"manifest of {str(bundle.path)!r} says pair_id {said!r}; by its graphs {found!r} was expected. Files of "
            "two exports were mixed, or it was changed. Copy, unpack or export it again."
        )


def _check_options(bundle: Bundle, options: _Options) -> None:
    if bundle.manifest.side == "device":
        raise UsageError(
            f"{str(bundle.path)!r} is the device's part of a bundle, which has no tails. "
            "Export the whole bundle, or the server's part."
        )
    if options.max_batch is not None and not 1 <= options.max_batch <= bundle.max_batch:
        raise UsageError(
            f"--max-batch is {options.max_batch}; a whole number from 1 to {bundle.max_batch} was expected, the "
            "largest batch size that was proven to run."
        )
    if options.instances < 1:
        raise UsageError(f"--instances is {options.instances}; a whole number from 1 was expected.")
    if options.max_queue_delay_us is not None and options.max_queue_delay_us < 0:
        raise UsageError(f"--max-queue-delay is {options.max_queue_delay_us}; microseconds from 0 were expected.")


def _choose(bundle: Bundle, target: str | None, backend: str | None) -> tuple[TargetEntry, ...]:
    """Return the targets whose plans are served; none if the ONNX graphs are."""
    if backend not in (None, *BACKENDS):
        raise UsageError(f"backend is {backend!r}; {' or '.join(map(repr, BACKENDS))} was expected.")
    if backend == "onnxruntime":
        if target is not None:
            raise UsageError(f"--onnx serves the ONNX graphs, whatever was built: leave --target {target} out.")
        return ()
    targets = choose_targets(bundle, "tensorrt" if target is None and backend == "tensorrt" else target)
    if backend == "tensorrt" and not targets:
        raise UsageError(f"target {target!r} has no plans; it runs the ONNX graphs.")
    return targets


def _check_output(bundle: Bundle, place: Path) -> None:
    if place.exists() and not place.is_dir():
        raise UsageError(f"{str(place)!r} is a file; a folder was expected. Choose another name.")
    if Bundle.is_bundle(place) or (not bundle.is_packed and place.is_relative_to(bundle.path.resolve())):
        raise UsageError(f"{str(place)!r} is, or lies in, a bundle. Choose another folder for the models.")
    if place.is_mount():
        raise UsageError(
            f"{str(place)!r} is where a file system is mounted, so models cannot be moved there in one step. "
            f"Choose a folder in it: {place / 'models'}"
        )
    refuse_foreign(place, bundle)


# ---- writing -----------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Model:
    """A model while it is written."""

    graph: _Graph
    name: str
    max_batch: int
    plans: tuple[Plan, ...] = ()
    pieces: tuple[Piece, ...] = ()
    weights_name: str = ""
    digests: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)


class _Export:
    """Writes all models of a bundle."""

    def __init__(
        self, bundle: Bundle, targets: Sequence[TargetEntry], options: _Options, progress: ProgressListener
    ) -> None:
        self.models: list[_Model] = []
        self._bundle = bundle
        self._targets = targets
        self._options = options
        self._progress = progress
        self._backend = "tensorrt" if targets else "onnxruntime"
        self._left_out: dict[str, str] = {}
        self._notes: list[str] = []
        self._versions: set[str] = set()

    def write(self, folder: Path) -> None:
        """Write all models and their list into an empty folder.

        Raises:
            UsageError: No model can be served.
        """
        graphs = _served_graphs(self._bundle)
        for done, graph in enumerate(graphs):
            self._progress(Progress(stage="export-triton", label=graph.choice, done=done, total=len(graphs)))
            reason = self._add(graph, folder)
            if reason:
                self._left_out[graph.choice] = reason
        if not self.models:
            why = "; ".join(f"{choice}: {reason}" for choice, reason in self._left_out.items())
            raise UsageError(f"{str(self._bundle.path)!r} has nothing to serve. {why or 'It has no pairs.'}")
        self._write_weights(folder)
        for model in self.models:
            write_bytes(folder / model.name / "config.pbtxt", encode_config(self._config(model)))
        write_json(folder / f"{name_prefix(self._bundle)}.json", self._list())
        self._progress(Progress(stage="export-triton", label="", done=len(graphs), total=len(graphs)))

    def result(self, place: Path) -> TritonResult:
        """Return what was written to ``place``."""
        notes = list(self._notes)
        if len(self._versions) > 1:
            notes.append(f"plans are of TensorRT {' and '.join(sorted(self._versions))}; a Triton has one of them")
        return TritonResult(
            folder=place,
            index=place / f"{name_prefix(self._bundle)}.json",
            pair_id=self._bundle.manifest.pair_id,
            backend=self._backend,
            tensorrt_versions=tuple(sorted(self._versions)),
            models=tuple(map(self._describe, self.models)),
            left_out=self._left_out,
            notes=tuple(notes),
        )

    def _add(self, graph: _Graph, folder: Path) -> str:
        """Write a model without weights and configuration; return why it cannot be served, or an empty text."""
        stacked = self._stacks(graph)
        reason = unservable((*graph.inputs, *graph.outputs), stacked=stacked)
        if reason:
            return reason
        plans, missing = find_plans(self._bundle, self._targets, graph.path) if self._targets else ((), [])
        if self._targets and not plans:
            return "; ".join(missing)
        self._notes += [f"{graph.choice}: {reason}" for reason in missing]
        name = triton_model_name(self._bundle, graph.choice)
        limits = [plan.batches[1] for plan in plans] + [self._options.max_batch or self._bundle.max_batch]
        model = _Model(graph=graph, name=name, max_batch=min(limits) if stacked else 0, plans=plans)
        (folder / name / "1").mkdir(parents=True)
        if plans:
            self._write_plans(model, folder)
        else:
            self._write_graph(model, folder)
        self.models.append(model)
        return ""

    def _write_plans(self, model: _Model, folder: Path) -> None:
        graph = model.graph
        for plan in model.plans:
            data, version = read_raw_plan(
                self._bundle,
                plan,
                graph_digest=self._bundle.graph_digest(graph.path),
                inputs=graph.inputs,
                outputs=graph.outputs,
                expect_trt=self._options.expect_trt,
            )
            self._versions.add(version)
            if plan.batches[0] > 1:
                self._notes.append(f"{graph.choice}: {plan.path} takes no batch smaller than {plan.batches[0]}")
            self._write_file(model, folder, plan.file_name, data)

    def _write_graph(self, model: _Model, folder: Path) -> None:
        graph = model.graph
        names = ([info.name for info in tensors] for tensors in (graph.inputs, graph.outputs))
        lone = detach_graph(self._bundle, graph.path, *names)
        self._write_file(model, folder, ONNX_FILE, lone.data)
        model.pieces, model.weights_name = lone.pieces, lone.weights_name

    def _write_file(self, model: _Model, folder: Path, name: str, data: bytes | memoryview) -> None:
        with new_file(folder / model.name / "1" / name) as file:
            file.write(data)
        model.digests[f"1/{name}"], model.sizes[f"1/{name}"] = hashlib.sha256(data).hexdigest(), len(data)

    def _write_weights(self, folder: Path) -> None:
        """Write the weights of every graph; those of the bundle are read once."""
        owners = {folder / model.name / "1" / model.weights_name: model for model in self.models if model.weights_name}
        if not owners:
            return
        self._progress(Progress(stage="export-triton", label="weights", done=0, total=0))
        digests = copy_pieces(self._bundle, {path: model.pieces for path, model in owners.items()})
        for path, model in owners.items():
            model.digests[f"1/{path.name}"], model.sizes[f"1/{path.name}"] = digests[path], path.stat().st_size

    def _stacks(self, graph: _Graph) -> bool:
        return stacks_samples((*graph.inputs, *graph.outputs), self._bundle.fixed_batch)

    def _config(self, model: _Model) -> ModelConfig:
        graph, manifest = model.graph, self._bundle.manifest
        stacked = self._stacks(graph)
        notes = {
            "pair_id": manifest.pair_id,
            "precision": manifest.precision,
            "choice": graph.choice,
            "graph_sha256": self._bundle.graph_digest(graph.path),
            **{f"sha256:{path}": digest for path, digest in model.digests.items()},
        }
        return ModelConfig(
            name=model.name,
            backend=self._backend,
            max_batch=model.max_batch,
            inputs=describe_tensors(graph.inputs, stacked=stacked),
            outputs=describe_tensors(graph.outputs, stacked=stacked),
            instances=self._options.instances,
            max_queue_delay_us=self._options.max_queue_delay_us,
            files={plan.capability: plan.file_name for plan in model.plans} or {"": ONNX_FILE},
            parameters={f"{PARAMETER}{key}": value for key, value in notes.items()},
        )

    def _describe(self, model: _Model) -> TritonModel:
        config = self._config(model)
        return TritonModel(
            name=model.name,
            choice=model.graph.choice,
            max_batch=model.max_batch,
            inputs=tuple(tensor.to_json() for tensor in config.inputs),
            outputs=tuple(tensor.to_json() for tensor in config.outputs),
            passthrough=model.graph.passthrough,
            early_outputs=model.graph.early_outputs,
            files=model.digests,
            size_bytes=sum(model.sizes.values()),
        )

    def _list(self) -> dict[str, object]:
        """Return the list of models, for clients."""
        manifest = self._bundle.manifest
        return {
            "format": FORMAT,
            "version": VERSION,
            "pair_id": manifest.pair_id,
            "model": manifest.model.title or None,
            "precision": manifest.precision,
            "backend": self._backend,
            "tensorrt_versions": sorted(self._versions),
            "table_sha256": self._table_digest(),
            "models": [asdict(self._describe(model)) for model in self.models],
            "left_out": self._left_out,
        }

    def _table_digest(self) -> str | None:
        """Hash the table of the bundle, so that a device can check that it has the same; ``None`` if there is none."""
        bundle, table = self._bundle, "table.json"
        if not bundle.has(table):
            return None
        data = bundle.read(table) if table in bundle.manifest.files else bundle.storage.read(table)
        return hashlib.sha256(data).hexdigest()


def _served_graphs(bundle: Bundle) -> list[_Graph]:
    """List the graphs that the server runs, the whole model first."""
    graphs = []
    if bundle.full_offload:
        graphs.append(
            _Graph(
                choice=FULL_OFFLOAD,
                path=bundle.manifest.model.path,
                inputs=bundle.inputs,
                outputs=bundle.outputs,
                passthrough=tuple(info.name for info in bundle.inputs),
            )
        )
    for split in bundle.splits:
        graphs.append(
            _Graph(
                choice=split.name,
                path=split.tail,
                inputs=split.tensors,
                outputs=tuple(info for info in bundle.outputs if info.name not in split.early_outputs),
                passthrough=split.passthrough,
                early_outputs=split.early_outputs,
            )
        )
    return graphs
