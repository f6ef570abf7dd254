from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.manifests import MANIFEST, OPTIONS, SPLIT, TENSOR

from dsc_split._support.files import write_bytes
from dsc_split._support.records import read_record, to_document
from dsc_split.bundle import VERSION, Bundle, Manifest
from dsc_split.bundles._manifest import ENVELOPE, encode_document, encode_manifest
from dsc_split.bundles._storage import is_plain_name
from dsc_split.engines._options import GEMM_POLICIES
from dsc_split.errors import BundleError, DscError, UsageError

Place = tuple[str | int, ...]


def open_with(folder: Path, manifest: dict[str, Any]) -> Bundle:
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Bundle.open(folder)


def changed(place: Place, value: Any) -> dict[str, Any]:
    manifest = copy.deepcopy(MANIFEST)
    inner: Any = manifest
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return manifest


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    """Every place in the manifest at which something stands."""
    if place:
        yield place
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield from places(item, (*place, key))


def test_manifest_with_every_key_opens(tmp_path: Path) -> None:
    bundle = open_with(tmp_path, MANIFEST)

    assert [split.passthrough for split in bundle.splits] == [("x",)]
    assert bundle.fixed_batch == bundle.max_batch == 4


@pytest.mark.parametrize("place", list(places(MANIFEST)), ids=str)
def test_value_of_another_type_is_a_damaged_bundle_wherever_it_stands(tmp_path: Path, place: Place) -> None:
    any_object_will_do = place[-1] == "fingerprint" or place in (("failed_splits", 0), ("samples",))
    wrong: list[Any] = [-1.5, [[]]] if any_object_will_do else [-1.5, [[]], {"": None}]
    for value in wrong:
        with pytest.raises(BundleError, match=r"manifest\.json'"):
            open_with(tmp_path, changed(place, value))


@pytest.mark.parametrize("key", [key for key in MANIFEST if key not in ("notes", "samples")])
def test_missing_key_is_a_damaged_bundle(tmp_path: Path, key: str) -> None:
    with pytest.raises(BundleError, match=key):
        open_with(tmp_path, {name: value for name, value in MANIFEST.items() if name != key})


def test_missing_key_of_a_tensor_is_named_with_its_place(tmp_path: Path) -> None:
    tensor = {name: value for name, value in TENSOR.items() if name != "itemsize"}

    with pytest.raises(BundleError, match=r"inputs\[0\]\.itemsize: the key is missing\. Export it again"):
        open_with(tmp_path, changed(("inputs", 0), tensor))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("inputs", 0, "itemsize"), 10**30),
        (("inputs", 0, "itemsize"), True),
        (("inputs", 0, "elements_by_batch"), [1]),
        (("inputs", 0, "shape", 0), ""),
        (("batch", "max"), 0),
        (("precision",), "fp64"),
        (("model", "opset", ""), "x"),
        (("samples", "batch"), 0),
        (("targets", "device", 0, "options"), {**OPTIONS, "gemm": "evil"}),
        (("targets", "device", 0, "options"), {**OPTIONS, "batches": [1.5]}),
    ],
)
def test_value_out_of_range_is_a_damaged_bundle(tmp_path: Path, place: Place, value: Any) -> None:
    with pytest.raises(BundleError, match="expected"):
        open_with(tmp_path, changed(place, value))


@pytest.mark.parametrize("policy", GEMM_POLICIES)
def test_every_policy_and_unknown_options_of_a_build_open(tmp_path: Path, policy: str) -> None:
    options = {**OPTIONS, "gemm": policy, "since_then": 1}

    open_with(tmp_path, changed(("targets", "device", 0, "options"), options))


def test_splits_share_neither_name_nor_graph(tmp_path: Path) -> None:
    other = {**SPLIT, "name": "A", "head": "onnx/b.head.onnx", "tail": "onnx/b.tail.onnx"}

    with pytest.raises(BundleError, match=r"splits\[1\]\.name: got 'A'"):
        open_with(tmp_path, changed(("splits",), [SPLIT, other]))
    with pytest.raises(BundleError, match=r"splits\[1\]\.tail"):
        open_with(tmp_path, changed(("splits",), [SPLIT, {**other, "name": "b", "tail": SPLIT["tail"]}]))


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "linked/x", "link", "a\0b", "\ud800"])
def test_path_that_is_no_plain_file_inside_the_bundle_is_refused(tmp_path: Path, path: str) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (tmp_path / "x").touch()
    (folder / "linked").symlink_to(tmp_path)
    (folder / "link").symlink_to(tmp_path / "x")

    with pytest.raises(BundleError, match="not a plain file inside the bundle"):
        open_with(folder, MANIFEST).file(path)


