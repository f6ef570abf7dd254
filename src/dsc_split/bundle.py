"""The bundle: the folder that holds a model's graphs, cells, tables and manifest.

This module knows where things lie, reads and writes the manifest, and keeps two writers apart. What is in a
graph or a cell is the business of the rooms.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsc_split._files import read_json, sha256_text, write_json
from dsc_split._manifest import check_manifest
from dsc_split.errors import BundleBusyError, BundleError, DamagedError, DscError, UsageError

__all__ = ["FORMAT", "VERSION", "Bundle", "Split", "TensorInfo"]

FORMAT = "dsc-split/bundle"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor at a border of a graph: an input, an output, or what crosses a cut."""

    name: str
    """ONNX value name."""
    dtype: str
    """Lower-case ONNX element type: ``float32``, ``int64``, ..."""
    shape: tuple[int | str, ...]
    """Dimensions; a string is an expression in the batch symbol."""
    elements_by_batch: tuple[int, int]
    """``(per_batch, constant)``: the tensor has ``per_batch * batch + constant`` elements."""
    itemsize: int
    """Bytes per element, before any encoding."""

    def elements(self, batch: int) -> int:
        """Count the elements at ``batch``."""
        per_batch, constant = self.elements_by_batch
        return per_batch * batch + constant

    def size_bytes(self, batch: int) -> int:
        """Count the bytes at ``batch``, as the tensor lies in memory."""
        return self.elements(batch) * self.itemsize

    def shape_at(self, batch: int) -> tuple[int, ...]:
        """Give the shape at ``batch``; the size of the free dimension follows from the count of elements.

        Raises:
            UsageError: More than one dimension is free.
        """
        free = [dim for dim in self.shape if isinstance(dim, str)]
        if len(free) > 1:
            raise UsageError(
                f"tensor {self.name!r} has {len(free)} free dimensions ({', '.join(free)}); "
                "one was expected. Give the others values with --input-shape."
            )
        fixed = math.prod(dim for dim in self.shape if isinstance(dim, int))
        size = self.elements(batch) // fixed if fixed else batch
        return tuple(size if isinstance(dim, str) else dim for dim in self.shape)

    def to_json(self) -> dict[str, Any]:
        """Give the manifest's form."""
        return {
            "name": self.name,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "elements_by_batch": list(self.elements_by_batch),
            "itemsize": self.itemsize,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TensorInfo:
        """Read the manifest's form."""
        per_batch, constant = data["elements_by_batch"]
        return cls(
            name=data["name"],
            dtype=data["dtype"],
            shape=tuple(data["shape"]),
            elements_by_batch=(int(per_batch), int(constant)),
            itemsize=int(data["itemsize"]),
        )


@dataclass(frozen=True, kw_only=True)
class Split:
    """A pair as the manifest lists it."""

    name: str
    """The cut's name: file-name safe, unique without regard to case."""
    tensors: tuple[TensorInfo, ...]
    """What crosses the cut, passthrough inputs included."""
    passthrough: tuple[str, ...]
    """Names of the graph inputs among ``tensors``: the device sends them as they are."""
    head: str
    """Path of the head graph, relative to the bundle."""
    tail: str
    """Path of the tail graph, relative to the bundle."""
    early_outputs: tuple[str, ...]
    """Model outputs that the head computes; they stay on the device."""
    data: dict[str, Any]
    """The whole entry of the manifest: ratio, flags, errors."""

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Split:
        """Read an entry of the manifest."""
        return cls(
            name=data["name"],
            tensors=tuple(TensorInfo.from_json(tensor) for tensor in data["tensors"]),
            passthrough=tuple(tensor["name"] for tensor in data["tensors"] if tensor["passthrough"]),
            head=data["head"],
            tail=data["tail"],
            early_outputs=tuple(data["early_outputs"]),
            data=data,
        )

    def size_bytes(self, batch: int) -> int:
        """Count the bytes that cross the cut at ``batch``."""
        return sum(tensor.size_bytes(batch) for tensor in self.tensors)

    def elements(self, batch: int) -> int:
        """Count the elements that cross the cut at ``batch``."""
        return sum(tensor.elements(batch) for tensor in self.tensors)


class Bundle:
    """A bundle folder, opened for reading; writers take :meth:`lock` first.

    Attributes:
        path: The folder.
        manifest: The manifest, as read; :meth:`save` writes it.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest

    # ---- opening -------------------------------------------------------------------------------------------

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Open the bundle in folder ``path``.

        Raises:
            UsageError: There is no such folder, or it is no bundle.
            BundleError: The manifest is damaged, or of a newer format.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise UsageError(
                f"no bundle {str(folder)!r}: there is no such folder. "
                f"Make one: dsc-split export SOURCE --output {folder}"
            )
        if not cls.is_bundle(folder):
            raise UsageError(
                f"{str(folder)!r} is no bundle: it has no manifest.json. "
                "Make one: dsc-split export SOURCE --output BUNDLE"
            )
        return cls(folder, _read_manifest(folder))

    @staticmethod
    def is_bundle(path: Path) -> bool:
        """Tell whether the folder ``path`` holds a manifest."""
        return (path / "manifest.json").is_file()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the bundle for writing, and see its newest manifest.

        Raises:
            BundleBusyError: Another process holds it. Nothing waits: a benchmark beside another one is worthless.
        """
        with lock_folder(self.path):
            self.manifest = _read_manifest(self.path)
            yield

    def save(self) -> None:
        """Write the manifest, all or nothing. Hold :meth:`lock` around reading, changing and saving."""
        write_json(self.path / "manifest.json", self.manifest)

    # ---- the model -----------------------------------------------------------------------------------------

    @property
    def model_path(self) -> Path:
        """The whole model's graph."""
        return self.file(self.manifest["model"]["path"])

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """Inputs of the model, in order."""
        return tuple(TensorInfo.from_json(item) for item in self.manifest["inputs"])

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        """Outputs of the model, in order. Shapes that depend on the data have no fixed size and count as zero."""
        return tuple(TensorInfo.from_json(item) for item in self.manifest["outputs"])

    @property
    def splits(self) -> tuple[Split, ...]:
        """The pairs that passed their proof, in graph order."""
        return tuple(Split.from_json(item) for item in self.manifest["splits"])

    @property
    def fixed_batch(self) -> int | None:
        """The only batch size the model takes, or ``None`` where the batch is a symbol."""
        value = self.manifest["batch"]["fixed"]
        return None if value is None else int(value)

    @property
    def max_batch(self) -> int:
        """The largest batch size that was proven to run."""
        return int(self.manifest["batch"]["max"])

    @property
    def full_offload(self) -> bool:
        """Whether inputs may be sent to the server as they are."""
        return bool(self.manifest["full_offload"])

    def input_bytes(self, batch: int) -> int:
        """Count what full offload sends at ``batch``: as stated with ``--input-bytes``, else the inputs' own bytes."""
        stated = self.manifest["input_bytes_stated"]
        if stated is not None:
            return int(stated) * batch
        return sum(tensor.size_bytes(batch) for tensor in self.inputs)

    def batch_of(self, elements: Mapping[str, int]) -> int:
        """Find the batch size from how many elements inputs have, by name; 1 where no size depends on it."""
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
        """Count the bytes of the outputs at ``batch`` that come back from the server.

        Args:
            batch: Batch size.
            without: Outputs that the head has already computed.
        """
        return sum(tensor.size_bytes(batch) for tensor in self.outputs if tensor.name not in without)

    def file(self, relative: str) -> Path:
        """Resolve a path of the manifest, and refuse one that leaves the bundle.

        Raises:
            BundleError: The path is absolute, leaves the folder, is or goes through a link, or is no path.
        """
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
        """Give the digest of a graph with the weights it refers to.

        Raises:
            BundleError: The manifest does not list the graph.
        """
        files = self.manifest["files"]
        weights = self.manifest["model"]["weights"]["path"]
        try:
            parts = [files[relative]["sha256"]] + ([files[weights]["sha256"]] if weights else [])
        except KeyError as e:
            raise BundleError(f"manifest of {str(self.path)!r} does not list {e.args[0]!r}. Export it again.") from e
        return sha256_text("dsc-split/graph", *parts)

    def targets(self, side: str) -> tuple[str, ...]:
        """List the targets recorded for ``side``, the one asked for last at the end."""
        return tuple(item["target"] for item in self.manifest["targets"][side])


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep other writers out of a bundle folder; the holder is named in the error.

    Raises:
        BundleBusyError: Another process holds it.
        DscError: The folder cannot be written.
    """
    from filelock import FileLock, Timeout  # what only reads a table needs no lock

    lock_path = folder / ".lock"
    holder_path = folder / ".lock.holder"
    lock = FileLock(lock_path)
    try:
        lock.acquire(timeout=0)
    except Timeout as e:
        raise BundleBusyError(
            f"bundle {str(folder)!r} is being written by another dsc-split ({_holder(holder_path)}). "
            "Wait for it to end, or stop it."
        ) from e
    except OSError as e:
        raise DscError(f"bundle {str(folder)!r} cannot be locked for writing: {e.strerror or e}.") from e
    try:
        with contextlib.suppress(OSError):
            holder_path.write_text(json.dumps({"pid": os.getpid()}))
        yield
    finally:
        holder_path.unlink(missing_ok=True)
        lock.release()


def _holder(path: Path) -> str:
    try:
        return f"process {int(json.loads(path.read_text())['pid'])}"
    except (OSError, ValueError, KeyError, TypeError):
        return "process unknown"


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    manifest = read_json(path, "manifest", BundleError)
    if manifest.get("format") != FORMAT:
        raise BundleError(f"manifest {str(path)!r} has format {manifest.get('format')!r}; {FORMAT!r} was expected.")
    version = manifest.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BundleError(f"manifest {str(path)!r} has version {version!r}; a whole number from 1 was expected.")
    if version > VERSION:
        raise BundleError(
            f"manifest {str(path)!r} has version {version}; this dsc-split reads up to {VERSION}. Update dsc-split."
        )
    try:
        check_manifest(manifest)
    except DamagedError as e:
        raise BundleError(f"manifest {str(path)!r}: {e} Export it again.") from e
    return manifest
