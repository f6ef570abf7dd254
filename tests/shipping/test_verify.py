"""What `verify` finds, file by file, in folders and in packed bundles."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tests.support.full_bundles import NEW_ENGINE, OLD_ENGINE, TABLE_OF_OLD, add_cell, full_bundle, list_file, relist
from tests.support.manifests import document_of, edited, targets_of

from dsc_split._support.progress import Progress
from dsc_split.bundle import Bundle
from dsc_split.bundles._manifest import DIGEST, encode_manifest
from dsc_split.bundles._samples import golden_samples
from dsc_split.errors import BundleError, UsageError
from dsc_split.packing import Trust, VerifyResult, generate_key, pack_bundle, unpack_bundle, verify_bundle
from dsc_split.shipping._file_checks import graph_faults, record_fault


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return full_bundle(tmp_path / "bundle")


@pytest.fixture
def sealed(tmp_path: Path, bundle: Bundle) -> Bundle:
    """The bundle as it comes out of a packed file: its manifest lists everything."""
    pack_bundle(bundle, tmp_path / "sealed.dscb")
    return unpack_bundle(tmp_path / "sealed.dscb", tmp_path / "sealed", trust=Trust(allow_unsigned=True))


def faults(result: VerifyResult) -> dict[str, str]:
    return {row.path: row.fault for row in result.rows}


def test_bundle_that_is_right_has_no_faults_as_folder_sealed_and_packed(
    tmp_path: Path, bundle: Bundle, sealed: Bundle
) -> None:
    results = [verify_bundle(path) for path in (bundle.path, sealed.path, tmp_path / "sealed.dscb")]

    assert [result.rows for result in results] == [(), (), ()]
    assert [result.sealed for result in results] == [False, True, True]
    assert {result.files for result in results} == {len(sealed.manifest.files)}
    assert {result.size_bytes for result in results} == {sum(f.size_bytes for f in sealed.manifest.files.values())}
    assert results[0].to_json()["ok"] is True


def test_every_fault_is_named_with_its_file(bundle: Bundle) -> None:
    folder = bundle.path
    (folder / "onnx/a.head.onnx").write_bytes(b"x")
    (folder / "onnx/weights.data").unlink()
    data = bytearray((folder / NEW_ENGINE).read_bytes())
    data[5] ^= 1
    (folder / NEW_ENGINE).write_bytes(data)
    (folder / "table.json").write_bytes(b"{}")

    found = faults(verify_bundle(folder))

    assert found.keys() == {"onnx/a.head.onnx", "onnx/weights.data", NEW_ENGINE, "table.json"}
    assert found["onnx/a.head.onnx"].startswith("has 1 bytes; the manifest says")
    assert found["onnx/weights.data"] == "is missing, or is no regular file"
    assert "it was changed" in found[NEW_ENGINE]


def test_manifest_that_was_written_by_another_hand_is_a_fault(bundle: Bundle) -> None:
    path = bundle.path / "manifest.json"
    written = path.read_bytes()
    path.write_bytes(json.dumps(json.loads(written)).encode())

    assert "canonical form" in faults(verify_bundle(bundle.path))["manifest.json"]

    path.write_bytes(written.replace(b'"fp32"', b'"fp16"'))
    assert "its own SHA-256" in faults(verify_bundle(bundle.path))["manifest.json"]

    path.write_bytes(b"{")
    result = verify_bundle(bundle.path)
    assert (result.pair_id, result.revision, result.files) == (None, None, 0)
    assert "no valid JSON" in faults(result)["manifest.json"]


def test_manifest_of_an_older_version_is_verified_and_noted(bundle: Bundle) -> None:
    document = {**document_of(bundle), "version": 1}
    for key in ("revision", "sealed", "side", "left_out", DIGEST):
        del document[key]
    (bundle.path / "manifest.json").write_text(json.dumps(document))

    result = verify_bundle(bundle.path)

    assert result.ok
    assert any("version 1" in note for note in result.notes)


def test_older_bundle_than_asked_for_is_a_fault(bundle: Bundle) -> None:
    revision = bundle.manifest.revision

    assert verify_bundle(bundle.path, min_revision=revision).ok
    assert f"at least {revision + 1}" in faults(verify_bundle(bundle.path, min_revision=revision + 1))["manifest.json"]


def test_head_of_one_export_with_the_tail_of_another_is_found_though_both_are_listed(
    tmp_path: Path, bundle: Bundle
) -> None:
    other = full_bundle(tmp_path / "other", seed=1)
    for path in ("onnx/a.tail.onnx", "onnx/weights.data"):
        shutil.copy(other.path / path, bundle.path / path)
        relist(bundle, path)

    assert "files of two exports were mixed" in faults(verify_bundle(bundle.path))["manifest.json"]


def test_swapped_files_are_found(tmp_path: Path, bundle: Bundle) -> None:
    head, tail = bundle.path / "onnx/a.head.onnx", bundle.path / "onnx/a.tail.onnx"
    shutil.copy(head, tmp_path / "head")
    shutil.copy(tail, head)
    shutil.copy(tmp_path / "head", tail)

    assert faults(verify_bundle(bundle.path)).keys() == {"onnx/a.head.onnx", "onnx/a.tail.onnx"}


def test_engine_of_another_graph_is_found(bundle: Bundle) -> None:
    with edited(bundle) as document:
        old, new = targets_of(document, "device")
        old["engines"][0]["graph_digest"] = 64 * "0"
        new["engines"][0]["path"] = "engines/none.plan"

    found = faults(verify_bundle(bundle.path))

    assert "was built from another 'onnx/a.head.onnx'" in found[OLD_ENGINE]
    assert "does not list it" in found["engines/none.plan"]


def test_engine_of_a_graph_that_is_none_of_the_bundles_is_found(bundle: Bundle) -> None:
    with edited(bundle) as document:
        targets_of(document, "device")[0]["engines"][0]["graph"] = "samples/a.npz"

    assert any("no graph of this bundle" in fault for fault in faults(verify_bundle(bundle.path)).values())


@pytest.mark.parametrize("path", ["onnx/a.tail.onnx", "onnx/weights.data", "samples/a.npz"])
def test_file_of_the_model_that_is_not_listed_is_found(bundle: Bundle, path: str) -> None:
    with edited(bundle) as document:
        del document["files"][path]

    assert "belongs to the model" in faults(verify_bundle(bundle.path))[path]


def test_file_that_is_held_and_left_out_is_found(bundle: Bundle) -> None:
    with bundle.edit() as draft:
        draft.change(left_out={"onnx/a.tail.onnx": draft.manifest.files["onnx/a.tail.onnx"]})

    assert faults(verify_bundle(bundle.path)) == {"onnx/a.tail.onnx": "is listed as held and as left out"}


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "ONNX/A.tail.onnx", "manifest.json"])
def test_list_with_a_name_that_no_bundle_may_have_is_a_fault(bundle: Bundle, path: str) -> None:
    (bundle.path.parent / "secret").write_bytes(b"x")
    with edited(bundle) as document:
        document["files"][path] = {"sha256": 64 * "0", "size": 1, "role": "sample"}

    assert path in faults(verify_bundle(bundle.path))


def test_links_hard_links_and_pipes_are_faults_wherever_they_point(tmp_path: Path, sealed: Bundle) -> None:
    folder = sealed.path
    outside = tmp_path / "weights"
    shutil.copy(folder / "onnx/weights.data", outside)
    (folder / "onnx/weights.data").unlink()
    (folder / "onnx/weights.data").symlink_to(outside)
    os.link(folder / "onnx/a.head.onnx", tmp_path / "elsewhere")
    os.mkfifo(folder / "pipe")
    (folder / "linked").symlink_to(tmp_path)

    rows = verify_bundle(folder).rows

    assert next(row.fault for row in rows if row.path == "onnx/weights.data").startswith("is a symbolic link")
    assert any(row.path == "onnx/a.head.onnx" and "has 2 hard links" in row.fault for row in rows)
    assert any(row.path == "pipe" and "a pipe" in row.fault for row in rows)
    assert any(row.path == "linked" and "symbolic link" in row.fault for row in rows)


def test_extra_files_are_faults_where_everything_is_listed_and_notes_elsewhere(bundle: Bundle, sealed: Bundle) -> None:
    for folder in (bundle.path, sealed.path):
        (folder / "more").mkdir()
        (folder / "more/x").touch()
        (folder / "report.html").touch()

    opened, closed = verify_bundle(bundle.path), verify_bundle(sealed.path)

    assert opened.ok
    assert [note for note in opened.notes if "'more/x' is no file of a bundle's" in note]
    assert faults(closed).keys() == {"more/x", "report.html"}


def test_cell_that_was_measured_after_sealing_is_a_note_and_a_damaged_one_a_fault(sealed: Bundle) -> None:
    path = add_cell(sealed, "onnx/model.onnx", "onnxruntime:cpu")
    result = verify_bundle(sealed.path)

    assert result.ok
    assert any("1 files of cells" in note for note in result.notes)

    (sealed.path / path).write_bytes((sealed.path / path).read_bytes().replace(b"2026", b"2027"))
    assert "its own SHA-256" in faults(verify_bundle(sealed.path))[path]


def test_cells_of_an_open_bundle_are_checked_by_what_they_say_of_themselves(bundle: Bundle) -> None:
    path = add_cell(bundle, "onnx/model.onnx", "onnxruntime:cpu")
    data = (bundle.path / path).read_bytes()

    assert record_fault(path, data) == ""
    assert "another cell" in record_fault("cells/x.json", data)
    assert "not written as it is by dsc-split" in record_fault(path, data + b"\n")
    assert "no valid JSON" in record_fault(path, data[:-9])


def test_table_of_other_pairs_is_a_fault(bundle: Bundle) -> None:
    table = json.loads((bundle.path / TABLE_OF_OLD).read_bytes())
    (bundle.path / TABLE_OF_OLD).write_text(json.dumps({**table, "pair_id": "sha256:" + 64 * "0"}))

    assert faults(verify_bundle(bundle.path)) == {TABLE_OF_OLD: "is a table of other pairs"}


@pytest.mark.parametrize("name", ["model.pt", "weights.PTH", "x.pkl", "x.pickle"])
def test_pickle_is_a_fault_listed_or_not(bundle: Bundle, name: str) -> None:
    (bundle.path / name).write_bytes(b"\x80\x04.")
    assert "is a pickle" in faults(verify_bundle(bundle.path))[name]

    list_file(bundle, name, b"\x80\x04.", "sample")
    assert "is a pickle" in faults(verify_bundle(bundle.path))[name]


def test_python_objects_among_samples_are_a_fault_and_are_not_unpickled(bundle: Bundle, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    np.savez(bundle.path / "samples/a.npz", x=np.array([Evil()], dtype=object))
    relist(bundle, "samples/a.npz")

    assert "holds Python objects (pickled) in 'x.npy'" in faults(verify_bundle(bundle.path))["samples/a.npz"]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x80\x04."])
def test_samples_that_are_no_arrays_are_a_fault(bundle: Bundle, data: bytes) -> None:
    list_file(bundle, "samples/a.npz", data, "sample")

    assert "no file of plain arrays" in faults(verify_bundle(bundle.path))["samples/a.npz"]


def test_compressed_samples_which_may_be_of_any_size_are_a_fault_and_not_read(bundle: Bundle) -> None:
    with np.load(bundle.path / "samples/model.npz") as arrays:
        np.savez_compressed(bundle.path / "samples/model.npz", **dict(arrays))
    relist(bundle, "samples/model.npz")

    assert "compressed" in faults(verify_bundle(bundle.path))["samples/model.npz"]
    with pytest.raises(BundleError, match=r"samples/model\.npz"):
        golden_samples(bundle, None)


def test_lock_that_is_a_link_is_a_fault_and_what_it_points_to_stays(tmp_path: Path, bundle: Bundle) -> None:
    (tmp_path / "precious").write_text("mine")
    (bundle.path / ".lock.holder").symlink_to(tmp_path / "precious")

    assert "symbolic link" in faults(verify_bundle(bundle.path))[".lock.holder"]
    with bundle.lock():
        pass
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "weights.data/../x", "other.data"])
def test_graph_that_refers_to_another_file_than_the_weights_is_a_fault(bundle: Bundle, location: str) -> None:
    path = bundle.path / "onnx/a.head.onnx"
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].external_data[0].value = location
    path.write_bytes(model.SerializeToString())
    relist(bundle, "onnx/a.head.onnx")

    fault = faults(verify_bundle(bundle.path))["onnx/a.head.onnx"]
    assert f"refers to data in {location!r}; 'weights.data' alone was expected" in fault


def external_tensor(location: str) -> onnx.TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def test_external_data_is_seen_wherever_a_tensor_can_stand() -> None:
    inner = helper.make_graph([], "inner", [], [], [external_tensor("in_branch")])
    nodes = [
        helper.make_node("Constant", [], ["c"], value=external_tensor("in_constant")),
        helper.make_node("If", ["c"], ["d"], then_branch=inner, else_branch=inner),
    ]
    model = helper.make_model(helper.make_graph(nodes, "g", [], [], [external_tensor("in_initializer")]))
    model.functions.append(
        helper.make_function(
            "f", "f", [], ["y"], [helper.make_node("Constant", [], ["y"], value=external_tensor("in_function"))], []
        )
    )
    model.training_info.add().initialization.CopyFrom(
        helper.make_graph([], "t", [], [], [external_tensor("in_training")])
    )
    sparse = model.graph.sparse_initializer.add()
    sparse.values.CopyFrom(external_tensor("in_sparse"))

    fault, has_ep_context = graph_faults(model.SerializeToString(), "weights.data")

    for place in ("branch", "constant", "initializer", "function", "training", "sparse"):
        assert f"'in_{place}'" in fault
    assert not has_ep_context


def test_tag_whose_upper_bits_another_library_drops_hides_nothing() -> None:
    model = helper.make_model(helper.make_graph([], "g", [], [], [external_tensor("../secret")]))
    data = model.SerializeToString()
    tag = bytes([7 << 3 | 2])
    place = data.index(tag)
    hidden = data[:place] + bytes([tag[0] | 0x80, 0x80, 0x80, 0x80, 0x10]) + data[place + 1 :]

    assert "'../secret'" in graph_faults(data, "weights.data")[0]
    assert "tag at byte" in graph_faults(hidden, "weights.data")[0]


def test_names_that_hold_the_words_that_are_searched_for_are_no_external_data() -> None:
    node = helper.make_node("Identity", ["location"], ["EPContext"], name="location")
    model = helper.make_model(helper.make_graph([node], "EPContext", [], []), producer_name="location")

    assert graph_faults(model.SerializeToString(), None) == ("", False)


def test_graph_that_is_cut_short_inside_what_is_looked_at_is_a_fault() -> None:
    model = helper.make_model(helper.make_graph([], "g", [], [], [external_tensor("weights.data")]))
    data = model.SerializeToString()

    assert graph_faults(data, "weights.data") == ("", False)
    places = data.index(b"location") + len(b"location"), data.index(b"weights.data") + len(b"weights.data")
    cut = [graph_faults(data[:size], "weights.data")[0] for size in range(*places)]
    assert all("no ONNX model" in fault for fault in cut)


def with_ep_context(bundle: Bundle) -> None:
    path = bundle.path / "onnx/a.head.onnx"
    node = helper.make_node("EPContext", ["x"], ["a"], domain="com.microsoft", ep_cache_context=b"blob")
    path.write_bytes(helper.make_model(helper.make_graph([node], "g", [], [])).SerializeToString())
    relist(bundle, "onnx/a.head.onnx")
    with edited(bundle) as document:
        for entry in targets_of(document, "device"):
            for engine in entry.pop("engines"):
                del document["files"][engine["path"]]
            del entry["failed"]
        document["pair_id"] = bundle.compute_pair_id()
    for path in (bundle.path / "tables", bundle.path / "engines"):
        shutil.rmtree(path)
    (bundle.path / "table.json").unlink()


def test_graph_that_holds_compiled_code_is_named_and_treated_as_an_engine(tmp_path: Path, bundle: Bundle) -> None:
    with_ep_context(bundle)
    result = verify_bundle(bundle.path)

    assert result.ok
    assert any("EPContext" in note and "onnx/a.head.onnx" in note for note in result.notes)

    pack_bundle(bundle, tmp_path / "x.dscb")
    with pytest.raises(BundleError, match=r"'onnx/a\.head\.onnx' is native code"):
        unpack_bundle(tmp_path / "x.dscb", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    unpack_bundle(tmp_path / "x.dscb", tmp_path / "out", trust=Trust(allow_unsigned=True))


def test_signature_is_verified_with_the_keys_that_are_given(tmp_path: Path, bundle: Bundle) -> None:
    pytest.importorskip("cryptography")
    ours, other = tmp_path / "ours.pem", tmp_path / "other.pem"
    public, foreign = generate_key(ours), generate_key(other)
    packed = tmp_path / "x.dscb"
    pack_bundle(bundle, packed, sign=[ours])

    by_us = verify_bundle(packed, trust=Trust(keys=(public,), require=True))
    by_nobody = verify_bundle(packed)
    by_other = verify_bundle(packed, trust=Trust(keys=(foreign,)))

    assert by_us.ok
    assert len(by_us.signed_by) == 1
    assert by_nobody.ok
    assert any("--trust PUBLIC_KEY" in note for note in by_nobody.notes)
    assert faults(by_other).keys() == {"manifest.dsse.json"}


def test_missing_signature_is_a_fault_where_one_is_asked_for(bundle: Bundle) -> None:
    assert faults(verify_bundle(bundle.path, trust=Trust(require=True))).keys() == {"manifest.json"}


def test_damaged_packed_file_is_a_row_and_what_is_no_bundle_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "x.dscb").write_bytes(b"PK")

    assert "too short for a zip file" in faults(verify_bundle(tmp_path / "x.dscb"))["x.dscb"]
    with pytest.raises(UsageError, match="no bundle"):
        verify_bundle(tmp_path / "none.dscb")


def test_progress_counts_megabytes(bundle: Bundle) -> None:
    list_file(bundle, "samples/more.npz", bytes(3_500_000), "sample")
    seen: list[Progress] = []
    verify_bundle(bundle.path, progress=seen.append)

    assert [step.done for step in seen] == sorted({step.done for step in seen})
    assert (seen[-1].stage, seen[-1].unit, seen[-1].done, seen[-1].total) == ("verify", "MB", 3, 3)


def flips(sizes: dict[str, int], count: int) -> list[tuple[str, int, int]]:
    """Choose bits to flip: evenly over the files, at random in each."""
    random = Random(1)
    names = sorted(sizes)
    return [
        (name, random.randrange(sizes[name]), 1 << random.randrange(8))
        for name in (names[i % len(names)] for i in range(count))
    ]


def flip(path: Path, place: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ bit]))


@pytest.mark.slow
def test_a_thousand_flipped_bits_in_a_sealed_folder_are_all_found_and_none_is_read(sealed: Bundle) -> None:
    sizes = {path.relative_to(sealed.path).as_posix(): path.stat().st_size for path in sealed.path.rglob("*.*")}
    sizes = {name: size for name, size in sizes.items() if (sealed.path / name).is_file()}
    assert sizes.keys() == {*sealed.manifest.files, "manifest.json"}
    for name, place, bit in flips(sizes, 1000):
        flip(sealed.path / name, place, bit)

        assert name in faults(verify_bundle(sealed.path)), (name, place, bit)
        if name != "manifest.json":
            with pytest.raises(BundleError, match="SHA-256"):
                sealed.read(name)

        flip(sealed.path / name, place, bit)
    assert verify_bundle(sealed.path).ok


@pytest.mark.slow
def test_a_thousand_flipped_bits_in_a_packed_bundle_are_all_found_and_none_is_read(
    tmp_path: Path, bundle: Bundle
) -> None:
    path = tmp_path / "x.dscb"
    pack_bundle(bundle, path)
    names = Bundle.open(path).manifest.files
    read = 0
    for _, place, bit in flips({"x.dscb": path.stat().st_size}, 1000):
        flip(path, place, bit)

        result = verify_bundle(path)
        assert not result.ok, (place, bit)
        for row in result.rows:
            if row.path in names:
                with pytest.raises(BundleError, match=r"SHA-256|checksum"):
                    Bundle.open(path).read(row.path)
                read += 1

        flip(path, place, bit)
    assert verify_bundle(path).ok
    assert read > 200


def test_canonical_manifest_is_the_one_that_is_written(bundle: Bundle) -> None:
    assert (bundle.path / "manifest.json").read_bytes() == encode_manifest(bundle.manifest)