def test_bundle_that_cannot_be_written_is_not_called_damaged(tmp_path: Path) -> None:
    bundle = open_with(tmp_path, MANIFEST)
    (tmp_path / ".lock").mkdir()

    with pytest.raises(DscError, match="cannot be locked for writing") as caught, bundle.lock():
        pass

    assert caught.value.exit_code == 1


def test_bundle_may_itself_be_reached_through_a_link(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    open_with(folder, MANIFEST)
    (tmp_path / "link").symlink_to(folder)

    path = Bundle.open(tmp_path / "link").file("onnx/model.onnx")

    assert path == tmp_path / "link" / "onnx/model.onnx"


def test_nothing_is_written_in_the_place_of_links_pipes_and_folders(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")

    for name in ("link", "folder", "pipe"):
        with pytest.raises(DscError, match=r"it is there, and no regular file\. Nothing was changed"):
            write_bytes(tmp_path / name, b"new")

    assert (tmp_path / "real").read_bytes() == b"old"
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "pipe").is_fifo()
    assert len(list(tmp_path.iterdir())) == 4


# ---- versions and digests ----------------------------------------------------------------------------------


def version_1() -> dict[str, Any]:
    new = ("revision", "sealed", "side", "left_out")
    return {**{key: value for key, value in MANIFEST.items() if key not in new}, "version": 1}


def test_manifest_of_version_1_is_brought_to_the_newest_and_written_so(tmp_path: Path) -> None:
    bundle = open_with(tmp_path, version_1())

    assert (bundle.manifest.version, bundle.manifest.revision, bundle.manifest.sealed) == (VERSION, 0, False)
    before = time.time()
    bundle.touch()
    again = Bundle.open(tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text())["version"] == VERSION
    assert again.manifest == bundle.manifest
    assert again.manifest.revision >= int(before)


def test_revision_grows_with_every_change_though_the_clock_stands_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    bundle = open_with(tmp_path, MANIFEST)

    found = []
    for _ in range(3):
        bundle.touch()
        found.append(bundle.manifest.revision)

    assert found == [1000, 1001, 1002]


def test_what_was_sent_is_remembered_when_it_is_changed(tmp_path: Path) -> None:
    bundle = open_with(tmp_path, {**MANIFEST, "sealed": True, "side": "device"})

    bundle.touch()
    bundle.touch()

    manifest = Bundle.open(tmp_path).manifest
    assert manifest.released == MANIFEST["revision"] < manifest.revision


def test_manifest_is_written_in_one_form_whatever_the_order_of_its_keys() -> None:
    turned = dict(reversed(list(MANIFEST.items())))

    assert encode_document(turned) == encode_document(MANIFEST)
    assert encode_manifest(read_record(turned, Manifest)) == encode_manifest(read_record(MANIFEST, Manifest))


def test_manifest_that_is_not_changed_is_not_written(tmp_path: Path) -> None:
    bundle = open_with(tmp_path, MANIFEST)
    before = (tmp_path / "manifest.json").read_bytes()

    with bundle.edit() as draft:
        draft.change(notes=bundle.manifest.notes)

    assert (tmp_path / "manifest.json").read_bytes() == before


def test_changes_of_a_block_that_fails_are_not_kept(tmp_path: Path) -> None:
    bundle = open_with(tmp_path, MANIFEST)
    before = (tmp_path / "manifest.json").read_bytes()

    with pytest.raises(TypeError), bundle.edit() as draft:
        draft.change(notes=("another",), no_field_of_a_manifest=1)

    assert bundle.manifest.notes == ("a note",)
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_nested_blocks_change_one_draft_and_the_outer_one_writes_it(tmp_path: Path) -> None:
    bundle = open_with(tmp_path, MANIFEST)
    before = (tmp_path / "manifest.json").read_bytes()

    with bundle.edit() as draft:
        draft.change(notes=("outer",))
        with bundle.edit() as inner:
            inner.change(full_offload=False)
        assert (tmp_path / "manifest.json").read_bytes() == before

    manifest = Bundle.open(tmp_path).manifest
    assert (manifest.notes, manifest.full_offload) == (("outer",), False)


def test_value_that_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    bundle = open_with(tmp_path, MANIFEST)
    before = (tmp_path / "manifest.json").read_bytes()

    for wrong in (5, (float("nan"),)):
        with pytest.raises(UsageError, match=r"notes.*got"), bundle.edit() as draft:
            draft.change(notes=wrong)

    assert (tmp_path / "manifest.json").read_bytes() == before
    assert bundle.manifest.notes == ("a note",)


def test_a_change_within_a_block_that_holds_the_bundle_is_made_on_the_newest_manifest(tmp_path: Path) -> None:
    bundle, other = open_with(tmp_path, MANIFEST), Bundle.open(tmp_path)
    with other.edit() as draft:
        draft.change(notes=("by the other",))

    with bundle.lock():
        assert bundle.manifest.notes == ("by the other",)
        with bundle.edit() as draft:
            draft.set_targets("server", ())

    manifest = Bundle.open(tmp_path).manifest
    assert (manifest.notes, manifest.targets.server) == (("by the other",), ())
    assert len(manifest.targets.device) == 1


def test_any_byte_of_a_saved_manifest_that_is_changed_is_found(tmp_path: Path) -> None:
    open_with(tmp_path, MANIFEST).touch()
    data = (tmp_path / "manifest.json").read_bytes()
    values = random.Random(0)

    unseen = 0
    for _ in range(500):
        place = values.randrange(len(data))
        damaged = data[:place] + bytes([data[place] ^ (1 << values.randrange(8))]) + data[place + 1 :]
        (tmp_path / "manifest.json").write_bytes(damaged)
        try:
            bundle = Bundle.open(tmp_path)
        except BundleError:
            continue
        unseen += encode_manifest(bundle.manifest) == damaged
    assert unseen == 0


def test_unsealing_opens_a_sealed_bundle_and_removes_its_signatures(tmp_path: Path) -> None:
    cell = {"cells/a.json": {"sha256": 64 * "2", "size": 1, "role": "cell"}}
    sealed = {**MANIFEST, "sealed": True, "files": {**MANIFEST["files"], **cell}}
    bundle = open_with(tmp_path, sealed)
    (tmp_path / ENVELOPE).write_text("{}")

    bundle.unseal()

    manifest = Bundle.open(tmp_path).manifest
    assert not manifest.sealed
    assert to_document(manifest)["files"] == MANIFEST["files"]
    assert not (tmp_path / ENVELOPE).exists()


# ---- files -------------------------------------------------------------------------------------------------


def with_file(folder: Path, name: str, data: bytes) -> Bundle:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "role": "model"}
    return open_with(folder, {**MANIFEST, "files": {name: entry}})


