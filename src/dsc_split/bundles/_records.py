"""The records of a manifest. No other file names a key of a manifest."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal

from msgspec import UNSET, Meta, UnsetType, field
from msgspec.structs import replace

from dsc_split._support.checks import shown
from dsc_split._support.records import Count, Facts, Integer, NotNegative, Positive, Record, Sha256, Text, to_document
from dsc_split.errors import UsageError

__all__ = [
    "FORMAT",
    "SEALED_ROLES",
    "SIDES",
    "VERSION",
    "BatchRange",
    "BuilderMemory",
    "CheckResult",
    "CheckRow",
    "Conversion",
    "CrossingTensor",
    "EngineEntry",
    "EngineFacts",
    "EnginePrecision",
    "FailedEngine",
    "FailedSplit",
    "FileEntry",
    "GemmPolicy",
    "KeptNode",
    "Manifest",
    "ModelEntry",
    "Precision",
    "Proof",
    "Provenance",
    "RecordedOptions",
    "Rewritten",
    "SampleFiles",
    "SourceFile",
    "Split",
    "TargetEntry",
    "Targets",
    "TensorInfo",
    "WeightsEntry",
]

FORMAT: Literal["dsc-split/bundle"] = "dsc-split/bundle"
VERSION: Literal[2] = 2
SIDES = ("device", "server")
SEALED_ROLES = ("cell", "memory", "table")
"""Roles of files that only a sealed manifest lists, as `pack` writes it: work on a bundle adds and removes them."""

Precision = Literal["fp32", "fp16"]
Side = Literal["device", "server"]
GemmPolicy = Literal["conv", "sum", "fp16"]


class TensorInfo(Record):
    """An input or an output of a graph, or a tensor that crosses a cut."""

    name: Text
    """ONNX value name."""
    dtype: Text
    """Lower-case ONNX element type: ``float32``, ``int64``, ..."""
    shape: tuple[Count | Text, ...]
    """Dimensions; a text is an expression in the batch symbol: ``2*N``."""
    elements_by_batch: tuple[Integer, Integer]
    """``(per_batch, constant)``: the tensor has ``per_batch * batch + constant`` elements."""
    itemsize: Count
    """Bytes per element, before any encoding."""

    def elements(self, batch: int) -> int:
        """Count the elements at ``batch``."""
        per_batch, constant = self.elements_by_batch
        return per_batch * batch + constant

    def size_bytes(self, batch: int) -> int:
        """Count the bytes at ``batch``, in memory."""
        return self.elements(batch) * self.itemsize

    def shape_at(self, batch: int) -> tuple[int, ...]:
        """Return the shape at ``batch``; the size of the symbolic dimension follows from the number of elements.

        Raises:
            UsageError: More than one dimension is symbolic.
        """
        free = [dim for dim in self.shape if isinstance(dim, str)]
        if len(free) > 1:
            raise UsageError(
                f"tensor {self.name!r} has {len(free)} free dimensions ({', '.join(free)}); "
                "one was expected. Give the others values with --input-shape."
            )
        fixed = math.prod(dim for dim in self.shape if isinstance(dim, int))
        size = self.elements(batch) // fixed if fixed else batch
        return tuple(size if isinstance(dim, str) else dim for dim in self.shape)


class CrossingTensor(TensorInfo):
    """A tensor that crosses a cut."""

    passthrough: bool
    """Whether it is an input of the model, which the device sends unchanged."""
    op_type: str = ""
    """Operator that computes it; empty for an input."""
    sample_bytes: Count = field(default=0, name="size_bytes")
    """Bytes at batch 1."""


class Proof(Record):
    """The settings of a pair's proof: its outputs were compared with the whole model's."""

    seeds: tuple[Integer, ...] = ()
    """Seeds of the random inputs."""
    batches: tuple[Positive, ...] = ()
    """Batch sizes that were run."""


class Split(Record):
    """A pair: head and tail of one cut."""

    name: Text
    """Name of the cut: valid in a file name; no other cut has it, also in other case."""
    tensors: tuple[CrossingTensor, ...]
    """Tensors that cross the cut, passthrough inputs included."""
    head: Text
    """Path of the head graph, relative to the bundle."""
    tail: Text
    """Path of the tail graph, relative to the bundle."""
    early_outputs: tuple[Text, ...]
    """Model outputs that the head computes; they stay on the device."""
    modules: tuple[str, ...] = ()
    """Modules that end at the cut, the outermost first."""
    position: Count = 0
    """Position in graph order of the last node before the cut."""
    sample_elements: Count = field(default=0, name="elements")
    """Elements that cross at batch 1."""
    sample_bytes: Count = field(default=0, name="size_bytes")
    """Bytes that cross at batch 1."""
    ratio: float | None = None
    """Size of the crossing tensors divided by the size of the input, both in the unit that the user chose."""
    natural: bool = False
    """Whether ``ratio`` is below 1."""
    compressive: bool = False
    """Whether it is natural, and strictly smaller than every earlier cut (Eq. 3)."""
    frontier: bool = False
    """Whether it is strictly smaller than every earlier cut, whatever its ratio."""
    refused: bool = False
    """Always false: a refused cut becomes no pair."""
    reason: str = ""
    """Why it is not compressive; empty where it is."""
    max_abs_error: float | None = None
    """Largest absolute difference from the whole model; ``None`` without a proof."""
    max_rel_error: float | None = None
    """Largest ``max|difference| / max|reference|`` of one output; ``None`` without a proof."""
    proof: Proof | UnsetType = UNSET
    """Settings of the proof."""

    def __post_init__(self) -> None:
        """Refuse a name that a file cannot have."""
        if not self.name.isprintable() or set(self.name) & set("/\\"):
            raise ValueError(f"the name is {shown(self.name)}; one that a file can have was expected.")

    @property
    def passthrough(self) -> tuple[str, ...]:
        """Names of the model's inputs in ``tensors``, which the device sends unchanged."""
        return tuple(tensor.name for tensor in self.tensors if tensor.passthrough)

    def size_bytes(self, batch: int) -> int:
        """Count the bytes that cross the cut at ``batch``."""
        return sum(tensor.size_bytes(batch) for tensor in self.tensors)

    def elements(self, batch: int) -> int:
        """Count the elements that cross the cut at ``batch``."""
        return sum(tensor.elements(batch) for tensor in self.tensors)

    def graph(self, side: str) -> str:
        """Return the path of the graph that runs on ``side``: the head on the device, the tail on the server."""
        return self.head if side == "device" else self.tail


