from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.support.engine_header import HEADER

from dsc_split._support.sizes import parse_size
from dsc_split.engines._cache import EngineCache, cache_folder
from dsc_split.engines._engine_file import read_plan, write_plan
from dsc_split.engines._fingerprint import fingerprint_digest
from dsc_split.errors import DscError, UsageError


def engine(folder: Path, content: bytes = b"plan", name: str = "model.plan") -> Path:
    path = folder / name
    write_plan(path, HEADER, content)
    return path


def key(number: int = 0) -> dict[str, Any]:
    return {"graph": f"{number:064}", "options": {"batches": [1, 2]}, "profile": (1, 2, 4)}


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "cache", 10**9)


def use(cache: EngineCache, number: int, second: int) -> None:
    """Say that an entry was used at a time."""
    os.utime(cache._record_path(fingerprint_digest(key(number))), (second, second))


def test_engine_that_was_put_in_is_found(cache: EngineCache, tmp_path: Path) -> None:
    path = engine(tmp_path)
    assert cache.get(key()) is None

    cache.put(key(), path)
    found = cache.get(key())

    assert found is not None
    assert found.read_bytes() == path.read_bytes()
    assert found.stat().st_ino != path.stat().st_ino
    assert cache.get(key(1)) is None
    assert [(entry.label, entry.target, entry.library_version, entry.size_bytes) for entry in cache.entries()] == [
        (HEADER.label, "tensorrt-rtx:sm75", "1.7.1.116", path.stat().st_size)
    ]


def test_editing_the_engine_afterwards_does_not_reach_the_cache(cache: EngineCache, tmp_path: Path) -> None:
    path = engine(tmp_path)
    cache.put(key(), path)
    with path.open("r+b") as file:
        file.write(b"something else")

    found = cache.get(key())

    assert found is not None
    assert bytes(read_plan(found).plan) == b"plan"


