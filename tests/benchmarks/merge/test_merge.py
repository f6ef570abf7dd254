"""Uniting what copies of a bundle became on other machines."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from msgspec.structs import replace
from tests.support.manifests import edited, targets_of

from dsc_split._support.hashing import sha256_file
from dsc_split._support.strict_json import body_digest, canonical_json
from dsc_split.benchmarks import BenchSettings, Cell, CellStore, Question, bench_bundle, merge_bundles, write_tables
from dsc_split.benchmarks.cells._cells import CellEnvironment, CellSettings, Round, Statistics
from dsc_split.bundle import Bundle
from dsc_split.bundles._records import (
    SIDES,
    CheckResult,
    EngineEntry,
    FileEntry,
    RecordedOptions,
    TargetEntry,
)
from dsc_split.bundles._tables import load_table
from dsc_split.engines._fingerprint import fingerprint_digest, target_id
from dsc_split.errors import BundleBusyError, BundleError, DscError, SignatureError, UsageError
from dsc_split.lookup_table import LookupTable
from dsc_split.packing import pack_bundle

ORT = "onnxruntime:cpu"
PLANS = "tensorrt-rtx:sm75"
GRAPHS = {
    "device": ("onnx/model.onnx", "onnx/a.head.onnx"),
    "server": ("onnx/model.onnx", "onnx/a.tail.onnx"),
}
BUILD = {"library": "tensorrt_rtx", "version": "1.5", "architecture": "sm75"}
OPTIONS = RecordedOptions(
    batches=(1, 2),
    opt_batch=None,
    per_batch=False,
    gemm="conv",
    workspace_bytes=None,
    timing_cache_sha256=None,
    device_memory_bytes=None,
)


def twin(bundle: Bundle, name: str) -> Bundle:
    """Copy a bundle to a folder beside it."""
    return Bundle.open(shutil.copytree(bundle.path, bundle.path.parent / name))


def cell(bundle: Bundle, graph: str, batch: int = 1, *, host: str = "box", target: str = ORT, **changes: Any) -> Cell:
    run_fingerprint: dict[str, object] = {
        "library": "onnxruntime",
        "architecture": "cpu",
        "host": host,
        "power_mode": "MAXN",
    }
    median_ms = changes.pop("median_ms", 1.0)
    day = changes.pop("day", 1)
    rounds = changes.pop("rounds", 5)
    return dataclasses.replace(
        Cell(
            question=Question(
                graph_digest=bundle.graph_digest(graph),
                fingerprint=fingerprint_digest(run_fingerprint),
                batch=batch,
                period_ms=None,
            ),
            graph=graph,
            target=target,
            run_fingerprint=run_fingerprint,
            emulated=None,
            status="ok",
            reason="as told",
            latency_ms=Statistics(median=median_ms, p95=median_ms, ci=(median_ms * 0.99, median_ms * 1.01)),
            rounds=tuple(
                Round(
                    started=f"2026-01-{day:02d}T00:00:{i:02d}.000+00:00",
                    samples_ms=(median_ms,),
                    first_after_pause_ms=(),
                )
                for i in range(rounds)
            ),
            settings=CellSettings(memory_limit_bytes=1),
            environment=CellEnvironment(),
        ),
        **changes,
    )


def record(bundle: Bundle, side: str, target: str = ORT, **fingerprint: Any) -> None:
    build = {"library": "onnxruntime", "architecture": "cpu", **fingerprint}
    add_target(bundle, side, TargetEntry(target=target, fingerprint=build, id=target_id(build)))


def add_target(bundle: Bundle, side: str, entry: TargetEntry, files: dict[str, FileEntry] | None = None) -> None:
    with bundle.edit() as draft:
        draft.set_targets(side, (*draft.manifest.targets.of(side), entry))
        draft.change(files={**draft.manifest.files, **(files or {})})


def listed(bundle: Bundle, path: str, role: str) -> FileEntry:
    file = bundle.path / path
    return FileEntry(sha256=sha256_file(file), size_bytes=file.stat().st_size, role=role)


def time_side(bundle: Bundle, side: str, host: str, batches: tuple[int, ...] = (1, 2), **changes: Any) -> None:
    """Give a side its cells."""
    record(bundle, side)
    for batch in batches:
        for graph in GRAPHS[side]:
            CellStore(bundle).put(cell(bundle, graph, batch, host=host, **changes))


def build_side(
    bundle: Bundle,
    side: str,
    content: bytes = b"plan",
    target: str = PLANS,
    batches: tuple[int, ...] = OPTIONS.batches,
    **facts: str,
) -> None:
    """Give a side engines, without a library that builds them."""
    fingerprint: dict[str, object] = {**BUILD, **facts}
    folder = f"engines/{target_id(fingerprint)}"
    (bundle.path / folder).mkdir(parents=True, exist_ok=True)
    engines = []
    for graph in GRAPHS[side]:
        path = f"{folder}/{Path(graph).stem}.plan"
        (bundle.path / path).write_bytes(content + graph.encode())
        digest = bundle.graph_digest(graph)
        engines.append(EngineEntry(graph=graph, graph_digest=digest, path=path, profile=(1, 1, 2)))
    entry = TargetEntry(
        target=target,
        fingerprint=fingerprint,
        id=target_id(fingerprint),
        options=replace(OPTIONS, batches=batches),
        engines=tuple(engines),
        failed=(),
    )
    add_target(bundle, side, entry, {engine.path: listed(bundle, engine.path, "engine") for engine in engines})


def list_samples(bundle: Bundle) -> None:
    """List the samples, so that the bundle can be packed."""
    samples = {path: listed(bundle, path, "sample") for path in ("samples/model.npz", "samples/a.npz")}
    with bundle.edit() as draft:
        draft.change(files={**draft.manifest.files, **samples}, pair_id=bundle.compute_pair_id())


def part_of(bundle: Bundle, side: str, name: str) -> Bundle:
    """Copy what one side needs, without cells."""
    part = twin(bundle, name)
    manifest = part.manifest
    shutil.rmtree(part.path / "cells", ignore_errors=True)
    kept = {*GRAPHS[side], *(engine.path for entry in manifest.targets.of(side) for engine in entry.built)}
    kept |= {path for path, item in manifest.files.items() if item.role not in ("graph", "engine")}
    for path in manifest.files.keys() - kept:
        (part.path / path).unlink()
    with part.edit() as draft:
        draft.change(
            side=side,
            files={path: item for path, item in manifest.files.items() if path in kept},
            left_out={path: item for path, item in manifest.files.items() if path not in kept},
        )
    return part


def contents(folder: Path) -> dict[str, bytes]:
    """Read every file of a bundle but locks."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".lock"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def engines_of(bundle: Bundle) -> dict[tuple[str, str, str], str]:
    """Return the digest of every engine by side, target's id and graph; its file is what the manifest says."""
    found = {}
    for side in SIDES:
        for entry in bundle.manifest.targets.of(side):
            for engine in entry.built:
                bundle.read(engine.path)
                found[side, entry.id, engine.graph] = bundle.manifest.files[engine.path].sha256
    return found


