"""Merge the work of other machines into a bundle: engines, cells, checks and the files of its parts."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from dsc_split._support.files import new_file, write_bytes
from dsc_split._support.hashing import Hasher, sha256_file
from dsc_split._support.progress import Progress, ProgressListener, silent
from dsc_split._support.records import to_document
from dsc_split.benchmarks.cells._cells import Cell, CellStore
from dsc_split.benchmarks.merge._cells import read_cells, unite_cells
from dsc_split.benchmarks.merge._targets import CopyFile, TargetMerger, choose, encoded
from dsc_split.benchmarks.tables._table import adopt_tables, write_tables
from dsc_split.bundle import Bundle
from dsc_split.bundles._archive import name_faults
from dsc_split.bundles._manifest import encode_manifest
from dsc_split.bundles._records import SIDES, FileEntry, Manifest, Targets
from dsc_split.errors import BundleError, DamagedError, UsageError
from dsc_split.shipping._file_checks import PICKLES, record_fault
from dsc_split.shipping._verify import engine_files

if TYPE_CHECKING:
    from dsc_split.shipping._signature import Trust

__all__ = ["PREFERENCES", "MergeResult", "merge_bundles"]

logger = logging.getLogger(__name__)

PREFERENCES = ("ours", "theirs", "newer")
_FOLDERS = ("onnx", "samples")
"""Folders of the files that a bundle can leave out, other than engines."""
_SETTINGS = ("batch", "full_offload", "input_bytes_stated")
"""Fields of the manifest that a table depends on, and that are not part of the pair."""


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    """The result of :func:`merge_bundles`."""

    files: tuple[str, ...]
    """Copied files: engines, files that the bundle had left out, and reports on memory."""
    removed: tuple[str, ...]
    """Engine files that were replaced by others."""
    cells_added: int
    """Cells that the bundle did not have."""
    cells_replaced: int
    """Cells of the bundle that were replaced by a longer or a preferred one."""
    targets: dict[str, list[str]]
    """By side: targets that are new or changed."""
    damaged: tuple[str, ...]
    """Errors of the cells that were skipped."""
    notes: tuple[str, ...]
    """Notes for the user."""
    dry_run: bool
    """Whether nothing was written."""
    tables: tuple[str, ...] = ()
    """Tables of the bundle, relative to it, that of ``table.json`` first; empty if none could be made."""

    @property
    def changed(self) -> bool:
        """Whether there was anything to merge."""
        return bool(self.files or self.removed or self.cells_added or self.cells_replaced or any(self.targets.values()))

    def to_json(self) -> dict[str, object]:
        """Return plain data."""
        return {"changed": self.changed, **dataclasses.asdict(self)}


def merge_bundles(
    bundle: Bundle,
    others: Sequence[str | os.PathLike[str] | Bundle],
    *,
    prefer: str | None = None,
    trust: Trust | None = None,
    skip_damaged: bool = False,
    dry_run: bool = False,
    progress: ProgressListener = silent,
) -> MergeResult:
    """Merge copies and parts of a bundle, which were changed elsewhere, into it, and write its tables.

    The bundle gets their engines, cells, notes of checks, and the files that it had left out. The order of ``others``
    does not matter. Everything is compared before anything is written. New files are written first, then the manifest,
    then the tables. So a merge that is killed leaves the old bundle, perhaps with some new cells, each complete; the
    next merge finishes it. A second merge changes nothing.

    Args:
        bundle: The bundle to merge into; it is locked meanwhile.
        others: Folders, packed files, or open bundles.
        prefer: Whose cells and engines win if two contradict each other: ``ours``, ``theirs`` (the newest of several)
            or ``newer``; ``None``: nobody's, and nothing is written.
        trust: Required signatures of the others; engines of a packed one are copied only if it is trusted.
        skip_damaged: Skip damaged cells of the others.
        dry_run: Compare everything, and write nothing.
        progress: Called before a file is copied, and at the end.

    Raises:
        UsageError: The bundle is packed, ``prefer`` is unknown, or an argument is the bundle itself.
        BundleError: Others have other pairs or damaged cells, or there are conflicts; all are named.
        SignatureError: No trusted key signed a bundle that engines are copied from.
        BundleBusyError: Another command is writing the bundle.
        DscError: A file cannot be written; new files are removed again.
    """
    if prefer is not None and prefer not in PREFERENCES:
        raise UsageError(f"--prefer is {prefer!r}; {', '.join(PREFERENCES[:-1])} or {PREFERENCES[-1]} was expected.")
    opened = [other if isinstance(other, Bundle) else Bundle.open(other, trust=trust) for other in others]
    with bundle.lock():
        for other in opened:
            _require_other(bundle, other)
        union = _Union(bundle, opened, prefer, skip_damaged=skip_damaged)
        result = union.result(dry_run=dry_run)
        if not dry_run:
            union.write(progress)
    if dry_run:
        return result
    adopt_tables(bundle, union.others)
    try:
        tables = tuple(path.relative_to(bundle.path).as_posix() for path in write_tables(bundle))
    except UsageError as e:
        return dataclasses.replace(result, notes=(*result.notes, f"no table yet: {e}"))
    return dataclasses.replace(result, tables=tables)


def _require_other(bundle: Bundle, other: Bundle) -> None:
    """Check that ``other`` is another bundle of the same pairs.

    Raises:
        UsageError: It is the same bundle.
        BundleError: It has other pairs.
    """
    if other.path.resolve() == bundle.path.resolve():
        raise UsageError(f"{str(other.path)!r} is the bundle that is merged into. Name another copy of it.")
    ours, theirs = _graph_digests(bundle), _graph_digests(other)
    if bundle.manifest.pair_id == other.manifest.pair_id and ours == theirs:
        return
    different = sorted(path for path in {*ours, *theirs} if ours.get(path) != theirs.get(path))
    raise BundleError(
        f"{str(other.path)!r} is of other pairs than {str(bundle.path)!r}: {other.manifest.pair_id}, and not "
        f"{bundle.manifest.pair_id}. Graphs that differ: {', '.join(different) or 'none'}. "
        "Merge copies of one export."
    )


def _graph_digests(bundle: Bundle) -> dict[str, str]:
    return {path: bundle.graph_digest(path) for path in bundle.manifest.graphs}


class _Union:
    """A merge: everything is compared when this is made, and written by ``write``.

    Attributes:
        others: The other bundles, the newest last: their order on the command line has no effect.
    """

    def __init__(self, bundle: Bundle, others: Sequence[Bundle], prefer: str | None, *, skip_damaged: bool) -> None:
        """Compare everything.

        Raises:
            BundleError: Cells are damaged, or there are conflicts; all are named.
        """
        self._bundle = bundle
        self.others = sorted(others, key=lambda other: (other.manifest.revision, encode_manifest(other.manifest)))
        copies = [bundle, *self.others]
        self._notes: list[str] = []
        if bundle.manifest.side is not None:
            self._notes.append(
                f"{str(bundle.path)!r} is the {bundle.manifest.side}'s part of a bundle, and all goes into it; "
                "usually parts are merged into the whole bundle"
            )
        read = [read_cells(copy) for copy in copies]
        self._damaged = [text for _, damaged in read[1:] for text in damaged]
        if self._damaged and not skip_damaged:
            raise _refusal("damaged cells", self._damaged, "Copy them again, or leave them out with --skip-damaged.")
        self._notes += [f"{text} It is ignored." for text in read[0][1]]
        self._own_cells = read[0][0]
        self._cells, conflicts = unite_cells(copies, [cells for cells, _ in read], prefer)
        merger = TargetMerger(copies=copies, cells=list(self._cells.values()), prefer=prefer)
        self._targets = {side: merger.unite(side) for side in SIDES}
        settings, more = _unite_settings(copies, prefer)
        conflicts += merger.conflicts + more
        if conflicts:
            choice = "Choose whose are right: --prefer ours, --prefer theirs or --prefer newer."
            raise _refusal("conflicts", conflicts, choice)
        self._reports = self._memory_reports()
        self._files = {**self._find_left_out(), **merger.engines}
        self._check_names(merger.engines)
        self._manifest = self._united_manifest(settings, merger.engines)
        self._is_changed = self._manifest != _unsealed(bundle.manifest)
        self._copies = {path: item for path, item in self._files.items() if self._is_new(path, item)}
        self._old = sorted(
            path
            for path, entry in bundle.manifest.files.items()
            if path not in self._manifest.files and _is_engine(entry)
        )
        for item in self._copies.values():
            if item.path in engine_files(item.bundle.manifest):
                item.bundle.require_trust(f"engine {item.path!r}")

    def result(self, *, dry_run: bool) -> MergeResult:
        """Return what the merge does, or would do."""
        before = self._bundle.manifest.targets
        new = {side: [entry.target for entry in self._targets[side] if entry not in before.of(side)] for side in SIDES}
        changed = self._changed_cells()
        added = [key for key in changed if key not in self._own_cells]
        return MergeResult(
            files=tuple(sorted([*self._copies, *self._reports])),
            removed=tuple(self._old),
            cells_added=len(added),
            cells_replaced=len(changed) - len(added),
            targets=new,
            damaged=tuple(self._damaged),
            notes=tuple(self._notes),
            dry_run=dry_run,
        )

    def write(self, progress: ProgressListener) -> None:
        """Write new files, cells and the manifest, in this order, and remove replaced engines."""
        bundle = self._bundle
        for folder in {(bundle.path / path).parent for path in self._files} | {bundle.path / "cells"}:
            for leftover in folder.glob(".*.partial"):
                leftover.unlink(missing_ok=True)
        new: list[Path] = []
        try:
            self._write_all(new, progress)
        except BaseException:
            listed = Bundle.open(bundle.path).manifest.files  # with the new files, if the manifest was written
            _remove(bundle, (path for path in new if path.relative_to(bundle.path).as_posix() not in listed))
            raise
        _remove(bundle, (bundle.file(path) for path in self._old))
        if self._copies:
            progress(Progress(stage="merge", label="", done=len(self._copies), total=len(self._copies)))

    def _write_all(self, new: list[Path], progress: ProgressListener) -> None:
        """Write everything; files that did not exist are added to ``new``."""
        bundle = self._bundle
        with Hasher() as hasher:
            for i, (path, found) in enumerate(self._copies.items()):
                progress(Progress(stage="merge", label=path, done=i, total=len(self._copies)))
                self._copy_file(path, found, hasher, new)
        for name, data in self._reports.items():
            bundle.unseal()
            report = bundle.file(name)
            report.parent.mkdir(exist_ok=True)
            _add_if_new(new, report)
            write_bytes(report, data)
        store = CellStore(bundle)
        for key, cell in self._changed_cells().items():
            if key not in self._own_cells:
                _add_if_new(new, store.path(cell.question))
            store.put(cell)
        if self._is_changed:
            with bundle.edit() as draft:
                draft.manifest = replace(self._manifest, revision=bundle.manifest.revision)

    def _changed_cells(self) -> dict[str, Cell]:
        return {key: cell for key, cell in self._cells.items() if cell != self._own_cells.get(key)}

    def _find_left_out(self) -> dict[str, CopyFile]:
        """Return the files, other than engines, that the bundle has left out and another one has."""
        manifest, found = self._bundle.manifest, {}
        for other in self.others:
            engines = engine_files(other.manifest)
            for path, listed in other.manifest.lasting_files.items():
                if path in engines:
                    continue
                known = manifest.all_files.get(path)
                where = f"{path!r} of {str(other.path)!r}"
                if known is None:
                    self._notes.append(f"{where} is no file of the bundle's, and does not come.")
                elif known.sha256 != listed.sha256:
                    self._notes.append(f"{where} is another one; that of the bundle stays.")
                elif path not in manifest.files:
                    found[path] = CopyFile(bundle=other, path=path, listed=known)
        return found

    def _check_names(self, engines: Collection[str]) -> None:
        """Check that new files go to the right folders, and that the bundle can be packed with them.

        Raises:
            BundleError: Some do not, or it cannot.
        """
        manifest, coming = self._bundle.manifest, [*self._files, *self._reports]
        faults = dict(name_faults(dict.fromkeys([*manifest.files, *manifest.left_out, *coming])))
        for path in self._files:
            folder, slash, _ = path.partition("/")
            folders = ("engines",) if path in engines else _FOLDERS
            if not slash or folder not in folders:
                faults.setdefault(path, f"does not lie in {' or '.join(map(repr, folders))}")
            elif path.lower().endswith(PICKLES):
                faults.setdefault(path, "is a pickle, which runs code when it is read; a bundle holds none")
        if faults:
            texts = [f"{path!r} {fault}." for path, fault in faults.items()]
            raise _refusal("files that cannot come", texts, "See what is wrong: dsc-split verify OTHER")

    def _memory_reports(self) -> dict[str, bytes]:
        """Return the others' memory reports that the bundle does not have; the newest wins."""
        found = {}
        for other in self.others:
            for name in other.storage.names():
                if not re.fullmatch(r"memory/[^/]+\.json", name) or self._bundle.has(name):
                    continue
                data = other.read_result(name)
                if fault := record_fault(name, data):
                    self._notes.append(f"{name!r} of {str(other.path)!r} {fault}. It does not come.")
                else:
                    found[name] = data
        return found

    def _united_manifest(self, settings: Mapping[str, object], engines: Mapping[str, CopyFile]) -> Manifest:
        manifest = _unsealed(self._bundle.manifest)
        held = {path for path, found in engines.items() if found.is_held}
        files = {path: entry for path, entry in manifest.files.items() if not _is_engine(entry) or path in held}
        files |= {path: found.listed for path, found in self._files.items() if path in held or path not in engines}
        left_out = {**manifest.left_out, **{path: found.listed for path, found in engines.items()}}
        left_out = {
            path: entry
            for path, entry in left_out.items()
            if path not in files and (path in engines or not _is_engine(entry))
        }
        sides = {copy.manifest.side for copy in (self._bundle, *self.others)}
        return replace(
            manifest,
            **settings,
            files=files,
            left_out=left_out,
            side=manifest.side if left_out and len(sides) == 1 else None,
            targets=Targets(**self._targets),
        )

    def _is_new(self, path: str, found: CopyFile) -> bool:
        """Return whether a file has to be copied: another bundle has it, and this one does not."""
        ours = self._bundle.manifest.files.get(path)
        if found.bundle is self._bundle or not found.is_held:
            return False
        return ours is None or ours.sha256 != found.listed.sha256

    def _copy_file(self, path: str, found: CopyFile, hasher: Hasher, new: list[Path]) -> None:
        """Copy a file, unless a killed merge did, and check its digest.

        Raises:
            BundleError: The digest is not that of the manifest.
        """
        target, size_bytes, sha256 = self._bundle.file(path), found.listed.size_bytes, found.listed.sha256
        if target.is_file() and target.stat().st_size == size_bytes and sha256_file(target) == sha256:
            return
        _add_if_new(new, target)
        target.parent.mkdir(parents=True, exist_ok=True)
        with found.bundle.storage.open(found.path) as source, new_file(target) as sink:
            copied = hasher.read(source, sink)
            if (copied.size_bytes, copied.sha256) != (size_bytes, sha256):
                raise BundleError(
                    f"{found.path!r} in {str(found.bundle.path)!r} has SHA-256 {copied.sha256[:12]}...; its manifest "
                    f"says {sha256[:12]}.... It was changed or damaged; copy it again. Nothing was merged."
                )


