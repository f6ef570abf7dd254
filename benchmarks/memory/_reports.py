"""Reports on the memory of loaded engines: their records, their files in a bundle, and sums over sets of choices."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta, UnsetType
from msgspec.structs import replace

from dsc_split._support.checks import fail
from dsc_split._support.files import make_folder, write_bytes
from dsc_split._support.records import (
    Count,
    Facts,
    NotNegative,
    Positive,
    Record,
    Text,
    read_record,
    to_document,
)
from dsc_split._support.strict_json import body_digest, canonical_json, read_json
from dsc_split.bundles._records import EngineEntry
from dsc_split.engines._fingerprint import machine_facts
from dsc_split.engines.side._sides import SideGraph, recorded_target, side_graphs
from dsc_split.errors import DamagedError
from dsc_split.table._types import FULL_OFFLOAD, NO_OFFLOAD

if TYPE_CHECKING:
    from dsc_split.bundle import Bundle
    from dsc_split.table._types import Side

__all__ = [
    "BUILDER",
    "ESTIMATED",
    "MEASURED",
    "EngineMemory",
    "MemoryReport",
    "SetMemory",
    "builder_memory",
    "choice_name",
    "load_memory",
    "save_memory",
]

logger = logging.getLogger(__name__)

FORMAT: Literal["dsc-split/memory"] = "dsc-split/memory"
VERSION: Literal[1] = 1
FOLDER = "memory"
"""Folder in the bundle."""
MEASURED: Literal["measured"] = "measured"
BUILDER: Literal["builder"] = "builder"
ESTIMATED: Literal["estimated"] = "estimated"
"""Source of a number: a measurement, the builder of the engines, or a sum of other numbers."""

Source = Literal["measured", "builder", "estimated"]

_HINT = "Remove it, and measure again: dsc-split memory BUNDLE"


class EngineMemory(Record):
    """Memory of one engine after one run, alone in its process."""

    choice: Text
    """Name of its choice."""
    graph: Text
    """Path of the graph, relative to the bundle."""
    graph_digest: Text
    """Digest of the graph with its weights."""
    batch: Positive
    """Batch size that it ran: the largest one, up to the one asked for, that fits into memory."""
    resident_bytes: Count | None
    """Memory of the machine; ``None`` if nothing ran."""
    gpu_bytes: Count | None
    """Memory of the GPU; ``None`` without one, or if the back-end does not report it."""
    load_ms: NotNegative | None
    """Milliseconds to load it when its library is in use: the cost of a switch to a choice that is not kept."""
    first_run_ms: NotNegative | None
    """Milliseconds of the first run after that."""
    source: Source
    """``measured`` or ``builder``."""
    reason: str = ""
    """Why there are no numbers; empty if there are."""

    @property
    def memory_bytes(self) -> int | None:
        """The memory that a budget limits: that of the GPU if it runs on one, else that of the machine."""
        return self.resident_bytes if self.gpu_bytes is None else self.gpu_bytes


class SetMemory(Record):
    """Memory of the engines of several choices, loaded in one process."""

    choices: Annotated[tuple[Text, ...], Meta(min_length=1)]
    """Names of the choices."""
    resident_bytes: Count | None
    """Memory of the machine; ``None`` if nothing ran."""
    gpu_bytes: Count | None
    """Memory of the GPU; ``None`` without one, or if the back-end does not report it."""
    source: Source
    """``measured``, ``builder`` or ``estimated``."""

    @property
    def memory_bytes(self) -> int | None:
        """The memory that a budget limits: that of the GPU if they run on one, else that of the machine."""
        return self.resident_bytes if self.gpu_bytes is None else self.gpu_bytes


class MemoryReport(Record, dict=True):
    """Memory of the engines of one side on one target."""

    format: Literal["dsc-split/memory"] = FORMAT
    """Kind of the document."""
    version: Literal[1] = VERSION
    """Version of the format."""
    pair_id: Text
    """Identity of the pairs."""
    side: Annotated[str, Meta(pattern="^(device|server)$")]
    """``device`` or ``server``."""
    target: Text
    """Canonical text of the target."""
    fingerprint: Text | None
    """SHA-256 of ``run_fingerprint``; ``None`` if nothing ran."""
    run_fingerprint: Facts | None
    """The machine and its state during the measurement; ``None`` if nothing ran."""
    engines: tuple[EngineMemory, ...]
    """One for each choice with an engine on this side, the whole model first."""
    sets: tuple[SetMemory, ...]
    """Sets that were measured together, that of all choices first."""

    def engine(self, choice: str) -> EngineMemory | None:
        """Return the engine of a choice, by name; ``None`` if there is none with numbers."""
        found = (engine for engine in self.engines if engine.choice == choice and engine.memory_bytes is not None)
        return next(found, None)

    @functools.cached_property
    def shared_bytes(self) -> int:
        """Memory that every engine needs and one process holds once: shared weights, and pages of the library.

        The sum of n engines measured alone counts it n - 1 times too often.
        """
        together = next((item for item in self.sets if item.source == MEASURED and len(item.choices) > 1), None)
        if together is None:
            return 0
        alone = [self._alone_bytes[name] for name in together.choices]
        surplus = sum(alone) - (together.memory_bytes or 0)
        return min(max(0, surplus // (len(alone) - 1)), *alone)

    def hold(self, choices: Collection[str]) -> SetMemory:
        """Return the memory of a set of choices: as measured, else estimated.

        The estimate is the sum of the engines' memory alone, with shared memory counted once. It is at most the memory
        of a larger measured set.

        Args:
            choices: Names of choices whose engines have numbers.
        """
        wanted = frozenset(choices)
        for item in self.sets:
            if wanted == frozenset(item.choices):
                return item
        names = tuple(engine.choice for engine in self.engines if engine.choice in wanted)
        on_gpu = any(engine.gpu_bytes is not None for engine in self.engines)
        alone = [self._alone_bytes[name] for name in names]
        estimate = sum(alone) - max(0, len(alone) - 1) * self.shared_bytes
        larger = [item.memory_bytes for item in self.sets if item.memory_bytes and wanted < frozenset(item.choices)]
        size_bytes = min(estimate, *larger) if larger else estimate
        built = self.fingerprint is None
        return SetMemory(
            choices=names,
            resident_bytes=None if on_gpu else size_bytes,
            gpu_bytes=size_bytes if on_gpu else None,
            source=BUILDER if built else MEASURED if len(names) == 1 else ESTIMATED,
        )

    @functools.cached_property
    def _alone_bytes(self) -> dict[str, int]:
        return {engine.choice: size for engine in self.engines if (size := engine.memory_bytes) is not None}

    def to_json(self) -> dict[str, object]:
        """Return the file's form, with the digest of its own body."""
        document = to_document(self)
        engines, sets = document.pop("engines"), document.pop("sets")
        body = {**document, "shared_bytes": self.shared_bytes, "engines": engines, "sets": sets}
        return {**body, "body_sha256": body_digest(body)}

    @classmethod
    def parse(cls, data: bytes, name: str) -> MemoryReport:
        """Read the bytes of a report's file.

        Args:
            data: The bytes.
            name: The file's name, for messages.

        Raises:
            DamagedError: It is no report, was changed after it was written, or is of a newer version.
        """
        what = f"memory report {name!r}"
        document = read_json(data, what, DamagedError)
        if document.get("format") != FORMAT or document.get("version") != VERSION:
            found = f"{document.get('format')!r} version {document.get('version')!r}"
            raise DamagedError(f"{what} is {found}; {FORMAT!r} version {VERSION} was expected. {_HINT}")
        if document.pop("body_sha256", None) != body_digest(document):
            raise DamagedError(f"{what} does not hold what its own SHA-256 says: it was changed or cut short. {_HINT}")
        document.pop("shared_bytes", None)  # follows from the engines and sets
        try:
            report = read_record(document, cls)
            _check_measured(report)
        except DamagedError as e:
            raise DamagedError(f"{what}: {e} {_HINT}") from e
        return report


