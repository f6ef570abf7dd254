"""Targets and engines that several copies of a bundle have, united."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from dsc_split._support.files import canonical_json
from dsc_split._support.records import to_document
from dsc_split.benchmarks.tables._side_times import runs_build
from dsc_split.bundles._records import EngineEntry, FileEntry, TargetEntry
from dsc_split.engines._fingerprint import kind_of
from dsc_split.errors import BundleError

if TYPE_CHECKING:
    from dsc_split.benchmarks.cells._cells import Cell
    from dsc_split.bundle import Bundle

__all__ = ["Found", "TargetMerger", "Variants", "choose", "encoded"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Found:
    """A file, and the bundle that has it."""

    bundle: Bundle
    """The bundle."""
    path: str
    """Where it lies there."""
    listed: FileEntry
    """What its manifest says of it."""

    @property
    def is_held(self) -> bool:
        """Whether the bundle holds the file, and did not leave it out."""
        return self.path in self.bundle.manifest.files


_OURS = {"ours": True, "theirs": False}

Variants = Sequence[tuple[int, T]]
"""What copies have: the number of the copy, 0 for the bundle that is merged into, the newest last; and the thing."""


def choose(variants: Variants[T], prefer: str | None, age: Callable[[int, T], Any]) -> tuple[int, T]:
    """Choose among what contradicts each other: by ``prefer``; among equals, the newest.

    Args:
        variants: What there is.
        prefer: ``ours``, ``theirs`` or ``newer``; ``None`` counts as ``newer``.
        age: Returns what is larger for what is newer.
    """
    fitting = [item for item in variants if prefer not in _OURS or (item[0] == 0) is _OURS[prefer]] or list(variants)
    return max(fitting, key=lambda item: (age(*item), item[0]))


def encoded(record: object) -> bytes:
    """Return a record in the one form of its JSON, to compare and to order records by."""
    return canonical_json(to_document(record))


@dataclass(kw_only=True)
class TargetMerger:
    """Unites the manifests' entries of targets, and says which engine files they need."""

    copies: Sequence[Bundle]
    """The bundle that is merged into, then the others, the newest last."""
    cells: Sequence[Cell]
    """The united cells: they say which entry is the newest."""
    prefer: str | None
    """Whose engines win; ``None``: nobody's, all contradictions are conflicts."""
    conflicts: list[str] = field(default_factory=list)
    """What contradicts each other, in words."""
    engines: dict[str, Found] = field(default_factory=dict)
    """Engine files by the path that they get in the bundle."""

    def unite(self, side: str) -> tuple[TargetEntry, ...]:
        """Unite the entries of a side: new ones first, those of the bundle behind them, in its order."""
        variants: dict[tuple[str, ...], list[tuple[int, TargetEntry]]] = {}
        for number, bundle in enumerate(self.copies):
            if number and bundle.manifest.side not in (None, side):
                continue  # what a part says of the other side is what it was told
            for entry in bundle.manifest.targets.of(side):
                if number == 0 or not entry.built or self._is_held(number, entry):
                    variants.setdefault(_key(entry), []).append((number, entry))
        own = list(dict.fromkeys(map(_key, self.copies[0].manifest.targets.of(side))))
        united = {key: self._entry(side, found) for key, found in variants.items()}
        new = sorted(
            (entry for key, entry in united.items() if key not in own),
            key=lambda entry: (self._newest(entry), entry.target, entry.id),
        )
        return (*new, *(united[key] for key in own))

    def _entry(self, side: str, variants: Variants[TargetEntry]) -> TargetEntry:
        """Unite what copies say of one target and kind."""
        built = [(number, entry) for number, entry in variants if entry.is_compiled]
        if not built:
            newest = max(variants, key=lambda item: (self._newest(item[1]), item[0] == 0, encoded(item[1])))[1]
            return _with_check(newest, variants)
        holding = [item for item in built if self._is_held(*item) or not item[1].built] or built
        entry = self._judged(holding, "", self._different(side, holding))[1]
        alike = [item for item in built if _recipe(item[1]) == _recipe(entry)]
        slots: dict[tuple[object, ...], list[tuple[int, EngineEntry]]] = {}
        for copy, found in alike:
            for engine in found.built:
                slots.setdefault((engine.graph, *engine.profile), []).append((copy, engine))
        order = {path: i for i, path in enumerate(self.copies[0].manifest.graphs)}
        engines = sorted(
            (self._engine(slot) for slot in slots.values()),
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

    def _engine(self, variants: Variants[EngineEntry]) -> EngineEntry:
        """Choose the engine of a graph and profile, and the path that its file gets."""
        held = [item for item in variants if item[1].path in self.copies[item[0]].manifest.files] or variants
        digests = {self._listed(*item).sha256 for item in held}
        words = ""
        if len(digests) > 1:
            each = (f"SHA-256 {self._listed(*item).sha256[:12]} in {self._name(item[0])}" for item in held)
            words = f"engine {held[0][1].path!r}: {', '.join(each)}"
        number, engine = self._judged(held, words, [])
        listed = self._listed(number, engine)
        if number and self._is_ours(variants, listed.sha256):
            number, engine = variants[0]
        path = self._free_path(engine.path, listed.sha256)
        self.engines[path] = Found(bundle=self.copies[number], path=engine.path, listed=listed)
        return replace(engine, path=path)

    def _is_ours(self, variants: Variants[EngineEntry], sha256: str) -> bool:
        """Return whether the bundle holds that very file already."""
        number, engine = variants[0]
        listed = self.copies[0].manifest.files.get(engine.path)
        return number == 0 and listed is not None and listed.sha256 == sha256

    def _judged(self, variants: Variants[T], words: str, more: Sequence[str]) -> tuple[int, T]:
        """Choose, and note a conflict where there are words for one and nobody is preferred."""
        found = [*([words] if words else []), *more]
        if found and self.prefer is None:
            self.conflicts += found
        return choose(variants, self.prefer, lambda copy, _: self.copies[copy].manifest.revision)

    def _different(self, side: str, variants: Variants[TargetEntry]) -> list[str]:
        """Say in which way engines were built for other things, or in other ways."""
        if len({_recipe(entry) for _, entry in variants}) < 2:
            return []
        words = []
        for what in ("fingerprint", "options"):
            facts = [(copy, _facts(entry, what)) for copy, entry in variants]
            if len({canonical_json(each) for _, each in facts}) > 1:
                keys = sorted({key for _, each in facts for key in each})
                keys = [key for key in keys if len({canonical_json(each.get(key)) for _, each in facts}) > 1]
                each = (
                    f"{', '.join(f'{key} {values.get(key)!r}' for key in keys)} in {self._name(copy)}"
                    for copy, values in facts
                )
                words.append(f"the {side}'s engines for {variants[0][1].target!r}: {what}: {'; '.join(each)}")
        return words

    def _free_path(self, path: str, sha256: str) -> str:
        """Return the path that a file gets: another one where a file of other bytes is listed, or comes, there."""
        ours, coming = self.copies[0].manifest.files.get(path), self.engines.get(path)
        taken = {ours.sha256} if ours else set()
        taken |= {coming.listed.sha256} if coming else set()
        if taken <= {sha256}:
            return path
        plain = PurePosixPath(path)
        return str(plain.with_name(f"{plain.stem}-{sha256[:12]}{plain.suffix}"))

    def _is_held(self, number: int, entry: TargetEntry) -> bool:
        """Return whether a copy holds at least one of an entry's engines."""
        return any(engine.path in self.copies[number].manifest.files for engine in entry.built)

    def _listed(self, number: int, engine: EngineEntry) -> FileEntry:
        """Return what a manifest says of an engine's file.

        Raises:
            BundleError: It does not list it, or not as an engine.
        """
        listed = self.copies[number].manifest.all_files.get(engine.path)
        if listed is None:
            raise BundleError(
                f"the manifest of {self._name(number)} does not list {engine.path!r}. Build or copy it again."
            )
        if listed.role != "engine":
            role = None if isinstance(listed.role, UnsetType) else listed.role
            raise BundleError(
                f"the manifest of {self._name(number)} names {engine.path!r} as an engine of a target, and lists it "
                f"with role {role!r}; 'engine' was expected. Build or copy it again."
            )
        return listed

    def _newest(self, entry: TargetEntry) -> str:
        """Return when the newest cell of a target and kind was measured; empty where there is none."""
        fitting = [
            cell.measured_at
            for cell in self.cells
            if cell.target == entry.target and runs_build(cell.run_fingerprint, entry.fingerprint)
        ]
        return max(fitting, default="")

    def _name(self, number: int) -> str:
        return repr(str(self.copies[number].path))


def _key(entry: TargetEntry) -> tuple[str, ...]:
    """Return what entries of one target and kind have in common."""
    return (entry.target, *map(repr, kind_of(entry.fingerprint)))


def _facts(entry: TargetEntry, what: str) -> dict[str, Any]:
    """Return an entry's fingerprint or options as plain data; empty where it has none."""
    value = getattr(entry, what)
    facts: dict[str, Any] = {} if value is UNSET else json.loads(encoded(value))
    return facts


def _recipe(entry: TargetEntry) -> bytes:
    """Return what engines were built for, and how."""
    return canonical_json([_facts(entry, "fingerprint"), _facts(entry, "options")])


def _with_check(entry: TargetEntry, variants: Iterable[tuple[int, TargetEntry]]) -> TargetEntry:
    """Add a check's note where the entry has none and another of the same build has one."""
    notes = [item.check for _, item in variants if item.check is not UNSET and _recipe(item) == _recipe(entry)]
    return entry if entry.check is not UNSET or not notes else replace(entry, check=max(notes, key=encoded))
