"""Cells: each is one measurement in one file, which is named after the question that it answers."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import UNSET, Meta, UnsetType

from dsc_split._support.files import make_folder, write_bytes
from dsc_split._support.hashing import sha256_text
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
from dsc_split.errors import DamagedError

if TYPE_CHECKING:
    from dsc_split.bundle import Bundle

__all__ = [
    "FORMAT",
    "MEASURED_STATUSES",
    "PROTOCOL_VERSION",
    "STATUSES",
    "VERSION",
    "Cell",
    "CellEnvironment",
    "CellFile",
    "CellSettings",
    "CellStore",
    "FirstCalls",
    "Question",
    "Round",
    "Statistics",
]

logger = logging.getLogger(__name__)

FOLDER = "cells"
"""Folder of the cells in a bundle."""
FORMAT: Literal["dsc-split/cell"] = "dsc-split/cell"
VERSION: Literal[1] = 1
PROTOCOL_VERSION = 1
"""Version of the way of measuring; cells of another version answer another question."""
MEASURED_STATUSES = ("ok", "unstable")
STATUSES = (*MEASURED_STATUSES, "out-of-memory", "failed")


@dataclass(frozen=True, kw_only=True)
class Question:
    """The question that a cell answers: how long does this graph take on this target?"""

    graph_digest: str
    """Digest of the graph with its weights, 64 hexadecimal digits."""
    fingerprint: str
    """SHA-256 of the target's run fingerprint, 64 hexadecimal digits."""
    batch: int
    """Batch size."""
    period_ms: float | None
    """Milliseconds between the starts of two calls; ``None``: each call starts right after the last."""

    def to_json(self) -> dict[str, object]:
        """Return the cell file's form."""
        period_ms = None if self.period_ms is None else float(self.period_ms)
        return {
            "graph_digest": self.graph_digest,
            "fingerprint": self.fingerprint,
            "batch": self.batch,
            "protocol": {"version": PROTOCOL_VERSION, "period_ms": period_ms},
        }

    @property
    def key(self) -> str:
        """Name of the cell's file: 64 hexadecimal digits."""
        return sha256_text(FORMAT, canonical_json(self.to_json()))


Milliseconds = Annotated[float, Meta(ge=0, le=1e12)]
"""At most 30 years."""


class FirstCalls(Record):
    """Statistics of the first calls after each pause."""

    n: Count
    """How many there were."""
    median: Milliseconds
    """Their median."""
    p95: Milliseconds
    """Their 95th percentile."""


class Statistics(Record):
    """Statistics of a cell's calls, in milliseconds; those of compute time have only the first four."""

    n: Count | UnsetType = UNSET
    """How many calls there were."""
    median: Milliseconds
    """Their median."""
    p95: Milliseconds
    """Their 95th percentile."""
    ci: tuple[Milliseconds, Milliseconds]
    """95 % confidence interval of the median."""
    p90: Milliseconds | UnsetType = UNSET
    """Their 90th percentile."""
    p99: Milliseconds | UnsetType = UNSET
    """Their 99th percentile."""
    mean: Milliseconds | UnsetType = UNSET
    """Their mean."""
    std: Milliseconds | UnsetType = UNSET
    """Their standard deviation."""
    first_after_pause: FirstCalls | UnsetType | None = UNSET
    """Statistics of the first calls after each pause, which count nowhere else; ``None`` if there was no pause."""

    def __post_init__(self) -> None:
        """Refuse an interval whose ends are in the wrong order."""
        if self.ci[0] > self.ci[1]:
            raise ValueError(f"ci is {list(self.ci)}; the lower end first was expected.")


class Round(Record):
    """Some calls of one engine in a row, as measured; not every engine reports everything."""

    started: Text
    """When it began: ISO 8601, UTC."""
    samples_ms: Annotated[tuple[Milliseconds, ...], Meta(min_length=1)]
    """Milliseconds of each call."""
    first_after_pause_ms: tuple[Milliseconds, ...]
    """Milliseconds of the first call after a pause, which is no sample; empty if there was no pause."""
    compute_ms: tuple[Milliseconds, ...] | UnsetType = UNSET
    """Milliseconds of each call between the engine's events on its device."""
    device_state: Facts | UnsetType = UNSET
    """State of the device after the round."""
    additional: bool | UnsetType = UNSET
    """Whether the cell was precise enough already, and the engine was timed again beside others."""


