"""Cells: one measurement each, in one file each, named by the question that it answers."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from dsc_split._support.checks import count, fail, fields, items, number, one_of, or_null, positive, some_object, text
from dsc_split._support.files import body_digest, canonical_json, read_json, sha256_text, write_bytes
from dsc_split.errors import DamagedError, DscError

if TYPE_CHECKING:
    from dsc_split.bundle import Bundle

__all__ = ["FORMAT", "PROTOCOL_VERSION", "STATUSES", "VERSION", "Cell", "CellStore", "Question"]

logger = logging.getLogger(__name__)

FOLDER = "cells"
"""Folder of the cells in a bundle."""
FORMAT = "dsc-split/cell"
VERSION = 1
PROTOCOL_VERSION = 1
"""Version of how it is measured; cells of another version answer another question."""
MEASURED_STATUSES = ("ok", "unstable")
STATUSES = (*MEASURED_STATUSES, "out-of-memory", "failed")


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a cell answers."""

    graph_digest: str
    """Digest of the graph with its weights, 64 hexadecimal digits."""
    fingerprint: str
    """SHA-256 of the target's run fingerprint, 64 hexadecimal digits."""
    batch: int
    """Batch size."""
    period_ms: float | None
    """Milliseconds between the starts of two calls; ``None`` where they follow at once."""

    def to_json(self) -> dict[str, Any]:
        """Give the cell file's form."""
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


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement: one engine at one batch size."""

    question: Question
    """What it answers."""
    graph: str
    """Path of the graph, relative to the bundle."""
    target: str
    """Canonical text of the target."""
    run_fingerprint: dict[str, Any]
    """What the timing depends on."""
    emulated: dict[str, Any] | None
    """``{"slowdown", "how"}``, or ``None`` where the times are this machine's own."""
    status: str
    """``ok``, ``unstable``, ``out-of-memory`` or ``failed``."""
    reason: str
    """Why it ended: ``precision reached``, ``time limit``, or the error."""
    latency_ms: dict[str, Any] | None
    """Statistics in milliseconds, host to host, slowdown included; ``None`` where nothing was measured."""
    compute_ms: dict[str, Any] | None = None
    """The same of the time between the engine's events on its device; ``None`` where it does not tell."""
    rounds: tuple[dict[str, Any], ...]
    """Raw samples by round, as measured: ``{"started", "samples_ms", "first_after_pause_ms"}``, and
    ``compute_ms`` and ``device_state`` where the engine and its back-end tell."""
    settings: dict[str, Any]
    """How it was measured."""
    environment: dict[str, Any]
    """Where and under what load it was measured."""

    @property
    def batch(self) -> int:
        """Batch size."""
        return self.question.batch

    @property
    def measured_at(self) -> str:
        """When its last round began; in UTC, so that text compares as time does. Empty where nothing was measured."""
        return str(self.rounds[-1]["started"]) if self.rounds else ""

    @property
    def marks(self) -> list[str]:
        """What was wrong with the device meanwhile: ``throttled: sw_thermal_slowdown``; empty where all was well."""
        return list(self.environment.get("marks", ()))

    @property
    def samples_ms(self) -> list[list[float]]:
        """Raw samples by round, in milliseconds."""
        return [item["samples_ms"] for item in self.rounds]

    def to_json(self) -> dict[str, Any]:
        """Give the file's form, with the digest of its own body."""
        body = {
            "format": FORMAT,
            "version": VERSION,
            "key": self.question.key,
            "question": self.question.to_json(),
            "graph": self.graph,
            "target": self.target,
            "run_fingerprint": self.run_fingerprint,
            "emulated": self.emulated,
            "status": self.status,
            "reason": self.reason,
            "latency_ms": self.latency_ms,
            "compute_ms": self.compute_ms,
            "rounds": list(self.rounds),
            "settings": self.settings,
            "environment": self.environment,
        }
        return {**body, "body_sha256": body_digest(body)}

    def encode(self) -> bytes:
        """Give the bytes of the file."""
        return canonical_json(self.to_json()) + b"\n"

    @classmethod
    def read(cls, path: Path) -> Cell:
        """Read a cell's file.

        Raises:
            DamagedError: It is no cell, was changed since it was written, or is of a newer version.
        """
        return cls.parse(path, path.stem, f"cell {str(path)!r}")

    @classmethod
    def parse(cls, source: Path | bytes, key: str, what: str) -> Cell:
        """Read a cell's file, or the bytes of one.

        Args:
            source: The file, or its bytes.
            key: Its name without the suffix: the key of the question that it must answer.
            what: What it is, in words, for messages.

        Raises:
            DamagedError: It is no cell, was changed since it was written, or is of a newer version.
        """
        document = read_json(source, "cell" if isinstance(source, Path) else what, DamagedError)
        if document.get("format") != FORMAT or document.get("version") != VERSION:
            found = f"{document.get('format')!r} version {document.get('version')!r}"
            raise DamagedError(f"{what} is {found}; {FORMAT!r} version {VERSION} was expected.")
        stated = document.pop("body_sha256", None)
        if stated != body_digest(document):
            raise DamagedError(f"{what} does not hold what its own SHA-256 says: it was changed or cut short.")
        try:
            _CELL(document, "")
            if document["status"] in MEASURED_STATUSES:
                _MEASUREMENT(document, "")
        except DamagedError as e:
            raise DamagedError(f"{what}: {e}") from e
        asked = document["question"]
        question = Question(
            graph_digest=asked["graph_digest"],
            fingerprint=asked["fingerprint"],
            batch=asked["batch"],
            period_ms=asked["protocol"]["period_ms"],
        )
        if question.to_json() != asked or not question.key == document["key"] == key:
            raise DamagedError(f"{what} answers another question than its name says.")
        measured = document["status"] in MEASURED_STATUSES
        return cls(
            question=question,
            latency_ms=document["latency_ms"] if measured else None,
            compute_ms=document.get("compute_ms") if measured else None,
            rounds=tuple(document["rounds"]) if measured else (),
            **{name: document[name] for name in _PLAIN_FIELDS},
        )