def test_newer_engine_for_the_same_key_replaces_the_old_one(cache: EngineCache, tmp_path: Path) -> None:
    cache.put(key(), engine(tmp_path))
    cache.put(key(), engine(tmp_path, b"another build of the same"))

    found = cache.get(key())

    assert found is not None
    assert bytes(read_plan(found).plan) == b"another build of the same"
    assert len(cache.entries()) == 1


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "empty record", "other key", "wrong form"])
def test_damaged_entry_is_removed_and_counts_as_none(
    cache: EngineCache, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    cache.put(key(), engine(tmp_path))
    digest = cache.entries()[0].digest
    plan, record = cache._plan_path(digest), cache._record_path(digest)
    data, document = plan.read_bytes(), json.loads(record.read_text())
    if damage == "flip":
        plan.write_bytes(data[:-1] + b"?")
    elif damage == "cut":
        plan.write_bytes(data[:-1])
    elif damage == "remove":
        plan.unlink()
    elif damage == "empty record":
        record.write_bytes(b"")
    elif damage == "other key":
        record.write_text(json.dumps({**document, "key": key(1)}))
    else:
        record.write_text(json.dumps({**document, "size_bytes": "1"}))

    assert cache.get(key()) is None

    assert "damaged entry" in caplog.text
    assert cache.entries() == ()
    assert not plan.exists()
    assert not record.exists()


def test_least_recently_used_engines_go_when_the_limit_is_passed(tmp_path: Path) -> None:
    path = engine(tmp_path)
    cache = EngineCache(tmp_path / "cache", 3 * path.stat().st_size)
    for number in range(3):
        cache.put(key(number), path)
        use(cache, number, number)
    assert cache.get(key(0)) is not None

    cache.put(key(3), path)

    assert [cache.get(key(number)) is not None for number in range(4)] == [True, False, True, True]


def test_engine_larger_than_the_limit_drives_nothing_out(tmp_path: Path) -> None:
    small = engine(tmp_path)
    cache = EngineCache(tmp_path / "cache", small.stat().st_size)
    cache.put(key(0), small)

    cache.put(key(1), engine(tmp_path, b"larger than the other"))

    assert cache.get(key(0)) is not None
    assert cache.get(key(1)) is None


def test_clear_says_what_it_freed(cache: EngineCache, tmp_path: Path) -> None:
    assert cache.clear() == 0
    path = engine(tmp_path)
    for number in range(2):
        cache.put(key(number), path)
    (cache.folder / f".{'a' * 64}.plan.x1.partial").write_bytes(b"12345")
    (cache.folder / f"{'b' * 64}.plan").write_bytes(b"half")

    assert cache.clear() >= 2 * path.stat().st_size + 9

    assert cache.entries() == ()
    assert [item.name for item in cache.folder.iterdir() if item.name != ".lock"] == []


def test_what_others_put_into_the_folder_is_left_alone(cache: EngineCache, tmp_path: Path) -> None:
    cache.put(key(), engine(tmp_path))
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    (cache.folder / "notes.json").write_text("{}")
    (cache.folder / f"{'a' * 64}.json").symlink_to(outside)
    (cache.folder / f"{'b' * 64}.plan").symlink_to(tmp_path / "nowhere")
    (cache.folder / f"{'c' * 64}.json").mkdir()

    assert len(cache.entries()) == 1
    cache.put(key(1), engine(tmp_path))
    cache.clear()

    assert outside.read_bytes() == b"precious"
    names = {item.name for item in cache.folder.iterdir()}
    assert names - {".lock"} == {"notes.json", f"{'a' * 64}.json", f"{'b' * 64}.plan", f"{'c' * 64}.json"}


def test_halves_that_a_killed_process_left_go_with_the_next_engine(cache: EngineCache, tmp_path: Path) -> None:
    cache.put(key(), engine(tmp_path))
    half = cache.folder / f"{'b' * 64}.plan"
    half.write_bytes(b"half")

    cache.put(key(1), engine(tmp_path))

    assert not half.exists()
    assert len(cache.entries()) == 2


# ---- a cache that cannot be used never fails a build -------------------------------------------------------


def test_full_disk_is_a_warning(
    cache: EngineCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = engine(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dsc_split._support.files.os.fsync", full)
    cache.put(key(), path)

    assert "No space left on device" in caplog.text
    assert cache.get(key()) is None
    assert [item.name for item in cache.folder.iterdir() if item.name != ".lock"] == []


def test_folder_that_is_a_file_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_bytes(b"")
    cache = EngineCache(tmp_path / "cache", 10**9)

    cache.put(key(), engine(tmp_path))

    assert cache.get(key()) is None
    assert cache.entries() == ()
    assert cache.clear() == 0
    assert "cannot be written" in caplog.text


def test_folder_that_cannot_be_locked_is_a_warning_for_builds_and_an_error_for_clear(
    cache: EngineCache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.put(key(), engine(tmp_path))
    (cache.folder / ".lock").unlink(missing_ok=True)
    (cache.folder / ".lock").mkdir()

    assert cache.get(key()) is None
    cache.put(key(1), engine(tmp_path))

    assert "cannot be read" in caplog.text
    assert "cannot be written" in caplog.text
    with pytest.raises(DscError, match="cannot be emptied"):
        cache.clear()


def test_garbage_is_not_put_in(cache: EngineCache, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "model.plan").write_bytes(b"garbage")

    cache.put(key(), tmp_path / "model.plan")

    assert "damaged" in caplog.text
    assert cache.entries() == ()


WORKER = """
import sys
from pathlib import Path
from dsc_split.engines._cache import EngineCache
cache = EngineCache(Path(sys.argv[1]), int(sys.argv[3]))
for turn in range(30):
    key = {"number": turn % 3}
    cache.put(key, Path(sys.argv[2]))
    found = cache.get(key)
    if turn % 10 == 9:
        cache.clear()
"""


@pytest.mark.parametrize("room", [1, 3])
def test_two_processes_do_not_disturb_each_other(tmp_path: Path, room: int) -> None:
    workers = []
    for number in range(2):
        path = engine(tmp_path, bytes([number]) * 100_000, f"{number}.plan")
        arguments = [str(tmp_path / "cache"), str(path), str(room * path.stat().st_size)]
        workers.append(subprocess.Popen([sys.executable, "-c", WORKER, *arguments], stderr=subprocess.PIPE, text=True))

    said = [worker.communicate(timeout=120)[1] for worker in workers]

    assert [(worker.returncode, text) for worker, text in zip(workers, said, strict=True)] == [(0, ""), (0, "")]


# ---- folder and limit --------------------------------------------------------------------------------------


def test_folder_and_limit_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSC_SPLIT_CACHE", str(tmp_path / "here"))
    monkeypatch.setenv("DSC_SPLIT_CACHE_LIMIT", "2GiB")

    cache = EngineCache()

    assert cache.folder == tmp_path / "here" / "engines"
    assert cache.limit_bytes == 2 * 2**30


def test_without_variables_the_users_cache_folder_and_10_gib_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSC_SPLIT_CACHE", raising=False)
    monkeypatch.delenv("DSC_SPLIT_CACHE_LIMIT", raising=False)

    assert cache_folder().name == "dsc-split"
    assert EngineCache().limit_bytes == 10 * 2**30


def test_limit_that_is_no_size_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSC_SPLIT_CACHE_LIMIT", "much")

    with pytest.raises(UsageError, match=r"\$DSC_SPLIT_CACHE_LIMIT: 'much' is no size"):
        EngineCache()


@pytest.mark.parametrize(
    ("text", "expected"), [("1", 1), ("8GiB", 8 * 2**30), (" 1.5 kb ", 1500), ("500 MB", 5 * 10**8)]
)
def test_sizes_are_read(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "0", "-1", "8 Gibs", "9999999TiB", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


def test_used_times_order_the_entries(cache: EngineCache, tmp_path: Path) -> None:
    for number, second in ((0, 20), (1, 30), (2, 10)):
        cache.put(key(number), engine(tmp_path))
        use(cache, number, second)

    assert [entry.used_s for entry in cache.entries()] == [30, 20, 10]
