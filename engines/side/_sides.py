"""Which graphs of a bundle run on which side, and where their golden samples lie."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsc_split._support.files import sha256_file
from dsc_split.engines._fingerprint import kind_of, target_id
from dsc_split.engines._source import read_listed, require_listed
from dsc_split.errors import BundleError, UsageError

if TYPE_CHECKING:
    import numpy as np

    from dsc_split.bundle import Bundle, Split
    from dsc_split.engines._base import BackendLike

__all__ = [
    "SIDES",
    "SideGraph",
    "golden_samples",
    "last_target",
    "read_samples",
    "record_check",
    "record_target",
    "recorded_here",
    "recorded_target",
    "recorded_targets",
    "side_graphs",
    "strip_prefix",
]

SIDES = ("device", "server")


@dataclass(frozen=True, kw_only=True)
class SideGraph:
    """A graph that runs on one side."""

    kind: str
    """``model``, ``head`` or ``tail``."""
    path: str
    """Path of the graph, relative to the bundle."""
    split: Split | None
    """The pair it belongs to; ``None`` for the whole model."""

    @property
    def label(self) -> str:
        """What it is, in words."""
        return "whole model" if self.split is None else f"{self.kind} {self.split.name}"


def side_graphs(bundle: Bundle, side: str, *, verify: bool = True, whole: bool = False) -> tuple[SideGraph, ...]:
    """List what runs on a side, the whole model first.

    On the device that is every head and the whole model; on the server every tail and, unless inputs must not
    be sent, the whole model.

    Args:
        bundle: The bundle.
        side: ``device`` or ``server``.
        verify: Whether the graphs themselves are needed; where engines are, they may be missing.
        whole: Whether every byte of the weights is looked at now, or their size alone.

    Raises:
        UsageError: ``side`` is neither, or the bundle is the other side's part.
        BundleError: A graph or the weights are not there, or are not what the manifest lists.
    """
    if side not in SIDES:
        raise UsageError(f"side is {side!r}; {' or '.join(map(repr, SIDES))} was expected.")
    part = bundle.manifest["side"]
    if part not in (None, side):
        raise UsageError(
            f"{str(bundle.path)!r} is the {part}'s part of a bundle; side {side!r} was asked for. "
            f"Use the whole bundle, or pack that side: dsc-split pack BUNDLE --side {side}"
        )
    model = SideGraph(kind="model", path=bundle.manifest["model"]["path"], split=None)
    graphs = [model] if side == "device" or bundle.full_offload else []
    for split in bundle.splits:
        kind, path = ("head", split.head) if side == "device" else ("tail", split.tail)
        graphs.append(SideGraph(kind=kind, path=path, split=split))
    if verify:
        for graph in graphs:
            read_listed(bundle, graph.path)
        _verify_weights(bundle, whole=whole)
    return tuple(graphs)


def _verify_weights(bundle: Bundle, *, whole: bool) -> None:
    """Look at the weights, which may be many GB: where they are run, every byte is looked at when they are loaded."""
    relative = bundle.manifest["model"]["weights"]["path"]
    if relative is None:
        return
    require_listed(bundle, relative)
    expected, found = bundle.manifest["files"][relative]["size"], bundle.storage.size_bytes(relative)
    if found != expected:
        state = "is missing" if found is None else f"has {found} bytes"
        raise BundleError(
            f"{relative!r} in {str(bundle.path)!r} {state}; the manifest says {expected} bytes. Export it again."
        )
    if whole and sha256_file(bundle.file(relative)) != bundle.manifest["files"][relative]["sha256"]:
        raise BundleError(f"{relative!r} in {str(bundle.path)!r} was changed or damaged. Copy or export it again.")


def last_target(bundle: Bundle, side: str) -> str:
    """Give the target of ``side`` that was asked for last, else ``onnxruntime:cpu``."""
    recorded = bundle.manifest["targets"].get(side) or ()
    return str(recorded[-1]["target"]) if recorded else "onnxruntime:cpu"


def recorded_targets(bundle: Bundle, side: str, target: str) -> list[dict[str, Any]]:
    """List what the manifest says of a target, given in its canonical text: an entry for each kind of machine."""
    return [item for item in bundle.manifest["targets"][side] if item["target"] == target]


def recorded_target(bundle: Bundle, side: str, target: str) -> dict[str, Any] | None:
    """Give the newest of :func:`recorded_targets`."""
    return next(reversed(recorded_targets(bundle, side, target)), None)


def recorded_here(bundle: Bundle, side: str, backend: BackendLike) -> dict[str, Any] | None:
    """Find what the manifest says of a back-end's target, for the kind of machine that is at hand."""
    kind = kind_of(backend.build_fingerprint())
    entries = recorded_targets(bundle, side, str(backend.target))
    return next((item for item in reversed(entries) if kind_of(item["fingerprint"]) == kind), None)