class FailedSplit(Record):
    """A pair that failed its proof and is not in the bundle."""

    name: str = ""
    """Name of the cut."""
    reason: str = ""
    """Why it failed."""


class WeightsEntry(Record):
    """The weights of the model."""

    path: Text | None
    """Path of their file, relative to the bundle; ``None`` where they are inside the graphs."""
    origin: Text | UnsetType = UNSET
    """Description of their source."""


class ModelEntry(Record):
    """The whole model."""

    path: Text
    """Path of its graph, relative to the bundle."""
    weights: WeightsEntry
    """Its weights."""
    name: Text | UnsetType = UNSET
    """Name of the model."""
    opset: dict[str, Count] | UnsetType = UNSET
    """Version of each operator set by domain."""
    source: str | UnsetType = UNSET
    """Source of the export, as the user wrote it."""
    export_max_rel_error: float | UnsetType | None = UNSET
    """Largest relative difference of the graph from PyTorch; ``None`` where they were not compared."""
    uint8_input: bool | UnsetType = UNSET
    """Whether the inputs are 8-bit images."""

    @property
    def title(self) -> str:
        """Name of the model; empty where it is not recorded."""
        return "" if isinstance(self.name, UnsetType) else self.name

    @property
    def own_opset(self) -> int:
        """Version of the default ONNX operator set; 0 where it is not recorded."""
        return 0 if isinstance(self.opset, UnsetType) else self.opset.get("", 0)


class BatchRange(Record):
    """The batch sizes that the model accepts."""

    fixed: Positive | None
    """The only batch size; ``None`` where the batch dimension is a symbol."""
    max: Positive
    """The largest batch size that was run successfully."""
    symbol: str | UnsetType | None = UNSET
    """The batch symbol in the graphs' shapes."""


class KeptNode(Record):
    """A node that stayed float32 in a float16 graph."""

    name: Text | None
    """Name of the node; ``None`` where it has none."""
    op_type: Text
    """Its operator."""
    reason: Text
    """Why it stayed float32, as the end of a sentence."""


class Conversion(Record):
    """The conversion of the graph to float16."""

    source: Literal["fp32"] = field(name="from")
    """Precision of the graph before."""
    io_precision: Precision
    """Precision of its inputs and outputs."""
    weights_converted: Count
    """Number of weights that became float16."""
    weights_overflowed: Count
    """Number of weights too large for float16, which became the largest float16 number."""
    weights_vanished: Count
    """Number of weights that became 0."""
    kept_float32: tuple[KeptNode, ...]
    """Nodes that stayed float32."""
    max_abs_error: NotNegative | None
    """Largest absolute difference from float32; ``None`` where it was not compared."""
    max_rel_error: NotNegative | None
    """Largest relative difference from float32; ``None`` where it was not compared."""


