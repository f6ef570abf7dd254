"""Pack a bundle, or the part that one side needs, into one file. Its manifest is sealed: it lists every file."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from msgspec import UNSET
from msgspec.structs import replace

from dsc_split._support.progress import ProgressListener, silent
from dsc_split.bundle import Bundle
from dsc_split.bundles._archive import Archive, Entry, write_archive
from dsc_split.bundles._manifest import ENVELOPE, MANIFEST, encode_manifest
from dsc_split.bundles._records import SIDES, FileEntry, Manifest, Targets
from dsc_split.bundles._storage import SUFFIX
from dsc_split.errors import BundleError, UsageError
from dsc_split.shipping._file_checks import is_record, is_table, record_fault, role_of, table_fault
from dsc_split.shipping._part_files import (
    choose_targets,
    fits_record,
    fits_table,
    held_files,
    put_last,
    side_graphs,
)
from dsc_split.shipping._verify import Verification, engine_files, progress_in_mb

__all__ = ["PackResult", "RoleSize", "pack_bundle"]

TABLE = "table.json"


@dataclass(frozen=True, kw_only=True)
class RoleSize:
    """Number and size of the files of one role."""

    role: str
    """Kind of file: ``model``, ``weights``, ``head``, ``tail``, ``engine``, ``sample``, ``cell``, ``table``, ..."""
    files: int
    """Number of files."""
    size_bytes: int
    """Total size of the files."""


@dataclass(frozen=True, kw_only=True)
class PackResult:
    """The result of :func:`pack_bundle`."""

    path: str
    """The packed file."""
    side: str | None
    """The side of a part; ``None`` for a whole bundle."""
    revision: int
    """Its revision."""
    size_bytes: int
    """Size of the packed file."""
    roles: tuple[RoleSize, ...]
    """Its files by role, the largest role first."""
    left_out_bytes: int
    """Total size of the whole bundle's files that are not in it."""
    signatures: int
    """Number of signatures."""
    notes: tuple[str, ...]
    """Notes for the user."""

    def to_json(self) -> dict[str, object]:
        """Return the result as plain data for JSON."""
        return asdict(self)


def pack_bundle(
    bundle: Bundle,
    output: str | os.PathLike[str],
    *,
    side: str | None = None,
    device: str | None = None,
    server: str | None = None,
    with_onnx: bool = False,
    with_cells: bool | None = None,
    revision: int | None = None,
    sign: Sequence[Path] = (),
    progress: ProgressListener = silent,
) -> PackResult:
    """Pack a bundle into one file; the same bundle gives the same bytes.

    Args:
        bundle: The bundle: a folder or a packed file.
        output: The file to write, ``NAME.dscb``; an existing file is replaced, but no signed bundle by an unsigned one.
        side: ``device`` or ``server`` for only the files that this side needs; ``None`` for all files.
        device: Target of the device, as text or id; only its engines and tables are packed. ``None``: all targets.
        server: The same for the server.
        with_onnx: Whether a part contains the graphs even if it has engines for them.
        with_cells: Whether to pack the measurements; ``None``: only without ``side``.
        revision: Revision of the packed bundle, higher for newer ones; ``None``: seconds since 1970 of its last change.
        sign: Private keys to sign it with. Existing signatures are kept if the manifest is unchanged. A packed bundle
            with engines can be signed again only if it is trusted.
        progress: Called with the number of MB packed.

    Raises:
        UsageError: An argument is unknown or does not fit the bundle.
        BundleError: A file is missing, damaged or differs from the manifest.
        SignatureError: ``sign`` is given, and the bundle is packed, has engines and is not trusted.
        BundleBusyError: Another command is writing the bundle.
        DscError: The file cannot be written.
    """
    target = Path(output)
    if target.suffix != SUFFIX:
        raise UsageError(f"output is {str(target)!r}; a name that ends in {SUFFIX} was expected.")
    if side is not None and side not in SIDES:
        raise UsageError(f"side is {side!r}; {' or '.join(map(repr, SIDES))} was expected.")
    if revision is not None and revision < 0:
        raise UsageError(f"revision is {revision}; a whole number from 0 was expected.")
    with contextlib.nullcontext() if bundle.is_packed else bundle.lock():
        packing = _Packing(bundle, side, {"device": device, "server": server}, with_onnx=with_onnx)
        packing.choose_files(with_cells=with_cells)
        manifest = packing.manifest(revision)
        if sign and not bundle.trusted:
            _refuse_code(bundle, manifest)
        data = encode_manifest(manifest)
        envelope = _envelope(bundle, data, sign)
        if envelope is None:
            _refuse_signed(target)
        extra = {MANIFEST: data, **({ENVELOPE: envelope} if envelope else {})}
        entries = [*packing.entries(), *(_entry(name, content) for name, content in extra.items())]
        if bundle.has(ENVELOPE) and bundle.storage.read(MANIFEST) != data:
            packing.notes.append("the signatures that it had were left out: what they sign has changed")
        write_archive(
            target, entries, tell=progress_in_mb("pack", sum(entry.size_bytes for entry in entries), progress)
        )
    return PackResult(
        path=str(target),
        side=manifest.side,
        revision=manifest.revision,
        size_bytes=target.stat().st_size,
        roles=_by_role(manifest.files),
        left_out_bytes=sum(entry.size_bytes for entry in manifest.left_out.values()),
        signatures=len(json.loads(envelope)["signatures"]) if envelope else 0,
        notes=tuple(packing.notes),
    )