# ---- what comes together -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fake_executor")
def test_two_machines_that_were_timed_become_one_table_per_device_kind(
    bundle: Bundle, quick: BenchSettings, dsc: Callable[..., Any]
) -> None:
    kinds = {name: f"onnxruntime:cpu,threads=1,slowdown={slowdown}" for name, slowdown in (("slow", 9), ("fast", 3))}
    copies = {name: twin(bundle, name) for name in (*kinds, "server")}
    for name, target in kinds.items():
        bench_bundle(copies[name], sides=["device"], device=target, batches=[2], settings=quick)
    bench_bundle(copies["server"], sides=["server"], server="onnxruntime:cpu,threads=1", batches=[2], settings=quick)

    done = dsc("merge", bundle.path, *(copy.path for copy in copies.values()), "--json")

    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["cells_added"], len(document["tables"])) == (6, 2)
    tables = [LookupTable.load(bundle.path / name) for name in document["tables"]]
    assert {table.device.target for table in tables} == set(kinds.values())
    assert all([item.batch for item in table.batches] == [2] for table in tables)
    assert all(table.device.run_fingerprint for table in tables)
    before = contents(bundle.path)
    again = dsc("merge", bundle.path, *(copy.path for copy in reversed(copies.values())))
    assert "nothing new" in again.stdout
    assert contents(bundle.path) == before