class RecordedOptions(Record):
    """The options of a target's engines, which are needed to find them and to build them again."""

    batches: Annotated[tuple[Positive, ...], Meta(min_length=1)]
    """Batch sizes that they run at, ascending."""
    opt_batch: Positive | None
    """Batch size that they are optimised for; ``None``: the middle one."""
    per_batch: bool
    """Whether every batch size has its own engine."""
    gemm: GemmPolicy
    """How float32 matrix products are rewritten for a GPU that has none."""
    workspace_bytes: Positive | None
    """Most scratch memory of one layer; ``None``: the library chooses."""
    timing_cache_sha256: Text | None
    """Digest of the file of kernel timings, where the user pinned it; ``None`` where not."""
    device_memory_bytes: Positive | None
    """Memory of the GPU that will run them, if the user gave it; ``None``: no limit."""


class BuilderMemory(Record):
    """The memory of an engine, as its builder reported it."""

    activation_bytes: (
        Annotated[dict[Annotated[str, Meta(pattern="^[0-9]{1,15}$")], Count], Meta(min_length=1)] | UnsetType
    ) = UNSET
    """Bytes of the activations by batch size, which is a text: ``"8"``."""
    weights_bytes: Count | UnsetType = UNSET
    """Bytes of the weights."""
    scratch_bytes: Count | UnsetType = UNSET
    """Scratch bytes of the layer that needs most."""

    @property
    def activations(self) -> dict[int, int]:
        """Bytes of the activations by batch size; empty where the builder reported none."""
        known = {} if isinstance(self.activation_bytes, UnsetType) else self.activation_bytes
        return {int(batch): size_bytes for batch, size_bytes in known.items()}


class Rewritten(Record):
    """Names of nodes whose matrix product was rewritten for a GPU without float32 matrix products."""

    converted: tuple[Text, ...]
    """Nodes that became 1x1 convolutions."""
    summed: tuple[Text, ...]
    """Nodes that became a multiplication and a sum."""
    halved: tuple[Text, ...]
    """Nodes that became float16."""
    why: str | UnsetType = UNSET
    """Why they were rewritten."""
    graph_sha256: str | UnsetType = UNSET
    """Digest of the rewritten graph, from which the engine was built."""
    max_rel_error: float | UnsetType = UNSET
    """Largest relative difference of the rewritten graph from the graph before."""


class EnginePrecision(Record):
    """The number types that an engine computes in."""

    layers: dict[str, Count]
    """Number of layers by the type of their first output."""
    tf32: bool
    """Whether float32 may be computed in TF32."""
    compute_layers: dict[str, Count] | UnsetType = UNSET
    """Number of the layers that take most of the time, by the type of their first input."""


class EngineFacts(Record):
    """The facts that a back-end reports of an engine."""

    profile: tuple[Positive, Positive, Positive]
    """Smallest, best and largest batch size."""
    memory: BuilderMemory = BuilderMemory()
    """Memory that it needs, where the builder reports it."""
    rewritten: Rewritten | None = None
    """Matrix products that were rewritten; ``None`` where none was."""
    lowered: Text | None = None
    """Why it was built for smaller batch sizes than requested; ``None`` where it was not."""
    precision: EnginePrecision | UnsetType = UNSET
    """Number types that it computes in."""
    notes: tuple[str, ...] = ()
    """Notes for the user."""
    system: Text | UnsetType = UNSET
    """The operating system that it runs on; unset where it runs on any."""
    machine: Text | UnsetType = UNSET
    """The processor architecture that it runs on; unset where it runs on any."""


class EngineEntry(EngineFacts):
    """An engine file."""

    graph: Text
    """Path of its graph, relative to the bundle."""
    graph_digest: Text
    """Digest of the graph with its weights."""
    path: Text
    """Path of the engine, relative to the bundle."""


class FailedEngine(Record):
    """An engine that could not be built."""

    graph: Text
    """Path of the graph, relative to the bundle."""
    reason: Text
    """Why the build failed."""


