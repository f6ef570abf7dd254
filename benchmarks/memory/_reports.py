"""What engines take that are kept loaded: the records, where they lie in a bundle, and sums over sets of choices."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsc_split._support.checks import (
    count,
    entries,
    fail,
    fields,
    items,
    number,
    one_of,
    or_null,
    positive,
    some_object,
    text,
)
from dsc_split._support.files import body_digest, canonical_json, read_json, write_bytes
from dsc_split.engines.side._sides import SIDES, SideGraph, recorded_target, side_graphs
from dsc_split.errors import BundleError, DamagedError, DscError
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

FORMAT = "dsc-split/memory"
VERSION = 1
FOLDER = "memory"
"""Folder in the bundle."""
MEASURED, BUILDER, ESTIMATED = "measured", "builder", "estimated"
"""Where a number is from: a process that held it, what the builder of the engines said, or other numbers."""
TIMES_ONLY = ("host", "locked_sm_clock_mhz")
"""Keys of the run fingerprint that times depend on, and memory does not."""

_AGAIN = "Remove it, and measure again: dsc-split memory BUNDLE"


@dataclass(frozen=True, kw_only=True)
class EngineMemory:
    """What one engine takes that is loaded and has run, alone in its process."""

    choice: str
    """Name of the choice that it runs for."""
    graph: str
    """Path of the graph, relative to the bundle."""
    graph_digest: str
    """Digest of the graph with its weights."""
    batch: int
    """Batch size that it ran: the largest that was asked for and could be had."""
    resident_bytes: int | None
    """Memory of the machine; ``None`` where nothing ran."""
    gpu_bytes: int | None
    """Memory of the GPU; ``None`` where it has none, or its back-end does not tell."""
    load_ms: float | None
    """Milliseconds to load it where its library is in use: what a switch costs to a choice that is not kept."""
    first_run_ms: float | None
    """Milliseconds of the first run after that."""
    source: str
    """``measured`` or ``builder``."""
    reason: str = ""
    """Why there are no numbers; empty where there are."""

    @property
    def memory_bytes(self) -> int | None:
        """What counts against a budget: memory of the GPU where it runs on one, else that of the machine."""
        return self.resident_bytes if self.gpu_bytes is None else self.gpu_bytes


@dataclass(frozen=True, kw_only=True)
class SetMemory:
    """What the engines of several choices take that are kept loaded in one process."""

    choices: tuple[str, ...]
    """Names of the choices."""
    resident_bytes: int | None
    """Memory of the machine; ``None`` where nothing ran."""
    gpu_bytes: int | None
    """Memory of the GPU; ``None`` where it has none, or its back-end does not tell."""
    source: str
    """``measured``, ``builder`` or ``estimated``."""

    @property
    def memory_bytes(self) -> int | None:
        """What counts against a budget: memory of the GPU where they run on one, else that of the machine."""
        return self.resident_bytes if self.gpu_bytes is None else self.gpu_bytes


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """What the engines of one side take on one target."""

    pair_id: str
    """Identity of the pairs."""
    side: str
    """``device`` or ``server``."""
    target: str
    """Canonical text of the target."""
    fingerprint: str | None
    """SHA-256 of ``run_fingerprint``; ``None`` where nothing ran."""
    run_fingerprint: Mapping[str, Any] | None
    """What it was measured on; ``None`` where nothing ran."""
    engines: tuple[EngineMemory, ...]
    """One per choice that this side has a part in, the whole model first."""
    sets: tuple[SetMemory, ...]
    """Sets that were held together, that of all choices first."""

    def engine(self, choice: str) -> EngineMemory | None:
        """Find the engine of a choice, by name; ``None`` where there is none that has numbers."""
        found = (engine for engine in self.engines if engine.choice == choice and engine.memory_bytes is not None)
        return next(found, None)

    @functools.cached_property
    def shared_bytes(self) -> int:
        """What every engine needs and one process holds once: weights that are shared, and the library's own pages.

        With all n engines in one process, the sum of what each takes alone counts it n - 1 times too often.
        """
        together = next((item for item in self.sets if item.source == MEASURED and len(item.choices) > 1), None)
        if together is None:
            return 0
        alone = [self._alone_bytes[name] for name in together.choices]
        surplus = sum(alone) - (together.memory_bytes or 0)
        return min(max(0, surplus // (len(alone) - 1)), *alone)

    def hold(self, choices: Collection[str]) -> SetMemory:
        """Say what a set of choices takes: as it was measured, else estimated.

        The estimate is the sum of what each takes alone, with what is shared counted once, and at most what a larger
        set took that was measured.

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

    def to_json(self) -> dict[str, Any]:
        """Give the file's form, with the digest of its own body."""
        body = {
            "format": FORMAT,
            "version": VERSION,
            "pair_id": self.pair_id,
            "side": self.side,
            "target": self.target,
            "fingerprint": self.fingerprint,
            "run_fingerprint": None if self.run_fingerprint is None else dict(self.run_fingerprint),
            "shared_bytes": self.shared_bytes,
            "engines": [asdict(engine) for engine in self.engines],
            "sets": [{**asdict(item), "choices": list(item.choices)} for item in self.sets],
        }
        return {**body, "body_sha256": body_digest(body)}

    @classmethod
    def parse(cls, data: bytes, name: str) -> MemoryReport:
        """Read a report's file form.

        Args:
            data: The file.
            name: What it is called, for messages.

        Raises:
            DamagedError: It is no report, was changed since it was written, or is of a newer version.
        """
        what = f"memory report {name!r}"
        document = read_json(data, what, DamagedError)
        if document.get("format") != FORMAT or document.get("version") != VERSION:
            found = f"{document.get('format')!r} version {document.get('version')!r}"
            raise DamagedError(f"{what} is {found}; {FORMAT!r} version {VERSION} was expected. {_AGAIN}")
        if document.pop("body_sha256", None) != body_digest(document):
            raise DamagedError(f"{what} does not hold what its own SHA-256 says: it was changed or cut short. {_AGAIN}")
        try:
            _REPORT(document, "")
            _check_sets(document)
        except DamagedError as e:
            raise DamagedError(f"{what}: {e} {_AGAIN}") from e
        known = ("pair_id", "side", "target", "fingerprint", "run_fingerprint")
        return cls(
            **{key: document[key] for key in known},
            engines=tuple(EngineMemory(**_only(item, EngineMemory)) for item in document["engines"]),
            sets=tuple(
                SetMemory(**{**_only(item, SetMemory), "choices": tuple(item["choices"])}) for item in document["sets"]
            ),
        )


