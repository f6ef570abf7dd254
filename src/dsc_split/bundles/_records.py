"""What a manifest says, as records. No other file names a key of a manifest."""

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
"""Roles of files that come and go while a bundle is worked on: it lists them only when it is sealed, as `pack` does."""

Precision = Literal["fp32", "fp16"]
Side = Literal["device", "server"]
GemmPolicy = Literal["conv", "sum", "fp16"]


class TensorInfo(Record):
    """One tensor at a border of a graph: an input, an output, or what crosses a cut."""

    name: Text
    """ONNX value name."""
    dtype: Text
    """Lower-case ONNX element type: ``float32``, ``int64``, ..."""
    shape: tuple[Count | Text, ...]
    """Dimensions; a string is an expression in the batch symbol."""
    elements_by_batch: tuple[Integer, Integer]
    """``(per_batch, constant)``: the tensor has ``per_batch * batch + constant`` elements."""
    itemsize: Count
    """Bytes per element, before any encoding."""

    def elements(self, batch: int) -> int:
        """Count the elements at ``batch``."""
        per_batch, constant = self.elements_by_batch
        return per_batch * batch + constant

    def size_bytes(self, batch: int) -> int:
        """Count the bytes at ``batch``, as the tensor lies in memory."""
        return self.elements(batch) * self.itemsize

    def shape_at(self, batch: int) -> tuple[int, ...]:
        """Return the shape at ``batch``; the size of the free dimension follows from the count of elements.

        Raises:
            UsageError: More than one dimension is free.
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
    """Whether it is an input of the model, which the device sends as it is."""
    op_type: str = ""
    """Op that makes it; empty for an input."""
    sample_bytes: Count = field(default=0, name="size_bytes")
    """Its bytes at batch 1."""


class Proof(Record):
    """What a pair was proven with."""

    seeds: tuple[Integer, ...] = ()
    """Seeds of the random inputs."""
    batches: tuple[Positive, ...] = ()
    """Batch sizes that were run."""


class Split(Record):
    """A pair: head and tail of one cut."""

    name: Text
    """The cut's name: file-name safe, unique without regard to case."""
    tensors: tuple[CrossingTensor, ...]
    """What crosses the cut, passthrough inputs included."""
    head: Text
    """Path of the head graph, relative to the bundle."""
    tail: Text
    """Path of the tail graph, relative to the bundle."""
    early_outputs: tuple[Text, ...]
    """Model outputs that the head computes; they stay on the device."""
    modules: tuple[str, ...] = ()
    """Every module that ends here, the outermost first."""
    position: Count = 0
    """Position in graph order of the last node before the cut."""
    sample_elements: Count = field(default=0, name="elements")
    """Elements that cross at batch 1."""
    sample_bytes: Count = field(default=0, name="size_bytes")
    """Bytes that cross at batch 1."""
    ratio: float | None = None
    """Size against the input, in the unit that was asked for."""
    natural: bool = False
    """Whether ``ratio`` is below 1."""
    compressive: bool = False
    """Whether it is natural, and strictly smaller than every earlier cut (Eq. 3)."""
    frontier: bool = False
    """Whether it is strictly smaller than every earlier cut, whatever its ratio."""
    refused: bool = False
    """Always false: a cut that is refused becomes no pair."""
    reason: str = ""
    """Why it is not compressive; empty where it is."""
    max_abs_error: float | None = None
    """Largest absolute difference from the whole model; ``None`` where it was not proven."""
    max_rel_error: float | None = None
    """Largest ``max|difference| / max|reference|`` of one output; ``None`` where it was not proven."""
    proof: Proof | UnsetType = UNSET
    """What it was proven with."""

    def __post_init__(self) -> None:
        """Refuse a name that no file can have."""
        if not self.name.isprintable() or set(self.name) & set("/\\"):
            raise ValueError(f"the name is {shown(self.name)}; one that a file can have was expected.")

    @property
    def passthrough(self) -> tuple[str, ...]:
        """Names of the model's inputs among ``tensors``: the device sends them as they are."""
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
    """A pair that failed its proof, and was left out."""

    name: str = ""
    """The cut's name."""
    reason: str = ""
    """Why it failed."""


class WeightsEntry(Record):
    """The weights of the model."""

    path: Text | None
    """Their file, relative to the bundle; ``None`` where the graphs hold them themselves."""
    origin: Text | UnsetType = UNSET
    """Where they came from, in words."""


