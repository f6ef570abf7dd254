"""Which graphs of a bundle run on which side, and where their golden samples lie."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsc_split._files import sha256_file
from dsc_split.engines._fingerprint import target_id
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
    "recorded_target",
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
        whole: Whether every byte of the weights is looked at, or their size alone.

    Raises:
        UsageError: ``side`` is neither.
        BundleError: A graph or the weights are not there, or are not what the manifest lists.
    """
    if side not in SIDES:
        raise UsageError(f"side is {side!r}; {' or '.join(map(repr, SIDES))} was expected.")
    model = SideGraph(kind="model", path=bundle.manifest["model"]["path"], split=None)
    graphs = [model] if side == "device" or bundle.full_offload else []
    for split in bundle.splits:
        kind, path = ("head", split.head) if side == "device" else ("tail", split.tail)
        graphs.append(SideGraph(kind=kind, path=path, split=split))
    if verify:
        for graph in graphs:
            _verify(bundle, graph.path)
        _verify_weights(bundle, whole=whole)
    return tuple(graphs)


def _verify(bundle: Bundle, relative: str) -> None:
    path = bundle.file(relative)
    listed = bundle.manifest["files"].get(relative)
    if listed is None:
        raise BundleError(f"manifest of {str(bundle.path)!r} does not list {relative!r}. Export it again.")
    if not path.is_file():
        raise BundleError(f"bundle {str(bundle.path)!r} lacks {relative!r}, which its manifest lists. Export it again.")
    found = sha256_file(path)
    if found != listed["sha256"]:
        raise BundleError(
            f"{str(path)!r} has SHA-256 {found[:12]}...; the manifest says {listed['sha256'][:12]}.... "
            f"The file was changed or damaged. Export it again."
        )


def _verify_weights(bundle: Bundle, *, whole: bool) -> None:
    """Look at the weights, which may be many GB: where they are only run, a changed value is found by ``check``."""
    relative = bundle.manifest["model"]["weights"]["path"]
    if relative is None:
        return
    path = bundle.file(relative)
    listed = bundle.manifest["files"].get(relative)
    found = path.stat().st_size if path.is_file() else None
    if listed is None or found != listed["size"]:
        says = "does not list it" if listed is None else f"says {listed['size']} bytes"
        state = "is missing" if found is None else f"has {found} bytes"
        raise BundleError(f"{str(path)!r} {state}; the manifest {says}. Export it again.")
    if whole:
        _verify(bundle, relative)


def last_target(bundle: Bundle, side: str) -> str:
    """Give the target of ``side`` that was asked for last, else ``onnxruntime:cpu``."""
    recorded = bundle.manifest["targets"].get(side) or ()
    return str(recorded[-1]["target"]) if recorded else "onnxruntime:cpu"


def recorded_target(bundle: Bundle, side: str, target: str) -> dict[str, Any] | None:
    """Find what the manifest says of a target, given in its canonical text."""
    found: list[dict[str, Any]] = [item for item in bundle.manifest["targets"][side] if item["target"] == target]
    return found[-1] if found else None


def record_target(bundle: Bundle, side: str, backend: BackendLike, engines: Mapping[str, Any] | None = None) -> None:
    """Put a target at the end of the manifest's list for ``side``; hold the bundle's lock around this.

    A target that stands there already moves to the end, with the fingerprint it has now.

    Args:
        bundle: The bundle.
        side: ``device`` or ``server``.
        backend: The back-end of the target.
        engines: What was built for it: ``options``, ``engines`` and ``failed``; what stands there already where
            nothing was built.
    """
    target, fingerprint = str(backend.target), backend.build_fingerprint()
    if engines is None:
        before = recorded_target(bundle, side, target) or {}
        engines = {key: before[key] for key in ("options", "engines", "failed") if key in before}
    entry = {"target": target, "fingerprint": fingerprint, "id": target_id(fingerprint), **engines}
    recorded = bundle.manifest["targets"].setdefault(side, [])
    if engines is None and recorded and recorded[-1] == entry:
        return
    bundle.manifest["targets"][side] = [item for item in recorded if item["target"] != target] + [entry]
    bundle.save()


def record_check(bundle: Bundle, side: str, backend: BackendLike, check: Mapping[str, Any]) -> None:
    """Note beside a target what a check found; hold the bundle's lock around this.

    A target that is not recorded yet is put at the front: checking one does not make it the one asked for last.
    """
    entry = recorded_target(bundle, side, str(backend.target))
    if entry is None:
        fingerprint = backend.build_fingerprint()
        entry = {"target": str(backend.target), "fingerprint": fingerprint, "id": target_id(fingerprint)}
        bundle.manifest["targets"][side].insert(0, entry)
    entry["check"] = dict(check)
    bundle.save()


def read_samples(path: Path) -> dict[str, np.ndarray]:
    """Read a file of samples: arrays under keys like ``input:NAME``.

    Raises:
        BundleError: It cannot be read, or holds anything but plain arrays.
    """
    import numpy as np

    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as e:
        why = "it is no file of plain arrays" if isinstance(e, ValueError) else e
        raise BundleError(f"samples {str(path)!r} cannot be read: {why}. Make them again, or export again.") from e


def golden_samples(bundle: Bundle, split: Split | None) -> dict[str, np.ndarray] | None:
    """Read the golden samples of the whole model or of a pair; ``None`` where the bundle has none.

    Returns:
        Keys ``input:NAME``, ``output:NAME`` for the whole model, ``cut:NAME``, ``early:NAME`` for a pair.
    """
    relative = "samples/model.npz" if split is None else f"samples/{split.name}.npz"
    path = bundle.file(relative)
    return read_samples(path) if path.is_file() else None


def strip_prefix(samples: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Give the entries under ``prefix``, without it."""
    return {key[len(prefix) :]: value for key, value in samples.items() if key.startswith(prefix)}