def _check_measured(report: MemoryReport) -> None:
    """Check that a report was measured, and that its sets have only choices whose engines have numbers.

    Raises:
        DamagedError: The message names the place.
    """
    for key in ("fingerprint", "run_fingerprint"):
        if getattr(report, key) is None:
            fail(None, key, "what it was measured on")
    sources = {"engines": [item.source for item in report.engines], "sets": [item.source for item in report.sets]}
    for place, found in sources.items():
        for i, source in enumerate(found):
            if source != MEASURED:
                fail(source, f"{place}[{i}].source", repr(MEASURED))
    known = {engine.choice for engine in report.engines if engine.memory_bytes is not None}
    for i, held in enumerate(report.sets):
        for k, name in enumerate(held.choices):
            if name not in known:
                fail(name, f"sets[{i}].choices[{k}]", "a choice whose engine has numbers")


# ---- in a bundle -------------------------------------------------------------------------------------------


def choice_name(graph: SideGraph, side: str) -> str:
    """Return the name of the choice that a graph of a side belongs to."""
    if graph.split is not None:
        return graph.split.name
    return NO_OFFLOAD if side == "device" else FULL_OFFLOAD


def save_memory(bundle: Bundle, report: MemoryReport) -> Path:
    """Write a report to ``memory/SIDE-FINGERPRINT.json``; hold the bundle's lock around this.

    Raises:
        DscError: It cannot be written.
    """
    bundle.unseal()
    folder = bundle.path / FOLDER
    make_folder(folder)
    path = folder / f"{report.side}-{str(report.fingerprint)[:12]}.json"
    write_bytes(path, canonical_json(report.to_json()) + b"\n")
    logger.info("memory: %s", path)
    return path