_BYTES = {"resident_bytes": or_null(count), "gpu_bytes": or_null(count)}
_REPORT = fields(
    {
        "pair_id": text,
        "side": one_of(*SIDES),
        "target": text,
        "fingerprint": text,
        "run_fingerprint": some_object,
        "engines": items(
            fields(
                {
                    "choice": text,
                    "graph": text,
                    "graph_digest": text,
                    "batch": positive,
                    **_BYTES,
                    "load_ms": or_null(number),
                    "first_run_ms": or_null(number),
                    "source": one_of(MEASURED),
                }
            )
        ),
        "sets": items(fields({"choices": items(text, at_least=1), **_BYTES, "source": one_of(MEASURED)})),
    }
)


def _by_batch(value: Any, where: str) -> None:
    entries(count)(value, where)
    if not value or not all(size.isascii() and size.isdigit() for size in value):
        fail(value, where, "bytes by batch size")


_BUILT = fields({"activation_bytes": _by_batch, "weights_bytes": count})


def _check_sets(document: Mapping[str, Any]) -> None:
    """Refuse sets of choices that have no numbers of their own."""
    known = {
        item["choice"] for item in document["engines"] if (item["resident_bytes"], item["gpu_bytes"]) != (None, None)
    }
    for i, item in enumerate(document["sets"]):
        for k, name in enumerate(item["choices"]):
            if name not in known:
                fail(name, f"sets[{i}].choices[{k}]", "a choice whose engine has numbers")


def _only(document: Mapping[str, Any], cls: type[EngineMemory] | type[SetMemory]) -> dict[str, Any]:
    """Give what a record has; unknown keys are ignored."""
    return {key: value for key, value in document.items() if key in cls.__dataclass_fields__}


# ---- in a bundle -------------------------------------------------------------------------------------------


def choice_name(graph: SideGraph, side: str) -> str:
    """Name the choice that a graph of a side runs for."""
    if graph.split is not None:
        return graph.split.name
    return NO_OFFLOAD if side == "device" else FULL_OFFLOAD


