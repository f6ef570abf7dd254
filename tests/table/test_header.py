"""A table as a C++ header: exact, safe whatever the names are, and checked by the compiler."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.cpp_compiler import CACHE, INCLUDE, WARNINGS, build, require, run
from tests.support.paths import GOLDEN
from tests.support.vectors import bits, random_table

from dsc_split._support.hashing import sha256_text
from dsc_split.errors import UsageError
from dsc_split.lookup_table import LookupTable, State
from dsc_split.table._header import header_name, table_header

HOSTILE_NAME = 'a"b\\c\n*/??/ ??= \t\x00\x07 // %s R"(é✂\u202e)" \\'
SHOW = r"""
#include <cstdio>

namespace {

void show(const char* what, std::string_view text) {
  std::printf("%s ", what);
  for (const char character : text) std::printf("%02x", static_cast<unsigned char>(character));
  std::printf("\n");
}

void show(const char* what, double value) {
  std::printf("%s %016llx\n", what, static_cast<unsigned long long>(dsc_split::detail::to_bits(value)));
}

void show(const char* what, long long value) { std::printf("%s %lld\n", what, value); }

}  // namespace

void show_all(const dsc_split::TableView& table) {
  show("pair_id", table.pair_id);
  show("precision", table.precision);
  show("count", table.count);
  show("device", table.device_target);
  show("device", table.device_fingerprint);
  show("server", table.server_target);
  show("server", table.server_fingerprint);
  show("emulated", static_cast<long long>(table.emulated));
  show("c0_ms", table.link.c0_ms);
  show("c1_ms_per_mb", table.link.c1_ms_per_mb);
  show("rtt_ms", table.link.rtt_ms);
  show("round_trips", table.link.round_trips);
  show("count_downlink", static_cast<long long>(table.link.count_downlink));
  show("downlink_rate_mb_s", table.link.downlink_rate_mb_s.value_or(-1.0));
  for (const dsc_split::Choice& choice : table.choices) {
    show("id", static_cast<long long>(choice.id));
    show("kind", static_cast<long long>(choice.kind));
    show("passthrough", static_cast<long long>(choice.passthrough));
    show("name", choice.name);
  }
  for (const dsc_split::Batch& batch : table.batches) {
    show("batch", static_cast<long long>(batch.batch));
    for (const dsc_split::Row& row : batch.rows) {
      show("choice", static_cast<long long>(table.choices[static_cast<std::size_t>(row.choice)].id));
      show("head_ms", row.head_ms);
      show("tail_ms", row.tail_ms);
      show("head_p95_ms", row.head_p95_ms);
      show("tail_p95_ms", row.tail_p95_ms);
      show("head_half_ci_ms", row.head_half_ci_ms);
      show("tail_half_ci_ms", row.tail_half_ci_ms);
      show("uplink_bytes", static_cast<long long>(row.uplink_bytes));
      show("downlink_bytes", static_cast<long long>(row.downlink_bytes));
      show("timing_valid", static_cast<long long>(row.timing_valid));
    }
  }
}
"""


def content(table: LookupTable) -> list[str]:
    """List what ``show_all`` prints of a table."""
    shown: list[str] = []

    def show(what: str, value: str | float | int | None) -> None:
        if isinstance(value, str):
            shown.append(f"{what} {value.encode().hex()}")
        else:
            shown.append(f"{what} {int(value)}" if isinstance(value, int) else f"{what} {bits(value)}")

    def half(interval: tuple[float, float] | None) -> float:
        return 0.0 if interval is None else (interval[1] - interval[0]) / 2.0

    show("pair_id", table.pair_id)
    show("precision", table.precision)
    show("count", table.count)
    for what, side in (("device", table.device), ("server", table.server)):
        show(what, side.target)
        show(what, side.fingerprint)
    show("emulated", table.emulated is not None)
    for key in ("c0_ms", "c1_ms_per_mb", "rtt_ms", "round_trips", "count_downlink"):
        show(key, getattr(table.link, key))
    show("downlink_rate_mb_s", -1.0 if table.link.downlink_rate_mb_s is None else table.link.downlink_rate_mb_s)
    for choice in table.choices:
        show("id", choice.id)
        show("kind", ["full-offload", "split", "no-offload"].index(choice.kind))
        show("passthrough", choice.passthrough)
        show("name", choice.name)
    for item in table.batches:
        show("batch", item.batch)
        for row in item.rows:
            show("choice", row.choice)
            show("head_ms", row.head_ms)
            show("tail_ms", row.tail_ms)
            show("head_p95_ms", -1.0 if row.head_p95_ms is None else row.head_p95_ms)
            show("tail_p95_ms", -1.0 if row.tail_p95_ms is None else row.tail_p95_ms)
            show("head_half_ci_ms", half(row.head_ci_ms))
            show("tail_half_ci_ms", half(row.tail_ci_ms))
            show("uplink_bytes", row.uplink_bytes)
            show("downlink_bytes", row.downlink_bytes)
            show("timing_valid", row.timing_valid)
    return shown


def hostile_table() -> LookupTable:
    """Make a table whose every text tries to break out of its literal, or of the comment."""
    table = LookupTable.load(GOLDEN)
    choices = [replace(choice, name=HOSTILE_NAME) if choice.kind == "split" else choice for choice in table.choices]
    side = replace(table.device, target=HOSTILE_NAME, fingerprint=HOSTILE_NAME)
    return replace(
        table,
        pair_id=HOSTILE_NAME,
        device=side,
        server=side,
        emulated={HOSTILE_NAME: HOSTILE_NAME},
        link=replace(table.link, source=HOSTILE_NAME),
        choices=tuple(choices),
    )


def program(tables: dict[str, LookupTable], compiler: str, standard: str) -> Path:
    """Build a program of two translation units that both include every header; it prints all that is in them."""
    includes = "".join(f'#include "{name}.hpp"\n' for name in tables)
    headers = {name: table_header(table, f"fleet::{name}") for name, table in tables.items()}
    folder = CACHE / f"shown-{sha256_text(SHOW, *headers.values())[:32]}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in headers.items():
        (folder / f"{name}.hpp").write_text(text, encoding="ascii")
    calls = "".join(f"  show_all(fleet::{name});\n" for name in tables)
    same = " && ".join(f"&fleet::{name} == other({i})" for i, name in enumerate(tables))
    others = "".join(f"  if (number == {i}) return &fleet::{name};\n" for i, name in enumerate(tables))
    other = "const dsc_split::TableView* other(int number)"
    (folder / "main.cpp").write_text(
        f"{includes}{SHOW}\n{other};\nint main() {{\n{calls}  return {same} ? 0 : 1;\n}}\n", encoding="ascii"
    )
    (folder / "other.cpp").write_text(
        f"{includes}{other};\n{other} {{\n{others}  return nullptr;\n}}\n", encoding="ascii"
    )
    flags = (f"-I{folder}", "-fno-exceptions", "-fno-rtti", "-trigraphs")
    return build(folder / "main.cpp", folder / "other.cpp", flags=flags, compiler=compiler, standard=standard)


def compile_text(text: str, folder: Path) -> Any:
    (folder / "table.hpp").write_text(text, encoding="ascii")
    (folder / "main.cpp").write_text('#include "table.hpp"\n', encoding="ascii")
    command = [require("g++"), "-std=c++17", *WARNINGS, f"-I{INCLUDE}", "-fsyntax-only", str(folder / "main.cpp")]
    return run(command)


@pytest.mark.slow
@pytest.mark.parametrize("standard", ["c++17", "c++20"])
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_header_holds_every_number_and_text_of_the_table_exactly(compiler: str, standard: str) -> None:
    numbers = random.Random(7)
    tables = {"golden": LookupTable.load(GOLDEN), "hostile": hostile_table()}
    tables |= {f"random_{i}": random_table(numbers) for i in range(6)}

    done = run([str(program(tables, compiler, standard))])

    assert done.returncode == 0, "both translation units have the same tables"
    assert done.stdout.splitlines() == [line for table in tables.values() for line in content(table)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "damaged", "says"),
    [
        (r"completed\(\{1, 20\.0,", "completed({1, 20.5,", "b4 picks otherwise"),
        (r"150000, 4000, true", "150001, 4000, true", "b4 picks otherwise"),
        (r"\{4, \{rows_4, 3\}, ", "{4, {rows_4, 2}, ", "b4 has other rows"),
        (r"\{4, \{rows_4", "{8, {rows_4", "b4 is out of order"),
        (r"\{1, dsc_split::Kind::split", "{2, dsc_split::Kind::split", "b4 is out of order"),
        (r"completed\(\{2, 60\.0", "completed({3, 60.0", "b4 is out of order"),
    ],
)
def test_damaged_header_is_refused_by_the_compiler(tmp_path: Path, pattern: str, damaged: str, says: str) -> None:
    text = table_header(LookupTable.load(GOLDEN), "b4")
    broken, count = re.subn(pattern, damaged, text, count=1)

    assert count == 1
    assert compile_text(text, tmp_path).returncode == 0
    done = compile_text(broken, tmp_path)
    assert done.returncode != 0
    assert f"static assertion failed: {says}" in done.stderr


def test_header_compares_a_pick_at_every_switch_rate() -> None:
    table = LookupTable.load(GOLDEN)

    text = table_header(table, "b4")

    for item in table.batches:
        expected = [segment.choice for segment in table.switch_rates(State(batch=item.batch))]
        found = re.findall(rf"picks\(b4, \{{{item.batch}, [^,]*\}}, (\d+), ", text)
        assert [int(choice) for choice in found] == expected
    assert "Percentile::p95" in text
    assert "picks(b4, {7, " in text, "a batch size that was not measured"


def test_same_table_gives_the_same_bytes_and_nothing_but_ascii() -> None:
    table = hostile_table()

    text = table_header(table, "b4")

    assert text == table_header(LookupTable.from_json(table.to_json()), "b4")
    assert re.fullmatch(r"[\n\x20-\x7e]*", text)
    assert "??" not in text
    assert not re.search(r"\\$", text, re.MULTILINE)


def test_header_includes_the_core_alone() -> None:
    text = table_header(LookupTable.load(GOLDEN), "b4")

    assert re.findall(r"^#include .*$", text, re.MULTILINE) == ['#include "dsc_split/lookup_table.hpp"']


def test_variable_may_have_the_name_of_what_it_refers_to(tmp_path: Path) -> None:
    table = LookupTable.load(GOLDEN)
    names = ("choices", "batches", "link", "picks", "rows_1", "table")

    done = compile_text("".join(table_header(table, f"fleet::{name}") for name in names), tmp_path)

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "name", ["", "1b", "b-4", "new", "fleet::", "::b4", "a b", "_x", "a__b", "std::b4", "dsc_split", "b4;", "é", "b4\n"]
)
def test_what_is_no_name_in_cpp_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="is no name for a variable"):
        table_header(LookupTable.load(GOLDEN), name)


def test_table_whose_times_overflow_has_no_header() -> None:
    table = LookupTable.load(GOLDEN)
    table = replace(table, link=replace(table.link, c0_ms=1.7e308, c1_ms_per_mb=1.7e308))

    with pytest.raises(UsageError, match=r"batch 1 the tail and the network of choice 'features\.4\.0'"):
        table_header(table, "b4")


@pytest.mark.parametrize(
    ("file", "name"), [("b4.hpp", "b4"), ("my-table.v2.hpp", "my_table_v2"), ("x/_b4_.h", "b4"), ("4.hpp", "4")]
)
def test_files_name_becomes_the_variables(file: str, name: str) -> None:
    assert header_name(Path(file)) == name


def test_command_writes_the_header_and_prints_nothing_to_stdout(dsc: Callable[..., Any], tmp_path: Path) -> None:
    outcome = dsc("table", GOLDEN, "--header", tmp_path / "b4_table.hpp", "--name", "fleet::b4")

    assert (outcome.exit_code, outcome.stdout) == (0, "")
    assert outcome.stderr == f"header: {tmp_path / 'b4_table.hpp'}\n"
    assert (tmp_path / "b4_table.hpp").read_text() == table_header(LookupTable.load(GOLDEN), "fleet::b4")


def test_command_names_the_variable_after_the_file(dsc: Callable[..., Any], tmp_path: Path) -> None:
    assert dsc("table", GOLDEN, "--header", tmp_path / "b4-table.hpp").exit_code == 0
    assert "inline constexpr dsc_split::TableView b4_table{" in (tmp_path / "b4-table.hpp").read_text()


@pytest.mark.parametrize(
    ("arguments", "exit_code", "says"),
    [
        (["--header", "4.hpp"], 2, "'4' is no name for a variable"),
        (["--name", "b4"], 2, "Give --header FILE"),
        (["--header", "nowhere/b4.hpp"], 1, "cannot write 'nowhere/b4.hpp'"),
    ],
)
def test_command_says_why_there_is_no_header(
    dsc: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    exit_code: int,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)

    outcome = dsc("table", GOLDEN, *arguments)

    assert outcome.exit_code == exit_code
    assert says in outcome.stderr
    assert list(tmp_path.iterdir()) == []
