"""A bundle: a folder or one packed file with a model's graphs, cells, tables and manifest.

This module finds files by their path, reads and writes the manifest, and allows one writer at a time. It does not
look into graphs and cells: other packages do.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from msgspec.structs import replace

from dsc_split._support.files import write_bytes
from dsc_split._support.hashing import sha256_text
from dsc_split.bundles._lock import lock_folder
from dsc_split.bundles._manifest import ENVELOPE, MANIFEST, encode_manifest, next_manifest, parse_manifest
from dsc_split.bundles._open import open_storage
from dsc_split.bundles._records import FileEntry, Manifest, Split, TargetEntry, TensorInfo
from dsc_split.bundles._storage import Folder, Storage
from dsc_split.errors import BundleError, SignatureError, UsageError
from dsc_split.table._table import LookupTable

__all__ = ["TABLE", "Bundle", "Draft", "TrustRule"]

TABLE = "table.json"
"""File of the newest lookup table, the one that is used."""


class TrustRule(Protocol):
    """Decides which signatures are enough, like :class:`dsc_split.packing.Trust`."""

    @property
    def allow_unsigned(self) -> bool:
        """Whether a bundle without signatures passes."""

    def check(self, manifest: bytes, envelope: bytes | None, what: str) -> tuple[str, ...]:
        """Return the names of the trusted keys that signed a manifest.

        Raises:
            SignatureError: A signature is required, and no trusted key made one; or a signature is damaged.
        """


class Draft:
    """A manifest with changes that :meth:`Bundle.edit` writes.

    Attributes:
        manifest: The changed manifest.
        is_touched: Whether it is written even if nothing changed.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.is_touched = False

    def change(self, **fields: object) -> None:
        """Change fields of the manifest, by name."""
        self.manifest = replace(self.manifest, **fields)

    def touch(self) -> None:
        """Write the manifest with a new revision even if it stays the same, for example after a table changed."""
        self.is_touched = True

    def set_targets(self, side: str, targets: Iterable[TargetEntry]) -> None:
        """Replace the targets of a side."""
        self.change(targets=replace(self.manifest.targets, **{side: tuple(targets)}))


