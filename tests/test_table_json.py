import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsc_split.errors import TableError, UsageError
from dsc_split.lookup_table import LookupTable

TABLES = Path(__file__).parent / "data" / "tables"
GOLDEN = TABLES / "golden.json"


def golden() -> LookupTable:
    return LookupTable.load(GOLDEN)


def golden_document() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(GOLDEN.read_text())
    return document


def test_the_golden_table_is_written_back_byte_for_byte() -> None:
    written = json.dumps(golden().to_json(), indent=1, ensure_ascii=False) + "\n"

    assert written.encode() == GOLDEN.read_bytes()


def test_a_table_loads_from_bytes_a_path_text_and_a_bundle_folder(tmp_path: Path) -> None:
    (tmp_path / "table.json").write_bytes(GOLDEN.read_bytes())

    assert (
        LookupTable.load(GOLDEN.read_bytes())
        == LookupTable.load(str(GOLDEN))
        == LookupTable.load(tmp_path)
        == LookupTable.load(GOLDEN)
    )


def test_a_missing_table_is_a_usage_error_that_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="dsc-split bench"):
        LookupTable.load(tmp_path)
    with pytest.raises(UsageError, match="no such file or folder"):
        LookupTable.load(tmp_path / "table.json")


def test_unknown_keys_are_ignored() -> None:
    document = golden_document()
    document["later"] = {"x": 1}
    document["batches"][0]["rows"][0]["energy_mj"] = 3
    document["link"]["colour"] = "blue"

    assert LookupTable.from_json(document) == golden()


def test_a_choice_that_sends_inputs_is_remembered() -> None:
    document = golden_document()
    document["choices"][1]["passthrough"] = True
    table = LookupTable.from_json(document)

    assert table.without_inputs_sent() == (2,)
    assert golden().without_inputs_sent() == (1, 2)
    assert LookupTable.from_json(table.to_json()) == table


HOSTILE = {
    "a_list": "a JSON list",
    "batch_is_zero": r"batches\[0\].batch: got 0",
    "batch_twice": r"batches\[1\].batch: got 1; .* twice",
    "batches_unsorted": r"batches\[1\].batch: got 4; .* sorted",
    "bytes_beyond_binary64": r"batches\[0\].rows\[0\].uplink_bytes",
    "bytes_not_whole": r"batches\[0\].rows\[0\].uplink_bytes: got 1.5; expected a whole number",
    "choice_id_twice": r"choices\[1\].id: got 0",
    "choice_name_twice": r"choices\[2\].name: got 'features.4.0'",
    "count_unknown": "count: got 'tokens'",
    "empty": "no valid JSON",
    "emulated_is_true": "emulated: got True",
    "huge_number": r"batches\[0\].rows\[0\].tail_ms: got 1000",
    "infinity": "no valid JSON: number 1e999",
    "interval_reversed": r"batches\[0\].rows\[0\].tail_ci_ms: got \[11.0, 9.0\]",
    "key_twice": "'precision' stands twice",
    "link_downlink_zero": "link.downlink_rate_mb_s: got 0",
    "link_key_missing": "link.round_trips: the key is missing",
    "link_negative": "link.rtt_ms: got -1",
    "nan": "NaN is no JSON number",
    "negative_time": r"batches\[0\].rows\[0\].tail_ms: got -1.5; expected a number from 0",
    "nested_deeply": "JSON",
    "newer_version": "version 2; this dsc-split reads up to 1. Update",
    "no_batches": r"batches: got \[\]",
    "no_offload_sends": r"batches\[0\].rows\[2\].uplink_bytes: got 5; expected 0",
    "no_rows": r"batches\[0\].rows: got \[\]",
    "no_segments": r"batches\[0\].segments: got \[\]",
    "other_format": "format: got 'dsc-split/bundle'; expected 'dsc-split/table'",
    "row_twice": r"batches\[0\].rows\[1\].choice: got 0; .* twice",
    "rows_unsorted": r"batches\[0\].rows\[1\].choice: got 1; .* sorted",
    "segment_choice_without_row": r"batches\[2\].segments\[0\] contradicts the rows: choice 2 has no row",
    "segment_hidden_at_low_rates": r"batches\[0\].segments\[0\] contradicts the rows: choice 1 sends more",
    "segments_contradict_rows": r"batches\[0\].segments\[0\] .* at 6 MB/s choice 1 is faster than choice 2",
    "segments_unsorted": r"batches\[0\].segments\[1\].below_rate_mb_s: got 2.0; expected a rate above 4.68",
    "segments_without_end": r"batches\[0\].segments\[2\].below_rate_mb_s: got 90.0",
    "side_missing": "server: the key is missing",
    "split_named_as_a_kind": r"choices\[1\].name: got 'no-offload'",
    "time_is_text": r"batches\[1\].rows\[0\].head_ms: got '14'",
    "time_is_true": r"batches\[0\].rows\[0\].head_ms: got True",
    "unknown_choice": r"batches\[0\].rows\[1\].choice: got 7",
    "unknown_kind": r"choices\[1\].kind: got 'early-exit'",
    "unknown_requirement": "requires 'energy'",
    "version_is_true": "version: got True",
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_a_hostile_table_is_refused_naming_the_place(name: str) -> None:
    with pytest.raises(TableError, match=HOSTILE[name]):
        LookupTable.load(TABLES / "hostile" / f"{name}.json")


def test_every_hostile_file_is_tried() -> None:
    assert sorted(path.stem for path in (TABLES / "hostile").iterdir()) == sorted(HOSTILE)


def test_a_table_cut_short_at_any_byte_is_refused() -> None:
    data = json.dumps(golden_document()).encode()
    LookupTable.load(data)

    for length in range(len(data)):
        with pytest.raises(TableError):
            LookupTable.load(data[:length])


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for i in range(len(value)):
            yield from places(value[i], (*path, i))


def changed(document: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    document = copy.deepcopy(document)
    target: Any = document
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return document


@pytest.mark.parametrize("value", ["text", True, -1, -1.5, math.nan, math.inf, [], {}, [None], 10**400], ids=str)
def test_a_wrong_value_anywhere_is_refused_and_never_crashes(value: Any) -> None:
    document = golden_document()
    free_text = {"pair_id", "precision", "target", "fingerprint", "source", "name", "emulated"}
    flags = {"timing_valid", "count_downlink"}
    for path in places(document):
        may_stand = (
            path[0] == "emulated"
            or (path[-1] in free_text and value == "text")
            or (path[-1] in flags and value is True)
            or (path[-1] == "requires" and value == [])
        )
        if not may_stand:
            with pytest.raises(TableError):
                LookupTable.from_json(changed(document, path, value))


def test_a_missing_key_anywhere_is_refused_by_name() -> None:
    document = golden_document()
    for path in places(document):
        if isinstance(path[-1], str) and (path[0] != "emulated" or len(path) == 1):
            bad = copy.deepcopy(document)
            target: Any = bad
            for key in path[:-1]:
                target = target[key]
            del target[path[-1]]
            if path == ("count",):
                assert LookupTable.from_json(bad) == golden()
                continue
            with pytest.raises(TableError, match=path[-1]):
                LookupTable.from_json(bad)


def test_switch_rates_of_another_writer_may_differ_by_rounding() -> None:
    document = golden_document()
    document["batches"][0]["segments"][0]["below_rate_mb_s"] = 4.6875

    assert LookupTable.from_json(document).pick(1, 4.0).choice.name == "no-offload"
