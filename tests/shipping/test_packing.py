"""From a bundle to one file, to a folder somewhere else, and back."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from msgspec.structs import replace
from tests.support.full_bundles import (
    NEW,
    NEW_ENGINE,
    NEW_ID,
    OLD,
    OLD_ENGINE,
    SERVER,
    STARTED_S,
    TABLE_OF_NEW,
    TABLE_OF_OLD,
    add_cell,
    full_bundle,
    make_zip,
    relist,
)
from tests.support.manifests import edited, targets_of

from dsc_split._support.strict_json import body_digest, canonical_json
from dsc_split.bundle import Bundle
from dsc_split.bundles._archive import Archive
from dsc_split.bundles._manifest import encode_manifest
from dsc_split.errors import BundleBusyError, BundleError, DscError, SignatureError, UsageError
from dsc_split.packing import PackResult, Trust, generate_key, pack_bundle, unpack_bundle, verify_bundle

ANYONE = Trust(allow_unsigned=True)
SAMPLES = {"samples/a.npz", "samples/model.npz"}


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return full_bundle(tmp_path / "bundle")


@pytest.fixture
def pack(tmp_path: Path, bundle: Bundle) -> Callable[..., tuple[PackResult, Bundle]]:
    """Pack the bundle, verify what came out, and open it."""

    def run(**options: Any) -> tuple[PackResult, Bundle]:
        result = pack_bundle(bundle, tmp_path / "x.dscb", **options)
        assert verify_bundle(tmp_path / "x.dscb").rows == ()
        return result, Bundle.open(tmp_path / "x.dscb", trust=ANYONE)

    return run


def lasting(packed: Bundle) -> set[str]:
    return {name for name, item in packed.manifest.files.items() if item.role not in ("cell", "table")}


def test_whole_bundle_holds_everything_and_lists_it(bundle: Bundle, pack: Callable[..., Any]) -> None:
    (bundle.path / "report.html").write_text("a report")
    result, packed = pack()

    assert set(packed.storage.names()) == {*bundle.storage.names()} - {"report.html"}
    assert packed.manifest.files.keys() == {*packed.storage.names()} - {"manifest.json"}
    assert packed.manifest.sealed
    assert (result.side, result.left_out_bytes, result.signatures, result.notes) == (None, 0, 0, ())
    assert result.size_bytes == packed.path.stat().st_size
    assert {item.role: item.files for item in result.roles} == {
        "model": 1,
        "head": 1,
        "tail": 1,
        "weights": 1,
        "sample": 2,
        "engine": 2,
        "cell": 3,
        "table": 3,
    }
    assert sum(item.size_bytes for item in result.roles) < result.size_bytes
    assert Bundle.open(packed.path).table().pair_id == bundle.manifest.pair_id


def test_packing_leaves_the_folder_as_it_is_and_gives_equal_bytes_twice(tmp_path: Path, bundle: Bundle) -> None:
    before = {path: path.read_bytes() for path in bundle.path.rglob("*.*") if path.is_file()}
    pack_bundle(bundle, tmp_path / "one.dscb")
    pack_bundle(bundle, tmp_path / "two.dscb")

    assert (tmp_path / "one.dscb").read_bytes() == (tmp_path / "two.dscb").read_bytes()
    assert {path: path.read_bytes() for path in before} == before
    assert not Bundle.open(bundle.path).manifest.sealed


def test_packed_bundle_is_the_same_after_unpacking_and_packing_again(tmp_path: Path, bundle: Bundle) -> None:
    first = tmp_path / "one.dscb"
    pack_bundle(bundle, first, revision=5)
    unpacked = unpack_bundle(first, tmp_path / "out", trust=ANYONE)
    pack_bundle(unpacked, tmp_path / "two.dscb")
    pack_bundle(Bundle.open(first), tmp_path / "three.dscb")

    assert first.read_bytes() == (tmp_path / "two.dscb").read_bytes() == (tmp_path / "three.dscb").read_bytes()
    assert verify_bundle(unpacked.path).rows == ()


def test_revision_is_that_of_the_newest_change_cells_included(bundle: Bundle, pack: Callable[..., Any]) -> None:
    bundle.manifest = replace(bundle.manifest, revision=3)
    (bundle.path / "manifest.json").write_bytes(encode_manifest(bundle.manifest))

    assert pack()[0].revision == STARTED_S
    assert pack(with_cells=False)[0].revision == STARTED_S
    assert pack(revision=0)[0].revision == 0
    assert Bundle.open(bundle.path).manifest.revision == 3


def test_part_for_the_device_holds_engines_samples_and_tables_and_no_graph(pack: Callable[..., Any]) -> None:
    result, part = pack(side="device")

    assert lasting(part) == {OLD_ENGINE, NEW_ENGINE, *SAMPLES}
    assert part.manifest.side == result.side == "device"
    assert part.manifest.left_out.keys() == {
        f"onnx/{n}" for n in ("model.onnx", "a.head.onnx", "a.tail.onnx", "weights.data")
    }
    assert {name for name in part.storage.names() if "table" in name} == {"table.json", TABLE_OF_OLD, TABLE_OF_NEW}
    assert not any(name.startswith("cells/") for name in part.storage.names())
    assert part.targets("server") == (SERVER,)
    assert part.graph_digest("onnx/a.head.onnx")
    assert part.compute_pair_id() == part.manifest.pair_id
    assert result.left_out_bytes == sum(item.size_bytes for item in part.manifest.left_out.values())


@pytest.mark.parametrize("device", [OLD, OLD_ENGINE.split("/")[1]])
def test_part_for_one_device_has_its_engines_alone_and_its_table_in_the_place_that_is_read(
    bundle: Bundle, pack: Callable[..., Any], device: str
) -> None:
    _, part = pack(side="device", device=device)

    assert lasting(part) == {OLD_ENGINE, *SAMPLES}
    assert NEW_ENGINE in part.manifest.left_out
    assert part.targets("device") == (NEW, OLD)
    assert Bundle.open(part.path).table().device.target == OLD
    assert part.read("table.json") == (bundle.path / TABLE_OF_OLD).read_bytes()
    assert TABLE_OF_NEW not in part.storage.names()


def test_of_several_fitting_tables_the_one_most_like_the_one_in_use_is_read_whenever_it_was_written(
    bundle: Bundle, pack: Callable[..., Any]
) -> None:
    other = TABLE_OF_OLD.replace("aaaaaaaaaaaa", "ffffffffffff")
    table = json.loads((bundle.path / TABLE_OF_OLD).read_bytes())
    link = {**table["link"], "source": "another"}
    (bundle.path / other).write_text(json.dumps({**table, "link": link}))
    os.utime(bundle.path / TABLE_OF_OLD, (1, 1))

    assert pack(device=OLD)[1].read("table.json") == (bundle.path / TABLE_OF_OLD).read_bytes()
    used = json.loads((bundle.path / "table.json").read_bytes())
    (bundle.path / "table.json").write_text(json.dumps({**used, "link": link}))
    assert pack(device=OLD)[1].read("table.json") == (bundle.path / other).read_bytes()


def test_part_without_a_fitting_table_has_none_and_says_so(bundle: Bundle, pack: Callable[..., Any]) -> None:
    (bundle.path / TABLE_OF_OLD).unlink()
    result, part = pack(side="device", device=OLD)

    assert not part.has("table.json")
    assert any("no lookup table" in note for note in result.notes)


def test_several_machines_of_one_target_are_told_apart_by_id(bundle: Bundle, pack: Callable[..., Any]) -> None:
    for name in (TABLE_OF_NEW, "table.json"):
        table = json.loads((bundle.path / name).read_bytes())
        table["device"]["target"] = OLD
        (bundle.path / name).write_text(json.dumps(table))
    with edited(bundle) as document:
        targets_of(document, "device")[1]["target"] = OLD

    _, part = pack(side="device", device=NEW_ID)

    assert lasting(part) == {NEW_ENGINE, *SAMPLES}
    assert TABLE_OF_OLD not in part.storage.names()
    assert part.read("table.json") == (bundle.path / TABLE_OF_NEW).read_bytes()


def test_part_for_the_device_with_graphs_holds_heads_and_the_model_and_no_tail(pack: Callable[..., Any]) -> None:
    _, part = pack(side="device", with_onnx=True)

    graphs = {"onnx/model.onnx", "onnx/a.head.onnx", "onnx/weights.data"}
    assert lasting(part) == {OLD_ENGINE, NEW_ENGINE, *SAMPLES, *graphs}
    assert part.manifest.left_out.keys() == {"onnx/a.tail.onnx"}


def test_part_for_a_target_that_runs_graphs_holds_them(bundle: Bundle, pack: Callable[..., Any]) -> None:
    graphs = {"onnx/a.tail.onnx", "onnx/weights.data"}
    assert lasting(pack(side="server")[1]) == {*graphs, "onnx/model.onnx", *SAMPLES}

    with bundle.edit() as draft:
        draft.change(full_offload=False)
    assert lasting(pack(side="server")[1]) == {*graphs, *SAMPLES}


def test_part_of_a_bundle_without_targets_holds_the_graphs_of_its_side(
    bundle: Bundle, pack: Callable[..., Any]
) -> None:
    with bundle.edit() as draft:
        draft.set_targets("device", [])

    assert lasting(pack(side="device")[1]) == {"onnx/a.head.onnx", "onnx/model.onnx", "onnx/weights.data", *SAMPLES}


def test_part_with_cells_holds_those_of_its_side_and_targets(bundle: Bundle, pack: Callable[..., Any]) -> None:
    _, part = pack(side="device", device=NEW, with_cells=True)
    cells = [json.loads(part.read(name)) for name in part.storage.names() if name.startswith("cells/")]

    assert [cell["target"] for cell in cells] == [NEW]


def test_whole_bundle_for_one_device_leaves_the_engines_of_others_out(pack: Callable[..., Any]) -> None:
    _, packed = pack(device=NEW)

    assert OLD_ENGINE in packed.manifest.left_out
    assert NEW_ENGINE in packed.manifest.files
    assert packed.manifest.side is None


def test_part_is_not_packed_for_the_other_side_or_with_what_it_has_not(
    tmp_path: Path, pack: Callable[..., Any]
) -> None:
    _, part = pack(side="device")

    with pytest.raises(UsageError, match="a part for the device side"):
        pack_bundle(part, tmp_path / "y.dscb", side="server")
    with pytest.raises(UsageError, match=r"needs 'onnx/a\.head\.onnx'.*does not hold"):
        pack_bundle(part, tmp_path / "y.dscb", side="device", with_onnx=True)
    pack_bundle(part, tmp_path / "y.dscb")
    assert (tmp_path / "y.dscb").read_bytes() == part.path.read_bytes()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"side": "both"}, "'device' or 'server' was expected"),
        ({"device": "tensorrt"}, "has no such target for its device side: 'tensorrt-rtx:sm75'"),
        ({"revision": -1}, "from 0"),
    ],
)
def test_option_that_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, bundle: Bundle, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(UsageError, match=match):
        pack_bundle(bundle, tmp_path / "x.dscb", **options)
    with pytest.raises(UsageError, match=r"ends in \.dscb"):
        pack_bundle(bundle, tmp_path / "x.zip")

    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("path", ["onnx/weights.data", "onnx/a.head.onnx", OLD_ENGINE, "samples/a.npz"])
def test_file_that_is_not_what_the_manifest_says_is_not_packed(tmp_path: Path, bundle: Bundle, path: str) -> None:
    data = bytearray((bundle.path / path).read_bytes())
    data[-1] ^= 1
    (bundle.path / path).write_bytes(data)

    with pytest.raises(BundleError, match=rf"'{path}' has \d+ bytes and SHA-256"):
        pack_bundle(bundle, tmp_path / "x.dscb")

    assert [item.name for item in tmp_path.iterdir()] == ["bundle"]


def test_damaged_cells_and_tables_of_other_pairs_are_not_packed(tmp_path: Path, bundle: Bundle) -> None:
    path = add_cell(bundle, "onnx/model.onnx", SERVER)
    whole = (bundle.path / path).read_bytes()
    (bundle.path / path).write_bytes(whole[:-20])
    with pytest.raises(BundleError, match=rf"'{path}' .* cannot be packed"):
        pack_bundle(bundle, tmp_path / "x.dscb")

    (bundle.path / path).write_bytes(whole)
    (bundle.path / TABLE_OF_OLD).write_bytes(b"{}")
    with pytest.raises(BundleError, match=rf"'{TABLE_OF_OLD}' .* cannot be packed"):
        pack_bundle(bundle, tmp_path / "x.dscb")


def test_mixed_exports_are_not_packed(tmp_path: Path, bundle: Bundle) -> None:
    other = full_bundle(tmp_path / "other", seed=1)
    shutil.copy(other.path / "onnx/a.tail.onnx", bundle.path / "onnx/a.tail.onnx")
    relist(bundle, "onnx/a.tail.onnx")

    with pytest.raises(BundleError, match="files of two exports were mixed"):
        pack_bundle(bundle, tmp_path / "x.dscb")


def test_bundle_that_is_being_written_is_not_packed(tmp_path: Path, bundle: Bundle) -> None:
    with bundle.lock(), pytest.raises(BundleBusyError):
        pack_bundle(Bundle.open(bundle.path), tmp_path / "x.dscb")


def test_cell_measured_after_sealing_is_sealed_in_too(tmp_path: Path, bundle: Bundle) -> None:
    pack_bundle(bundle, tmp_path / "x.dscb", revision=1)
    unpacked = unpack_bundle(tmp_path / "x.dscb", tmp_path / "out", trust=ANYONE)
    cell = add_cell(unpacked, "onnx/model.onnx", SERVER)
    pack_bundle(unpacked, tmp_path / "y.dscb")
    manifest = Bundle.open(tmp_path / "y.dscb").manifest

    assert cell in manifest.files
    assert manifest.revision == STARTED_S


def test_signatures_stay_while_nothing_changes_and_go_when_it_does(tmp_path: Path, bundle: Bundle) -> None:
    pytest.importorskip("cryptography")
    keys = [tmp_path / "one.pem", tmp_path / "two.pem"]
    public = [generate_key(key) for key in keys]
    signed, again, both, changed = (tmp_path / f"{name}.dscb" for name in ("signed", "again", "both", "changed"))
    with edited(bundle) as document:  # as a later version may write it
        document["added_later"] = document["splits"][0]["added_later"] = {"a": [0.1, None]}
    pack_bundle(bundle, signed, sign=keys[:1])
    unpacked = unpack_bundle(signed, tmp_path / "out", trust=Trust(keys=(public[0],), require=True))

    assert verify_bundle(unpacked.path, trust=Trust(keys=(public[0],), require=True)).ok
    pack_bundle(unpacked, again)
    assert again.read_bytes() == signed.read_bytes()
    assert pack_bundle(unpacked, both, sign=keys[1:]).signatures == 2
    result = pack_bundle(Bundle.open(both), changed, revision=1)
    assert result.signatures == 0
    assert any("signatures" in note for note in result.notes)
    with pytest.raises(SignatureError):
        unpack_bundle(changed, tmp_path / "more", trust=Trust(keys=(public[0],)))


# ---- unpacking ---------------------------------------------------------------------------------------------


def test_engines_of_others_are_signed_only_where_they_are_trusted(tmp_path: Path, bundle: Bundle) -> None:
    pytest.importorskip("cryptography")
    theirs, ours = tmp_path / "theirs.pem", tmp_path / "ours.pem"
    public = generate_key(theirs)
    generate_key(ours)
    source, output = tmp_path / "x.dscb", tmp_path / "y.dscb"
    pack_bundle(bundle, source, sign=[theirs])

    with pytest.raises(SignatureError, match=r"'engines/.* is native code"):
        pack_bundle(Bundle.open(source), output, sign=[ours])
    assert not output.exists()
    assert pack_bundle(Bundle.open(source), output).signatures == 1
    for trust in (Trust(keys=(public,)), ANYONE):
        assert pack_bundle(Bundle.open(source, trust=trust), output, sign=[ours]).signatures == 2


def test_compiled_code_in_a_graph_of_others_is_not_signed(tmp_path: Path, bundle: Bundle) -> None:
    pytest.importorskip("cryptography")
    key = tmp_path / "ours.pem"
    generate_key(key)
    pack_bundle(bundle, tmp_path / "x.dscb", side="server")
    assert pack_bundle(Bundle.open(tmp_path / "x.dscb"), tmp_path / "y.dscb", sign=[key]).signatures == 1

    model = onnx.load(bundle.path / "onnx/a.tail.onnx", load_external_data=False)
    model.graph.node.add(op_type="EPContext", domain="com.microsoft", name="blob")
    (bundle.path / "onnx/a.tail.onnx").write_bytes(model.SerializeToString())
    relist(bundle, "onnx/a.tail.onnx")
    with bundle.edit() as draft:
        draft.change(pair_id=bundle.compute_pair_id())
        draft.set_targets("device", [])
    for path in [*(bundle.path / "tables").iterdir(), bundle.path / "table.json"]:
        path.unlink()
    pack_bundle(bundle, tmp_path / "x.dscb", side="server")
    with pytest.raises(SignatureError, match=r"'onnx/a\.tail\.onnx' .* is native code"):
        pack_bundle(Bundle.open(tmp_path / "x.dscb"), tmp_path / "y.dscb", sign=[key])


@pytest.fixture
def packed(tmp_path: Path, bundle: Bundle) -> Path:
    path = tmp_path / "x.dscb"
    pack_bundle(bundle, path, revision=10)
    return path


def around(path: Path) -> set[str]:
    return {item.name for item in path.iterdir()} - {"bundle", "x.dscb", "y.dscb"}


def test_unpacked_bundle_is_byte_for_byte_what_was_packed(tmp_path: Path, packed: Path) -> None:
    unpacked = unpack_bundle(packed, tmp_path / "out", trust=ANYONE)
    archive = Archive(packed)

    assert unpacked.storage.names() == archive.names()
    assert all((unpacked.path / name).read_bytes() == archive.read(name) for name in archive.names())
    assert around(tmp_path) == {"out"}


def test_engines_that_nobody_trusted_signed_are_not_unpacked(tmp_path: Path, packed: Path) -> None:
    for trust in (None, Trust()):
        with pytest.raises(SignatureError, match="--trust PUBLIC_KEY, or --allow-unsigned"):
            unpack_bundle(packed, tmp_path / "out", trust=trust)

    assert around(tmp_path) == set()


def test_bundle_of_graphs_alone_is_unpacked_without_a_signature(tmp_path: Path, bundle: Bundle) -> None:
    pack_bundle(bundle, tmp_path / "x.dscb", side="server")

    assert unpack_bundle(tmp_path / "x.dscb", tmp_path / "out").manifest.side == "server"
    with pytest.raises(SignatureError):
        unpack_bundle(tmp_path / "x.dscb", tmp_path / "out", trust=Trust(require=True))


def forged(packed: Path, output: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """Change the files of a packed bundle, and pack them again as they are."""
    archive = Archive(packed)
    files = {name: archive.read(name) for name in archive.names()}
    change(files)
    output.write_bytes(make_zip([{"name": name, "data": files[name]} for name in sorted(files)]))
    return output


@pytest.mark.parametrize("name", ["onnx/a.head.onnx", "onnx/weights.data", NEW_ENGINE, "samples/a.npz", "table.json"])
def test_nothing_is_unpacked_where_one_file_is_another(tmp_path: Path, packed: Path, name: str) -> None:
    def change(files: dict[str, bytes]) -> None:
        files[name] = files[name][:-1] + bytes([files[name][-1] ^ 1])

    with pytest.raises(BundleError, match=rf"not unpacked: '{name}' has SHA-256"):
        unpack_bundle(forged(packed, tmp_path / "y.dscb", change), tmp_path / "out", trust=ANYONE)

    assert around(tmp_path) == set()


@pytest.mark.parametrize("name", ["cells/x.json", "tables/x.json", "memory/device-x.json"])
def test_packed_bundle_with_a_file_that_is_not_listed_is_not_opened(tmp_path: Path, packed: Path, name: str) -> None:
    more = forged(packed, tmp_path / "y.dscb", lambda files: files.update({name: b"{}"}))

    with pytest.raises(BundleError, match=f"holds '{name}', which its manifest does not list"):
        Bundle.open(more, trust=ANYONE)


def test_what_was_verified_is_what_is_unpacked_though_the_file_answers_otherwise_the_next_time(
    tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, seen = Archive.read, list[str]()

    def read_twice(self: Archive, name: str, **limits: Any) -> bytes:
        seen.append(name)
        data = read(self, name, **limits)
        return data if seen.count(name) == 1 else data.replace(b"tiny", b"evil")

    monkeypatch.setattr(Archive, "read", read_twice)
    unpack_bundle(packed, tmp_path / "out", trust=ANYONE)

    assert b"evil" not in (tmp_path / "out/manifest.json").read_bytes()
    assert verify_bundle(tmp_path / "out").rows == ()


def test_nothing_is_unpacked_where_a_file_is_missing_or_too_many(tmp_path: Path, packed: Path) -> None:
    without = forged(packed, tmp_path / "y.dscb", lambda files: files.__delitem__("onnx/weights.data"))
    with pytest.raises(BundleError, match="is missing"):
        unpack_bundle(without, tmp_path / "out", trust=ANYONE)
    more = forged(packed, tmp_path / "y.dscb", lambda files: files.update({"extra.sh": b"rm"}))
    with pytest.raises(BundleError, match=r"'extra\.sh' is not listed"):
        unpack_bundle(more, tmp_path / "out", trust=ANYONE)

    assert around(tmp_path) == set()


def test_cell_that_is_not_listed_is_not_unpacked(tmp_path: Path, packed: Path) -> None:
    body = {"key": 64 * "0"}
    cell = canonical_json({**body, "body_sha256": body_digest(body)}) + b"\n"
    more = forged(packed, tmp_path / "y.dscb", lambda files: files.update({f"cells/{64 * '0'}.json": cell}))

    with pytest.raises(BundleError, match="is not listed"):
        unpack_bundle(more, tmp_path / "out", trust=ANYONE)


def test_older_bundle_does_not_replace_a_newer_one_unless_it_is_allowed(
    tmp_path: Path, bundle: Bundle, packed: Path
) -> None:
    newer = tmp_path / "y.dscb"
    pack_bundle(bundle, newer, revision=11)
    out = tmp_path / "out"
    unpack_bundle(packed, out, trust=ANYONE)

    assert unpack_bundle(newer, out, trust=ANYONE).manifest.revision == 11
    with pytest.raises(BundleError, match=r"has revision 10, and .* is newer: 11"):
        unpack_bundle(packed, out, trust=ANYONE)
    assert Bundle.open(out).manifest.revision == 11
    assert unpack_bundle(packed, out, trust=ANYONE, allow_older=True).manifest.revision == 10


def test_next_release_replaces_a_part_that_was_timed_on_the_device_meanwhile(tmp_path: Path, bundle: Bundle) -> None:
    for revision in (10, 11):
        pack_bundle(bundle, tmp_path / f"{revision}.dscb", side="device", revision=revision)
    part = unpack_bundle(tmp_path / "10.dscb", tmp_path / "out", trust=ANYONE)
    part.touch()

    assert part.manifest.revision > 11
    assert unpack_bundle(tmp_path / "11.dscb", tmp_path / "out", trust=ANYONE).manifest.revision == 11
    with pytest.raises(BundleError, match="is newer: 11"):
        unpack_bundle(tmp_path / "10.dscb", tmp_path / "out", trust=ANYONE)


def test_new_export_replaces_the_old_one_and_keeps_what_was_measured_here(tmp_path: Path, packed: Path) -> None:
    out = tmp_path / "out"
    before = unpack_bundle(packed, out, trust=ANYONE)
    cell = add_cell(before, "onnx/model.onnx", SERVER)
    full_bundle(tmp_path / "other", seed=1)
    pack_bundle(Bundle.open(tmp_path / "other"), tmp_path / "y.dscb", revision=11)
    after = unpack_bundle(tmp_path / "y.dscb", out, trust=ANYONE)

    assert after.manifest.pair_id != before.manifest.pair_id
    assert (out / cell).is_file()
    assert verify_bundle(out).rows == ()


def test_cell_that_is_packed_wins_over_the_one_that_was_there(tmp_path: Path, packed: Path) -> None:
    out = tmp_path / "out"
    unpack_bundle(packed, out, trust=ANYONE)
    cell = next((out / "cells").iterdir())
    whole = cell.read_bytes()
    cell.write_bytes(b"another")
    unpack_bundle(packed, out, trust=ANYONE)

    assert cell.read_bytes() == whole


def test_what_is_no_bundle_is_never_touched(tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, file, link = tmp_path / "folder", tmp_path / "file", tmp_path / "link"
    folder.mkdir()
    (folder / "mine").write_text("mine")
    file.write_text("mine")
    link.symlink_to(folder)
    for place in (folder, file, link):
        with pytest.raises(UsageError, match="not replaced"):
            unpack_bundle(packed, place, trust=ANYONE)
    assert (folder / "mine").read_text() == file.read_text() == "mine"

    empty = tmp_path / "empty"
    empty.mkdir()
    unpack_bundle(packed, empty, trust=ANYONE)
    monkeypatch.chdir(empty)
    with pytest.raises(UsageError, match="current folder"):
        unpack_bundle(packed, empty, trust=ANYONE)


def test_bundle_that_is_being_written_is_not_replaced(tmp_path: Path, packed: Path) -> None:
    there = unpack_bundle(packed, tmp_path / "out", trust=ANYONE)

    with there.lock(), pytest.raises(BundleBusyError):
        unpack_bundle(packed, tmp_path / "out", trust=ANYONE)
    assert around(tmp_path) == {"out"}


def test_full_disk_leaves_nothing(tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)

    with pytest.raises(DscError, match="No space left on device"):
        unpack_bundle(packed, tmp_path / "out", trust=ANYONE)
    assert around(tmp_path) == set()


def test_what_is_unpacked_is_private_until_it_is_verified(
    tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[int] = []
    real = os.fsync

    def look(fd: int) -> None:
        modes.extend(path.stat().st_mode & 0o777 for path in tmp_path.glob(".out.*.partial"))
        real(fd)

    monkeypatch.setattr(os, "fsync", look)
    unpack_bundle(packed, tmp_path / "out", trust=ANYONE)

    assert set(modes) == {0o700}


def test_folder_and_nothing_are_no_packed_bundle(tmp_path: Path, bundle: Bundle) -> None:
    for source, fault in ((bundle.path, "is a folder, not a packed bundle"), (tmp_path / "none", "no packed bundle")):
        with pytest.raises(UsageError, match=fault):
            unpack_bundle(source, tmp_path / "out")


def test_a_part_does_not_take_the_place_of_the_whole_bundle(tmp_path: Path, bundle: Bundle) -> None:
    pack_bundle(bundle, tmp_path / "part.dscb", side="device")
    before = around(bundle.path)

    with pytest.raises(UsageError, match="holds a whole bundle, and the packed file the device's part"):
        unpack_bundle(tmp_path / "part.dscb", bundle.path, trust=ANYONE, allow_older=True)

    assert around(bundle.path) == before


def test_other_contents_of_the_same_revision_are_not_taken_for_newer(tmp_path: Path, bundle: Bundle) -> None:
    pack_bundle(bundle, tmp_path / "one.dscb", revision=10)
    (bundle.path / TABLE_OF_OLD).unlink()
    pack_bundle(bundle, tmp_path / "two.dscb", revision=10)
    unpack_bundle(tmp_path / "one.dscb", tmp_path / "out", trust=ANYONE)

    with pytest.raises(BundleError, match="have the same revision, 10, and other contents"):
        unpack_bundle(tmp_path / "two.dscb", tmp_path / "out", trust=ANYONE)


def test_unsigned_file_does_not_take_the_place_of_a_signed_one(tmp_path: Path, bundle: Bundle) -> None:
    generate_key(tmp_path / "key")
    pack_bundle(bundle, tmp_path / "x.dscb", sign=[tmp_path / "key"])
    before = (tmp_path / "x.dscb").read_bytes()

    with pytest.raises(UsageError, match="is a signed bundle, and what is packed has no signature"):
        pack_bundle(bundle, tmp_path / "x.dscb")

    assert (tmp_path / "x.dscb").read_bytes() == before


def test_measurements_of_a_part_are_packed_to_be_carried_home(tmp_path: Path, bundle: Bundle) -> None:
    pack_bundle(bundle, tmp_path / "part.dscb", side="device")
    part = unpack_bundle(tmp_path / "part.dscb", tmp_path / "part", trust=ANYONE)
    cell = add_cell(part, "onnx/model.onnx", SERVER)

    pack_bundle(part, tmp_path / "back.dscb")

    assert Bundle.open(tmp_path / "back.dscb").has(cell)


def test_damaged_bundle_is_replaced_only_when_it_is_said_that_its_revision_does_not_matter(
    tmp_path: Path, packed: Path
) -> None:
    out = tmp_path / "out"
    unpack_bundle(packed, out, trust=ANYONE)
    (out / "manifest.json").write_bytes(b"{")

    with pytest.raises(BundleError, match="--allow-older to replace it"):
        unpack_bundle(packed, out, trust=ANYONE)
    assert unpack_bundle(packed, out, trust=ANYONE, allow_older=True).manifest.revision == 10


def test_what_a_killed_pack_has_left_is_removed_by_the_next_one(tmp_path: Path, bundle: Bundle) -> None:
    (tmp_path / ".x.dscb.partial").write_bytes(b"half of what is longer than a small bundle" * 10_000)
    (tmp_path / ".y.dscb.partial").write_bytes(b"another file's")
    pack_bundle(bundle, tmp_path / "x.dscb")

    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "x.dscb", ".y.dscb.partial"}
    assert verify_bundle(tmp_path / "x.dscb").ok
