"""Bundles that an older dsc-split wrote: they are read, verified, packed, changed and timed as they were then.

``manifest-1`` is a folder whose manifest has version 1; ``manifest-2.dscb`` is packed and signed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path, PurePosixPath

import pytest
from tests.support.paths import DATA

from dsc_split.benchmarks import BenchSettings, bench_bundle
from dsc_split.benchmarks.cells._cells import CellStore
from dsc_split.benchmarks.memory._reports import MemoryReport, load_memory
from dsc_split.bundle import Bundle
from dsc_split.bundles._manifest import ENVELOPE
from dsc_split.bundles._samples import golden_samples
from dsc_split.engines._engine_file import read_plan
from dsc_split.engines._source import EngineSource
from dsc_split.packing import Trust, pack_bundle, unpack_bundle, verify_bundle

WRITTEN = DATA / "written"
FOLDER, PACKED = WRITTEN / "manifest-1", WRITTEN / "manifest-2.dscb"
TRUST = Trust(keys=(WRITTEN / "key.pub",), require=True)
BOTH = pytest.mark.parametrize("path", [FOLDER, PACKED], ids=lambda path: path.name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the folder that may be changed."""
    return shutil.copytree(FOLDER, tmp_path / "bundle")


@BOTH
def test_they_open_and_say_what_they_said(path: Path) -> None:
    bundle = Bundle.open(path)

    assert [split.name for split in bundle.splits] == ["a", "c"]
    assert (bundle.manifest.version, bundle.manifest.side, bundle.max_batch) == (2, None, 2)
    assert bundle.targets("server") == ("onnxruntime:cpu,threads=1",)
    assert bundle.compute_pair_id() == bundle.manifest.pair_id
    assert all(golden_samples(bundle, split) for split in (None, *bundle.splits))


def test_folder_has_nothing_wrong(folder: Path) -> None:
    result = verify_bundle(folder)

    assert [f"{row.path} {row.fault}" for row in result.rows] == []


def test_packed_one_has_nothing_wrong_and_its_signature_holds() -> None:
    result = verify_bundle(PACKED, trust=TRUST)

    assert [f"{row.path} {row.fault}" for row in result.rows] == []
    assert Bundle.open(PACKED, trust=TRUST).trusted
    assert not Bundle.open(PACKED).trusted


@BOTH
def test_table_is_read_and_picks(path: Path) -> None:
    table = Bundle.open(path).table()

    assert [item.batch for item in table.batches] == [1, 2]
    for item in table.batches:
        cheapest = min(item.rows, key=lambda row: row.head_ms + row.tail_ms)
        assert table.pick(batch=item.batch, rate_mb_s=1e-6).choice.name == "no-offload"
        assert table.pick(batch=item.batch, rate_mb_s=1e9).choice.id == cheapest.choice


@BOTH
def test_every_cell_is_read_and_written_as_it_was(path: Path) -> None:
    bundle = Bundle.open(path)
    store = CellStore(bundle)

    cells = {name: store.read(name) for name in store.names()}

    assert len(cells) == 12
    for name, cell in cells.items():
        assert (cell.status, store.name(cell.question)) == ("ok", name)
        assert json.loads(cell.encode()) == json.loads(bundle.read_result(name))


def test_every_memory_report_is_read_and_written_as_it_was() -> None:
    bundle = Bundle.open(PACKED)
    names = [name for name in bundle.storage.names() if name.startswith("memory/")]

    reports = [MemoryReport.parse(bundle.read_result(name), name) for name in names]

    assert [report.side for report in reports] == ["server"]
    assert json.loads(json.dumps(reports[0].to_json())) == json.loads(bundle.read_result(names[0]))
    assert load_memory(bundle, "server", bundle.table().server) == reports[0]


def test_every_engine_header_is_read() -> None:
    bundle = Bundle.open(PACKED, trust=TRUST)
    (target,) = (entry for entry in bundle.manifest.targets.device if entry.is_compiled)

    for engine in target.built:
        data = bundle.read(engine.path)
        header = read_plan(EngineSource(name=engine.path, data=data, sha256=hashlib.sha256(data).hexdigest())).header
        assert (header.target, header.graph, header.graph_digest) == (target.target, engine.graph, engine.graph_digest)
        assert (header.profile.batches, header.memory) == (engine.profile, engine.memory)
    assert sorted(PurePosixPath(engine.path).name for engine in target.built) == [
        *("a.head.plan", "c.head.plan", "model.plan"),
    ]


def test_packing_it_again_gives_the_same_bytes_with_the_signature(tmp_path: Path) -> None:
    pack_bundle(Bundle.open(PACKED), tmp_path / "again.dscb")
    unpacked = unpack_bundle(PACKED, tmp_path / "unpacked", trust=TRUST)
    pack_bundle(unpacked, tmp_path / "unpacked.dscb")

    assert (tmp_path / "again.dscb").read_bytes() == PACKED.read_bytes()
    assert (tmp_path / "unpacked.dscb").read_bytes() == PACKED.read_bytes()
    assert (unpacked.path / ENVELOPE).is_file()


def test_folder_that_is_changed_is_of_version_2(folder: Path) -> None:
    before = json.loads((folder / "manifest.json").read_bytes())

    with Bundle.open(folder).edit() as draft:
        draft.change(notes=("tried on the bench",))

    document = json.loads((folder / "manifest.json").read_bytes())
    assert (before["version"], document["version"]) == (1, 2)
    assert document["notes"] == ["tried on the bench"]
    new = ("version", "notes", "body_sha256", "revision", "sealed", "side", "left_out")
    assert {key: value for key, value in before.items() if key not in new} == {
        key: value for key, value in document.items() if key not in new
    }
    assert verify_bundle(folder).ok


def test_folder_is_timed(folder: Path) -> None:
    settings = BenchSettings(precision_goal=1e6, time_limit_s=0.1)

    result = bench_bundle(Bundle.open(folder), batches=[1], settings=settings)

    assert result.counts["ok"] == len(result.cells) == 6
    assert result.targets == {"device": "onnxruntime:cpu,threads=1,slowdown=6", "server": "onnxruntime:cpu,threads=1"}
