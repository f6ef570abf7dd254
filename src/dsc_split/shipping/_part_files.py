"""Which files of a bundle a part of it holds: what one side needs, and no more."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from dsc_split.errors import UsageError
from dsc_split.shipping._file_checks import role_of

__all__ = ["SIDES", "choose_targets", "fits_record", "fits_table", "held_files", "put_last", "side_graphs"]

SIDES = ("device", "server")

Entry = Mapping[str, Any]


def choose_targets(manifest: Mapping[str, Any], side: str, asked: str | None) -> list[Entry]:
    """Find the entries of a side's targets; all of them where none is asked for.

    Args:
        manifest: The bundle's manifest.
        side: ``device`` or ``server``.
        asked: A target's text or its id.

    Raises:
        UsageError: There is no such target.
    """
    recorded: list[Entry] = manifest["targets"][side]
    found = [entry for entry in recorded if asked in (None, entry["target"], entry["id"])]
    if asked is not None and not found:
        known = ", ".join(f"{entry['target']!r} (id {entry['id']})" for entry in recorded) or "none is recorded"
        raise UsageError(f"--{side} is {asked!r}, and the bundle has no such target for its {side} side: {known}.")
    return found


def put_last(recorded: Sequence[Entry], chosen: Sequence[Entry]) -> list[Entry]:
    """Put the chosen targets where those stand that were asked for last."""
    return [*(entry for entry in recorded if entry not in chosen), *chosen]


def side_graphs(manifest: Mapping[str, Any], side: str) -> set[str]:
    """Give the paths of the graphs that run on a side."""
    graphs = {split["head" if side == "device" else "tail"] for split in manifest["splits"]}
    return graphs | {manifest["model"]["path"]} if side == "device" or manifest["full_offload"] else graphs


def held_files(manifest: Mapping[str, Any], side: str, targets: Sequence[Entry], *, with_onnx: bool) -> set[str]:
    """Give the paths of the listed files that a side needs: engines or graphs, and the samples to check and time them.

    Args:
        manifest: The bundle's manifest.
        side: ``device`` or ``server``.
        targets: Entries of the targets that it is for.
        with_onnx: Whether graphs are held that have engines, too.

    Raises:
        UsageError: A graph is needed, and the bundle is itself a part without it.
    """
    needed = {path for path, item in manifest["files"].items() if item.get("role") == "sample"}
    compiled = [entry for entry in targets if "engines" in entry]
    needed |= {engine["path"] for entry in compiled for engine in entry["engines"]}
    if with_onnx or len(compiled) < len(targets) or not targets:
        weights = manifest["model"]["weights"]["path"]
        needed |= side_graphs(manifest, side) | ({weights} if weights else set())
    if absent := sorted(needed & manifest["left_out"].keys()):
        raise UsageError(
            f"the {side} side needs {', '.join(map(repr, absent))}, which this part of a bundle does not hold. "
            "Pack the whole bundle's."
        )
    return {path for path in manifest["files"] if path in needed}


def fits_table(name: str, data: bytes, side: str, targets: Sequence[Entry]) -> bool:
    """Tell whether a lookup table is of one of a side's targets.

    Several machines may have the same target, so the id in the name decides where the name has one.
    """
    if not any(entry["target"] == json.loads(data)[side]["target"] for entry in targets):
        return False
    ids = PurePosixPath(name).stem.split("--")
    return len(ids) != len(SIDES) or any(ids[SIDES.index(side)].startswith(f"{entry['id']}-") for entry in targets)


def fits_record(name: str, data: bytes, side: str, graphs: set[str], targets: Sequence[Entry]) -> bool:
    """Tell whether what was measured is of a side's graphs, by their digests, on one of its targets."""
    document = json.loads(data)
    if role_of(name) == "memory":
        return document["side"] == side and any(entry["target"] == document["target"] for entry in targets)
    asked = document["question"]["graph_digest"]
    return asked in graphs and any(entry["target"] == document["target"] for entry in targets)
