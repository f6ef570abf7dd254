"""Packed files: what is written, and every other zip file that is refused."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
from tests.support.full_bundles import make_zip

from dsc_split.bundles import _archive
from dsc_split.bundles._archive import Archive, Entry, name_faults, write_archive
from dsc_split.errors import BundleError, DscError

FILES = {"manifest.json": b"{}", "onnx/a.onnx": b"graph" * 50, "onnx/weights.data": bytes(400), "empty": b""}
GOOD = [{"name": name, "data": data} for name, data in sorted(FILES.items())]


def entry(name: str, data: bytes) -> Entry:
    digest = hashlib.sha256(data).hexdigest()
    return Entry(name=name, size_bytes=len(data), sha256=digest, open=partial(io.BytesIO, data))


def write(path: Path, files: dict[str, bytes]) -> bytes:
    write_archive(path, [entry(name, data) for name, data in files.items()], tell=lambda name, count: None)
    return path.read_bytes()


def refused(path: Path, data: bytes, match: str) -> None:
    path.write_bytes(data)
    with pytest.raises(BundleError, match=match):
        Archive(path)


def test_packed_file_is_a_stored_zip_without_dates_that_any_program_reads(tmp_path: Path) -> None:
    write(tmp_path / "x.dscb", {**FILES, "onnx/ü.onnx": b"umlaut"})

    with zipfile.ZipFile(tmp_path / "x.dscb") as archive:
        assert archive.testzip() is None
        assert archive.namelist() == sorted([*FILES, "onnx/ü.onnx"])
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert archive.read("onnx/a.onnx") == FILES["onnx/a.onnx"]


def test_packed_file_depends_on_names_and_contents_alone(tmp_path: Path) -> None:
    one = write(tmp_path / "one.dscb", FILES)
    other = write(tmp_path / "other.dscb", dict(reversed(FILES.items())))

    assert one == other == make_zip(GOOD)


def test_archive_lists_opens_and_reads_what_was_packed(tmp_path: Path) -> None:
    write(tmp_path / "x.dscb", FILES)
    archive = Archive(tmp_path / "x.dscb")

    assert archive.names() == tuple(sorted(FILES))
    assert {name: archive.read(name) for name in archive.names()} == FILES
    assert {name: archive.size_bytes(name) for name in FILES} == {name: len(data) for name, data in FILES.items()}
    assert archive.size_bytes("onnx") is None
    with archive.open("onnx/a.onnx") as file:
        assert file.seek(-5, os.SEEK_END) == 245
        assert file.read() == b"graph"
        assert file.seek(10_000) == 10_000
        assert file.read() == b""
    with pytest.raises(BundleError, match="holds no 'nothing'"):
        archive.open("nothing")
    with pytest.raises(BundleError, match="more than 249 bytes"):
        archive.read("onnx/a.onnx", max_bytes=249)


def test_archive_stays_the_file_that_was_opened(tmp_path: Path) -> None:
    write(tmp_path / "x.dscb", FILES)
    archive = Archive(tmp_path / "x.dscb")
    write(tmp_path / "x.dscb", {"manifest.json": b"[]"})

    assert archive.read("manifest.json") == b"{}"


def test_empty_archive_can_be_read(tmp_path: Path) -> None:
    write(tmp_path / "x.dscb", {})

    assert Archive(tmp_path / "x.dscb").names() == ()


@pytest.mark.parametrize("limit", ["_LARGEST_32", "_LARGEST_16"])
def test_large_files_and_places_and_many_files_are_written_with_zip64(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(_archive, limit, 2 if limit == "_LARGEST_16" else 200)
    write(tmp_path / "x.dscb", FILES)

    with zipfile.ZipFile(tmp_path / "x.dscb") as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == FILES
    ours = Archive(tmp_path / "x.dscb")
    assert {name: ours.read(name) for name in ours.names()} == FILES
    monkeypatch.undo()
    with pytest.raises(BundleError):  # zip64 where nothing needs it is another file than we would write
        Archive(tmp_path / "x.dscb")


def read_everything(archive: Archive) -> None:
    for name in archive.names():
        archive.read(name)


HOSTILE: dict[str, tuple[list[dict[str, Any]], str]] = {
    "goes up": ([{"name": "../x", "data": b""}], r"'\.\./x' is no plain path"),
    "goes up inside": ([{"name": "a/../../x", "data": b""}], "is no plain path"),
    "absolute": ([{"name": "/etc/x", "data": b""}], "'/etc/x' is no plain path"),
    "backslash": ([{"name": "a\\..\\x", "data": b""}], "is no plain path"),
    "drive": ([{"name": "C:x", "data": b""}], "'C:x' is no plain path"),
    "no name": ([{"name": "", "data": b""}], "is no plain path"),
    "dot": ([{"name": "./x", "data": b""}], "is no plain path"),
    "two slashes": ([{"name": "a//x", "data": b""}], "is no plain path"),
    "NUL": ([{"name": "a\0x", "data": b""}], "is no plain path"),
    "hidden": ([{"name": ".lock", "data": b""}], "is no plain path"),
    "unfinished": ([{"name": "x.partial/y", "data": b""}], "is no plain path"),
    "long name": ([{"name": "x" * 401, "data": b""}], "is no plain path"),
    "link": ([{"name": "x", "data": b"/etc", "attributes": 0o120777 << 16}], "'x' is a link"),
    "device": ([{"name": "x", "data": b"", "attributes": 0o020666 << 16}], "'x' is a device or a pipe"),
    "pipe": ([{"name": "x", "data": b"", "attributes": 0o010666 << 16}], "'x' is a device or a pipe"),
    "folder": ([{"name": "x/", "data": b""}], "'x/' is a folder"),
    "folder by mode": ([{"name": "x", "data": b"", "attributes": 0o040755 << 16}], "'x' is a folder"),
    "program": ([{"name": "x", "data": b"", "attributes": 0o100755 << 16}], "has fields that a packed bundle has not"),
    "twice": ([{"name": "x", "data": b"1"}, {"name": "x", "data": b"2"}], "'x' stands there twice"),
    "case": ([{"name": "X", "data": b"1"}, {"name": "x", "data": b"2"}], "differs from 'X' in nothing but case"),
    "accents": ([{"name": "e\u0301", "data": b"1"}, {"name": "\xe9", "data": b"2"}], "in nothing but case"),
    "file as folder": ([{"name": "a", "data": b"1"}, {"name": "a/b", "data": b"2"}], "lies in 'a', which is a file"),
    "unsorted": ([{"name": "b", "data": b"1"}, {"name": "a", "data": b"2"}], "out of order"),
    "compressed": ([{"name": "x", "data": b"1", "method": 8}], r"'x' is compressed \(method 8\)"),
    "bomb": ([{"name": "x", "data": b"1", "method": 8, "size": 2**31, "packed": 1}], "is compressed"),
    "encrypted": ([{"name": "x", "data": b"1", "flags": 1}], "'x' is encrypted"),
    "descriptor": ([{"name": "x", "data": b"1", "flags": 8}], "has its size behind the data"),
    "flag": ([{"name": "x", "data": b"1", "flags": 0x800}], "has fields that a packed bundle has not"),
    "lies, larger": ([{"name": "x", "data": b"1", "size": 2**31}], "lies about its size"),
    "lies, smaller": ([{"name": "x", "data": b"12", "size": 1}], "bytes that belong to no file"),
    "lies, unlike": ([{"name": "x", "data": b"12", "packed": 2, "size": 2**31}], "lies about its size"),
    "lies, 64 bits": ([{"name": "x", "data": b"1", "size": 2**32 - 1}], "has fields|lies"),
    "dated": ([{"name": "x", "data": b"1", "date": 0x5A21}], "has fields that a packed bundle has not"),
    "extra field": ([{"name": "x", "data": b"1", "extra": b"UT\1\0x"}], "has fields that a packed bundle has not"),
    "overlap": ([{"name": "x", "data": b"1"}, {"name": "y", "data": b"2", "offset": 0}], "'y' does not begin where"),
    "gap": ([{"name": "x", "data": b"1", "offset": 1}], "'x' does not begin where"),
    "two names": ([{"name": "x", "data": b"1", "local_name": "y"}], "the header of 'x' is another one"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archive_is_refused_by_name_before_any_data_is_read(tmp_path: Path, case: str) -> None:
    entries, match = HOSTILE[case]

    refused(tmp_path / "x.dscb", make_zip(entries), match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"before": b"#!/bin/sh\n"}, "does not begin where|added"),
        ({"after": b"between"}, "belong to no file"),
        ({"comment": b"hello"}, "something was added"),
    ],
)
def test_bytes_that_belong_to_no_file_are_refused(tmp_path: Path, change: dict[str, bytes], match: str) -> None:
    refused(tmp_path / "x.dscb", make_zip(GOOD, **change), match)


def test_bytes_behind_the_end_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "x.dscb", make_zip(GOOD) + b"\0", "something was added")
    refused(tmp_path / "x.dscb", make_zip(GOOD) + make_zip(GOOD), "does not")


def test_more_entries_than_are_read_are_refused_before_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_archive, "MAX_ENTRIES", 3)

    refused(tmp_path / "x.dscb", make_zip(GOOD), "lists 4 files")
    with pytest.raises(BundleError, match="4 files: at most 3"):
        write(tmp_path / "y.dscb", FILES)


def test_archive_cut_short_at_any_of_a_thousand_places_is_refused(tmp_path: Path) -> None:
    data = make_zip(GOOD)

    for size in Random(1).sample(range(len(data)), 1000):
        refused(tmp_path / "x.dscb", data[:size], "packed bundle")


def test_every_changed_byte_outside_the_data_is_refused_and_inside_is_found_by_its_checksum(tmp_path: Path) -> None:
    data = make_zip(GOOD)
    path = tmp_path / "x.dscb"
    in_data = 0
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        try:
            archive = Archive(path)
        except BundleError:
            continue
        in_data += 1
        with pytest.raises(BundleError, match="checksum"):
            read_everything(archive)

    assert in_data == sum(map(len, FILES.values()))


def test_archive_damaged_in_any_other_way_is_refused_or_read_as_it_is(tmp_path: Path) -> None:
    random, path = Random(1), tmp_path / "x.dscb"
    good = make_zip([{"name": "a", "data": b"x" * 40}, {"name": "b/c", "data": b"y"}, {"name": "é", "data": b""}])
    refusals = 0
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(random.randint(1, 3)):
            place = random.randrange(len(data))
            damage = random.choice((b"", b"\0", b"\xff", b"\xff\xff\xff\xff", random.randbytes(3)))
            data[place : place + random.randint(0, 8)] = damage
        path.write_bytes(data)
        try:
            names = Archive(path).names()
        except BundleError:
            refusals += 1
        else:
            assert names == ("a", "b/c", "é")

    assert 2000 < refusals < 3000


def test_name_that_no_folder_can_hold_is_not_packed(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"cannot pack '\.\./x'"):
        write(tmp_path / "x.dscb", {"../x": b""})

    assert list(tmp_path.iterdir()) == []


def test_names_that_end_in_dots_and_blanks_are_no_names_on_every_system() -> None:
    assert dict(name_faults(["a.", "b ", "c"])).keys() == {"a.", "b "}


def test_file_that_is_another_than_its_entry_says_is_not_packed(tmp_path: Path) -> None:
    path = tmp_path / "x.dscb"
    before = write(path, FILES)
    changed = Entry(name="x", size_bytes=1, sha256=hashlib.sha256(b"1").hexdigest(), open=partial(io.BytesIO, b"2"))

    with pytest.raises(BundleError, match="'x' has 1 bytes and SHA-256 d4735e"):
        write_archive(path, [changed], tell=lambda name, count: None)

    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["x.dscb"]


def test_file_in_a_folder_that_is_not_there_is_not_packed(tmp_path: Path) -> None:
    with pytest.raises(DscError, match="cannot write"):
        write(tmp_path / "none" / "x.dscb", FILES)


def test_file_larger_than_all_buffers_is_copied_whole(tmp_path: Path) -> None:
    data = Random(1).randbytes(9 * 2**20 + 1)
    write(tmp_path / "x.dscb", {"x": data})

    assert Archive(tmp_path / "x.dscb").read("x") == data
