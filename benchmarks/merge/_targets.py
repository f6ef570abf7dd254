"""Merge the targets and engines of several copies of a bundle."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, TypeVar

from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from dsc_split._support.records import to_document
from dsc_split._support.strict_json import canonical_json
from dsc_split.benchmarks.tables._side_times import runs_build
from dsc_split.bundles._records import EngineEntry, FileEntry, TargetEntry
from dsc_split.engines._fingerprint import kind_of
from dsc_split.errors import BundleError

if TYPE_CHECKING:
    from dsc_split.benchmarks.cells._cells import Cell
    from dsc_split.bundle import Bundle

__all__ = ["CopyFile", "TargetMerger", "Variants", "choose", "encoded"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class CopyFile:
    """A file of one of the copies."""

    bundle: Bundle
    """The copy."""
    path: str
    """Path of the file, relative to that bundle."""
    listed: FileEntry
    """The file's entry in that manifest."""

    @property
    def is_held(self) -> bool:
        """Whether the bundle has the file, and did not leave it out."""
        return self.path in self.bundle.manifest.files


_OURS = {"ours": True, "theirs": False}

Variants = Sequence[tuple[int, T]]
"""Versions of one thing, the newest last: the number of the copy, 0 for the bundle to merge into, and the version."""


def choose(variants: Variants[T], prefer: str | None, age: Callable[[int, T], object]) -> tuple[int, T]:
    """Choose one version: by ``prefer``, then the newest.

    Args:
        variants: The versions.
        prefer: ``ours``, ``theirs`` or ``newer``; ``None`` counts as ``newer``.
        age: Returns something that can be compared, and is larger for newer versions.
    """
    fitting = [item for item in variants if prefer not in _OURS or (item[0] == 0) is _OURS[prefer]] or list(variants)
    return max(fitting, key=lambda item: (age(*item), item[0]))


def encoded(record: object) -> bytes:
    """Return a record's canonical JSON, to compare and to sort records."""
    return canonical_json(to_document(record))