class _Packing:
    """Chooses the files to pack; it does not change the bundle.

    Attributes:
        notes: Notes for the user.
    """

    def __init__(self, bundle: Bundle, side: str | None, asked: dict[str, str | None], *, with_onnx: bool) -> None:
        manifest = bundle.manifest
        if manifest.side not in (None, side or manifest.side):
            raise UsageError(f"the bundle is a part for the {manifest.side} side, and holds none for the {side} side.")
        check = Verification(bundle.storage)
        check.manifest()
        check.lists()
        if check.rows:
            row = check.rows[0]
            raise BundleError(
                f"{row.path!r} in {str(bundle.path)!r} {row.fault}. See it all: dsc-split verify {bundle.path}"
            )
        self.notes: list[str] = []
        self._bundle = bundle
        self._side = side
        self._asked = [name for name in SIDES if asked[name] is not None]
        self._targets = {name: choose_targets(manifest, name, asked[name]) for name in SIDES}
        self._with_onnx = with_onnx
        self._files: dict[str, FileEntry] = {}
        self._sealed: dict[str, bytes] = {}
        self._newest_s = 0

    def choose_files(self, *, with_cells: bool | None) -> None:
        """Choose from the files that the manifest lists, and from the measurements, which it may not list yet."""
        manifest = self._bundle.manifest
        held = set(manifest.lasting_files)
        if self._side is not None:
            held &= held_files(manifest, self._side, self._targets[self._side], with_onnx=self._with_onnx)
        elif self._asked:
            held -= self._engines_of_others()
        self._files = {path: entry for path, entry in manifest.lasting_files.items() if path in held}
        self._read_sealed()
        if with_cells is False or (with_cells is None and self._side):
            self._sealed = {name: data for name, data in self._sealed.items() if not is_record(name)}
        elif self._side is not None:
            graphs = {self._bundle.graph_digest(path) for path in side_graphs(manifest, self._side)}
            targets = self._targets[self._side]
            self._sealed = {
                name: data
                for name, data in self._sealed.items()
                if not is_record(name) or fits_record(name, data, self._side, graphs, targets)
            }
        self._choose_tables()

    def manifest(self, revision: int | None) -> Manifest:
        """Return the manifest of the packed bundle."""
        whole = self._bundle.manifest
        sealed = {
            name: FileEntry(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data), role=role_of(name))
            for name, data in self._sealed.items()
        }
        chosen = {
            side: put_last(whole.targets.of(side), self._targets[side])
            if side in self._asked
            else whole.targets.of(side)
            for side in SIDES
        }
        left_out = {path: entry for path, entry in whole.lasting_files.items() if path not in self._files}
        return replace(
            whole,
            sealed=True,
            side=self._side or whole.side,
            revision=max(whole.revision, self._newest_s) if revision is None else revision,
            released=UNSET,
            targets=Targets(**chosen),
            files={**self._files, **sealed},
            left_out={**whole.left_out, **left_out},
        )

    def entries(self) -> list[Entry]:
        """List the files to pack, without the manifest and the signatures."""
        storage = self._bundle.storage
        return [
            *(
                Entry(name=path, size_bytes=entry.size_bytes, sha256=entry.sha256, open=partial(storage.open, path))
                for path, entry in self._files.items()
            ),
            *(_entry(name, data) for name, data in self._sealed.items()),
        ]

    def _engines_of_others(self) -> set[str]:
        """Return the paths of the engines of targets that were not chosen."""
        kept = {engine.path for entries in self._targets.values() for entry in entries for engine in entry.built}
        return {engine.path for entry in self._bundle.manifest.targets for engine in entry.built} - kept

    def _read_sealed(self) -> None:
        """Read and check the files that only a sealed bundle lists: cells, memory reports and tables."""
        manifest, storage = self._bundle.manifest, self._bundle.storage
        listed = {path for path, entry in manifest.files.items() if entry.comes_and_goes}
        names = {name for name in storage.names() if is_record(name) or (is_table(name) and not manifest.sealed)}
        for name in sorted(listed | names):
            data = self._bundle.read_result(name)
            fault = record_fault(name, data) if is_record(name) else table_fault(data, manifest.pair_id)
            if fault:
                again = f"Remove it, or make it again: dsc-split bench {self._bundle.path}"
                raise BundleError(f"{name!r} in {str(self._bundle.path)!r} cannot be packed: {fault}. {again}")
            self._sealed[name] = data
            if is_record(name) and name not in listed:
                self._newest_s = max(self._newest_s, _measured_s(data))

    def _choose_tables(self) -> None:
        """Keep the tables of the chosen targets; if ``table.json`` does not fit them, use the most similar of these."""
        asked = {*self._asked, *([self._side] if self._side and self._targets[self._side] else [])}
        tables = {name: data for name, data in self._sealed.items() if is_table(name)}
        others = {name: data for name, data in tables.items() if name != TABLE}
        fitting = [
            name
            for name, data in others.items()
            if all(fits_table(name, data, side, self._targets[side]) for side in asked)
        ]
        used = tables.get(TABLE)
        same = next((name for name, data in others.items() if data == used), TABLE)
        if used is not None and not all(fits_table(same, used, side, self._targets[side]) for side in asked):
            used = None
        if used is None and fitting:
            before = json.loads(tables[TABLE]) if TABLE in tables else {}
            used = others[max(fitting, key=lambda name: (_count_equal(json.loads(others[name]), before), name))]
        if used is None and tables:
            self.notes.append("it holds no lookup table: none is of the targets that were chosen")
        kept = {**{name: others[name] for name in fitting}, **({TABLE: used} if used is not None else {})}
        self._sealed = {name: data for name, data in self._sealed.items() if name not in tables} | kept