def test_a_device_part_and_a_server_part_become_the_whole_bundle(bundle: Bundle) -> None:
    build_side(bundle, "device")
    build_side(bundle, "server")
    whole = bundle.manifest
    device, server = part_of(bundle, "device", "device"), part_of(bundle, "server", "server")
    time_side(server, "server", "lab")

    result = merge_bundles(device, [server.path])

    merged = Bundle.open(device.path)
    assert (merged.manifest.side, merged.manifest.left_out) == (None, {})
    assert merged.manifest.files == whole.files
    assert [merged.read(path) for path in merged.manifest.files]
    assert "is the device's part of a bundle" in result.notes[0]
    assert "no table yet" in result.notes[-1]
    assert engines_of(merged) == engines_of(bundle)


def test_what_a_part_says_of_the_other_side_does_not_come_back(bundle: Bundle) -> None:
    build_side(bundle, "server")
    device = part_of(bundle, "device", "device")
    with bundle.edit() as draft:
        draft.set_targets("server", [])
    build_side(bundle, "server", b"rebuilt", batches=(1, 2, 4))
    before = bundle.manifest.targets

    assert not merge_bundles(bundle, [device.path]).changed
    assert Bundle.open(bundle.path).manifest.targets == before


def test_a_part_without_cells_keeps_the_times_of_its_table(bundle: Bundle) -> None:
    time_side(bundle, "device", "edge")
    time_side(bundle, "server", "lab")
    write_tables(bundle)
    device = part_of(bundle, "device", "device")
    before = device.table()
    for graph in GRAPHS["device"]:
        CellStore(device).put(cell(device, graph, 1, host="other", median_ms=7.0, day=2))

    (newest, _) = write_tables(device, device=fingerprint_digest(cell(device, graph, host="other").run_fingerprint))

    after = load_table(newest)
    assert after == device.table()
    assert (after.server, after.device.run_fingerprint["host"]) == (before.server, "other")  # type: ignore[index]
    assert [(row.head_ms, row.tail_ms) for row in after.batches[0].rows] == [(0.0, 1.0), (7.0, 1.0), (7.0, 0.0)]
    assert after.batches[0].rows[0].tail_ci_ms == (0.99, 1.01)
    assert [item.batch for item in before.batches] == [1, 2]
    merge_bundles(bundle, [device.path])
    assert {LookupTable.load(path).device for path in (bundle.path / "tables").iterdir()} == {
        before.device,
        after.device,
    }


def test_tables_of_a_part_come_though_nobody_has_their_cells(bundle: Bundle) -> None:
    empty = twin(bundle, "empty")
    time_side(bundle, "device", "edge")
    time_side(bundle, "server", "lab")
    write_tables(bundle)

    merge_bundles(empty, [part_of(bundle, "device", "device").path])

    assert Bundle.open(empty.path).table() == Bundle.open(bundle.path).table()


def test_a_longer_cell_continues_a_shorter_one_and_is_no_conflict(bundle: Bundle) -> None:
    other = twin(bundle, "other")
    short, long = (cell(bundle, "onnx/model.onnx", rounds=rounds) for rounds in (5, 9))
    failed = dataclasses.replace(short, status="failed", rounds=(), latency_ms=None)
    for mine, theirs, wins in (
        (short, long, long),
        (long, short, long),
        (failed, short, short),
        (short, failed, short),
    ):
        CellStore(bundle).put(mine)
        CellStore(other).put(theirs)
        merge_bundles(bundle, [other.path])

        assert list(CellStore(bundle).all()) == [wins]


def test_several_gpus_live_under_one_target(bundle: Bundle) -> None:
    other = twin(bundle, "other")
    build_side(bundle, "server", b"a10", target="tensorrt", gpu="A10", compute_capability="8.6")
    build_side(other, "server", b"t4", target="tensorrt", gpu="T4", compute_capability="7.5")

    merge_bundles(bundle, [other.path])

    merged = Bundle.open(bundle.path)
    entries = merged.manifest.targets.server
    assert [entry.fingerprint["gpu"] for entry in entries] == ["T4", "A10"]
    assert len({engine.path for entry in entries for engine in entry.built}) == 4


def test_what_was_measured_of_memory_comes_too(bundle: Bundle) -> None:
    other = twin(bundle, "other")
    (other.path / "memory").mkdir()
    theirs = canonical_json({"body_sha256": body_digest({})}) + b"\n"
    (other.path / "memory/device-0123456789ab.json").write_bytes(theirs)
    (other.path / "memory/device-ffffffffffff.json").write_bytes(theirs[1:])

    assert merge_bundles(bundle, [other.path]).files == ("memory/device-0123456789ab.json",)
    assert (bundle.path / "memory/device-0123456789ab.json").read_bytes() == theirs
    assert not merge_bundles(bundle, [other.path]).changed


