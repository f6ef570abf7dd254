from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from tests.support.engine_header import DOCUMENT, HEADER

from dsc_split._support.records import to_document
from dsc_split._support.strict_json import canonical_json
from dsc_split.bundle import Bundle
from dsc_split.engines import EngineSource
from dsc_split.engines._engine_file import export_raw, read_header, read_plan, write_plan
from dsc_split.errors import DscError, EngineFileError

PLAN = bytes(range(256)) * 5


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "model.plan"
    write_plan(file, HEADER, PLAN)
    return file


def with_header(path: Path, header: bytes | dict[str, Any], *, length: int | None = None, version: int = 1) -> Path:
    """Write a file with a header of one's own."""
    data = header if isinstance(header, bytes) else canonical_json(header)
    path.write_bytes(struct.pack("<7sBI", b"DSCPLAN", version, len(data) if length is None else length) + data + PLAN)
    return path


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    header = to_document(HEADER)
    header |= {"plan_bytes": len(PLAN), "plan_sha256": hashlib.sha256(PLAN).hexdigest()}
    change(header)
    return dict(header)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.plan"

    sha256, size_bytes = write_plan(path, HEADER, memoryview(PLAN))
    file = read_plan(path, sha256=sha256)

    assert (sha256, size_bytes) == (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)
    assert file.plan == PLAN
    assert file.plan.readonly
    assert file.header == read_header(path)
    assert to_document(file.header) == changed(lambda header: None)
    document = json.loads(canonical_json(to_document(file.header)))
    assert {**document, **DOCUMENT} == document


def test_layout_is_magic_length_json_plan(path: Path) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<I", data[8:12])

    assert data[:8] == b"DSCPLAN\x01"
    assert data[12 : 12 + length] == canonical_json(to_document(read_header(path)))
    assert data[12 + length :] == PLAN


def test_files_that_were_written_before_are_read_and_would_be_written_the_same(root: Path) -> None:
    bundle = Bundle.open(root / "tests/data/written/manifest-2.dscb")
    plans = [name for name in bundle.manifest.files if name.endswith(".plan")]

    assert len(plans) == 3
    for name in plans:
        data = bundle.read(name)
        header = read_plan(EngineSource(name=name, data=data, sha256=bundle.listed(name).sha256)).header
        (length,) = struct.unpack("<I", data[8:12])
        assert canonical_json(to_document(header)) == data[12 : 12 + length]


def test_bare_plan_is_exported(path: Path, tmp_path: Path) -> None:
    export_raw(path, tmp_path / "bare.plan")

    assert (tmp_path / "bare.plan").read_bytes() == PLAN


def test_damaged_plan_is_not_exported(path: Path, tmp_path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"?")

    with pytest.raises(EngineFileError):
        export_raw(path, tmp_path / "bare.plan")
    assert not (tmp_path / "bare.plan").exists()


def test_every_flipped_byte_is_seen(path: Path) -> None:
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()

    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x20]) + data[place + 1 :])
        with pytest.raises(EngineFileError, match=r"model\.plan"):
            read_plan(path, sha256=digest)


def test_flipped_bytes_in_prefix_and_plan_are_seen_without_a_manifest(path: Path) -> None:
    data = path.read_bytes()

    for place in [*range(12), *range(len(data) - len(PLAN), len(data))]:
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(EngineFileError, match=r"Build it again|newer"):
            read_plan(path)


def test_file_that_was_cut_off_anywhere_is_refused(path: Path) -> None:
    data = path.read_bytes()

    for length in [*range(len(data) - len(PLAN)), len(data) - len(PLAN) + 1, len(data) - 1]:
        path.write_bytes(data[:length])
        for read in (read_header, read_plan):
            with pytest.raises(EngineFileError, match="Build it again"):
                read(path)


def test_file_with_something_behind_it_is_refused(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")

    with pytest.raises(EngineFileError, match=rf"{path.stat().st_size} bytes; {path.stat().st_size - 1} were expected"):
        read_plan(path)


def test_another_engine_than_the_manifest_lists_is_refused_with_both_digests(path: Path) -> None:
    with pytest.raises(EngineFileError, match=f"; {'f' * 64} was expected"):
        read_plan(path, sha256="f" * 64)


@given(st.binary(max_size=200))
def test_garbage_is_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("garbage") / "model.plan"
    for content in (data, b"DSCPLAN\x01" + data, b"DSCPLAN\x01" + struct.pack("<I", max(len(data) - 3, 0)) + data):
        path.write_bytes(content)
        with pytest.raises(EngineFileError):
            read_plan(path)
        with pytest.raises(EngineFileError):
            read_header(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(sorted(DOCUMENT)), JSON)
def test_any_value_of_a_key_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: object
) -> None:
    path = tmp_path_factory.mktemp("value") / "model.plan"
    with_header(path, canonical_json(changed(lambda header: header.update({key: value}))))
    try:
        header = read_plan(path).header
    except EngineFileError:
        return
    assert to_document(header)[key] == value or key in ("memory", "precision", "rewritten")  # unknown keys are ignored


