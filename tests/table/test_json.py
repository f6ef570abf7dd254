import contextlib
import copy
import json
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.paths import GOLDEN
from tests.support.table_documents import HOSTILE_FOLDER, damaged_document, special_documents, truncated_documents

from dsc_split.errors import TableError, UsageError
from dsc_split.lookup_table import LookupTable, State


def golden() -> LookupTable:
    return LookupTable.load(GOLDEN)


def golden_document() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(GOLDEN.read_text())
    return document


def test_the_golden_table_is_written_back_byte_for_byte() -> None:
    written = json.dumps(golden().to_json(), indent=1, ensure_ascii=False) + "\n"

    assert written.encode() == GOLDEN.read_bytes()


def test_a_table_loads_from_bytes_a_path_and_its_text() -> None:
    assert LookupTable.load(GOLDEN.read_bytes()) == LookupTable.load(str(GOLDEN)) == LookupTable.load(GOLDEN)


def test_a_missing_table_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        LookupTable.load(tmp_path / "table.json")


@pytest.mark.parametrize("name", ["folder", "packed.dscb"])
def test_a_bundle_is_no_table_and_the_error_says_how_its_table_is_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"") if path.suffix else path.mkdir()

    with pytest.raises(UsageError, match=r"Bundle\.open\(PATH\)\.table\(\)"):
        LookupTable.load(path)


def test_unknown_keys_are_ignored() -> None:
    document = golden_document()
    document["later"] = {"x": 1}
    document["batches"][0]["rows"][0]["energy_mj"] = 3
    document["link"]["colour"] = "blue"

    assert LookupTable.from_json(document) == golden()


def test_what_a_side_was_measured_under_is_kept_and_makes_no_other_table() -> None:
    document = golden_document()
    document["device"]["run_fingerprint"] = {"host": "edge", "gpu": {"name": "Orin", "driver": None}}
    table = LookupTable.from_json(document)

    assert table.device.run_fingerprint == document["device"]["run_fingerprint"]
    assert table.server.run_fingerprint is None
    assert table.to_json() == document
    assert table == golden()
    document["server"]["run_fingerprint"] = "edge"
    with pytest.raises(TableError, match=r"server.run_fingerprint: got 'edge'; expected an object"):
        LookupTable.from_json(document)


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
    "batch_too_large": r"batches\[2\].batch: got 1048577; expected a whole number from 1 to 1048576",
    "batch_twice": r"batches\[1\].batch: got 1; .* twice",
    "batches_unsorted": r"batches\[1\].batch: got 4; .* sorted",
    "byte_order_mark": "begins with a byte order mark",
    "bytes_beyond_binary64": r"batches\[0\].rows\[0\].uplink_bytes",
    "bytes_not_whole": r"batches\[0\].rows\[0\].uplink_bytes: got 1.5; expected a whole number",
    "bytes_too_many": r"batches\[2\].rows\[0\].uplink_bytes: got 4398046511105",
    "choice_id_too_large": r"choices\[2\].id: got 2147483648",
    "choice_id_twice": r"choices\[1\].id: got 0",
    "choice_name_twice": r"choices\[2\].name: got 'features.4.0'",
    "comment": "no valid JSON: .* line 3",
    "count_unknown": "count: got 'tokens'",
    "empty": "no valid JSON",
    "emulated_is_true": "emulated: got True",
    "half_surrogate": "half a surrogate pair",
    "huge_number": "no valid JSON: number 1000.* is out of range",
    "infinity": "no valid JSON: number 1e999",
    "integer_of_5000_digits": "no valid JSON: number 9999.* is out of range",
    "interval_negative": r"batches\[0\].rows\[0\].tail_ci_ms\[0\]: got -9.5",
    "interval_reversed": r"batches\[0\].rows\[0\].tail_ci_ms: got \[11.0, 9.0\]",
    "key_twice": "'precision' stands twice",
    "key_twice_in_unknown_key": "key 'b' stands twice",
    "link_downlink_zero": "link.downlink_rate_mb_s: got 0",
    "link_key_missing": "link.round_trips: the key is missing",
    "link_negative": "link.rtt_ms: got -1",
    "more_rows_than_choices": r"batches\[0\].rows: got 4 items; expected at most 3",
    "nan": "NaN is no JSON number",
    "negative_time": r"batches\[0\].rows\[0\].tail_ms: got -1.5; expected a number from 0",
    "nested_65_levels": "nested too deeply; at most 64 levels",
    "nested_deeply": "nested too deeply; at most 64 levels",
    "newer_version": "version 2; this dsc-split reads up to 1. Update",
    "no_batches": r"batches: got \[\]",
    "no_offload_sends": r"batches\[0\].rows\[2\].uplink_bytes: got 5; expected 0",
    "no_offload_uses_server": r"batches\[0\].rows\[2\].tail_ms: got 5.0; expected 0",
    "no_rows": r"batches\[0\].rows: got \[\]",
    "no_segments": r"batches\[0\].segments: got \[\]",
    "not_utf8": "not UTF-8: invalid continuation byte at byte 815",
    "other_format": "format: got 'dsc-split/bundle'; expected 'dsc-split/table'",
    "overflow_in_unknown_key": "no valid JSON: number -1e400 is out of range",
    "row_twice": r"batches\[0\].rows\[1\].choice: got 0; .* twice",
    "rows_unsorted": r"batches\[0\].rows\[1\].choice: got 1; .* sorted",
    "segment_choice_twice": r"batches\[2\].segments\[1\].choice: got 1; expected a choice that no other segment has",
    "segment_choice_without_row": r"batches\[2\].segments\[0\] contradicts the rows: choice 2 has no row",
    "segment_hidden_at_low_rates": r"batches\[0\].segments\[0\] contradicts the rows: choice 1 sends more",
    "segments_contradict_rows": r"batches\[0\].segments\[0\] .* at 6 MB/s choice 1 is faster than choice 2",
    "segments_unsorted": r"batches\[0\].segments\[1\].below_rate_mb_s: got 2.0; expected a rate above 4.68",
    "segments_without_end": r"batches\[0\].segments\[2\].below_rate_mb_s: got 90.0",
    "side_missing": "server: the key is missing",
    "split_named_as_a_kind": r"choices\[1\].name: got 'no-offload'",
    "text_behind": "no valid JSON: Extra data: line 249",
    "time_is_text": r"batches\[1\].rows\[0\].head_ms: got '14'",
    "time_is_true": r"batches\[0\].rows\[0\].head_ms: got True",
    "too_many_batches": "batches: got 4097 items; expected at most 4096",
    "too_many_choices": "choices: got 1001 items; expected at most 1000",
    "trailing_comma": "no valid JSON: .* line 4",
    "unknown_choice": r"batches\[0\].rows\[1\].choice: got 7",
    "unknown_kind": r"choices\[1\].kind: got 'early-exit'",
    "unknown_requirement": "requires 'energy'",
    "version_has_a_fraction": "version: got 1.0; expected a whole number",
    "version_is_true": "version: got True",
    "zero_byte_behind": "no valid JSON: Extra data",
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_a_hostile_table_is_refused_naming_the_place(name: str) -> None:
    with pytest.raises(TableError, match=HOSTILE[name]):
        LookupTable.load(HOSTILE_FOLDER / f"{name}.json")


