from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from dsc_split._support.hashing import sha256_text
from dsc_split._support.strict_json import canonical_json
from dsc_split.benchmarks import Cell, CellStore, Question
from dsc_split.benchmarks.cells._cells import CellEnvironment, CellSettings, Round, Statistics
from dsc_split.bundle import Bundle
from dsc_split.errors import DscError

QUESTION = Question(graph_digest="a" * 64, fingerprint="b" * 64, batch=8, period_ms=None)


def make_cell(question: Question = QUESTION, status: str = "ok") -> Cell:
    return Cell(
        question=question,
        graph="onnx/a.head.onnx",
        target="onnxruntime:cpu",
        run_fingerprint={"host": "käfer"},
        emulated=None,
        status=status,
        reason="precision reached",
        latency_ms=Statistics(n=1, median=0.1, p95=0.1, ci=(0.1, 0.1)),
        rounds=(Round(started="now", samples_ms=(0.1,), first_after_pause_ms=()),),
        settings=CellSettings(memory_limit_bytes=1),
        environment=CellEnvironment(),
    )


@pytest.fixture
def store(bundle: Bundle) -> CellStore:
    return CellStore(bundle)


def test_a_cell_comes_back_as_it_was_put(store: CellStore) -> None:
    assert store.get(QUESTION) is None
    assert list(store.all()) == []

    store.put(make_cell())

    assert store.get(QUESTION) == make_cell()
    assert list(store.all()) == [make_cell()]


def test_a_cell_replaces_an_older_answer(store: CellStore) -> None:
    store.put(make_cell(status="unstable"))
    store.put(make_cell(status="ok"))

    assert [cell.status for cell in store.all()] == ["ok"]


def test_a_cell_that_was_written_before_there_were_marks_is_read(store: CellStore) -> None:
    body = {key: entry for key, entry in make_cell().to_json().items() if key not in ("body_sha256", "compute_ms")}
    store.put(make_cell())
    store.path(QUESTION).write_text(json.dumps({**body, "body_sha256": sha256_text(canonical_json(body))}))

    (cell,) = store.all()

    assert (cell.compute_ms, cell.marks) == (None, ())


def test_a_cell_keeps_its_marks_and_its_compute_time(store: CellStore) -> None:
    marks = ("throttled: sw_power_cap",)
    compute_ms = Statistics(n=1, median=0.05, p95=0.05, ci=(0.05, 0.05))
    cell = dataclasses.replace(make_cell(), compute_ms=compute_ms, environment=CellEnvironment(marks=marks, engine={}))
    store.put(cell)

    assert list(store.all()) == [cell]
    assert cell.marks == marks


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(QUESTION, batch=9),
        dataclasses.replace(QUESTION, period_ms=33.0),
        dataclasses.replace(QUESTION, fingerprint="c" * 64),
        dataclasses.replace(QUESTION, graph_digest="c" * 64),
    ],
)
def test_another_question_has_another_key(other: Question) -> None:
    assert other.key != QUESTION.key


def test_a_whole_period_is_the_same_question_as_int_and_float() -> None:
    assert dataclasses.replace(QUESTION, period_ms=33).key == dataclasses.replace(QUESTION, period_ms=33.0).key


def _flip_a_digit(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"median":0.1', b'"median":0.2'))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _newer(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 2}))


@pytest.mark.parametrize("damage", [_flip_a_digit, _truncate, _empty, _newer])
def test_a_damaged_cell_is_warned_about_and_ignored(
    store: CellStore, caplog: pytest.LogCaptureFixture, damage: object
) -> None:
    store.put(make_cell())
    assert callable(damage)
    damage(store.path(QUESTION))

    with caplog.at_level(logging.WARNING):
        assert store.get(QUESTION) is None
        assert list(store.all()) == []

    assert "It is ignored" in caplog.text


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("latency_ms", "median"), "fast"),
        (("latency_ms", "ci"), [2.0, 1.0]),
        (("latency_ms", "p95"), 1e308),
        (("latency_ms",), None),
        (("rounds", 0, "samples_ms"), []),
        (("rounds", 0, "samples_ms", 0), -1.0),
        (("rounds", 0, "started"), None),
        (("rounds", 0, "compute_ms"), ["fast"]),
        (("rounds", 0, "device_state"), "hot"),
        (("compute_ms",), {"median": 1.0}),
        (("environment", "marks"), [1]),
        (("environment", "engine"), []),
        (("rounds",), []),
        (("question", "batch"), [8]),
        (("question", "protocol"), 1),
        (("settings",), {}),
        (("emulated",), True),
        (("status",), "fine"),
    ],
)
def test_a_cell_whose_digest_is_right_and_whose_values_are_not_is_ignored(
    store: CellStore, caplog: pytest.LogCaptureFixture, place: tuple[str | int, ...], value: Any
) -> None:
    body = json.loads(make_cell().encode())
    del body["body_sha256"]
    inner = body
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    store.put(make_cell())
    store.path(QUESTION).write_text(json.dumps({**body, "body_sha256": sha256_text(canonical_json(body))}))

    with caplog.at_level(logging.WARNING):
        assert list(store.all()) == []

    assert str(place[0]) in caplog.text
    assert "It is ignored" in caplog.text


def test_a_cell_under_another_name_is_ignored(store: CellStore) -> None:
    other = dataclasses.replace(QUESTION, batch=9)
    store.put(make_cell())
    store.path(QUESTION).rename(store.path(other))

    assert store.get(other) is None


def test_what_a_killed_writer_left_is_no_cell_and_is_removed(bundle: Bundle, store: CellStore) -> None:
    store.put(make_cell())
    partial = bundle.path / "cells" / f".{QUESTION.key}.json.abc.partial"
    partial.write_bytes(b"{")

    assert len(list(store.all())) == 1
    store.remove_partial()
    assert not partial.exists()
    assert len(list(store.all())) == 1


def test_a_folder_that_cannot_be_made_is_a_clear_error(bundle: Bundle, store: CellStore) -> None:
    (bundle.path / "cells").write_text("in the way")

    with pytest.raises(DscError, match="cells"):
        store.put(make_cell())