_PLAIN_FIELDS = (
    "graph",
    "target",
    "run_fingerprint",
    "emulated",
    "status",
    "reason",
    "settings",
    "environment",
)

MAX_MS = 1e12
"""A longer time, 30 years, is no measurement."""


def _milliseconds(value: Any, where: str) -> None:
    number(value, where)
    if value > MAX_MS:
        fail(value, where, f"at most {MAX_MS:g} ms")


def _interval(value: Any, where: str) -> None:
    items(_milliseconds, at_least=2, at_most=2)(value, where)
    if value[0] > value[1]:
        fail(value, where, "the lower end first")


_CELL = fields(
    {
        "key": text,
        "question": fields(
            {
                "graph_digest": text,
                "fingerprint": text,
                "batch": positive,
                "protocol": fields({"period_ms": or_null(number)}),
            }
        ),
        "graph": text,
        "target": text,
        "run_fingerprint": some_object,
        "emulated": or_null(some_object),
        "status": one_of(*STATUSES),
        "reason": text,
        "settings": fields({"memory_limit_bytes": count}),
        "environment": fields({}, {"marks": items(text), "engine": some_object}),
    }
)
_STATISTICS = fields({"median": _milliseconds, "p95": _milliseconds, "ci": _interval})
_MEASUREMENT = fields(
    {
        "latency_ms": _STATISTICS,
        "rounds": items(
            fields(
                {
                    "started": text,
                    "samples_ms": items(_milliseconds, at_least=1),
                    "first_after_pause_ms": items(_milliseconds),
                },
                {"compute_ms": items(_milliseconds), "device_state": some_object},
            ),
            at_least=1,
        ),
    },
    {"compute_ms": or_null(_STATISTICS)},
)


class CellStore:
    """The cells of a bundle, each in ``cells/KEY.json``; those of a packed bundle are read in place.

    A file that is damaged is left where it is, warned about, and counts as not there.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle

    def path(self, question: Question) -> Path:
        """Say where the answer to ``question`` lies."""
        return self._bundle.path / self.name(question)

    @staticmethod
    def name(question: Question) -> str:
        """Give the path of the answer to ``question``, relative to the bundle."""
        return f"{FOLDER}/{question.key}.json"

    def names(self) -> tuple[str, ...]:
        """List the files of all cells, relative to the bundle."""
        return tuple(name for name in self._bundle.storage.names() if re.fullmatch(rf"{FOLDER}/[^/]+\.json", name))

    def get(self, question: Question) -> Cell | None:
        """Read the answer to ``question``; ``None`` where there is none that can be read."""
        name = self.name(question)
        return self._read_or_warn(name) if self._bundle.has(name) else None

    def read(self, name: str) -> Cell:
        """Read the cell of a file.

        Raises:
            DamagedError: It cannot be read, is no cell, was changed since it was written, or is of a newer version.
        """
        data = self._bundle.read_result(name)
        return Cell.parse(data, PurePosixPath(name).stem, f"cell {name!r} of {str(self._bundle.path)!r}")

    def put(self, cell: Cell) -> None:
        """Write a cell, all or nothing, in place of an older answer; hold the bundle's lock around this.

        Raises:
            DscError: It cannot be written; the older answer is still there.
            UsageError: The bundle is packed.
        """
        folder = self._bundle.file(FOLDER)
        self._bundle.unseal()
        try:
            folder.mkdir(exist_ok=True)
        except OSError as e:
            raise DscError(f"cannot make folder {str(folder)!r}: {e.strerror or e}.") from e
        path = self.path(cell.question)
        write_bytes(path, cell.encode())
        logger.info("cell %s: %s batch %d on %s: %s", path.name[:12], cell.graph, cell.batch, cell.target, cell.status)

    def all(self) -> Iterator[Cell]:
        """Read every cell that can be read, in the order of their names."""
        for name in self.names():
            cell = self._read_or_warn(name)
            if cell is not None:
                yield cell

    def remove_partial(self) -> None:
        """Remove what a killed writer left half-written; hold the bundle's lock around this."""
        for path in (self._bundle.path / FOLDER).glob(".*.partial"):
            path.unlink(missing_ok=True)

    def _read_or_warn(self, name: str) -> Cell | None:
        try:
            return self.read(name)
        except DamagedError as e:
            logger.warning("%s It is ignored.", e)
            return None