def test_what_is_read_is_what_the_manifest_lists(tmp_path: Path) -> None:
    bundle = with_file(tmp_path, "onnx/model.onnx", b"graph")

    assert bundle.has("onnx/model.onnx")
    assert bundle.read("onnx/model.onnx") == b"graph"
    for damaged in (b"Graph", b"grap", b"graph!", b""):
        (tmp_path / "onnx/model.onnx").write_bytes(damaged)
        with pytest.raises(BundleError, match=r"onnx/model\.onnx"):
            bundle.read("onnx/model.onnx")


@pytest.mark.parametrize("kind", ["file", "folder", "pipe"])
def test_a_link_or_a_pipe_is_not_read_as_a_file(tmp_path: Path, kind: str) -> None:
    bundle = with_file(tmp_path / "bundle", "onnx/model.onnx", b"graph")
    path = tmp_path / "bundle/onnx/model.onnx"
    if kind == "folder":
        (tmp_path / "bundle/onnx").rename(tmp_path / "elsewhere")
        (tmp_path / "bundle/onnx").symlink_to(tmp_path / "elsewhere")
    elif kind == "file":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.unlink()
        os.mkfifo(path)

    assert not bundle.has("onnx/model.onnx")
    with pytest.raises(BundleError, match=r"onnx/model\.onnx"):
        bundle.read("onnx/model.onnx")


@pytest.mark.parametrize(
    "name", ["../a", "/a", "a/../b", "./a", "a//b", "a\\b", "c:/a", "a/", "", ".", "a\nb", "a" * 401, "a/./b"]
)
def test_a_path_that_is_not_plain_is_refused(name: str) -> None:
    assert not is_plain_name(name)


def test_plain_paths_are_taken() -> None:
    assert all(map(is_plain_name, ["manifest.json", "onnx/features.4.0.head.onnx", "engines/ä-1/a b.plan"]))