def load_memory(bundle: Bundle, side: str, part: Side) -> MemoryReport | None:
    """Return the memory of the engines of a table's side: as measured there, else by the builder of the engines.

    Args:
        bundle: The bundle.
        side: ``device`` or ``server``.
        part: That side of the table.

    Returns:
        A report without engines of graphs that the bundle no longer has; ``None`` if there are no numbers.

    Raises:
        DamagedError: A report is damaged.
    """
    digests = {bundle.graph_digest(graph.path) for graph in side_graphs(bundle, side, verify=False)}
    for name in bundle.storage.names():
        if not name.startswith(f"{FOLDER}/{side}-"):
            continue
        report = MemoryReport.parse(bundle.read_result(name), name)
        if report.side == side and _is_measured_on(report, part):
            return _without_other_graphs(report, digests)
    return builder_memory(bundle, side, part.target)


def _is_measured_on(report: MemoryReport, part: Side) -> bool:
    """Return whether memory was measured on the kind of machine that a table names; host and clock do not matter."""
    if report.fingerprint == part.fingerprint:
        return True
    if report.run_fingerprint is None or part.run_fingerprint is None:
        return False
    return machine_facts(report.run_fingerprint) == machine_facts(part.run_fingerprint)


def _without_other_graphs(report: MemoryReport, digests: Collection[str]) -> MemoryReport | None:
    """Return a report without engines of other graphs, and without their sets."""
    engines = tuple(engine for engine in report.engines if engine.graph_digest in digests)
    left = {engine.choice for engine in engines}
    sets = tuple(item for item in report.sets if left.issuperset(item.choices))
    return replace(report, engines=engines, sets=sets) if engines else None


def builder_memory(bundle: Bundle, side: str, target: str, batch: int | None = None) -> MemoryReport | None:
    """Return the memory of engines by their builder: weights and activations of each engine.

    Args:
        bundle: The bundle.
        side: ``device`` or ``server``.
        target: Canonical text of the target.
        batch: Largest batch size to run; ``None``: the largest that each engine was built for.

    Returns:
        The report; ``None`` if the manifest has no such numbers.
    """
    entry = recorded_target(bundle, side, target)
    engines = []
    for graph in side_graphs(bundle, side, verify=False):
        told = [engine for engine in (entry.built if entry else ()) if engine.graph == graph.path]
        built = [engine for engine in told if not isinstance(engine.memory.activation_bytes, UnsetType)]
        if not built:
            continue
        largest = max(engine.profile[2] for engine in built)
        most = largest if batch is None else min(batch, largest)
        used = min((engine for engine in built if engine.profile[2] >= most), key=lambda engine: engine.profile[2])
        engines.append(
            EngineMemory(
                choice=choice_name(graph, side),
                graph=graph.path,
                graph_digest=bundle.graph_digest(graph.path),
                batch=most,
                resident_bytes=None,
                gpu_bytes=_built_bytes(used, most),
                load_ms=None,
                first_run_ms=None,
                source=BUILDER,
            )
        )
    if not engines:
        return None
    return MemoryReport(
        pair_id=bundle.manifest.pair_id,
        side=side,
        target=target,
        fingerprint=None,
        run_fingerprint=None,
        engines=tuple(engines),
        sets=(),
    )


def _built_bytes(engine: EngineEntry, batch: int) -> int:
    """Add weights and activations at a batch size, or at the next larger one that the builder reported."""
    memory = engine.memory
    told = {} if isinstance(memory.activation_bytes, UnsetType) else memory.activation_bytes
    sizes = {int(size): activation_bytes for size, activation_bytes in told.items()}
    enough = [size for size in sizes if size >= batch]
    weights_bytes = 0 if isinstance(memory.weights_bytes, UnsetType) else memory.weights_bytes
    return weights_bytes + sizes[min(enough) if enough else max(sizes)]
