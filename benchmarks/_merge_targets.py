"""Targets and engines that several copies of a bundle have, united."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from dsc_split._support.files import canonical_json
from dsc_split.benchmarks.tables._side_times import is_kind
from dsc_split.engines._fingerprint import kind_of
from dsc_split.errors import BundleError

if TYPE_CHECKING:
    from dsc_split.benchmarks.cells._cells import Cell
    from dsc_split.bundle import Bundle

__all__ = ["Found", "TargetMerger", "Variants", "choose"]


@dataclass(frozen=True, kw_only=True)
class Found:
    """A file, and the bundle that has it."""

    bundle: Bundle
    """The bundle."""
    path: str
    """Where it lies there."""
    listed: dict[str, Any]
    """What its manifest says of it: ``sha256``, ``size``, ``role``."""


_OURS = {"ours": True, "theirs": False}

Variants = Sequence[tuple[int, Any]]
"""What copies have: the number of the copy, 0 for the bundle that is merged into, the newest last; and the thing."""


def choose(variants: Variants, prefer: str | None, age: Callable[[int, Any], Any]) -> tuple[int, Any]:
    """Choose among what contradicts each other: by ``prefer``; among equals, the newest.

    Args:
        variants: What there is.
        prefer: ``ours``, ``theirs`` or ``newer``; ``None`` counts as ``newer``.
        age: Gives what is larger for what is newer.
    """
    fitting = [item for item in variants if prefer not in _OURS or (item[0] == 0) is _OURS[prefer]] or list(variants)
    return max(fitting, key=lambda item: (age(*item), item[0]))


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

    def unite(self, side: str) -> list[dict[str, Any]]:
        """Unite the entries of a side: new ones first, those of the bundle behind them, in its order."""
        variants: dict[tuple[str, ...], list[tuple[int, dict[str, Any]]]] = {}
        for number, bundle in enumerate(self.copies):
            if number and bundle.manifest["side"] not in (None, side):
                continue  # what a part says of the other side is what it was told
            for entry in bundle.manifest["targets"].get(side, ()):
                if number == 0 or not entry.get("engines") or self._held(number, entry):
                    variants.setdefault(_key(entry), []).append((number, entry))
        own = list(dict.fromkeys(map(_key, self.copies[0].manifest["targets"].get(side, ()))))
        united = {key: self._entry(side, found) for key, found in variants.items()}
        new = sorted(
            (entry for key, entry in united.items() if key not in own),
            key=lambda entry: (self._newest(entry), entry["target"], entry["id"]),
        )
        return [*new, *(united[key] for key in own)]

    def _entry(self, side: str, variants: list[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
        """Unite what copies say of one target and kind."""
        built = [(number, entry) for number, entry in variants if "engines" in entry]
        if not built:
            newest = max(variants, key=lambda item: (self._newest(item[1]), item[0] == 0, canonical_json(item[1])))[1]
            return _with_check(newest, variants)
        holding = [item for item in built if self._held(*item) or not item[1]["engines"]] or built
        entry = self._judged(holding, "", self._different(side, holding))[1]
        alike = [item for item in built if _recipe(item[1]) == _recipe(entry)]
        slots: dict[tuple[Any, ...], list[tuple[int, dict[str, Any]]]] = {}
        for copy, found in alike:
            for engine in found["engines"]:
                slots.setdefault((engine["graph"], *engine["profile"]), []).append((copy, engine))
        engines = [self._engine(slot) for slot in slots.values()]
        order = {path: i for i, path in enumerate(_graphs(self.copies[0]))}
        engines.sort(key=lambda item: (order.get(item["graph"], len(order)), item["graph"], item["profile"]))
        failed = {
            item["graph"]: item
            for _, found in alike
            for item in found.get("failed", ())
            if item["graph"] not in {engine["graph"] for engine in engines}
            or item["graph"] in {engine["graph"] for engine in found["engines"]}
        }
        return _with_check({**entry, "engines": engines, "failed": [failed[key] for key in sorted(failed)]}, alike)

    def _engine(self, variants: list[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
        """Choose the engine of a graph and profile, and the path that its file gets."""
        held = [item for item in variants if item[1]["path"] in self.copies[item[0]].manifest["files"]] or variants
        digests = {self._listed(*item)["sha256"] for item in held}
        words = ""
        if len(digests) > 1:
            each = (f"SHA-256 {self._listed(*item)['sha256'][:12]} in {self._name(item[0])}" for item in held)
            words = f"engine {held[0][1]['path']!r}: {', '.join(each)}"
        number, engine = self._judged(held, words, [])
        listed = self._listed(number, engine)
        if number and self._is_ours(variants, listed["sha256"]):
            number, engine = variants[0]
        path = self._free_path(engine["path"], listed["sha256"])
        self.engines[path] = Found(bundle=self.copies[number], path=engine["path"], listed=listed)
        return {**engine, "path": path}

    def _is_ours(self, variants: list[tuple[int, dict[str, Any]]], sha256: str) -> bool:
        """Tell whether the bundle holds that very file already."""
        number, engine = variants[0]
        bundle = self.copies[0]
        return number == 0 and bundle.manifest["files"].get(engine["path"], {}).get("sha256") == sha256

    def _judged(self, variants: Variants, words: str, more: Sequence[str]) -> tuple[int, dict[str, Any]]:
        """Choose, and note a conflict where there are words for one and nobody is preferred."""
        found = [*([words] if words else []), *more]
        if found and self.prefer is None:
            self.conflicts += found
        number, item = choose(variants, self.prefer, lambda copy, _: self.copies[copy].manifest["revision"])
        return number, item

    def _different(self, side: str, variants: Variants) -> list[str]:
        """Say in which way engines were built for other things, or in other ways."""
        if len({_recipe(entry) for _, entry in variants}) < 2:
            return []
        words = []
        for what in ("fingerprint", "options"):
            values = {canonical_json(entry.get(what)): None for _, entry in variants}
            if len(values) > 1:
                keys = sorted({key for _, entry in variants for key in entry.get(what) or {}})
                keys = [
                    key for key in keys if len({canonical_json((e.get(what) or {}).get(key)) for _, e in variants}) > 1
                ]
                each = (
                    f"{', '.join(f'{key} {(entry.get(what) or {}).get(key)!r}' for key in keys)} in {self._name(copy)}"
                    for copy, entry in variants
                )
                words.append(f"the {side}'s engines for {variants[0][1]['target']!r}: {what}: {'; '.join(each)}")
        return words

    def _free_path(self, path: str, sha256: str) -> str:
        """Give the path that a file gets: another one where a file of other bytes is listed, or comes, there."""
        ours = self.copies[0].manifest["files"].get(path)
        taken = {digest for digest in (ours and ours["sha256"], self._coming(path)) if digest}
        if taken <= {sha256}:
            return path
        plain = PurePosixPath(path)
        return str(plain.with_name(f"{plain.stem}-{sha256[:12]}{plain.suffix}"))

    def _coming(self, path: str) -> str | None:
        return str(self.engines[path].listed["sha256"]) if path in self.engines else None

    def _held(self, number: int, entry: Mapping[str, Any]) -> bool:
        """Tell whether a copy has at least one of an entry's engines."""
        return any(engine["path"] in self.copies[number].manifest["files"] for engine in entry.get("engines", ()))

    def _listed(self, number: int, engine: Mapping[str, Any]) -> dict[str, Any]:
        """Give what a manifest says of an engine's file.

        Raises:
            BundleError: It does not list it, or not as an engine.
        """
        manifest, path = self.copies[number].manifest, engine["path"]
        for files in (manifest["files"], manifest["left_out"]):
            if path in files:
                if (role := files[path].get("role")) != "engine":
                    raise BundleError(
                        f"the manifest of {self._name(number)} names {path!r} as an engine of a target, and lists it "
                        f"with role {role!r}; 'engine' was expected. Build or copy it again."
                    )
                return dict(files[path])
        raise BundleError(f"the manifest of {self._name(number)} does not list {path!r}. Build or copy it again.")

    def _newest(self, entry: Mapping[str, Any]) -> str:
        """Say when the newest cell of a target and kind was measured."""
        fitting = [
            cell.measured_at
            for cell in self.cells
            if cell.target == entry["target"] and is_kind(entry["fingerprint"], cell.run_fingerprint)
        ]
        return max(fitting, default="")

    def _name(self, number: int) -> str:
        return repr(str(self.copies[number].path))


def _key(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """Give what entries of one target and kind have in common."""
    return (entry["target"], *map(repr, kind_of(entry["fingerprint"])))


def _recipe(entry: Mapping[str, Any]) -> bytes:
    return canonical_json([entry["fingerprint"], entry.get("options")])


def _with_check(entry: dict[str, Any], variants: Iterable[tuple[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """Add a check's note where the entry has none and another of the same build has one."""
    notes = [item["check"] for _, item in variants if "check" in item and _recipe(item) == _recipe(entry)]
    return entry if "check" in entry or not notes else {**entry, "check": max(notes, key=canonical_json)}


def _graphs(bundle: Bundle) -> list[str]:
    return [bundle.manifest["model"]["path"], *(path for split in bundle.splits for path in (split.head, split.tail))]