def test_one_table_that_lacks_a_row_does_not_take_it_from_the_others_of_a_part(bundle: Bundle) -> None:
    time_side(bundle, "device", "edge")
    time_side(bundle, "server", "lab")
    tail = cell(bundle, "onnx/a.tail.onnx", 2, host="small")
    for graph, batch in (("onnx/model.onnx", 1), ("onnx/model.onnx", 2), ("onnx/a.tail.onnx", 1)):
        CellStore(bundle).put(cell(bundle, graph, batch, host="small", day=2))
    CellStore(bundle).put(dataclasses.replace(tail, status="out-of-memory", rounds=(), latency_ms=None))
    before = {path.name: LookupTable.load(path) for path in write_tables(bundle)}
    part = part_of(bundle, "device", "device")

    assert {path.name: LookupTable.load(path) for path in write_tables(part)} == before
    assert sorted(len(table.batches[1].rows) for table in before.values()) == [2, 3]


def test_packed_parts_are_merged_in_place_and_their_engines_only_where_they_are_trusted(
    bundle: Bundle, dsc: Callable[..., Any]
) -> None:
    list_samples(bundle)
    other = twin(bundle, "other")
    build_side(other, "device")
    time_side(other, "device", "edge")
    packed = bundle.path.parent / "other.dscb"
    pack_bundle(other, packed)
    before = contents(bundle.path)

    refused = dsc("merge", bundle.path, packed)

    assert refused.exit_code == 6
    assert "model.plan" in refused.stderr
    assert "--allow-unsigned" in refused.stderr
    assert contents(bundle.path) == before
    done = dsc("merge", bundle.path, packed, "--allow-unsigned")
    assert done.exit_code == 0, done.stderr
    assert "2 files and 4 cells came" in done.stdout
    assert engines_of(Bundle.open(bundle.path)) == engines_of(other)
    into = dsc("merge", packed, bundle.path)
    assert (into.exit_code, "is packed" in into.stderr) == (2, True)


def test_notes_of_checks_come_too(bundle: Bundle) -> None:
    build_side(bundle, "device")
    other = twin(bundle, "other")
    check = CheckResult(
        side="device", target=PLANS, against="golden samples", fallback_reason=None, rows=(), passed=True
    )
    with other.edit() as draft:
        draft.set_targets("device", [replace(draft.manifest.targets.device[0], check=check)])

    assert merge_bundles(bundle, [other.path]).targets == {"device": [PLANS], "server": []}
    assert Bundle.open(bundle.path).manifest.targets.device[0].check == check