class CellSettings(Record):
    """How a cell was measured."""

    memory_limit_bytes: Count
    """Memory limit of the engines that were timed together."""
    precision_goal: float | UnsetType = UNSET
    """Largest allowed half-width of the 95 % confidence interval, as a share of the median."""
    time_limit_s: float | UnsetType = UNSET
    """Seconds after which the cell ends, precise or not."""
    period_ms: float | UnsetType | None = UNSET
    """Milliseconds between the starts of two calls; ``None`` where they follow at once."""
    lock_clocks_mhz: float | UnsetType | None = UNSET
    """Locked clock of the GPU's SMs in MHz; ``None`` if it was not locked."""
    warm_up_limit_ms: float | UnsetType = UNSET
    """Longest warm-up in milliseconds; two calls are made in any case."""
    round_ms: float | UnsetType = UNSET
    """Milliseconds that a round should take."""
    min_rounds: int | UnsetType = UNSET
    """Rounds that a cell needs before it may stop."""
    timer: str | UnsetType = UNSET
    """The clock."""
    first_call_of_a_round: str | UnsetType = UNSET
    """What happens to it, in words."""
    inputs: str | UnsetType = UNSET
    """The inputs of the engine, in words."""
    threads: int | UnsetType | None = UNSET
    """Threads that the target asks for; ``None``: the library decides."""
    warm_up: Facts | UnsetType = UNSET
    """Facts about the last warm-up; empty if there was none."""


class CellEnvironment(Record):
    """The machine on which a cell was measured, and its load."""

    host: str | UnsetType = UNSET
    """Name of the machine."""
    system: str | UnsetType = UNSET
    """Its operating system."""
    versions: dict[str, str] | UnsetType = UNSET
    """Versions of the libraries."""
    start: Facts | UnsetType = UNSET
    """State of the machine, and of its GPU, when the engine was loaded."""
    end: Facts | UnsetType = UNSET
    """State of the machine, and of its GPU, when the cell was done."""
    engine: Facts | UnsetType = UNSET
    """Facts that the engine reports."""
    marks: tuple[Text, ...] | UnsetType = UNSET
    """What was wrong with the device: ``throttled: sw_thermal_slowdown``."""


class _Protocol(Record):
    """The way of measuring that is part of the question."""

    version: Count = PROTOCOL_VERSION
    """Version of how it is measured."""
    period_ms: NotNegative | None
    """Milliseconds between the starts of two calls; ``None`` where they follow at once."""


class _AskedQuestion(Record):
    """The question in a cell's file."""

    graph_digest: Text
    """Digest of the graph with its weights."""
    fingerprint: Text
    """SHA-256 of the target's run fingerprint."""
    batch: Positive
    """Batch size."""
    protocol: _Protocol
    """How it is measured."""


class CellFile(Record):
    """A cell's file."""

    format: Literal["dsc-split/cell"] = FORMAT
    """Kind of the document."""
    version: Literal[1] = VERSION
    """Version of the format."""
    key: Text
    """The file's name without its suffix: a digest of the question."""
    question: _AskedQuestion
    """What the cell answers."""
    graph: Text
    """Path of the graph, relative to the bundle."""
    target: Text
    """Canonical text of the target."""
    run_fingerprint: Facts
    """Everything that the times depend on."""
    emulated: Facts | None
    """What was emulated, and how; null if nothing was."""
    status: Literal["ok", "unstable", "out-of-memory", "failed"]
    """How it ended."""
    reason: Text
    """Why it ended."""
    latency_ms: Statistics | None = None
    """Statistics, host to host; null if nothing was measured."""
    compute_ms: Statistics | None = None
    """The same of the time on the device."""
    rounds: tuple[Round, ...] = ()
    """Raw samples."""
    settings: CellSettings
    """How it was measured."""
    environment: CellEnvironment
    """Where and under what load."""

    def __post_init__(self) -> None:
        """Refuse a cell with a measured status and no times."""
        if self.status in MEASURED_STATUSES and (self.latency_ms is None or not self.rounds):
            raise ValueError(f"latency_ms, rounds: the cell is {self.status!r} and has no times.")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement: one engine at one batch size."""

    question: Question
    """What it answers."""
    graph: str
    """Path of the graph, relative to the bundle."""
    target: str
    """Canonical text of the target."""
    run_fingerprint: Facts
    """Everything that the times depend on."""
    emulated: Facts | None
    """``{"slowdown", "how"}``; ``None`` if nothing was emulated."""
    status: str
    """``ok``, ``unstable``, ``out-of-memory`` or ``failed``."""
    reason: str
    """Why it ended: ``precision reached``, ``time limit``, or the error."""
    latency_ms: Statistics | None
    """Statistics in milliseconds, host to host, slowdown included; ``None`` if nothing was measured."""
    compute_ms: Statistics | None = None
    """The same for the time between the engine's events on its device; ``None`` if the engine has none."""
    rounds: tuple[Round, ...]
    """Raw samples by round, as measured."""
    settings: CellSettings
    """How it was measured."""
    environment: CellEnvironment
    """The machine on which it was measured, and its load."""

    @property
    def batch(self) -> int:
        """Batch size."""
        return self.question.batch

    @property
    def measured_at(self) -> str:
        """When its last round began, in UTC, so that texts sort by time; empty if nothing was measured."""
        return self.rounds[-1].started if self.rounds else ""

    @property
    def marks(self) -> tuple[str, ...]:
        """What was wrong with the device: ``throttled: sw_thermal_slowdown``; empty if nothing was."""
        marks = self.environment.marks
        return () if isinstance(marks, UnsetType) else marks

    @property
    def samples_ms(self) -> list[tuple[float, ...]]:
        """Raw samples by round, in milliseconds."""
        return [item.samples_ms for item in self.rounds]

    def to_json(self) -> dict[str, object]:
        """Return the file's form, with the digest of its own body."""
        own = ("graph", "target", "run_fingerprint", "emulated", "status", "reason")
        parts = ("latency_ms", "compute_ms", "rounds", "settings", "environment")
        body = {
            "format": FORMAT,
            "version": VERSION,
            "key": self.question.key,
            "question": self.question.to_json(),
            **{name: getattr(self, name) for name in own},
            **{name: to_document(getattr(self, name)) for name in parts},
        }
        return {**body, "body_sha256": body_digest(body)}

    def encode(self) -> bytes:
        """Return the bytes of the file."""
        return canonical_json(self.to_json()) + b"\n"

    @classmethod
    def read(cls, path: Path) -> Cell:
        """Read a cell's file.

        Raises:
            DamagedError: It is no cell, was changed after it was written, or is of a newer version.
        """
        return cls.parse(path, path.stem, f"cell {str(path)!r}")

    @classmethod
    def parse(cls, source: Path | bytes, key: str, what: str) -> Cell:
        """Read a cell's file, or the bytes of one.

        Args:
            source: The file, or its bytes.
            key: Its name without the suffix: the key of the question that it must answer.
            what: A description of it, for messages.

        Raises:
            DamagedError: It is no cell, was changed after it was written, or is of a newer version.
        """
        document = read_json(source, "cell" if isinstance(source, Path) else what, DamagedError)
        if document.get("format") != FORMAT or document.get("version") != VERSION:
            found = f"{document.get('format')!r} version {document.get('version')!r}"
            raise DamagedError(f"{what} is {found}; {FORMAT!r} version {VERSION} was expected.")
        stated = document.pop("body_sha256", None)
        if stated != body_digest(document):
            raise DamagedError(f"{what} does not hold what its own SHA-256 says: it was changed or cut short.")
        try:
            file = read_record(document, CellFile)
        except DamagedError as e:
            raise DamagedError(f"{what}: {e}") from e
        asked = file.question
        question = Question(
            graph_digest=asked.graph_digest,
            fingerprint=asked.fingerprint,
            batch=asked.batch,
            period_ms=asked.protocol.period_ms,
        )
        if question.to_json() != document["question"] or not question.key == file.key == key:
            raise DamagedError(f"{what} answers another question than its name says.")
        return cls(question=question, **{name: getattr(file, name) for name in _FIELDS if name != "question"})