@dataclass(kw_only=True)
class TargetMerger:
    """Merges the manifests' entries of targets, and lists the engine files that they need."""

    copies: Sequence[Bundle]
    """The bundle to merge into, then the others, the newest last."""
    cells: Sequence[Cell]
    """The merged cells: they show which entry is the newest."""
    prefer: str | None
    """Whose engines win; ``None``: nobody's, all contradictions are conflicts."""
    conflicts: list[str] = field(default_factory=list)
    """The conflicts, in words."""
    engines: dict[str, CopyFile] = field(default_factory=dict)
    """Engine files by the path that they get in the bundle."""

    def unite(self, side: str) -> tuple[TargetEntry, ...]:
        """Merge the entries of a side: new ones first, then those of the bundle in its order."""
        variants: dict[tuple[str, ...], list[tuple[int, TargetEntry]]] = {}
        for number, bundle in enumerate(self.copies):
            if number and bundle.manifest.side not in (None, side):
                continue  # a part only repeats the other side's entries
            for entry in bundle.manifest.targets.of(side):
                if number == 0 or not entry.built or self._is_held(number, entry):
                    variants.setdefault(_target_key(entry), []).append((number, entry))
        own = list(dict.fromkeys(map(_target_key, self.copies[0].manifest.targets.of(side))))
        united = {key: self._unite_entries(side, found) for key, found in variants.items()}
        new = sorted(
            (entry for key, entry in united.items() if key not in own),
            key=lambda entry: (self._measured_at(entry), entry.target, entry.id),
        )
        return (*new, *(united[key] for key in own))

    def _unite_entries(self, side: str, variants: Variants[TargetEntry]) -> TargetEntry:
        """Merge the entries of one target and kind."""
        built = [(number, entry) for number, entry in variants if entry.is_compiled]
        if not built:
            newest = max(variants, key=lambda item: (self._measured_at(item[1]), item[0] == 0, encoded(item[1])))[1]
            return _with_check(newest, variants)
        holding = [item for item in built if self._is_held(*item) or not item[1].built] or built
        entry = self._choose_or_conflict(holding, "", self._differences(side, holding))[1]
        alike = [item for item in built if _build_key(item[1]) == _build_key(entry)]
        slots: dict[tuple[object, ...], list[tuple[int, EngineEntry]]] = {}
        for copy, found in alike:
            for engine in found.built:
                slots.setdefault((engine.graph, *engine.profile), []).append((copy, engine))
        order = {path: i for i, path in enumerate(self.copies[0].manifest.graphs)}
        engines = sorted(
            (self._choose_engine(slot) for slot in slots.values()),
            key=lambda engine: (order.get(engine.graph, len(order)), engine.graph, engine.profile),
        )
        graphs = {engine.graph for engine in engines}
        failed = {
            failure.graph: failure
            for _, found in alike
            for failure in found.failures
            if failure.graph not in graphs or failure.graph in {engine.graph for engine in found.built}
        }
        united = replace(entry, engines=tuple(engines), failed=tuple(failed[key] for key in sorted(failed)))
        return _with_check(united, alike)

    def _choose_engine(self, variants: Variants[EngineEntry]) -> EngineEntry:
        """Choose the engine of a graph and profile, and the path of its file in the bundle."""
        held = [item for item in variants if item[1].path in self.copies[item[0]].manifest.files] or variants
        digests = {self._file_entry(*item).sha256 for item in held}
        words = ""
        if len(digests) > 1:
            each = (f"SHA-256 {self._file_entry(*item).sha256[:12]} in {self._copy_name(item[0])}" for item in held)
            words = f"engine {held[0][1].path!r}: {', '.join(each)}"
        number, engine = self._choose_or_conflict(held, words, [])
        listed = self._file_entry(number, engine)
        if number and self._has_file(variants, listed.sha256):
            number, engine = variants[0]
        path = self._free_path(engine.path, listed.sha256)
        self.engines[path] = CopyFile(bundle=self.copies[number], path=engine.path, listed=listed)
        return replace(engine, path=path)

    def _has_file(self, variants: Variants[EngineEntry], sha256: str) -> bool:
        """Return whether the bundle has the same file already."""
        number, engine = variants[0]
        listed = self.copies[0].manifest.files.get(engine.path)
        return number == 0 and listed is not None and listed.sha256 == sha256

    def _choose_or_conflict(self, variants: Variants[T], words: str, more: Sequence[str]) -> tuple[int, T]:
        """Choose a version; add the given conflicts if nobody is preferred."""
        found = [*([words] if words else []), *more]
        if found and self.prefer is None:
            self.conflicts += found
        return choose(variants, self.prefer, lambda copy, _: self.copies[copy].manifest.revision)

    def _differences(self, side: str, variants: Variants[TargetEntry]) -> list[str]:
        """List the differences between fingerprints and build options of a target's engines, in words."""
        if len({_build_key(entry) for _, entry in variants}) < 2:
            return []
        words = []
        for what in ("fingerprint", "options"):
            facts = [(copy, _plain_facts(entry, what)) for copy, entry in variants]
            if len({canonical_json(each) for _, each in facts}) > 1:
                keys = sorted({key for _, each in facts for key in each})
                keys = [key for key in keys if len({canonical_json(each.get(key)) for _, each in facts}) > 1]
                each = (
                    f"{', '.join(f'{key} {values.get(key)!r}' for key in keys)} in {self._copy_name(copy)}"
                    for copy, values in facts
                )
                words.append(f"the {side}'s engines for {variants[0][1].target!r}: {what}: {'; '.join(each)}")
        return words

    def _free_path(self, path: str, sha256: str) -> str:
        """Return a file's path in the bundle; it is another one if the path belongs to a file with other bytes."""
        ours, coming = self.copies[0].manifest.files.get(path), self.engines.get(path)
        taken = {ours.sha256} if ours else set()
        taken |= {coming.listed.sha256} if coming else set()
        if taken <= {sha256}:
            return path
        plain = PurePosixPath(path)
        return str(plain.with_name(f"{plain.stem}-{sha256[:12]}{plain.suffix}"))

    def _is_held(self, number: int, entry: TargetEntry) -> bool:
        """Return whether a copy has at least one of an entry's engines."""
        return any(engine.path in self.copies[number].manifest.files for engine in entry.built)

    def _file_entry(self, number: int, engine: EngineEntry) -> FileEntry:
        """Return a manifest's entry of an engine's file.

        Raises:
            BundleError: It does not list it, or not as an engine.
        """
        listed = self.copies[number].manifest.all_files.get(engine.path)
        if listed is None:
            raise BundleError(
                f"the manifest of {self._copy_name(number)} does not list {engine.path!r}. Build or copy it again."
            )
        if listed.role != "engine":
            role = None if isinstance(listed.role, UnsetType) else listed.role
            raise BundleError(
                f"the manifest of {self._copy_name(number)} names {engine.path!r} as an engine of a target, and lists "
                f"it with role {role!r}; 'engine' was expected. Build or copy it again."
            )
        return listed

    def _measured_at(self, entry: TargetEntry) -> str:
        """Return when the newest cell of a target and kind was measured; empty if there is none."""
        fitting = [
            cell.measured_at
            for cell in self.cells
            if cell.target == entry.target and runs_build(cell.run_fingerprint, entry.fingerprint)
        ]
        return max(fitting, default="")

    def _copy_name(self, number: int) -> str:
        return repr(str(self.copies[number].path))


def _target_key(entry: TargetEntry) -> tuple[str, ...]:
    """Return a key that is the same for entries of one target and kind."""
    return (entry.target, *map(repr, kind_of(entry.fingerprint)))


def _plain_facts(entry: TargetEntry, what: str) -> dict[str, object]:
    """Return an entry's fingerprint or options as plain data; empty if it has none."""
    value = getattr(entry, what)
    facts: dict[str, object] = {} if value is UNSET else json.loads(encoded(value))
    return facts


def _build_key(entry: TargetEntry) -> bytes:
    """Return an entry's fingerprint and options, as bytes to compare."""
    return canonical_json([_plain_facts(entry, "fingerprint"), _plain_facts(entry, "options")])


def _with_check(entry: TargetEntry, variants: Iterable[tuple[int, TargetEntry]]) -> TargetEntry:
    """Add a check's note if the entry has none and another entry of the same build has one."""
    notes = [item.check for _, item in variants if item.check is not UNSET and _build_key(item) == _build_key(entry)]
    return entry if entry.check is not UNSET or not notes else replace(entry, check=max(notes, key=encoded))
