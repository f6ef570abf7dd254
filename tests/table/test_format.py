"""The worked example of docs/table-format.md: both readers give what was computed there by hand."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.cpp_compiler import FUSING, PROGRAMS, build, run
from tests.support.vectors import Question, answer

from dsc_split.lookup_table import LookupTable, State

STATE: dict[str, Any] = {"downlink_rate_mb_s": 40.0, "server_load": 1.5, "queue_ms": 5.0}


@pytest.fixture(scope="module")
def text(root: Path) -> str:
    document = (root / "docs" / "table-format.md").read_text(encoding="utf-8")
    return document[document.index("## An example") :]


@pytest.fixture(scope="module")
def example(text: str) -> bytes:
    found = re.search(r"```json\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return found[1].encode()


def test_the_example_has_the_bytes_and_times_that_were_computed_by_hand(text: str, example: bytes) -> None:
    ranking = LookupTable.load(example).ranking(State(batch=3, rate_mb_s=10.0, **STATE))

    assert [(terms.choice.name, terms.uplink_bytes, terms.downlink_bytes) for terms in ranking] == [
        ("layer2", 375_001, 12_000),
        ("no-offload", 0, 0),
        ("full-offload", 1_800_000, 12_000),
    ]
    assert [terms.latency_ms for terms in ranking] == pytest.approx([123.17011, 176.0, 253.42], rel=1e-12)
    for shown in ("123.17011", "176", "253.42", "375001", "1800000"):
        assert shown in text


def test_the_example_has_the_answers_that_were_computed_by_hand(example: bytes) -> None:
    table = LookupTable.load(example)
    pick = table.pick(3, 10.0, **STATE)
    bound = table.pick(3, 10.0, percentile=95, **STATE)

    assert (pick.choice.name, pick.measured_batch, pick.tie) == ("layer2", 4, False)
    assert (pick.margin_ms, pick.uncertainty_ms) == pytest.approx((52.82989, 6.5), rel=1e-12)
    assert (bound.choice.name, bound.latency_ms) == ("no-offload", 190.0)
    assert [terms.choice.name for terms in bound.ranking] == ["no-offload", "full-offload"]
    assert bound.ranking[1].latency_ms == pytest.approx(259.42, rel=1e-12)


def test_the_example_has_the_segments_that_its_rows_give(example: bytes) -> None:
    table = LookupTable.load(example)

    assert [table.switch_rates(State(batch=item.batch)) for item in table.batches] == [
        item.segments for item in table.batches
    ]


def test_the_loader_in_cpp_answers_the_example_with_the_same_bits(example: bytes, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(example)
    median = Question(
        table=0, batch=3, rate_mb_s=10.0, downlink_rate_mb_s=40.0, server_load=1.5, queue_ms=5.0, position=1
    )
    questions = [median, replace(median, percentile=95, position=0)]
    program = build(PROGRAMS / "load_tables.cpp", flags=FUSING, json=True)

    done = run([str(program), "answer", str(path)], text="".join(f"{question.line()}\n" for question in questions))

    table = LookupTable.load(example)
    assert done.stdout.splitlines() == [answer(table, question) for question in questions]
    assert done.stdout.startswith("3 5 ")


def test_the_example_is_no_more_than_version_1_asks(example: bytes) -> None:
    assert json.loads(example).keys() == LookupTable.load(example).to_json().keys()