def save_memory(bundle: Bundle, report: MemoryReport) -> Path:
    """Write what was measured to ``memory/SIDE-FINGERPRINT.json``; hold the bundle's lock around this.

    Raises:
        DscError: It cannot be written.
    """
    bundle.unseal()
    folder = bundle.path / FOLDER
    try:
        folder.mkdir(exist_ok=True)
    except OSError as e:
        raise DscError(f"cannot make folder {str(folder)!r}: {e.strerror or e}.") from e
    path = folder / f"{report.side}-{str(report.fingerprint)[:12]}.json"
    write_bytes(path, canonical_json(report.to_json()) + b"\n")
    logger.info("memory: %s", path)
    return path


def load_memory(bundle: Bundle, side: str, part: Side) -> MemoryReport | None:
    """Find what the engines of a table's side take: as measured there, else as the builder of the engines said.

    Args:
        bundle: The bundle.
        side: ``device`` or ``server``.
        part: That side of the table.

    Returns:
        Engines of graphs that the bundle no longer has are not in it; ``None`` where there are no numbers.

    Raises:
        DamagedError: A report is damaged.
    """
    digests = {bundle.graph_digest(graph.path) for graph in side_graphs(bundle, side, verify=False)}
    for name in bundle.storage.names():
        if not name.startswith(f"{FOLDER}/{side}-"):
            continue
        report = MemoryReport.parse(bundle.read_result(name), name)
        if report.side == side and _is_measured_on(report, part):
            return _without_strangers(report, digests)
    return builder_memory(bundle, side, part.target)


def _is_measured_on(report: MemoryReport, part: Side) -> bool:
    """Tell whether memory was measured on what a side of a table names; the host and a clock do not matter."""
    if report.fingerprint == part.fingerprint:
        return True
    if report.run_fingerprint is None or part.run_fingerprint is None:
        return False
    return _without_times(report.run_fingerprint) == _without_times(part.run_fingerprint)


def _without_times(run_fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in run_fingerprint.items() if key not in TIMES_ONLY}


def _without_strangers(report: MemoryReport, digests: Collection[str]) -> MemoryReport | None:
    """Leave out engines of other graphs, and the sets that they were in."""
    engines = tuple(engine for engine in report.engines if engine.graph_digest in digests)
    left = {engine.choice for engine in engines}
    sets = tuple(item for item in report.sets if left.issuperset(item.choices))
    return replace(report, engines=engines, sets=sets) if engines else None


def builder_memory(bundle: Bundle, side: str, target: str, batch: int | None = None) -> MemoryReport | None:
    """Say what engines take from what their builder said: weights and activations, each engine with its own.

    Args:
        bundle: The bundle.
        side: ``device`` or ``server``.
        target: Canonical text of the target.
        batch: Largest batch size that is run; ``None``: the largest that an engine was built for.

    Returns:
        ``None`` where the manifest has no such numbers.
    """
    entry = recorded_target(bundle, side, target) or {}
    engines = []
    for graph in side_graphs(bundle, side, verify=False):
        built = [item for item in entry.get("engines", ()) if item["graph"] == graph.path and item["memory"]]
        if not built:
            continue
        largest = max(item["profile"][2] for item in built)
        most = largest if batch is None else min(batch, largest)
        used = min((item for item in built if item["profile"][2] >= most), key=lambda item: int(item["profile"][2]))
        engines.append(
            EngineMemory(
                choice=choice_name(graph, side),
                graph=graph.path,
                graph_digest=bundle.graph_digest(graph.path),
                batch=most,
                resident_bytes=None,
                gpu_bytes=_built_bytes(bundle, used, most),
                load_ms=None,
                first_run_ms=None,
                source=BUILDER,
            )
        )
    if not engines:
        return None
    return MemoryReport(
        pair_id=bundle.manifest["pair_id"],
        side=side,
        target=target,
        fingerprint=None,
        run_fingerprint=None,
        engines=tuple(engines),
        sets=(),
    )


def _built_bytes(bundle: Bundle, item: Mapping[str, Any], batch: int) -> int:
    """Add weights and activations at a batch size, or at the next larger one that the builder told of."""
    memory = item["memory"]
    try:
        _BUILT(memory, "memory")
    except DamagedError as e:
        raise BundleError(
            f"manifest of {str(bundle.path)!r}, engine {item['path']!r}: {e} Build it again: dsc-split build"
        ) from e
    told = {int(size): value for size, value in memory["activation_bytes"].items()}
    enough = [size for size in told if size >= batch]
    return int(memory["weights_bytes"] + told[min(enough) if enough else max(told)])