class ModelEntry(Record):
    """The whole model."""

    path: Text
    """Its graph, relative to the bundle."""
    weights: WeightsEntry
    """Its weights."""
    name: Text | UnsetType = UNSET
    """What it is called."""
    opset: dict[str, Count] | UnsetType = UNSET
    """Version of each operator set by domain."""
    source: str | UnsetType = UNSET
    """What it was exported from, as the user named it."""
    export_max_rel_error: float | UnsetType | None = UNSET
    """How far the graph is off from PyTorch; ``None`` where there is nothing to compare with."""
    uint8_input: bool | UnsetType = UNSET
    """Whether it takes 8-bit images."""

    @property
    def title(self) -> str:
        """What it is called; empty where that is not said."""
        return "" if isinstance(self.name, UnsetType) else self.name

    @property
    def own_opset(self) -> int:
        """Version of ONNX's own operators; 0 where that is not said."""
        return 0 if isinstance(self.opset, UnsetType) else self.opset.get("", 0)


class BatchRange(Record):
    """The batch sizes that the model takes."""

    fixed: Positive | None
    """The only one; ``None`` where the batch is a symbol."""
    max: Positive
    """The largest one that was proven to run."""
    symbol: str | UnsetType | None = UNSET
    """The batch symbol in the graphs' shapes."""


class KeptNode(Record):
    """A node that stayed float32 in a float16 graph."""

    name: Text | None
    """The node's name, where it has one."""
    op_type: Text
    """Its operator."""
    reason: Text
    """Why it stayed, as the end of a sentence."""


class Conversion(Record):
    """The conversion of the graph to float16."""

    source: Literal["fp32"] = field(name="from")
    """What the graph was."""
    io_precision: Precision
    """What its inputs and outputs are."""
    weights_converted: Count
    """Weights that became float16."""
    weights_overflowed: Count
    """Weights beyond float16, which became its largest number."""
    weights_vanished: Count
    """Weights that became 0."""
    kept_float32: tuple[KeptNode, ...]
    """Nodes that stayed float32."""
    max_abs_error: NotNegative | None
    """Largest absolute difference from float32; ``None`` where it was not compared."""
    max_rel_error: NotNegative | None
    """Largest relative difference from float32; ``None`` where it was not compared."""


class RecordedOptions(Record):
    """How the engines of a target were built: what is needed to find and to rebuild them."""

    batches: Annotated[tuple[Positive, ...], Meta(min_length=1)]
    """Batch sizes that they run at, ascending."""
    opt_batch: Positive | None
    """The batch size to be fastest at; ``None``: the middle one."""
    per_batch: bool
    """Whether every batch size has an engine of its own."""
    gemm: GemmPolicy
    """What became of float32 matrix products where the GPU has none."""
    workspace_bytes: Positive | None
    """Scratch memory that one layer may take; ``None``: the library's choice."""
    timing_cache_sha256: Text | None
    """Digest of the kernel timings that were used; ``None`` where they were not pinned."""
    device_memory_bytes: Positive | None
    """Memory of the GPU that they were built for; ``None``: not looked at."""


class BuilderMemory(Record):
    """What the builder of an engine said of its memory."""

    activation_bytes: (
        Annotated[dict[Annotated[str, Meta(pattern="^[0-9]{1,15}$")], Count], Meta(min_length=1)] | UnsetType
    ) = UNSET
    """By batch size, as text."""
    weights_bytes: Count | UnsetType = UNSET
    """What its weights take."""
    scratch_bytes: Count | UnsetType = UNSET
    """What its greediest layer takes."""

    @property
    def activations(self) -> dict[int, int]:
        """Bytes of its activations by batch size; empty where it said nothing."""
        known = {} if isinstance(self.activation_bytes, UnsetType) else self.activation_bytes
        return {int(batch): size_bytes for batch, size_bytes in known.items()}


class Rewritten(Record):
    """Matrix products that were rewritten for a GPU without float32 ones, by node name."""

    converted: tuple[Text, ...]
    """They became 1x1 convolutions."""
    summed: tuple[Text, ...]
    """They became a multiplication and a sum."""
    halved: tuple[Text, ...]
    """They became float16."""
    why: str | UnsetType = UNSET
    """Why."""
    graph_sha256: str | UnsetType = UNSET
    """Digest of the graph that was built instead."""
    max_rel_error: float | UnsetType = UNSET
    """Largest relative difference of that graph from the one that it came from."""