def _add_if_new(new: list[Path], path: Path) -> None:
    """Add a path to ``new``, unless it exists already."""
    if not os.path.lexists(path):
        new.append(path)


def _remove(bundle: Bundle, paths: Iterable[Path]) -> None:
    """Remove files, and folders of the bundle that become empty."""
    for path in paths:
        path.unlink(missing_ok=True)
        for folder in path.parents[: len(path.relative_to(bundle.path).parts) - 1]:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def _unite_settings(copies: Sequence[Bundle], prefer: str | None) -> tuple[dict[str, object], list[str]]:
    """Merge the settings of the export; return them, and conflicts in words."""
    settings: dict[str, object] = {}
    conflicts = []
    for name in _SETTINGS:
        variants = [(number, getattr(bundle.manifest, name)) for number, bundle in enumerate(copies)]
        if len({encoded(value) for _, value in variants}) > 1 and prefer is None:
            each = "; ".join(f"{to_document(value)!r} in {str(copies[number].path)!r}" for number, value in variants)
            conflicts.append(f"the export's {name.replace('_', ' ')}: {each}")
        settings[name] = choose(variants, prefer, lambda number, _: copies[number].manifest.revision)[1]
    return settings, conflicts


def _unsealed(manifest: Manifest) -> Manifest:
    """Return a manifest without the files that only a sealed one lists."""
    return replace(manifest, files=manifest.lasting_files)


def _is_engine(listed: FileEntry) -> bool:
    return listed.role == "engine"


def _refusal(what: str, texts: Sequence[str], choice: str) -> DamagedError:
    lines = "".join(f"\n  {text}" for text in texts)
    counted = what.removesuffix("s") if len(texts) == 1 else what
    return BundleError(f"{len(texts)} {counted}; nothing was merged.{lines}\n{choice}")
