"""Choose the files of a part of a bundle: only those that one side needs."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import PurePosixPath

from dsc_split.bundles._records import SIDES, Manifest, TargetEntry
from dsc_split.errors import UsageError
from dsc_split.shipping._file_checks import role_of

__all__ = ["choose_targets", "fits_record", "fits_table", "held_files", "put_last", "side_graphs"]


def choose_targets(manifest: Manifest, side: str, asked: str | None) -> list[TargetEntry]:
    """Return the entries of one target of a side, or of all its targets.

    Args:
        manifest: The bundle's manifest.
        side: ``device`` or ``server``.
        asked: The target's text or id; ``None``: all targets.

    Raises:
        UsageError: There is no such target.
    """
    recorded = manifest.targets.of(side)
    found = [entry for entry in recorded if asked in (None, entry.target, entry.id)]
    if asked is not None and not found:
        known = ", ".join(f"{entry.target!r} (id {entry.id})" for entry in recorded) or "none is recorded"
        raise UsageError(f"--{side} is {asked!r}, and the bundle has no such target for its {side} side: {known}.")
    return found


def put_last(recorded: Sequence[TargetEntry], chosen: Sequence[TargetEntry]) -> tuple[TargetEntry, ...]:
    """Return the recorded targets with the chosen ones at the end, because the last target is the one in use."""
    return (*(entry for entry in recorded if entry not in chosen), *chosen)


def side_graphs(manifest: Manifest, side: str) -> set[str]:
    """Return the paths of the graphs that run on a side."""
    graphs = {split.graph(side) for split in manifest.splits}
    return graphs | {manifest.model.path} if side == "device" or manifest.full_offload else graphs


def held_files(manifest: Manifest, side: str, targets: Sequence[TargetEntry], *, with_onnx: bool) -> set[str]:
    """Return the paths of the listed files that a side needs: engines or graphs, and the samples.

    Args:
        manifest: The bundle's manifest.
        side: ``device`` or ``server``.
        targets: Entries of the part's targets.
        with_onnx: Whether to include the graphs even if all targets have engines.

    Raises:
        UsageError: A needed file is missing because the bundle is already a part.
    """
    needed = {path for path, entry in manifest.files.items() if entry.role == "sample"}
    needed |= {engine.path for entry in targets for engine in entry.built}
    if with_onnx or not targets or not all(entry.is_compiled for entry in targets):
        needed |= side_graphs(manifest, side)
        needed |= {manifest.model.weights.path} if manifest.model.weights.path else set()
    if absent := sorted(needed & manifest.left_out.keys()):
        raise UsageError(
            f"the {side} side needs {', '.join(map(repr, absent))}, which this part of a bundle does not hold. "
            "Pack the whole bundle's."
        )
    return {path for path in manifest.files if path in needed}


def fits_table(name: str, data: bytes, side: str, targets: Sequence[TargetEntry]) -> bool:
    """Return whether a lookup table was measured on one of a side's targets.

    Several kinds of machines may have the same target. So if the file's name has target ids, the side's id must fit.
    """
    if not any(entry.target == json.loads(data)[side]["target"] for entry in targets):
        return False
    ids = PurePosixPath(name).stem.split("--")
    return len(ids) != len(SIDES) or any(ids[SIDES.index(side)].startswith(f"{entry.id}-") for entry in targets)


def fits_record(name: str, data: bytes, side: str, graphs: Collection[str], targets: Sequence[TargetEntry]) -> bool:
    """Return whether a cell or a memory report is of one of a side's targets and, by digest, of one of its graphs."""
    document = json.loads(data)
    if not any(entry.target == document["target"] for entry in targets):
        return False
    if role_of(name) == "memory":
        return bool(document["side"] == side)
    return document["question"]["graph_digest"] in graphs
