"""List the graphs of a side, and read and write a side's targets in the manifest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from msgspec import UNSET
from msgspec.structs import replace

from dsc_split._support.hashing import sha256_file
from dsc_split.bundles._records import SIDES, TargetEntry
from dsc_split.engines._fingerprint import kind_of, target_id
from dsc_split.errors import BundleError, UsageError

if TYPE_CHECKING:
    from dsc_split.bundle import Bundle, Draft, Manifest, Split
    from dsc_split.bundles._records import CheckResult
    from dsc_split.engines._base import BackendLike

__all__ = [
    "SIDES",
    "SideGraph",
    "last_target",
    "new_entry",
    "put_last",
    "record_check",
    "record_target",
    "recorded_here",
    "recorded_target",
    "recorded_targets",
    "side_graphs",
]


@dataclass(frozen=True, kw_only=True)
class SideGraph:
    """A graph that runs on one side."""

    kind: str
    """``model``, ``head`` or ``tail``."""
    path: str
    """Path of the graph, relative to the bundle."""
    split: Split | None
    """Its pair; ``None`` for the whole model."""

    @property
    def label(self) -> str:
        """Name for people: ``whole model``, ``head NAME``."""
        return "whole model" if self.split is None else f"{self.kind} {self.split.name}"


def side_graphs(bundle: Bundle, side: str, *, verify: bool = True, whole: bool = False) -> tuple[SideGraph, ...]:
    """List the graphs of a side, the whole model first.

    The device has all heads and the whole model. The server has all tails and, unless inputs must not be sent, the
    whole model.

    Args:
        bundle: The bundle.
        side: ``device`` or ``server``.
        verify: Whether to check the graphs and weights; with engines, they may be missing.
        whole: Whether to check every byte of the weights, or only their size.

    Raises:
        UsageError: ``side`` is neither, or the bundle is the other side's part.
        BundleError: A graph or the weights are missing, or are not what the manifest lists.
    """
    if side not in SIDES:
        raise UsageError(f"side is {side!r}; {' or '.join(map(repr, SIDES))} was expected.")
    part = bundle.manifest.side
    if part not in (None, side):
        raise UsageError(
            f"{str(bundle.path)!r} is the {part}'s part of a bundle; side {side!r} was asked for. "
            f"Use the whole bundle, or pack that side: dsc-split pack BUNDLE --side {side}"
        )
    model = SideGraph(kind="model", path=bundle.manifest.model.path, split=None)
    graphs = [model] if side == "device" or bundle.full_offload else []
    kind = "head" if side == "device" else "tail"
    graphs += [SideGraph(kind=kind, path=split.graph(side), split=split) for split in bundle.splits]
    if verify:
        for graph in graphs:
            bundle.read(graph.path)
        _verify_weights(bundle, whole=whole)
    return tuple(graphs)


def _verify_weights(bundle: Bundle, *, whole: bool) -> None:
    """Check the weights, which may be many GB; when a graph is loaded, every byte is checked then."""
    relative = bundle.manifest.model.weights.path
    if relative is None:
        return
    listed, found = bundle.listed(relative), bundle.storage.size_bytes(relative)
    if found != listed.size_bytes:
        state = "is missing" if found is None else f"has {found} bytes"
        raise BundleError(
            f"{relative!r} in {str(bundle.path)!r} {state}; the manifest says {listed.size_bytes} bytes. "
            "Export it again."
        )
    if whole and sha256_file(bundle.file(relative)) != listed.sha256:
        raise BundleError(f"{relative!r} in {str(bundle.path)!r} was changed or damaged. Copy or export it again.")


def last_target(bundle: Bundle, side: str) -> str:
    """Return the last recorded target of ``side``, or else ``onnxruntime:cpu``."""
    recorded = bundle.targets(side)
    return recorded[-1] if recorded else "onnxruntime:cpu"


def recorded_targets(bundle: Bundle, side: str, target: str) -> tuple[TargetEntry, ...]:
    """List the entries of a target, given as its canonical text: one for each kind of machine."""
    return bundle.manifest.targets.named(side, target)


def recorded_target(bundle: Bundle, side: str, target: str) -> TargetEntry | None:
    """Return the newest of :func:`recorded_targets`."""
    return next(reversed(recorded_targets(bundle, side, target)), None)


def recorded_here(manifest: Manifest, side: str, backend: BackendLike) -> TargetEntry | None:
    """Return the entry of a back-end's target for this kind of machine, or ``None``."""
    kind = kind_of(backend.build_fingerprint())
    entries = manifest.targets.named(side, str(backend.target))
    return next((entry for entry in reversed(entries) if kind_of(entry.fingerprint) == kind), None)


def new_entry(backend: BackendLike) -> TargetEntry:
    """Make an entry of a back-end's target for this machine, without engines."""
    fingerprint = backend.build_fingerprint()
    return TargetEntry(target=str(backend.target), fingerprint=fingerprint, id=target_id(fingerprint))


def record_target(bundle: Bundle, side: str, backend: BackendLike) -> None:
    """Put a target at the end of the manifest's list for ``side``.

    If the list has the target for this kind of machine, its entry moves to the end, with its engines and the current
    fingerprint. If nothing changes, nothing is written.

    Raises:
        DscError: The manifest cannot be written, or another process holds the bundle.
    """
    with bundle.edit() as draft:
        entry, before = new_entry(backend), recorded_here(draft.manifest, side, backend)
        if before is not None:
            check = before.check if before.fingerprint == entry.fingerprint else UNSET
            entry = replace(before, fingerprint=entry.fingerprint, id=entry.id, check=check)
        put_last(draft, side, entry, before)


def put_last(draft: Draft, side: str, entry: TargetEntry, before: TargetEntry | None) -> None:
    """Put an entry at the end of the list for ``side``, and remove ``before``."""
    others = (item for item in draft.manifest.targets.of(side) if item is not before)
    draft.set_targets(side, (*others, entry))


def record_check(bundle: Bundle, side: str, backend: BackendLike, check: CheckResult) -> None:
    """Write the result of a check to a target's entry.

    A new target goes to the front of the list: a check does not make it the default target.

    Raises:
        DscError: The manifest cannot be written, or another process holds the bundle.
    """
    with bundle.edit() as draft:
        entries, before = draft.manifest.targets.of(side), recorded_here(draft.manifest, side, backend)
        if before is None:
            draft.set_targets(side, (replace(new_entry(backend), check=check), *entries))
        else:
            draft.set_targets(side, (replace(item, check=check) if item is before else item for item in entries))