@pytest.mark.parametrize("count", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_however_cells_and_engines_are_spread_over_copies_they_merge_to_the_same_whole(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # what is measured is not how safe the disk is
    export = twin(bundle, "export")
    build_side(bundle, "device", b"orin", gpu="Orin")
    build_side(bundle, "device", b"xavier", gpu="Xavier")
    build_side(bundle, "server")
    time_side(bundle, "device", "edge")
    time_side(bundle, "server", "lab", day=2)
    write_tables(bundle)
    random = Random(0)

    for number in range(count):
        folder = bundle.path.parent / str(number)
        copies = [Bundle.open(shutil.copytree(export.path, folder / str(i))) for i in range(random.randint(2, 4))]
        _spread(bundle, copies, random)
        main, *others = random.sample(copies, len(copies))

        merge_bundles(main, [other.path for other in others])

        merged = Bundle.open(main.path)
        assert engines_of(merged) == engines_of(bundle)
        assert {cell.question.key: cell for cell in CellStore(merged).all()} == {
            cell.question.key: cell for cell in CellStore(bundle).all()
        }
        assert merged.table() == bundle.table()
        shutil.rmtree(folder)


def _spread(bundle: Bundle, copies: list[Bundle], random: Random) -> None:
    """Give each cell and engine to one of the copies, or to several."""
    files = [dict(spread.manifest.files) for spread in copies]
    targets: list[dict[str, list[TargetEntry]]] = [{side: [] for side in SIDES} for _ in copies]
    for side in SIDES:
        for entry in bundle.manifest.targets.of(side):
            engines: list[list[EngineEntry]] = [[] for _ in copies]
            for engine in entry.built:
                for i in random.sample(range(len(copies)), random.randint(1, 2)):
                    engines[i].append(engine)
                    path = copies[i].path / engine.path
                    path.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(bundle.path / engine.path, path)
                    files[i][engine.path] = bundle.manifest.files[engine.path]
            for i, some in enumerate(engines):
                if some:
                    targets[i][side].append(replace(entry, engines=tuple(some)))
                elif not entry.is_compiled and (i == 0 or random.random() < 0.5):
                    targets[i][side].append(entry)
    for name in CellStore(bundle).names():
        for i in random.sample(range(len(copies)), random.randint(1, 2)):
            (copies[i].path / "cells").mkdir(exist_ok=True)
            shutil.copy(bundle.path / name, copies[i].path / name)
    for i, spread in enumerate(copies):
        with spread.edit() as draft:
            draft.change(files=files[i])
            for side in SIDES:
                draft.set_targets(side, targets[i][side])


# ---- what contradicts ----------------------------------------------------------------------------------------


def conflicting(bundle: Bundle) -> tuple[Bundle, dict[str, bytes]]:
    """Two copies that were timed and built each on its own."""
    other = twin(bundle, "other")
    for part, content, median_ms, day in ((bundle, b"ours", 1.0, 2), (other, b"theirs", 2.0, 1)):
        build_side(part, "device", content)
        time_side(part, "server", "lab", median_ms=median_ms, day=day)
    with other.edit() as draft:
        draft.change(revision=draft.manifest.revision + 100)
    return other, contents(bundle.path)


def test_conflicts_are_all_named_and_nothing_is_written(bundle: Bundle, dsc: Callable[..., Any]) -> None:
    other, before = conflicting(bundle)

    done = dsc("merge", bundle.path, other.path)

    assert done.exit_code == 6
    assert "6 conflicts; nothing was merged" in done.stderr
    for words in ("onnx/a.tail.onnx, batch 2", "1 ms of 2026-01-02", "2 ms of 2026-01-01", "a.head.plan", "--prefer"):
        assert words in done.stderr
    assert contents(bundle.path) == before


@pytest.mark.parametrize(
    ("prefer", "median_ms", "start"), [("ours", 1, b"ours"), ("theirs", 2, b"their"), ("newer", 1, b"their")]
)
def test_prefer_says_whose_are_right(bundle: Bundle, prefer: str, median_ms: float, start: bytes) -> None:
    other, before = conflicting(bundle)

    result = merge_bundles(bundle, [other.path], prefer=prefer)

    merged = Bundle.open(bundle.path)
    assert {cell.latency_ms.median for cell in CellStore(merged).all() if cell.latency_ms} == {median_ms}
    (entry,) = merged.manifest.targets.device
    assert {merged.read(engine.path)[: len(start)] for engine in entry.built} == {start}
    assert len(result.removed) == (0 if start == b"ours" else 2)
    for path in result.removed:
        assert path in before
        assert not (merged.path / path).exists()
        assert path not in merged.manifest.files
    after = contents(bundle.path)
    merge_bundles(bundle, [other.path], prefer=prefer)
    assert contents(bundle.path) == after


def test_engines_built_in_other_ways_are_a_conflict_that_says_how(bundle: Bundle) -> None:
    other = twin(bundle, "other")
    build_side(bundle, "device", version="1.5")
    build_side(other, "device", version="1.6", batches=(1, 8))

    with pytest.raises(BundleError, match=r"version '1.5' in .*version '1.6' in") as caught:
        merge_bundles(bundle, [other.path])
    assert "batches [1, 2] in" in str(caught.value)
    merge_bundles(bundle, [other.path], prefer="newer")
    assert len(Bundle.open(bundle.path).targets("device")) == 1


def test_settings_that_a_table_depends_on_are_a_conflict(bundle: Bundle) -> None:
    other = twin(bundle, "other")
    with other.edit() as draft:
        draft.change(input_bytes_stated=77)

    with pytest.raises(BundleError, match=r"input bytes stated: None in .*; 77 in"):
        merge_bundles(bundle, [other.path])
    merge_bundles(bundle, [other.path], prefer="theirs")
    assert Bundle.open(bundle.path).manifest.input_bytes_stated == 77


def test_copies_of_another_export_are_refused_with_the_graphs_that_differ(bundle: Bundle) -> None:
    other = twin(bundle, "other")
    with edited(other) as document:
        document["files"]["onnx/a.tail.onnx"]["sha256"] = 64 * "7"
        document["pair_id"] = "sha256:7"

    with pytest.raises(BundleError, match=r"sha256:7.*sha256:0.*differ: onnx/a.tail.onnx\."):
        merge_bundles(bundle, [other.path])


# ---- faults ------------------------------------------------------------------------------------------------------


def test_a_damaged_cell_is_named_and_can_be_left_out(bundle: Bundle, dsc: Callable[..., Any]) -> None:
    other = twin(bundle, "other")
    time_side(other, "device", "edge")
    damaged = sorted((other.path / "cells").iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:-9])
    before = contents(bundle.path)

    refused = dsc("merge", bundle.path, other.path)

    assert refused.exit_code == 6
    assert damaged.name in refused.stderr
    assert contents(bundle.path) == before
    done = dsc("merge", bundle.path, other.path, "--skip-damaged")
    assert (done.exit_code, damaged.name in done.stderr) == (0, True)
    assert len(list(CellStore(bundle).all())) == 3


def test_a_damaged_engine_does_not_come_and_nothing_else_does(bundle: Bundle) -> None:
    other = twin(bundle, "other")
    build_side(other, "device")
    time_side(other, "device", "edge")
    path = other.manifest.targets.device[0].built[1].path
    (other.path / path).write_bytes(b"x" + (other.path / path).read_bytes()[1:])
    before = contents(bundle.path)

    with pytest.raises(BundleError, match=r"a\.head\.plan.*changed or damaged"):
        merge_bundles(bundle, [other.path])
    assert contents(bundle.path) == before
    assert not (bundle.path / "engines").exists()


@pytest.mark.parametrize("name", ["table.json", "cells/x.txt", ".lock", "program.py"])
def test_a_file_that_has_no_place_there_does_not_come(bundle: Bundle, name: str) -> None:
    other = twin(bundle, "other")
    (other.path / "cells").mkdir(exist_ok=True)
    (other.path / name).write_text("{}")
    with other.edit() as draft:
        draft.change(files={**draft.manifest.files, name: listed(other, name, "sample")})
    before = contents(bundle.path)

    result = merge_bundles(bundle, [other.path])

    assert (result.changed, f"{name!r} of" in str(result.notes)) == (False, True)
    assert contents(bundle.path) == before


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("table.json", "does not lie in 'engines'"),
        ("engines", "does not lie in 'engines'"),
        ("onnx/a.plan", "does not lie in 'engines'"),
        ("engines/x/a.pkl", "is a pickle"),
        ("engines/.hid", "is no plain path"),
        ("engines/A.PLAN", "differs from 'engines/a.plan' in nothing but case"),
        ("engines/a.plan/b", "lies in 'engines/a.plan', which is a file"),
    ],
)
def test_an_engine_comes_to_no_place_that_makes_the_bundle_unusable(bundle: Bundle, name: str, fault: str) -> None:
    other = twin(bundle, "other")
    build_side(other, "device")
    with edited(other) as document:
        engine = targets_of(document, "device")[0]["engines"][0]
        document["files"][name] = document["files"].pop(engine["path"])
        engine["path"] = name
    with bundle.edit() as draft:
        draft.change(left_out={"engines/a.plan": other.manifest.files[name]})
    before = contents(bundle.path)

    with pytest.raises(BundleError, match=re.escape(f"{name!r} {fault}")):
        merge_bundles(bundle, [other.path])

    assert contents(bundle.path) == before


