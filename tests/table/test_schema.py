"""The JSON Schema of the lookup table against the reader: what it takes, and what only the reader can see."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path
from random import Random

import pytest
from jsonschema import Draft202012Validator
from tests.support.paths import GOLDEN
from tests.support.table_documents import damaged_document, hostile_documents
from tests.support.vectors import golden_tables

from dsc_split.errors import TableError
from dsc_split.lookup_table import LookupTable

# What compares values with each other, or is about how JSON is written.
UNSEEN = {
    *("batch_twice", "choice_id_twice", "choice_name_twice", "key_twice", "key_twice_in_unknown_key", "row_twice"),
    *("batches_unsorted", "rows_unsorted", "segments_unsorted", "interval_reversed", "segment_choice_twice"),
    *("segment_choice_without_row", "segment_hidden_at_low_rates", "segments_contradict_rows", "segments_without_end"),
    *("no_offload_sends", "no_offload_uses_server", "unknown_choice", "more_rows_than_choices"),
    *("nested_65_levels", "byte_order_mark", "half_surrogate", "overflow_in_unknown_key", "version_has_a_fraction"),
}


@pytest.fixture(scope="module")
def schema() -> Draft202012Validator:
    document = json.loads(files("dsc_split").joinpath("schemas/table-1.schema.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(document)
    return Draft202012Validator(document)


def refuse_constant(name: str) -> None:
    raise ValueError(name)


def test_the_schema_takes_what_dsc_split_writes(schema: Draft202012Validator) -> None:
    for path in [GOLDEN, *golden_tables()]:
        document = LookupTable.load(path).to_json()

        assert [error.message for error in schema.iter_errors(document)] == []


def test_the_schema_refuses_every_hostile_file_that_a_schema_can_refuse(schema: Draft202012Validator) -> None:
    taken = set()
    for name, data in hostile_documents().items():
        try:
            document = json.loads(data, parse_constant=refuse_constant)
        except (ValueError, RecursionError):
            continue
        if schema.is_valid(document):
            taken.add(name.removesuffix(".json"))

    assert taken == UNSEEN


def test_the_schema_takes_every_damaged_table_that_the_reader_takes(schema: Draft202012Validator) -> None:
    random = Random(1)
    taken = 0
    for _ in range(400):
        data = damaged_document(random)
        try:
            LookupTable.load(data)
        except TableError:
            continue
        taken += 1
        assert schema.is_valid(json.loads(data))

    assert taken > 20


def test_the_schema_has_the_keys_and_the_limits_of_the_specification(schema: Draft202012Validator, root: Path) -> None:
    text = (root / "docs" / "table-format.md").read_text(encoding="utf-8")
    tables = text[text.index("## What it holds") : text.index("## What a reader computes")]
    tables += text[text.index("## Segments") : text.index("## Versions")]
    said = {
        key
        for line in tables.splitlines()
        if line.startswith("| `")
        for key in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    assert isinstance(schema.schema, dict)
    parts = [schema.schema, *schema.schema["$defs"].values()]

    assert said == {key for part in parts for key in part.get("properties", {})}
    numbers = {
        f"{part[word]:,}"
        for part in [*parts, *(item for part in parts for item in part.get("properties", {}).values())]
        for word in ("maximum", "maxItems")
        if 1 < part.get(word, 0) < 1e300
    }
    assert {number for number in numbers if number not in tables} == set()
