"""The C++ loader against the Python reader: the same documents are refused, at the same place."""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from random import Random, SystemRandom

import pytest
from tests.support.cpp_compiler import PROGRAMS, SANITIZED, build, run
from tests.support.paths import GOLDEN
from tests.support.table_documents import (
    HOSTILE_FOLDER,
    damaged_document,
    hostile_documents,
    special_documents,
    truncated_documents,
)

from dsc_split.errors import TableError
from dsc_split.lookup_table import LookupTable


class Errc(IntEnum):
    """Codes of ``dsc_split::Errc``."""

    OK = 0
    TOO_LARGE = 21
    NOT_JSON = 22
    TOO_DEEP = 23
    DUPLICATE_KEY = 24
    NOT_A_TABLE = 25
    NEWER_VERSION = 26
    UNKNOWN_REQUIREMENT = 27
    BAD_VALUE = 28
    CONTRADICTION = 29


@dataclass(frozen=True)
class Verdict:
    """What the C++ loader said about a document."""

    code: Errc
    line: int
    place: str


@pytest.fixture(scope="module")
def program() -> Path:
    return build(PROGRAMS / "load_tables.cpp", flags=SANITIZED, json=True)


def verdicts(program: Path, documents: Iterable[bytes]) -> list[Verdict]:
    text = b"".join(b"%d\n%b" % (len(document), document) for document in documents)
    done = subprocess.run([str(program), "check"], input=text, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    lines = [line.split(" ") for line in done.stdout.decode().splitlines()]
    return [Verdict(Errc(int(code)), int(line), place) for code, line, place in lines]


def python_place(document: bytes) -> str | None:
    """Return the place that the Python reader refuses; empty for the document itself, ``None`` where it accepts."""
    try:
        LookupTable.load(document)
    except TableError as error:
        found = re.match(r"lookup table: ([\w.\[\]]+)(?::| contradicts)", str(error))
        return found[1] if found else ""
    return None


def differences(documents: list[bytes], got: list[Verdict]) -> list[tuple[bytes, str | None, Verdict]]:
    expected = [python_place(document) for document in documents]
    return [
        (document[-200:], place, verdict)
        for document, place, verdict in zip(documents, expected, got, strict=True)
        if (place is None) != (verdict.code == Errc.OK) or (place or "") != verdict.place
    ]


def test_both_readers_refuse_the_hostile_files_at_the_same_places(program: Path) -> None:
    documents = list(hostile_documents().values())
    got = verdicts(program, documents)

    assert differences(documents, got) == []
    assert Errc.OK not in {item.code for item in got}


def test_both_readers_refuse_a_table_cut_short_at_any_byte(program: Path) -> None:
    documents = truncated_documents()
    got = verdicts(program, documents)

    assert differences(documents, got) == []
    assert {item.code for item in got} == {Errc.NOT_JSON}


def test_both_readers_agree_at_the_limits_of_text_nesting_and_size(program: Path) -> None:
    documents = special_documents()
    got = verdicts(program, documents)

    assert differences(documents, got) == []
    wanted = {Errc.OK, Errc.NOT_JSON, Errc.TOO_DEEP, Errc.TOO_LARGE, Errc.DUPLICATE_KEY, Errc.NOT_A_TABLE}
    assert wanted <= {item.code for item in got}


def test_both_readers_agree_on_damaged_tables(program: Path) -> None:
    seed = SystemRandom().randrange(2**32)
    random = Random(seed)

    documents = [damaged_document(random) for _ in range(1500)]
    got = verdicts(program, documents)

    assert differences(documents, got) == [], f"seed {seed}"
    codes = [item.code for item in got]
    for code in (Errc.OK, Errc.NOT_JSON, Errc.DUPLICATE_KEY, Errc.BAD_VALUE, Errc.CONTRADICTION):
        assert codes.count(code) >= 10, f"seed {seed}"


@pytest.mark.slow
def test_both_readers_agree_on_many_damaged_tables(program: Path) -> None:
    seed = SystemRandom().randrange(2**32)
    random = Random(seed)
    documents = [damaged_document(random) for _ in range(5_000)]

    assert differences(documents, verdicts(program, documents)) == [], f"seed {seed}"


def test_an_error_names_file_line_place_and_what_was_expected(program: Path) -> None:
    names = ["negative_time", "link_key_missing", "key_twice", "newer_version", "infinity", "byte_order_mark"]
    paths = [str(HOSTILE_FOLDER / f"{name}.json") for name in names]
    lines = run([str(program), "show", *paths]).stdout.splitlines()

    place = {path: line.removeprefix(path) for path, line in zip(paths, lines, strict=True)}
    assert place[paths[0]] == ":61: batches[0].rows[0].tail_ms: got -1.5; expected a number from 0"
    assert place[paths[1]].endswith(": link.round_trips: the key is missing")
    assert place[paths[2]].endswith(": key 'precision' stands twice in one object")
    assert place[paths[3]].startswith(":3: version: the table is of version 2; this dsc-split reads up to 1. Update")
    assert "1e999" in place[paths[4]]
    assert place[paths[5]] == ":1: it begins with a byte order mark; write it without"


def test_the_line_is_where_the_value_stands(program: Path) -> None:
    # One value to a line, and each wrong in turn.
    lines = GOLDEN.read_bytes().splitlines()
    numbers = [i for i, line in enumerate(lines) if re.search(rb'_ms": \d', line)]
    documents = [b"\n".join([*lines[:i], re.sub(rb": \d[\d.]*", b": -3", lines[i]), *lines[i + 1 :]]) for i in numbers]

    assert len(numbers) > 30
    assert [item.line for item in verdicts(program, documents)] == [i + 1 for i in numbers]


def test_a_table_that_was_loaded_says_what_it_is(program: Path) -> None:
    described, picked = run([str(program), "show", str(GOLDEN)]).stdout.splitlines()
    table = LookupTable.load(GOLDEN)
    pick = table.pick(1, 8.0)

    sides = (table.device.target, table.device.fingerprint, table.server.target, table.server.fingerprint)
    assert described.split() == [
        *(table.pair_id, table.precision, table.count, *sides, "emulated"),
        *("0=full-offload*", "1=features.4.0", "2=no-offload", "1x3", "4x3", "8x2"),
    ]
    assert picked == f"{pick.choice.name} {pick.latency_ms:g}"


def test_what_is_no_file_cannot_be_read_and_says_why(program: Path, tmp_path: Path) -> None:
    missing = str(tmp_path / "none.json")
    lines = run([str(program), "show", missing, str(tmp_path)]).stdout.splitlines()

    assert lines == [
        f"{missing}: cannot be read: No such file or directory",
        f"{tmp_path}: cannot be read: Is a directory",
    ]


def test_a_large_file_and_one_that_never_ends_are_refused_by_their_size(program: Path, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(b"[" * 100_000_000)

    lines = run([str(program), "show", str(path), "/dev/zero"]).stdout.splitlines()

    said = "more than 8388608 bytes; no more are read"
    assert lines == [f"{path}: {said}", f"/dev/zero: {said}"]


def test_a_pipe_is_read_as_a_file_is(program: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(GOLDEN.read_bytes(),))
    writer.start()

    assert run([str(program), "show", str(pipe)]).stdout == run([str(program), "show", str(GOLDEN)]).stdout

    writer.join()


def test_keys_may_come_in_any_order(program: Path) -> None:
    def shuffled(value: object, random: Random) -> object:
        if isinstance(value, dict):
            return {key: shuffled(value[key], random) for key in random.sample(sorted(value), len(value))}
        return [shuffled(item, random) for item in value] if isinstance(value, list) else value

    golden = json.loads(GOLDEN.read_text())
    documents = [json.dumps(shuffled(golden, Random(i))).encode() for i in range(20)]

    assert {item.code for item in verdicts(program, documents)} == {Errc.OK}
    assert [LookupTable.load(document) for document in documents] == [LookupTable.load(GOLDEN)] * 20