class CheckRow(Record):
    """The result of one engine on the samples."""

    graph: str
    """Path of the graph, relative to the bundle."""
    label: str
    """What the graph is: ``whole model``, ``head NAME``."""
    max_abs_error: float | None
    """Largest absolute difference over all outputs; ``None`` where nothing could be compared."""
    max_rel_error: float | None
    """Largest ``max|difference| / max|reference|`` of one output; infinite (JSON: null) where type or shape differ."""
    tolerance: float
    """Largest relative error that passes, for the precision of the engine."""
    passed: bool
    """Whether the relative error is within the tolerance."""
    reason: str
    """Why it did not pass; empty where it did."""


class CheckResult(Record):
    """The result of a check of a side's engines."""

    side: str
    """``device`` or ``server``."""
    target: str
    """The target, in its canonical text."""
    against: str
    """The reference: ``golden samples``, or the file that the user gave."""
    fallback_reason: str | None
    """Why the graphs ran on ONNX Runtime instead of the engines; ``None`` where they did not."""
    rows: tuple[CheckRow, ...]
    """One row per graph of the side, the whole model first."""
    passed: bool
    """Whether every engine passed."""

    def finite(self) -> CheckResult:
        """Return the result for JSON, where an infinite error becomes ``None``."""
        return replace(
            self,
            rows=tuple(
                replace(row, max_abs_error=_finite(row.max_abs_error), max_rel_error=_finite(row.max_rel_error))
                for row in self.rows
            ),
        )

    def to_json(self) -> dict[str, object]:
        """Return the result as plain data."""
        return to_document(self.finite())


def _finite(error: float | None) -> float | None:
    return None if error == math.inf else error


class TargetEntry(Record):
    """A target of one side, on one kind of machine, with its engines."""

    target: Text
    """Its canonical text."""
    fingerprint: Facts
    """Its build fingerprint."""
    id: Text
    """Short name with 12 digits of the build fingerprint's digest; the name of its folder."""
    options: RecordedOptions | UnsetType = UNSET
    """Options of its engines; unset where nothing is compiled."""
    engines: tuple[EngineEntry, ...] | UnsetType = UNSET
    """Its engines; unset where nothing is compiled."""
    failed: tuple[FailedEngine, ...] | UnsetType = UNSET
    """The engines that could not be built; unset where nothing is compiled."""
    check: CheckResult | UnsetType = UNSET
    """Result of the last check of its engines; unset where there was none."""

    @property
    def library(self) -> object:
        """Import name of its library, from the fingerprint; ``None`` where the fingerprint has none."""
        return self.fingerprint.get("library")

    @property
    def is_compiled(self) -> bool:
        """Whether it needs engines; they were built, or the build failed."""
        return not isinstance(self.engines, UnsetType)

    @property
    def built(self) -> tuple[EngineEntry, ...]:
        """Its engines; empty where nothing is compiled."""
        return () if isinstance(self.engines, UnsetType) else self.engines

    @property
    def failures(self) -> tuple[FailedEngine, ...]:
        """The engines that could not be built; empty where nothing is compiled."""
        return () if isinstance(self.failed, UnsetType) else self.failed


class Targets(Record):
    """The targets of both sides; the last one of a side is the newest choice of the user."""

    device: tuple[TargetEntry, ...]
    """Targets of the device."""
    server: tuple[TargetEntry, ...]
    """Targets of the server."""

    def of(self, side: str) -> tuple[TargetEntry, ...]:
        """Return the targets of a side."""
        return self.device if side == "device" else self.server

    def named(self, side: str, target: str) -> tuple[TargetEntry, ...]:
        """Return a side's entries of a target, given as canonical text: one for each kind of machine."""
        return tuple(entry for entry in self.of(side) if entry.target == target)

    def __iter__(self) -> Iterator[TargetEntry]:
        yield from self.device
        yield from self.server


class FileEntry(Record):
    """A file of the bundle."""

    sha256: Sha256
    """Digest of its bytes."""
    size_bytes: Count = field(name="size")
    """Size in bytes."""
    role: Text | UnsetType = UNSET
    """Kind of file: ``model``, ``weights``, ``head``, ``tail``, ``engine``, ``sample``, ``cell``, ``table``, ..."""

    @property
    def comes_and_goes(self) -> bool:
        """Whether only a sealed bundle lists it, because it is a cell, a memory report or a table."""
        return self.role in SEALED_ROLES


class SampleFiles(Record):
    """The golden samples."""

    batch: Positive | UnsetType = UNSET
    """Their batch size."""
    files: dict[str, Text] | UnsetType = UNSET
    """Path by cut name; ``model`` for the whole model."""


class SourceFile(Record):
    """The source of an export."""

    name: str
    """Its name, as the user wrote it, without the folder."""
    sha256: str | None
    """Digest of the file; ``None`` where the source is no file."""