class Bundle:
    """A bundle, opened for reading; to write, take :meth:`lock` first.

    Attributes:
        path: The folder, or the packed file.
        manifest: The manifest, as read; :meth:`edit` changes it.
        storage: Reads its files.
        trusted: Whether its engines may be loaded. Engines in a folder are trusted. Engines in a packed file are
            trusted if a trusted key signed the bundle, or unsigned bundles are allowed.
    """

    def __init__(self, path: Path, manifest: Manifest, *, storage: Storage | None = None, trusted: bool = True) -> None:
        self.path = path
        self.manifest = manifest
        self.storage = Folder(path) if storage is None else storage
        self.trusted = trusted
        self._locks = 0
        self._draft: Draft | None = None

    # ---- opening -------------------------------------------------------------------------------------------

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, trust: TrustRule | None = None) -> Bundle:
        """Open a bundle: a folder, or a packed file, which is read in place.

        Args:
            path: The folder, or ``NAME.dscb``.
            trust: Which signatures are enough; ``None``: none is checked, and engines of a packed file are not loaded.

        Raises:
            UsageError: There is no such folder or file, or it is no bundle.
            BundleError: The manifest or the packed file is damaged, hostile, or of a newer format.
            SignatureError: ``trust`` requires a signature, and no trusted key made one; or a signature is damaged.
        """
        storage = open_storage(Path(path))
        data = storage.read(MANIFEST)
        manifest = parse_manifest(data, _manifest_name(path))
        trusted = isinstance(storage, Folder)
        if not trusted:
            _require_sealed(storage, manifest)
        if trust is not None:
            signature = storage.read(ENVELOPE) if ENVELOPE in storage.names() else None
            trusted = bool(trust.check(data, signature, f"bundle {str(path)!r}")) or trust.allow_unsigned or trusted
        return cls(Path(path), manifest, storage=storage, trusted=trusted)

    @staticmethod
    def is_bundle(path: Path) -> bool:
        """Return whether the folder ``path`` holds a manifest."""
        return (path / MANIFEST).is_file()

    @property
    def is_packed(self) -> bool:
        """Whether it is one packed file, which is read only."""
        return not isinstance(self.storage, Folder)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the bundle for writing during the block, and read its manifest again. A nested block does nothing.

        Raises:
            BundleBusyError: Another process has the lock. This does not wait: two benchmarks disturb each other.
            UsageError: The bundle is packed.
        """
        self._refuse_packed()
        with contextlib.nullcontext() if self._locks else lock_folder(self.path):
            if not self._locks:
                self.manifest = parse_manifest(self.storage.read(MANIFEST), _manifest_name(self.path))
            self._locks += 1
            try:
                yield
            finally:
                self._locks -= 1

    @contextlib.contextmanager
    def edit(self) -> Iterator[Draft]:
        """Change the manifest. It is written, all or nothing, if the block ends without an error and changed something.

        The bundle is locked during the block. If :func:`dsc_split.packing.pack_bundle` sealed it, the new manifest is
        not sealed: it does not list cells and tables. Signatures no longer fit and are removed. A nested block changes
        the same draft. ::

            with bundle.edit() as draft:
                draft.change(notes=("tried on the bench",))

        Raises:
            BundleBusyError: Another process has the lock.
            UsageError: The bundle is packed, or a changed field has a value that no manifest may hold.
            DscError: The manifest cannot be written.
        """
        if self._draft is not None:
            yield self._draft
            return
        with self.lock():
            draft = self._draft = Draft(self.manifest)
            try:
                yield draft
            finally:
                self._draft = None
            if draft.is_touched or draft.manifest != self.manifest:
                manifest = next_manifest(draft.manifest)
                write_bytes(self.path / MANIFEST, encode_manifest(manifest))
                self.manifest = manifest
                (self.path / ENVELOPE).unlink(missing_ok=True)

    def touch(self) -> None:
        """Write the manifest with a new revision; the bundle is not sealed afterwards.

        Raises:
            DscError: It cannot be written, or another process has the lock.
        """
        with self.edit() as draft:
            draft.touch()

    def unseal(self) -> None:
        """Write an unsealed manifest if the bundle is sealed; call it before a file of the bundle is written.

        Raises:
            DscError: It cannot be written, or another process has the lock.
        """
        if self.manifest.sealed:
            self.touch()

    # ---- files ---------------------------------------------------------------------------------------------

    def has(self, relative: str) -> bool:
        """Return whether the bundle has a file."""
        return self.storage.size_bytes(relative) is not None

    def listed(self, relative: str) -> FileEntry:
        """Return the manifest's entry of a file.

        Raises:
            BundleError: The manifest does not list the file, or the bundle is a part without it.
        """
        manifest = self.manifest
        if relative in manifest.files:
            return manifest.files[relative]
        if relative in manifest.left_out:
            raise BundleError(
                f"{str(self.path)!r} is the {manifest.side}'s part of a bundle, and {relative!r} was left out of it. "
                f"Use the whole bundle, or pack this side again with its graphs: dsc-split pack BUNDLE --side "
                f"{manifest.side} --with-onnx"
            )
        raise BundleError(f"manifest of {str(self.path)!r} does not list {relative!r}. Export it again.")

    def read(self, relative: str) -> bytes:
        """Read a whole file that the manifest lists, and check its size and SHA-256.

        Raises:
            BundleError: The manifest does not list the file, the file is missing, or it differs from the manifest.
        """
        listed, found_bytes = self.listed(relative), self.storage.size_bytes(relative)
        if found_bytes is None:
            raise BundleError(
                f"bundle {str(self.path)!r} lacks {relative!r}, which its manifest lists. Export it again."
            )
        if found_bytes != listed.size_bytes:
            raise BundleError(
                f"{relative!r} in {str(self.path)!r} has {found_bytes} bytes; the manifest says {listed.size_bytes}. "
                "The file was changed or damaged. Copy, unpack or export it again."
            )
        data = self.storage.read(relative, max_bytes=listed.size_bytes)
        found = hashlib.sha256(data).hexdigest()
        if found != listed.sha256:
            raise BundleError(
                f"{relative!r} in {str(self.path)!r} has SHA-256 {found[:12]}...; the manifest says "
                f"{listed.sha256[:12]}.... The file was changed or damaged. Copy, unpack or export it again."
            )
        return data

    def read_result(self, relative: str) -> bytes:
        """Read a cell, a table or a memory report; if the manifest lists the file, check its size and SHA-256.

        Raises:
            BundleError: The file cannot be read, differs from the manifest, or is packed and not listed.
        """
        is_checked = self.is_packed or relative in self.manifest.files
        return self.read(relative) if is_checked else self.storage.read(relative)

    def table(self) -> LookupTable:
        """Read the bundle's lookup table, and check that it was measured with the pairs of this bundle.

        Raises:
            UsageError: There is no table yet, or it was measured with other pairs.
            BundleError: The file differs from the manifest, or the bundle is packed and does not list the table.
            TableError: The table is damaged, contradicts itself, or is of a newer version.
        """
        if not self.has(TABLE):
            what = "packed bundle " if self.is_packed else ""
            again = "Pack it with one." if self.is_packed else self._how_to_time()
            raise UsageError(f"{what}{str(self.path)!r} has no {TABLE}. {again}")
        if self.is_packed or TABLE in self.manifest.files:
            table = LookupTable.load(self.read(TABLE))
        else:
            table = LookupTable.load(self.file(TABLE))
        if table.pair_id != self.manifest.pair_id:
            raise UsageError(
                f"the table of {str(self.path)!r} is of other pairs than the bundle has now. {self._how_to_time()}"
            )
        return table

    def _how_to_time(self) -> str:
        again = f"Make it: dsc-split bench {self.path}"
        if self.manifest.side is None:
            return again
        return f"{again}, and unite it with the other side's: dsc-split merge BUNDLE {self.path} OTHER"

    def require_trust(self, what: str) -> None:
        """Raise an error if native code of this bundle must not be loaded; ``what`` names the code in the message.

        Raises:
            SignatureError: The bundle is packed, no trusted key signed it, and unsigned bundles are not allowed.
        """
        if not self.trusted:
            raise SignatureError(
                f"{what} in {str(self.path)!r} is native code from a packed bundle, which is loaded only when a key "
                "that you trust signed it: give --trust PUBLIC_KEY, or --allow-unsigned to load it all the same."
            )

    def _refuse_packed(self) -> None:
        if self.is_packed:
            raise UsageError(
                f"{str(self.path)!r} is packed, and is read only. "
                f"Unpack it: dsc-split unpack {self.path} --output FOLDER"
            )

    # ---- the model -----------------------------------------------------------------------------------------

    @property
    def model_path(self) -> Path:
        """File of the whole model's graph."""
        return self.file(self.manifest.model.path)

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """Inputs of the model, in order."""
        return self.manifest.inputs

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        """Outputs of the model, in order. Shapes that depend on the data have no fixed size and count as zero."""
        return self.manifest.outputs

    @property
    def splits(self) -> tuple[Split, ...]:
        """Pairs that passed their proof, in graph order."""
        return self.manifest.splits

    @property
    def fixed_batch(self) -> int | None:
        """The only batch size that the model accepts; ``None`` where the batch dimension is a symbol."""
        return self.manifest.batch.fixed

    @property
    def max_batch(self) -> int:
        """The largest batch size that was run successfully."""
        return self.manifest.batch.max

    @property
    def full_offload(self) -> bool:
        """Whether the device may send the model's inputs unchanged to the server."""
        return self.manifest.full_offload

    def input_bytes(self, batch: int) -> int:
        """Count the bytes that full offload sends at ``batch``: those of ``--input-bytes``, or else of the inputs."""
        stated = self.manifest.input_bytes_stated
        if stated is not None:
            return stated * batch
        return sum(tensor.size_bytes(batch) for tensor in self.inputs)

    def batch_of(self, elements: Mapping[str, int]) -> int:
        """Return the batch size of inputs with these element counts, by name; 1 where no size depends on the batch."""
        if self.fixed_batch is not None:
            return self.fixed_batch
        for info in self.inputs:
            per_batch, constant = info.elements_by_batch
            if per_batch and info.name in elements:
                return (elements[info.name] - constant) // per_batch
        return 1

    def input_elements(self, batch: int) -> int:
        """Count the elements of the inputs at ``batch``."""
        return sum(tensor.elements(batch) for tensor in self.inputs)

    def output_bytes(self, batch: int, *, without: tuple[str, ...] = ()) -> int:
        """Count the bytes of the outputs that the server sends back at ``batch``.

        Args:
            batch: Batch size.
            without: Outputs that the head computes, which are not sent.
        """
        return sum(tensor.size_bytes(batch) for tensor in self.outputs if tensor.name not in without)

    def file(self, relative: str) -> Path:
        """Return the file for a path of the manifest; it may not exist yet.

        Raises:
            BundleError: The path is absolute, leaves the folder, contains a link, or is no valid path.
            UsageError: The bundle is packed.
        """
        self._refuse_packed()
        path = self.path / relative
        plain = not Path(relative).is_absolute() and ".." not in Path(relative).parts
        try:
            inside = plain and path.resolve() == self.path.resolve() / relative
        except (OSError, RuntimeError, ValueError):  # a loop of links, or text that is no path
            inside = False
        if not inside:
            raise BundleError(
                f"manifest of {str(self.path)!r} names {relative!r}, which is not a plain file inside the bundle. "
                "Export it again."
            )
        return path

    def graph_digest(self, relative: str) -> str:
        """Return the digest of a graph and its weights, 64 hexadecimal digits.

        Raises:
            BundleError: The manifest does not list the graph, or the weights.
        """
        files, weights = self.manifest.all_files, self.manifest.model.weights.path
        try:
            parts = [files[path].sha256 for path in (relative, weights) if path is not None]
        except KeyError as e:
            raise BundleError(f"manifest of {str(self.path)!r} does not list {e.args[0]!r}. Export it again.") from e
        return sha256_text("dsc-split/graph", *parts)

    def compute_pair_id(self) -> str:
        """Compute the id that all heads and tails of one export share: a digest of graphs, weights and precision.

        Raises:
            BundleError: The manifest does not list a graph, or the weights.
        """
        manifest = self.manifest
        parts = [self.graph_digest(manifest.model.path), manifest.precision]
        for split in sorted(manifest.splits, key=lambda split: split.name):
            parts += [split.name, self.graph_digest(split.head), self.graph_digest(split.tail)]
        return f"sha256:{sha256_text('dsc-split/pair', *parts)}"

    def targets(self, side: str) -> tuple[str, ...]:
        """List the targets recorded for ``side``; the last one is the newest choice of the user."""
        return tuple(entry.target for entry in self.manifest.targets.of(side))


def _require_sealed(storage: Storage, manifest: Manifest) -> None:
    """Check that the manifest of a packed file lists all its files: a signature covers only the manifest.

    Raises:
        BundleError: A file is not listed; the message names it.
    """
    strange = sorted({*storage.names()} - {*manifest.files, MANIFEST, ENVELOPE})
    if strange:
        raise BundleError(
            f"packed bundle {str(storage.path)!r} holds {strange[0]!r}, which its manifest does not list "
            f"({len(strange)} files in all). It was changed since it was packed; ask for another copy."
        )


def _manifest_name(path: str | os.PathLike[str]) -> str:
    return f"manifest {str(Path(path) / MANIFEST)!r}"