class EnginePrecision(Record):
    """What an engine computes in."""

    layers: dict[str, Count]
    """Layers by type."""
    tf32: bool
    """Whether float32 may be computed in TF32."""
    compute_layers: dict[str, Count] | UnsetType = UNSET
    """Layers that compute, by type."""


class EngineFacts(Record):
    """What a back-end says of an engine that it built."""

    profile: tuple[Positive, Positive, Positive]
    """Smallest, best and largest batch size."""
    memory: BuilderMemory = BuilderMemory()
    """What it takes, as far as the builder says."""
    rewritten: Rewritten | None = None
    """What was rewritten; ``None`` where nothing was."""
    lowered: Text | None = None
    """Why it was built for smaller batches than were asked for; ``None`` where it was not."""
    precision: EnginePrecision | UnsetType = UNSET
    """What it computes in."""
    notes: tuple[str, ...] = ()
    """What the user should know."""
    system: Text | UnsetType = UNSET
    """The operating system that it runs on; unset where it runs on any."""
    machine: Text | UnsetType = UNSET
    """The processor's architecture that it runs on; unset where it runs on any."""


class EngineEntry(EngineFacts):
    """An engine file."""

    graph: Text
    """Path of the graph that it was built from."""
    graph_digest: Text
    """Digest of that graph with its weights."""
    path: Text
    """Its file, relative to the bundle."""


class FailedEngine(Record):
    """An engine that could not be built."""

    graph: Text
    """Path of the graph."""
    reason: Text
    """Why."""


class CheckRow(Record):
    """One engine that was run on the samples."""

    graph: str
    """Path of the graph, relative to the bundle."""
    label: str
    """What it is, in words."""
    max_abs_error: float | None
    """Largest absolute difference over all outputs; ``None`` where nothing could be compared."""
    max_rel_error: float | None
    """Largest ``max|difference| / max|reference|`` of one output; infinite where type or shape differ, which is null in
    JSON."""
    tolerance: float
    """Largest relative error that passes, for what the engine computes in."""
    passed: bool
    """Whether the relative error is within the tolerance."""
    reason: str
    """Why it did not pass; empty where it did."""


class CheckResult(Record):
    """What a check of a side's engines found."""

    side: str
    """``device`` or ``server``."""
    target: str
    """The target, in its canonical text."""
    against: str
    """What was compared with: ``golden samples``, or the file that was given."""
    fallback_reason: str | None
    """Why the graphs ran on ONNX Runtime instead of the engines; ``None`` where they did not."""
    rows: tuple[CheckRow, ...]
    """One per graph of the side, the whole model first."""
    passed: bool
    """Whether every engine passed."""

    def finite(self) -> CheckResult:
        """Return the result as JSON takes it: an error that is infinite is ``None``."""
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
    """A target of one side, on one kind of machine, with what was built for it."""

    target: Text
    """Its canonical text."""
    fingerprint: Facts
    """Its build fingerprint."""
    id: Text
    """A slug and 12 digits of the build fingerprint; the name of its folder."""
    options: RecordedOptions | UnsetType = UNSET
    """How its engines were built; unset where nothing is compiled."""
    engines: tuple[EngineEntry, ...] | UnsetType = UNSET
    """Its engines; unset where nothing is compiled."""
    failed: tuple[FailedEngine, ...] | UnsetType = UNSET
    """The engines that could not be built; unset where nothing is compiled."""
    check: CheckResult | UnsetType = UNSET
    """What the last check of its engines found; unset where there was none."""

    @property
    def library(self) -> object:
        """Import name of the library that it is for, as its fingerprint says; ``None`` where that does not."""
        return self.fingerprint.get("library")

    @property
    def is_compiled(self) -> bool:
        """Whether engines were built for it, or tried."""
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
    """The targets of both sides, those that were asked for last at the end."""

    device: tuple[TargetEntry, ...]
    """Of the device."""
    server: tuple[TargetEntry, ...]
    """Of the server."""

    def of(self, side: str) -> tuple[TargetEntry, ...]:
        """Return the targets of a side."""
        return self.device if side == "device" else self.server

    def named(self, side: str, target: str) -> tuple[TargetEntry, ...]:
        """Return the entries of a side's target, given in its canonical text: one for each kind of machine."""
        return tuple(entry for entry in self.of(side) if entry.target == target)

    def __iter__(self) -> Iterator[TargetEntry]:
        yield from self.device
        yield from self.server