@pytest.mark.parametrize("key", sorted([*DOCUMENT, "plan_bytes", "plan_sha256"]))
def test_missing_key_is_named(path: Path, key: str) -> None:
    with_header(path, changed(lambda header: header.pop(key)))

    with pytest.raises(EngineFileError, match=key):
        read_header(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda header: header.update(format="other"), "format: got 'other'"),
        (lambda header: header.update(version=True), "version: got True"),
        (lambda header: header.update(library="torch"), "library: got 'torch'"),
        (lambda header: header.update(graph_digest="0" * 63), "graph_digest"),
        (lambda header: header.update(plan_sha256="Z" * 64), "plan_sha256"),
        (lambda header: header.update(plan_bytes=-1), "plan_bytes: got -1"),
        (lambda header: header.update(inputs=[]), "inputs"),
        (lambda header: header.update(inputs=header["inputs"] * 2), "inputs: .* each name once"),
        (lambda header: header["inputs"][0].update(dtype="object"), r"inputs\[0\].dtype: got 'object'"),
        (lambda header: header["inputs"][0].update(shape=[-1]), r"shape\[0\]: got -1"),
        (lambda header: header["profile"].update(opt=65), "profile: .* ascending order"),
        (lambda header: header["profile"].update(min=0), "profile.min: got 0"),
        (lambda header: header["profile"]["shapes"]["input"].update(max=[64]), r"shapes\['input'\]: .* ascending"),
        (lambda header: header["profile"]["shapes"]["input"].update(max=[2**30] * 4), "a GPU can hold"),
        (lambda header: header["precision"].update(tf32="no"), "precision.tf32"),
        (lambda header: header["memory"].update(weights_bytes="much"), "weights_bytes"),
    ],
)
def test_wrong_value_is_named_with_its_place(
    path: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    with_header(path, changed(change))

    with pytest.raises(EngineFileError, match=words):
        read_header(path)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b'{"format": "a", "format": "b"}', "stands twice"),
        (b'{"format": NaN}', "NaN"),
        (b"[]", "list"),
        (b"{", "no valid JSON"),
        (b"\xff", "UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_hostile_json_is_refused(path: Path, header: bytes, words: str) -> None:
    with_header(path, header)

    with pytest.raises(EngineFileError, match=words):
        read_plan(path)


def test_unknown_keys_are_read_and_kept(path: Path) -> None:
    later = changed(lambda header: header.update(later={"a": 1}))
    with_header(path, later)

    assert to_document(read_plan(path).header) == later


def test_newer_versions_are_refused_by_name(path: Path) -> None:
    with_header(path, changed(lambda header: header.update(version=2)))
    with pytest.raises(EngineFileError, match="is of version 2; this dsc-split reads version 1"):
        read_plan(path)

    with_header(path, changed(lambda header: None), version=9)
    with pytest.raises(EngineFileError, match="is of version 9; this dsc-split reads version 1"):
        read_plan(path)


def test_huge_header_is_refused_before_it_is_read(path: Path) -> None:
    with_header(path, b"{}", length=2**32 - 1)

    with pytest.raises(EngineFileError, match="header has 4294967295 bytes; at most"):
        read_plan(path)


def test_bare_plan_of_the_library_is_refused(path: Path) -> None:
    path.write_bytes(b"vtrt" + PLAN)

    with pytest.raises(EngineFileError, match="begins with b'vtrt"):
        read_header(path)


@pytest.mark.parametrize("read", [read_header, read_plan])
def test_folder_and_missing_file_are_refused(tmp_path: Path, read: Callable[[Path], object]) -> None:
    for path in (tmp_path, tmp_path / "none.plan"):
        with pytest.raises(EngineFileError, match="cannot be read"):
            read(path)


def test_header_that_no_reader_takes_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(EngineFileError, match="library"):
        write_plan(tmp_path / "model.plan", replace(HEADER, library="torch"), PLAN)
    assert list(tmp_path.iterdir()) == []


def test_write_that_fails_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dsc_split._support.files.os.fsync", full)

    with pytest.raises(DscError, match="No space left"):
        write_plan(path, HEADER, b"new")
    assert path.read_bytes() == before
    assert [item.name for item in path.parent.iterdir()] == ["model.plan"]
