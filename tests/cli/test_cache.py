"""``dsc-split cache``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.engine_header import HEADER

from dsc_split.engines._cache import EngineCache
from dsc_split.engines._engine_file import write_plan

Dsc = Callable[..., Any]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineCache:
    monkeypatch.setenv("DSC_SPLIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DSC_SPLIT_CACHE_LIMIT", "20GB")
    cache = EngineCache()
    write_plan(tmp_path / "head.plan", HEADER, b"plan" * 1000)
    cache.put({"graph": "a"}, tmp_path / "head.plan")
    return cache


def test_table_shows_what_is_kept_of_each_model_and_the_limit(dsc: Dsc, cache: EngineCache) -> None:
    outcome = dsc("cache")

    assert outcome.exit_code == 0
    for words in ("tiny", "tensorrt-rtx:sm75", "1.7.1.116"):
        assert words in outcome.stdout
    assert f"{cache.folder}: 1 engines, 0.0 MB of at most 20.0 GB" in outcome.stderr


def test_json_is_one_document(dsc: Dsc, cache: EngineCache) -> None:
    document = json.loads(dsc("cache", "--json").stdout)

    (entry,) = cache.entries()
    assert document == {
        "folder": str(cache.folder),
        "limit_bytes": 20 * 10**9,
        "size_bytes": entry.size_bytes,
        "freed_bytes": 0,
        "entries": [entry.to_json()],
    }


def test_clear_empties_it_and_says_how_much(dsc: Dsc, cache: EngineCache) -> None:
    outcome = dsc("cache", "--clear")

    assert outcome.exit_code == 0
    assert outcome.stdout == ""
    assert f"{cache.folder}: 0.0 MB freed" in outcome.stderr
    assert cache.entries() == ()
    assert json.loads(dsc("cache", "--clear", "--json").stdout)["freed_bytes"] == 0


def test_limit_that_is_no_size_is_wrong_usage(dsc: Dsc, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSC_SPLIT_CACHE_LIMIT", "much")

    outcome = dsc("cache")

    assert outcome.exit_code == 2
    assert "$DSC_SPLIT_CACHE_LIMIT" in outcome.stderr