def _count_equal(table: dict[str, Any], other: dict[str, Any]) -> int:
    """Count the settings that two tables share: sides, link, count and batch sizes."""
    keys = ("device", "server", "link", "count")
    batches = [[item["batch"] for item in each.get("batches", ())] for each in (table, other)]
    return sum([*(table.get(key) == other.get(key) for key in keys), batches[0] == batches[1]])


def _entry(name: str, data: bytes) -> Entry:
    digest = hashlib.sha256(data).hexdigest()
    return Entry(name=name, size_bytes=len(data), sha256=digest, open=partial(io.BytesIO, data))


def _refuse_code(bundle: Bundle, manifest: Manifest) -> None:
    """Raise an error if a bundle that is not trusted contains native code, in engines or in graphs.

    Raises:
        SignatureError: It contains some.
    """
    code = engine_files(manifest)
    if not code:
        check = Verification(bundle.storage)
        check.manifest()
        check.files()
        code = {*check.ep_context} & {*manifest.files}
    if code:
        bundle.require_trust(repr(min(code)))


def _envelope(bundle: Bundle, manifest: bytes, keys: Sequence[Path]) -> bytes | None:
    """Return the envelope of a manifest with new signatures and the bundle's present ones; ``None`` without any."""
    from dsc_split.shipping._signature import sign_manifest

    unchanged = bundle.has(ENVELOPE) and bundle.storage.read(MANIFEST) == manifest
    before = bundle.storage.read(ENVELOPE) if unchanged else None
    return sign_manifest(manifest, keys, before) if keys else before


def _refuse_signed(target: Path) -> None:
    """Raise an error if an unsigned bundle would replace a signed one.

    Raises:
        UsageError: ``target`` is a signed bundle.
    """
    try:
        is_signed = target.is_file() and ENVELOPE in Archive(target).names()
    except BundleError:  # damaged; replacing it loses nothing
        return
    if is_signed:
        raise UsageError(
            f"{str(target)!r} is a signed bundle, and what is packed has no signature. Choose another --output, or "
            "sign it: --sign KEY"
        )


def _measured_s(cell: bytes) -> int:
    """Return the time of a cell's last measurement in seconds since 1970; 0 where there is none."""
    rounds = json.loads(cell).get("rounds")
    if not rounds:
        return 0
    try:
        started_s = datetime.fromisoformat(rounds[-1]["started"]).timestamp()
    except (KeyError, TypeError, ValueError, OverflowError):  # no valid time
        return 0
    return int(min(started_s, time.time()))  # a wrong clock must not give a time in the future


def _by_role(files: Mapping[str, FileEntry]) -> tuple[RoleSize, ...]:
    sizes: dict[str, list[int]] = {}
    for entry in files.values():
        sizes.setdefault(entry.role or "other", []).append(entry.size_bytes)
    found = [RoleSize(role=role, files=len(each), size_bytes=sum(each)) for role, each in sizes.items()]
    return tuple(sorted(found, key=lambda item: (-item.size_bytes, item.role)))
