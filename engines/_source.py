"""Sources of engines: checked bytes in memory, so that no file is opened again after its check."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from dsc_split.bundles._onnx_scan import scan_graph
from dsc_split.errors import BundleError, DamagedError

if TYPE_CHECKING:
    from dsc_split.bundle import Bundle

__all__ = ["EngineSource", "GraphReader", "Weights"]

BLOCK_BYTES = 1 << 20

_IN_MEMORY: weakref.WeakValueDictionary[str, Weights] = weakref.WeakValueDictionary()
"""Weights by digest: engines of this process that use the same weights share them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Weights:
    """The weights of a bundle, in memory and checked."""

    name: str
    """Name of their file, as graphs refer to it."""
    data: mmap.mmap
    """All bytes of the file; one zero where it is empty. Must be kept as long as engines use the weights."""
    size_bytes: int
    """Size of the file."""


def _no_weights() -> Weights | None:
    return None


@dataclass(frozen=True, kw_only=True)
class EngineSource:
    """An engine's file or a graph, as the bytes that were checked."""

    name: str
    """Name of the file, for messages."""
    data: bytes
    """All bytes of the file."""
    sha256: str
    """Digest of ``data``, 64 hexadecimal digits."""
    read_weights: Callable[[], Weights | None] = field(default=_no_weights)
    """Returns the weights that a graph refers to; ``None`` where it refers to none."""

    @contextlib.contextmanager
    def written(self) -> Iterator[Path]:
        """Write the bytes, and a graph's weights beside them, for a library that needs a path.

        The folder is closed to other users, and is removed at the end of the block.

        Raises:
            BundleError: The weights are missing, or are not what the manifest says.
        """
        with tempfile.TemporaryDirectory(prefix="dsc-split-", ignore_cleanup_errors=True) as folder:
            weights = self.read_weights()
            if weights is not None:
                with (Path(folder) / weights.name).open("wb") as file:
                    for start in range(0, weights.size_bytes, BLOCK_BYTES):
                        file.write(weights.data[start : start + BLOCK_BYTES])
            path = Path(folder) / self.name
            path.write_bytes(self.data)
            yield path


class GraphReader:
    """Reads graphs of a bundle. Reads the weights once, and keeps them as long as the reader exists."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._weights: Weights | None = None

    def read(self, relative: str) -> EngineSource:
        """Read a graph, and check that it refers only to the bundle's weights.

        Raises:
            BundleError: It is missing, is not what the manifest says, is damaged, or names another file.
            SignatureError: It carries a compiled engine, and the bundle is not trusted.
        """
        data = self._bundle.read(relative)
        try:
            found = scan_graph(data)
        except DamagedError as e:
            raise BundleError(f"graph {relative!r} cannot be loaded: {e}. Export it again.") from e
        if found.context_files:
            raise BundleError(
                f"graph {relative!r} names compiled engines in other files ({', '.join(found.context_files)}), "
                "which are not loaded. Export the model without EPContext nodes."
            )
        if found.has_ep_context:
            self._bundle.require_trust(f"graph {relative!r}, which holds a compiled engine (EPContext),")
        ours = _weights_name(relative, self._bundle.manifest.model.weights.path)
        if wrong := sorted({*found.locations} - {ours}):
            raise BundleError(
                f"graph {relative!r} refers to {', '.join(map(repr, wrong))}, which is not the bundle's weights. "
                "Export it again."
            )
        return EngineSource(
            name=PurePosixPath(relative).name,
            data=data,
            sha256=self._bundle.listed(relative).sha256,
            read_weights=self._read_weights if found.locations else _no_weights,
        )

    def _read_weights(self) -> Weights | None:
        path = self._bundle.manifest.model.weights.path
        if self._weights is None and path is not None:
            self._weights = _read_weights(self._bundle, path)
        return self._weights


def _weights_name(graph: str, weights: str | None) -> str | None:
    """Return the name by which a graph refers to the weights; ``None`` where they are not beside it."""
    if weights is None or PurePosixPath(weights).parent != PurePosixPath(graph).parent:
        return None
    return PurePosixPath(weights).name


def _read_weights(bundle: Bundle, relative: str) -> Weights:
    """Read the weights into memory and hash the same bytes.

    Raises:
        BundleError: They are missing, or are not what the manifest says.
    """
    listed = bundle.listed(relative)
    known = _IN_MEMORY.get(listed.sha256)
    name = PurePosixPath(relative).name
    if known is not None and known.name == name:
        return known
    size_bytes, digest, position = listed.size_bytes, hashlib.sha256(), 0
    # Unwritten pages of zeros take no memory: sparse weights stay as small as their file.
    data = mmap.mmap(-1, max(1, size_bytes))
    zeros = bytes(BLOCK_BYTES)
    with bundle.storage.open(relative) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            end = position + len(block)
            if end > size_bytes:
                break
            if block != zeros[: len(block)]:
                data[position:end] = block
            position = end
    found = digest.hexdigest()
    if found != listed.sha256:
        raise BundleError(
            f"{relative!r} in {os.fspath(bundle.path)!r} has SHA-256 {found[:12]}...; the manifest says "
            f"{listed.sha256[:12]}.... The file was changed or damaged. Copy, unpack or export it again."
        )
    weights = Weights(name=name, data=data, size_bytes=size_bytes)
    _IN_MEMORY[listed.sha256] = weights
    return weights