def test_native_code_of_another_role_does_not_come_without_trust(tmp_path: Path, bundle: Bundle) -> None:
    list_samples(bundle)
    other = twin(bundle, "other")
    build_side(other, "device")
    pack_bundle(other, tmp_path / "honest.dscb")
    with pytest.raises(SignatureError, match="is native code"):
        merge_bundles(bundle, [tmp_path / "honest.dscb"])

    with edited(other) as document:
        for engine in targets_of(document, "device")[0]["engines"]:
            document["files"][engine["path"]]["role"] = "sample"
    pack_bundle(other, tmp_path / "liar.dscb")
    with pytest.raises(BundleError, match=r"with role 'sample'; 'engine' was expected"):
        merge_bundles(bundle, [tmp_path / "liar.dscb"])
    with other.edit() as draft:
        draft.set_targets("device", [])
    pack_bundle(other, tmp_path / "stray.dscb")
    assert not merge_bundles(bundle, [tmp_path / "stray.dscb"]).files
    assert not (bundle.path / "engines").exists()


def test_what_stood_there_stays_where_a_merge_fails(bundle: Bundle) -> None:
    other = twin(bundle, "other")
    build_side(other, "device")
    first, second = (Path(engine.path) for engine in other.manifest.targets.device[0].built)
    (other.path / second).write_bytes(b"x" + (other.path / second).read_bytes()[1:])
    (bundle.path / first).parent.mkdir(parents=True)
    (bundle.path / first).write_bytes(b"not listed")

    with pytest.raises(BundleError, match="changed or damaged"):
        merge_bundles(bundle, [other.path])

    assert (bundle.path / first).is_file()
    assert not (bundle.path / second).exists()