def record_target(bundle: Bundle, side: str, backend: BackendLike, engines: Mapping[str, Any] | None = None) -> None:
    """Put a target at the end of the manifest's list for ``side``; hold the bundle's lock around this.

    A target that stands there already, for this kind of machine, moves to the end, with the fingerprint it has now.
    Where all of this is so already, nothing is written.

    Args:
        bundle: The bundle.
        side: ``device`` or ``server``.
        backend: The back-end of the target.
        engines: What was built for it: ``options``, ``engines`` and ``failed``; what stands there already where
            nothing was built.
    """
    before, fingerprint = recorded_here(bundle, side, backend), backend.build_fingerprint()
    entry = {"target": str(backend.target), "fingerprint": fingerprint, "id": target_id(fingerprint)}
    if engines is not None:
        entry |= engines
    elif before is not None:
        same = before["fingerprint"] == fingerprint
        entry |= {key: before[key] for key in ("options", "engines", "failed", *(["check"] * same)) if key in before}
    recorded = bundle.manifest["targets"][side]
    if engines is None and before == entry and recorded[-1] is before:
        return
    bundle.manifest["targets"][side] = [item for item in recorded if item is not before] + [entry]
    bundle.save()


def record_check(bundle: Bundle, side: str, backend: BackendLike, check: Mapping[str, Any]) -> None:
    """Note beside a target what a check found; hold the bundle's lock around this.

    A target that is not recorded yet is put at the front: checking one does not make it the one asked for last.
    """
    entry = recorded_here(bundle, side, backend)
    if entry is None:
        fingerprint = backend.build_fingerprint()
        entry = {"target": str(backend.target), "fingerprint": fingerprint, "id": target_id(fingerprint)}
        bundle.manifest["targets"][side].insert(0, entry)
    entry["check"] = dict(check)
    bundle.save()


def read_samples(source: Path | bytes, name: str) -> dict[str, np.ndarray]:
    """Read samples: arrays under keys like ``input:NAME``.

    Args:
        source: A user's file, or the bytes of a bundle's, which are not compressed.
        name: Of the file, for messages.

    Raises:
        BundleError: They cannot be read, or hold anything but plain arrays.
    """
    import numpy as np

    try:
        if isinstance(source, bytes):
            with zipfile.ZipFile(io.BytesIO(source)) as members:
                if any(member.compress_type != zipfile.ZIP_STORED for member in members.infolist()):
                    raise ValueError("it is compressed, and may be of any size")
        with (
            source.open("rb") if isinstance(source, Path) else io.BytesIO(source) as file,
            np.load(file, allow_pickle=False) as archive,
        ):
            return {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, MemoryError, zipfile.BadZipFile) as e:
        why = "it is no file of plain arrays" if isinstance(e, ValueError) else e
        raise BundleError(f"samples {name!r} cannot be read: {why}. Make them again, or export again.") from e


def golden_samples(bundle: Bundle, split: Split | None) -> dict[str, np.ndarray] | None:
    """Read the golden samples of the whole model or of a pair; ``None`` where the bundle has none.

    Returns:
        Keys ``input:NAME``, ``output:NAME`` for the whole model, ``cut:NAME``, ``early:NAME`` for a pair.
    """
    relative = "samples/model.npz" if split is None else f"samples/{split.name}.npz"
    if relative in bundle.manifest["files"]:
        return read_samples(bundle.read(relative), relative)
    if bundle.is_packed or not bundle.has(relative):
        return None
    return read_samples(bundle.file(relative), relative)


def strip_prefix(samples: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Give the entries under ``prefix``, without it."""
    return {key[len(prefix) :]: value for key, value in samples.items() if key.startswith(prefix)}