class FileEntry(Record):
    """A file of the bundle."""

    sha256: Sha256
    """Digest of its bytes."""
    size_bytes: Count = field(name="size")
    """Its size."""
    role: Text | UnsetType = UNSET
    """What it is: ``model``, ``weights``, ``head``, ``tail``, ``engine``, ``sample``, ``cell``, ``table``, ..."""

    @property
    def comes_and_goes(self) -> bool:
        """Whether only a sealed bundle lists it: a cell, a memory report or a table."""
        return self.role in SEALED_ROLES


class SampleFiles(Record):
    """The golden samples."""

    batch: Positive | UnsetType = UNSET
    """Their batch size."""
    files: dict[str, Text] | UnsetType = UNSET
    """Path by cut name; that of the whole model under ``model``."""


class SourceFile(Record):
    """What a bundle was exported from."""

    name: str
    """As the user named it, without the folder."""
    sha256: str | None
    """Digest of the file; ``None`` where it is no file."""


class Provenance(Record):
    """Where a bundle comes from."""

    command: str | UnsetType = UNSET
    """The command that exported it."""
    versions: dict[str, str] | UnsetType = UNSET
    """Versions of what took part."""
    source: SourceFile | UnsetType = UNSET
    """What was exported."""
    model_sha256: str | UnsetType | None = UNSET
    """Digest of the whole model's graph."""
    weights_sha256: str | UnsetType | None = UNSET
    """Digest of the weights; ``None`` where the graphs hold them."""


class Manifest(Record):
    """All that a bundle says of itself."""

    format: Literal["dsc-split/bundle"] = FORMAT
    """What kind of document it is."""
    version: Literal[2] = VERSION
    """Version of the format."""
    pair_id: Text
    """What heads and tails of one export have in common: ``sha256:`` and 64 digits."""
    revision: Count
    """Seconds since 1970 of its last change: what is newer has a higher one."""
    sealed: bool
    """Whether it lists every file, as ``pack`` does."""
    side: Side | None
    """The side that it is a part for; ``None`` for a whole bundle."""
    model: ModelEntry
    """The whole model."""
    precision: Precision
    """What the graphs compute in."""
    batch: BatchRange
    """The batch sizes that the model takes."""
    inputs: tuple[TensorInfo, ...]
    """Inputs of the model, in order."""
    outputs: tuple[TensorInfo, ...]
    """Outputs of the model, in order. Shapes that depend on the data have no fixed size and count as zero."""
    input_bytes_stated: Count | None
    """What full offload sends per sample, where the user said so: a JPEG is smaller than its pixels."""
    full_offload: bool
    """Whether inputs may be sent to the server as they are."""
    splits: tuple[Split, ...]
    """The pairs that passed their proof, in graph order."""
    failed_splits: tuple[FailedSplit, ...]
    """The pairs that did not."""
    targets: Targets
    """What engines were built for, or timed on."""
    files: dict[str, FileEntry]
    """The files that it holds, by path."""
    left_out: dict[str, FileEntry]
    """The files of the whole bundle that a part does not hold, by path."""
    notes: tuple[Text, ...] | UnsetType = UNSET
    """What the user should know of the export."""
    conversion: Conversion | UnsetType = UNSET
    """The conversion to float16; unset where there was none."""
    provenance: Provenance | UnsetType = UNSET
    """Where it comes from."""
    released: Count | UnsetType = UNSET
    """Revision that it had when it was sealed; what is timed on a device makes it no newer than the next release."""
    samples: SampleFiles | UnsetType = UNSET
    """The golden samples."""

    def __post_init__(self) -> None:
        """Refuse two splits of one name, head or tail; file systems may not tell upper from lower case."""
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
        """Revision of the release that it is, or that it was unpacked from."""
        return self.revision if isinstance(self.released, UnsetType) else self.released

    @property
    def sample_batch(self) -> int:
        """Batch size of the golden samples; 1 where there are none."""
        batch = UNSET if isinstance(self.samples, UnsetType) else self.samples.batch
        return 1 if isinstance(batch, UnsetType) else batch

    @property
    def sample_paths(self) -> dict[str, str]:
        """Paths of the golden samples by cut name; that of the whole model under ``model``."""
        files = UNSET if isinstance(self.samples, UnsetType) else self.samples.files
        return {} if isinstance(files, UnsetType) else files

    @property
    def lasting_files(self) -> dict[str, FileEntry]:
        """The files that are listed also while the bundle is worked on."""
        return {path: entry for path, entry in self.files.items() if not entry.comes_and_goes}

    @property
    def all_files(self) -> dict[str, FileEntry]:
        """The files that it holds or has left out."""
        return {**self.left_out, **self.files}