class Provenance(Record):
    """How a bundle was made."""

    command: str | UnsetType = UNSET
    """The command that exported it."""
    versions: dict[str, str] | UnsetType = UNSET
    """Versions of the packages that exported it."""
    source: SourceFile | UnsetType = UNSET
    """The source of the export."""
    model_sha256: str | UnsetType | None = UNSET
    """Digest of the whole model's graph."""
    weights_sha256: str | UnsetType | None = UNSET
    """Digest of the weights; ``None`` where they are inside the graphs."""


class Manifest(Record):
    """The contents and the history of a bundle."""

    format: Literal["dsc-split/bundle"] = FORMAT
    """Kind of document."""
    version: Literal[2] = VERSION
    """Version of the format."""
    pair_id: Text
    """Id that all heads and tails of one export share: ``sha256:`` and 64 digits."""
    revision: Count
    """Higher in a newer bundle: the time of its last change in seconds since 1970, or the number given to ``pack``."""
    sealed: bool
    """Whether it lists every file, as ``pack`` writes it."""
    side: Side | None
    """The side of a part; ``None`` for a whole bundle."""
    model: ModelEntry
    """The whole model."""
    precision: Precision
    """Precision of the graphs."""
    batch: BatchRange
    """The batch sizes that the model accepts."""
    inputs: tuple[TensorInfo, ...]
    """Inputs of the model, in order."""
    outputs: tuple[TensorInfo, ...]
    """Outputs of the model, in order. Shapes that depend on the data have no fixed size and count as zero."""
    input_bytes_stated: Count | None
    """Bytes per sample that full offload sends, if the user gave them: a JPEG is smaller than its pixels."""
    full_offload: bool
    """Whether the device may send the model's inputs unchanged to the server."""
    splits: tuple[Split, ...]
    """Pairs that passed their proof, in graph order."""
    failed_splits: tuple[FailedSplit, ...]
    """Pairs that failed their proof."""
    targets: Targets
    """Targets for which engines were built, or on which graphs were timed."""
    files: dict[str, FileEntry]
    """The files of the bundle by path."""
    left_out: dict[str, FileEntry]
    """The files of the whole bundle that a part does not have, by path."""
    notes: tuple[Text, ...] | UnsetType = UNSET
    """Notes on the export for the user."""
    conversion: Conversion | UnsetType = UNSET
    """The conversion to float16; unset where there was none."""
    provenance: Provenance | UnsetType = UNSET
    """How the bundle was made."""
    released: Count | UnsetType = UNSET
    """Revision of the sealed bundle that it was; timings on a device do not make it newer than the next release."""
    samples: SampleFiles | UnsetType = UNSET
    """The golden samples."""

    def __post_init__(self) -> None:
        """Refuse two splits with one name, head or tail; upper and lower case are one on some file systems."""
        for key in ("name", "head", "tail"):
            seen: set[str] = set()
            for i, split in enumerate(self.splits):
                value: str = getattr(split, key)
                if value.lower() in seen:
                    expected = "expected one that no other split has, whatever its case"
                    raise ValueError(f"splits[{i}].{key}: got {shown(value)}; {expected}.")
                seen.add(value.lower())

    @property
    def graphs(self) -> tuple[str, ...]:
        """Paths of all graphs: the whole model, then head and tail of each split."""
        return (self.model.path, *(path for split in self.splits for path in (split.head, split.tail)))

    @property
    def released_revision(self) -> int:
        """Revision of the sealed bundle that it is, or that it was before later changes."""
        return self.revision if isinstance(self.released, UnsetType) else self.released

    @property
    def sample_batch(self) -> int:
        """Batch size of the golden samples; 1 where there are none."""
        batch = UNSET if isinstance(self.samples, UnsetType) else self.samples.batch
        return 1 if isinstance(batch, UnsetType) else batch

    @property
    def sample_paths(self) -> dict[str, str]:
        """Paths of the golden samples by cut name; ``model`` for the whole model."""
        files = UNSET if isinstance(self.samples, UnsetType) else self.samples.files
        return {} if isinstance(files, UnsetType) else files

    @property
    def lasting_files(self) -> dict[str, FileEntry]:
        """The files that also an unsealed manifest lists."""
        return {path: entry for path, entry in self.files.items() if not entry.comes_and_goes}

    @property
    def all_files(self) -> dict[str, FileEntry]:
        """The files of the bundle, and those that a part does not have."""
        return {**self.left_out, **self.files}