def test_what_a_packed_bundle_does_not_list_is_not_believed(tmp_path: Path, bundle: Bundle) -> None:
    list_samples(bundle)
    other = twin(bundle, "other")
    time_side(other, "device", "edge")
    pack_bundle(other, tmp_path / "other.dscb")
    packed = Bundle.open(tmp_path / "other.dscb")
    names = [name for name in packed.manifest.files if name.startswith("cells/")]
    others = {path: item for path, item in packed.manifest.files.items() if path != names[0]}
    packed.manifest = replace(packed.manifest, files=others)

    with pytest.raises(BundleError, match="does not list"):
        CellStore(packed).read(names[0])
    with pytest.raises(BundleError, match=f"does not list '{names[0]}'"):
        merge_bundles(bundle, [packed])
    assert not CellStore(bundle).names()


def test_a_full_disk_leaves_the_bundle_as_it_was(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    other = twin(bundle, "other")
    build_side(other, "device")
    time_side(other, "device", "edge")
    before = contents(bundle.path)
    fsync, left = os.fsync, [0]

    def full(fd: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", full)
    for writes in range(0, 8, 2):
        left[0] = writes
        with pytest.raises(DscError, match="No space left"):
            merge_bundles(Bundle.open(bundle.path), [other.path])
        assert contents(bundle.path) == before
    left[0] = 1000
    assert merge_bundles(bundle, [other.path]).changed


def test_a_merge_that_is_killed_is_finished_by_the_next(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    other = twin(bundle, "other")
    build_side(other, "device")
    time_side(other, "device", "edge")
    whole = twin(bundle, "whole")
    merge_bundles(whole, [other.path])

    class Killed(BaseException):
        pass

    real, left = Path.replace, [0]

    def replace_some(path: Path, target: Any) -> Any:
        left[0] -= Path(target).name != ".lock.holder"
        if left[0] < 0:
            raise Killed
        return real(path, target)

    for writes in (0, 1, 2, 5, 6, 7):  # two engines, four cells, the manifest
        killed = twin(bundle, f"killed-{writes}")
        with monkeypatch.context() as patched:
            patched.setattr(Path, "replace", replace_some)
            patched.setattr("dsc_split.benchmarks.merge._merge._remove", lambda *arguments: None)
            left[0] = writes
            with pytest.raises(Killed) if writes < 7 else contextlib.nullcontext():
                merge_bundles(killed, [other.path])
        now = Bundle.open(killed.path)
        assert all(now.read(path) for path in now.manifest.files)
        assert bool(now.targets("device")) is (writes >= 7)
        merge_bundles(now, [other.path])
        assert {**contents(killed.path), "manifest.json": b""} == {**contents(whole.path), "manifest.json": b""}
        assert engines_of(Bundle.open(killed.path)) == engines_of(Bundle.open(whole.path))


def test_what_cannot_be_merged_into_is_refused(bundle: Bundle) -> None:
    other = twin(bundle, "other")
    with pytest.raises(UsageError, match="is the bundle that is merged into"):
        merge_bundles(bundle, [bundle.path])
    with pytest.raises(UsageError, match="--prefer is 'mine'"):
        merge_bundles(bundle, [other.path], prefer="mine")
    with bundle.lock(), pytest.raises(BundleBusyError):
        merge_bundles(Bundle.open(bundle.path), [other.path])


def test_a_dry_run_says_what_it_would_do(bundle: Bundle, dsc: Callable[..., Any]) -> None:
    other = twin(bundle, "other")
    build_side(other, "device")
    time_side(other, "device", "edge")
    before = contents(bundle.path)

    done = dsc("merge", bundle.path, other.path, "--dry-run")

    assert "2 files and 4 cells would come" in done.stdout
    assert f"target  device {PLANS}" in done.stdout
    assert contents(bundle.path) == before