_FIELDS = tuple(field.name for field in dataclasses.fields(Cell))


class CellStore:
    """The cells of a bundle, each in ``cells/KEY.json``; those of a packed bundle are read in place.

    A damaged file is ignored, with a warning.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle

    def path(self, question: Question) -> Path:
        """Return the path of the answer to ``question``."""
        return self._bundle.path / self.name(question)

    @staticmethod
    def name(question: Question) -> str:
        """Return the path of the answer to ``question``, relative to the bundle."""
        return f"{FOLDER}/{question.key}.json"

    def names(self) -> tuple[str, ...]:
        """List the files of all cells, relative to the bundle."""
        return tuple(name for name in self._bundle.storage.names() if re.fullmatch(rf"{FOLDER}/[^/]+\.json", name))

    def get(self, question: Question) -> Cell | None:
        """Read the answer to ``question``; ``None`` if there is none, or it is damaged."""
        name = self.name(question)
        return self._read_or_warn(name) if self._bundle.has(name) else None

    def read(self, name: str) -> Cell:
        """Read the cell of a file.

        Raises:
            DamagedError: It cannot be read, is no cell, was changed after it was written, or is of a newer version.
        """
        data = self._bundle.read_result(name)
        return Cell.parse(data, PurePosixPath(name).stem, f"cell {name!r} of {str(self._bundle.path)!r}")

    def put(self, cell: Cell) -> None:
        """Write a cell, as a whole or not at all, and replace an older answer; hold the bundle's lock around this.

        Raises:
            DscError: It cannot be written; the older answer is still there.
            UsageError: The bundle is packed.
        """
        folder = self._bundle.file(FOLDER)
        self._bundle.unseal()
        make_folder(folder)
        path = self.path(cell.question)
        write_bytes(path, cell.encode())
        logger.info("cell %s: %s batch %d on %s: %s", path.name[:12], cell.graph, cell.batch, cell.target, cell.status)

    def all(self) -> Iterator[Cell]:
        """Read every undamaged cell, in the order of their names."""
        for name in self.names():
            cell = self._read_or_warn(name)
            if cell is not None:
                yield cell

    def remove_partial(self) -> None:
        """Remove files that a killed process left half-written; hold the bundle's lock around this."""
        for path in (self._bundle.path / FOLDER).glob(".*.partial"):
            path.unlink(missing_ok=True)

    def _read_or_warn(self, name: str) -> Cell | None:
        try:
            return self.read(name)
        except DamagedError as e:
            logger.warning("%s It is ignored.", e)
            return None