def test_every_hostile_file_is_tried() -> None:
    assert sorted(path.stem for path in HOSTILE_FOLDER.iterdir()) == sorted(HOSTILE)


def test_a_table_cut_short_at_any_byte_is_refused() -> None:
    for document in truncated_documents():
        with pytest.raises(TableError):
            LookupTable.load(document)


def test_nesting_is_read_to_64_levels_and_refused_beyond() -> None:
    for levels, accepted in ((63, True), (64, False), (100_000, False)):
        document = GOLDEN.read_bytes().rstrip()[:-1] + b', "later": ' + b"[" * levels + b"]" * levels + b"}"
        if accepted:
            assert LookupTable.load(document) == golden()
        else:
            with pytest.raises(TableError, match="nested too deeply"):
                LookupTable.load(document)


def test_a_file_of_100_mb_of_nesting_is_refused_by_its_size(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(b"[" * 100_000_000)

    with pytest.raises(TableError, match="more than 8388608 bytes"):
        LookupTable.load(path)


def test_a_device_that_never_ends_is_refused_by_its_size() -> None:
    with pytest.raises(TableError, match="more than 8388608 bytes"):
        LookupTable.load("/dev/zero")


def test_a_pipe_is_read_as_a_file_is(tmp_path: Path) -> None:
    pipe = tmp_path / "table.json"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(GOLDEN.read_bytes(),))
    writer.start()

    assert LookupTable.load(pipe) == golden()

    writer.join()


def test_minus_zero_reads_as_zero() -> None:
    document = GOLDEN.read_bytes().replace(b'"rtt_ms": 0.0', b'"rtt_ms": -0.0')
    document = document.replace(b'"uplink_bytes": 0', b'"uplink_bytes": -0')

    assert math.copysign(1.0, LookupTable.load(document).link.rtt_ms) == 1.0
    assert LookupTable.load(document) == golden()


def test_numbers_too_small_for_binary64_read_as_zero() -> None:
    document = GOLDEN.read_bytes().replace(b'"rtt_ms": 0.0', b'"rtt_ms": 1e-400')

    assert LookupTable.load(document) == golden()


def answers_or_refuses(document: bytes) -> None:
    """Load; where that works, ask, and see that nothing but an answer or a usage error comes."""
    try:
        table = LookupTable.load(document)
    except TableError:
        return
    assert LookupTable.from_json(table.to_json()) == table
    for batch in {1, table.batches[-1].batch}:
        for rate_mb_s in (0.0, 5e-324, 7.5, math.inf):
            for percentile in (50, 95):
                with contextlib.suppress(UsageError):
                    pick = table.pick(batch, rate_mb_s, percentile=percentile)
                    assert pick.latency_ms == min(terms.latency_ms for terms in pick.ranking)
                    assert math.isfinite(pick.latency_ms)
        with contextlib.suppress(UsageError):
            assert table.switch_rates(State(batch=batch))[-1].below_rate_mb_s is None


@given(st.randoms(use_true_random=False))
@settings(max_examples=400)
def test_a_damaged_table_is_refused_or_answers(random: Random) -> None:
    answers_or_refuses(damaged_document(random))


@given(st.binary(max_size=200))
@settings(max_examples=100)
def test_any_bytes_are_refused_or_answer(data: bytes) -> None:
    answers_or_refuses(data)


def test_special_documents_are_refused_or_answer() -> None:
    for document in special_documents():
        answers_or_refuses(document)


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
