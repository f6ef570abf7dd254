"""The commands of the faults' tests, and what a bundle has to be after them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from dsc_split.packing import verify_bundle

if TYPE_CHECKING:
    from tests.support.commands import Commands

EXPORT = ("export", "net.onnx", "--output", "bundle", "--cuts", "b", "--max-batch", "2")
EXPORT_ANEW = ("export", "net.onnx", "--output", "bundle", "--cuts", "c", "--max-batch", "2")
CUT = ("cut", "bundle", "--cuts", "b,c")
RTX = ("build", "bundle", "--side", "server", "--target", "tensorrt-rtx:sm75", "--batches", "1,2")
BUILD = ("build", "bundle", "--side", "device", "--target", "onnxruntime:cpu,threads=1")
QUICK = ("--batches", "1", "--time-limit", "0.05", "--precision-goal", "0.4")
BENCH = ("bench", "bundle", "--server", "onnxruntime:cpu", *QUICK)
BENCH_SERVER = ("bench", "bundle", "--side", "server", "--server", "onnxruntime:cpu", *QUICK)
EXPORT_OTHER = ("export", "net.onnx", "--output", "other", "--cuts", "b", "--max-batch", "2")
BENCH_OTHER = ("bench", "other", "--side", "server", "--server", "onnxruntime:cpu,threads=2", *QUICK)
MERGE = ("merge", "bundle", "other")
PACK = ("pack", "bundle", "--output", "bundle.dscb")
UNPACK = ("unpack", "bundle.dscb", "--output", "unpacked")


def restore(base: Path, folder: Path) -> Path:
    """Make ``folder`` a copy of ``base``."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder)
    return folder


def document_in(bundle: Path) -> dict[str, Any]:
    """Read the manifest of a folder, whatever it says."""
    document: dict[str, Any] = json.loads((bundle / "manifest.json").read_bytes())
    return document


def pairs_of(bundle: Path) -> list[str]:
    return [split["name"] for split in document_in(bundle)["splits"]]


def prepare(commands: Commands, base: Path, folder: Path, case: Case) -> Path:
    """Make ``folder`` a copy of ``base`` in which the command can be run."""
    if case.needs is not None:
        pytest.importorskip(case.needs)
    restore(base, folder)
    for arguments in case.before:
        run = commands(*arguments, folder=folder)
        assert run.status == 0, run.output
    return folder


def faults_of(bundle: Path) -> list[str]:
    """What `verify` has against a bundle."""
    return [f"{row.path} {row.fault}" for row in verify_bundle(bundle).rows]


def litter_in(folder: Path) -> list[str]:
    """What a command left that nobody reads: unfinished files and folders, and files that no manifest lists."""
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
    left = [name for name in found if name.endswith((".partial", ".old", ".lock.holder"))]
    for path in folder.iterdir():
        if (path / "manifest.json").is_file():
            listed = document_in(path)["files"]
            names = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
            kept = {name for name in names if name.startswith(("cells/", "tables/"))}
            left += sorted(names - kept - set(listed) - {"manifest.json", "manifest.dsse.json", "table.json", ".lock"})
    return left


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command that writes a bundle."""

    before: tuple[Sequence[Any], ...] = ()
    """Commands that are run first."""
    command: Sequence[Any]
    """The command."""
    needs: str | None = None
    """A module that it imports, and that may be missing."""
    wrong: Callable[[Path, Path], list[str]]
    """Says what is neither the old nor the new in a folder; the one before it was run is given, too."""


def neither_pairs(work: Path, _: Path) -> list[str]:
    found = pairs_of(work / "bundle")
    return [] if found in (["b"], ["c"], ["b", "c"]) else [f"pairs {found}"]


def other_pairs(work: Path, before: Path) -> list[str]:
    found = pairs_of(work / "bundle")
    return [] if found == pairs_of(before / "bundle") else [f"pairs {found}"]


def lost_cells(work: Path, before: Path) -> list[str]:
    old, new = ({path.name for path in (folder / "bundle" / "cells").iterdir()} for folder in (before, work))
    return sorted(old - new) + other_pairs(work, before)


def damaged_file(work: Path, _: Path) -> list[str]:
    return faults_of(work / "bundle.dscb")


def half_unpacked(work: Path, before: Path) -> list[str]:
    if not (work / "unpacked").exists():
        return []
    old, new = (set(document_in(folder / name)["files"]) for folder, name in ((before, "bundle"), (work, "unpacked")))
    return faults_of(work / "unpacked") + sorted(old - new)


CASES = {
    "export": Case(command=EXPORT_ANEW, wrong=neither_pairs),
    "cut": Case(command=CUT, wrong=neither_pairs),
    "build": Case(before=(RTX,), command=(*RTX, "--memory-per-batch"), needs="tensorrt_rtx", wrong=other_pairs),
    "bench": Case(command=(*BENCH_SERVER, "--again"), wrong=lost_cells),
    "merge": Case(before=(EXPORT_OTHER, BENCH_OTHER), command=MERGE, wrong=lost_cells),
    "pack": Case(before=(PACK,), command=PACK, wrong=damaged_file),
    "unpack": Case(before=(PACK,), command=UNPACK, wrong=half_unpacked),
}
