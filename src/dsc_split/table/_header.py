"""Write a lookup table as a C++ header of constants, for programs without heap or parser. The compiler checks it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from decimal import Decimal
from pathlib import Path

from dsc_split._support.strict_json import canonical_json
from dsc_split.errors import UsageError
from dsc_split.table._arithmetic import in_order, make_lines, neighbour
from dsc_split.table._state import State
from dsc_split.table._table import LookupTable
from dsc_split.table._types import Row as TableRow
from dsc_split.table._types import half_width

__all__ = ["header_name", "table_header"]

KEYWORDS = frozenset(
    """
    alignas alignof and and_eq asm auto bitand bitor bool break case catch char char8_t char16_t char32_t class co_await
    co_return co_yield compl concept const const_cast consteval constexpr constinit continue decltype default delete do
    double dynamic_cast else enum explicit export extern false float for friend goto if inline int long mutable
    namespace new noexcept not not_eq nullptr operator or or_eq private protected public register reinterpret_cast
    requires return short signed sizeof static static_assert static_cast struct switch template this thread_local throw
    true try typedef typeid typename union unsigned using virtual void volatile wchar_t while xor xor_eq
    """.split()
)
TAKEN = frozenset({"dsc_split", "main", "std"})
"""Names that have another meaning in C++, but are no keywords."""
MOST_CELLS = 4096
"""Most choices times batches for a check at a batch size that was not measured: clang refuses a constant that takes
more than 2^20 steps."""
MOST_CERTAIN = 64
"""Most rows for which the compiler finds the rates where no rounding can change the choice: it takes rows^2 steps."""

_CHECKS = """\
constexpr bool in_order(const dsc_split::TableView& table) noexcept {
  for (std::size_t i = 1; i < table.choices.size; ++i) {
    if (table.choices[i].id <= table.choices[i - 1].id) return false;
  }
  std::int64_t last_batch = 0;
  for (const dsc_split::Batch& batch : table.batches) {
    if (batch.batch <= last_batch || batch.rows.size == 0) return false;
    last_batch = batch.batch;
    std::int32_t last_choice = -1;
    for (const dsc_split::Row& row : batch.rows) {
      if (row.choice <= last_choice) return false;
      last_choice = row.choice;
    }
    if (static_cast<std::size_t>(last_choice) >= table.choices.size) return false;
  }
  return true;
}

constexpr std::size_t row_count(const dsc_split::TableView& table) noexcept {
  std::size_t count = 0;
  for (const dsc_split::Batch& batch : table.batches) count += batch.rows.size;
  return count;
}

constexpr bool picks(const dsc_split::TableView& table, const dsc_split::State& state, std::int32_t id,
                     double latency_ms) noexcept {
  const auto pick = table.pick(state);
  return pick && pick->choice->id == id && pick->latency_ms == latency_ms;
}
"""


def header_name(path: Path) -> str:
    """Return the name of the variable for a header file: ``my-table.hpp`` gives ``my_table``."""
    return re.sub(r"[^A-Za-z0-9]+", "_", path.stem).strip("_")


def table_header(table: LookupTable, name: str) -> str:
    """Write a table as a C++17 header that includes only ``dsc_split/lookup_table.hpp``.

    The same table gives the same bytes. Every number is exact: decimal where that is exact, otherwise hexadecimal.
    The compiler checks the order of the content, and that C++ and Python pick the same choices: at every switch rate
    of every measured batch size, and in a few other states.

    Args:
        table: The table.
        name: Name of the variable, with or without namespaces: ``fleet::b4``. Its data is in a namespace beside it:
            ``fleet::b4_data``.

    Returns:
        The header, in ASCII.

    Raises:
        UsageError: ``name`` is no valid name of a variable in C++, or a time of the table overflows binary64.
    """
    *namespaces, variable = _split_name(name)
    _refuse_overflow(table)
    data = f"{variable}_data"
    lines = [
        *_preamble(table),
        *(f"namespace {part} {{" for part in namespaces),
        f"namespace {data} {{",
        "",
        *_data(table),
        *_CHECKS.splitlines(),
        "",
        f"}}  // namespace {data}",
        "",
        *_view(table, variable, data),
        "",
        *_assertions(table, variable, data),
        "",
        *(f"}}  // namespace {part}" for part in reversed(namespaces)),
    ]
    return "\n".join(lines) + "\n"


def _split_name(name: str) -> list[str]:
    parts = name.split("::")
    for part in parts:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", part) or "__" in part or part in KEYWORDS | TAKEN:
            raise UsageError(
                f"{name!r} is no name for a variable in C++; letters, digits and underscores were expected, a letter "
                "first, and no word of the language. Give one with --name, such as --name fleet::b4."
            )
    return parts


def _refuse_overflow(table: LookupTable) -> None:
    """Refuse a table with an infinite constant: the compiler would refuse it, too, with an unclear message."""
    choices = {choice.id: choice for choice in table.choices}
    for item in table.batches:
        lines = make_lines(
            in_order((choices[row.choice], row) for row in item.rows),
            measured_batch=item.batch,
            link=table.link,
            rtt_ms=table.link.rtt_ms,
            server_load=1.0,
            queue_ms=0.0,
            downlink_rate_mb_s=None,
        )
        for choice, (_, fixed_ms, *_) in zip(lines.choices, lines.numbers, strict=True):
            if fixed_ms == math.inf:
                raise UsageError(
                    f"at batch {item.batch} the tail and the network of choice {choice.name!r} take longer than "
                    "binary64 can say, so that there is no constant for it. Correct the link or the row."
                )


def _preamble(table: LookupTable) -> Iterator[str]:
    from dsc_split import __version__

    facts = {
        "pair_id": table.pair_id,
        "precision": table.precision,
        "count": table.count,
        "device": f"{table.device.target} {table.device.fingerprint}",
        "server": f"{table.server.target} {table.server.fingerprint}",
        "link": table.link.source,
        "emulated": "no" if table.emulated is None else canonical_json(table.emulated).decode(),
    }
    yield f"// Generated by dsc-split {__version__}; do not edit, make it again: dsc-split table BUNDLE --header FILE"
    yield "//"
    for key, value in facts.items():
        yield f"//   {key:<10} {_text(value)}"
    yield from ("#pragma once", "", '#include "dsc_split/lookup_table.hpp"', "")


def _data(table: LookupTable) -> Iterator[str]:
    position = {choice.id: i for i, choice in enumerate(table.choices)}
    yield "inline constexpr dsc_split::Choice choices[] = {"
    for choice in table.choices:
        kind, name = choice.kind.replace("-", "_"), _string_view(choice.name)
        yield f"    {{{choice.id}, dsc_split::Kind::{kind}, {_boolean(choice.passthrough)}, {name}}},"
    yield "};"
    yield ""
    link = table.link
    costs = ", ".join(map(_number, (link.c0_ms, link.c1_ms_per_mb, link.rtt_ms, link.round_trips)))
    yield "inline constexpr dsc_split::Link link{"
    yield f"    {costs}, {_boolean(link.count_downlink)}, {_optional(link.downlink_rate_mb_s)}}};"
    yield ""
    for at_batch, item in enumerate(table.batches):
        yield f"inline constexpr dsc_split::Row rows_{item.batch}[] = {{"
        for row in item.rows:
            at = position[row.choice]
            fields = ", ".join(_row(row, at, neighbour(table.batches, at_batch, row.choice)))
            yield f"    dsc_split::completed({{{fields}}}, choices[{at}], link),"
        yield "};"
        if len(item.rows) <= MOST_CERTAIN:
            rows = f"{{rows_{item.batch}, {len(item.rows)}}}"
            yield f"inline constexpr dsc_split::CertainRanges<{len(item.rows)}> certain_{item.batch}(link, {rows});"
        yield ""
    yield "inline constexpr dsc_split::Batch batches[] = {"
    for item in table.batches:
        certain = (
            f"{{certain_{item.batch}.data, certain_{item.batch}.size}}" if len(item.rows) <= MOST_CERTAIN else "{}"
        )
        yield f"    {{{item.batch}, {{rows_{item.batch}, {len(item.rows)}}}, {certain}}},"
    yield "};"
    yield ""


def _row(row: TableRow, position: int, other: tuple[int, TableRow] | None) -> Iterable[str]:
    """Write the fields of ``dsc_split::Row``, without those that ``dsc_split::completed`` computes from them."""
    return (
        str(position),
        _number(row.head_ms),
        _number(row.tail_ms),
        _time(row.head_p95_ms),
        _time(row.tail_p95_ms),
        _number(half_width(row.head_ci_ms)),
        _number(half_width(row.tail_ci_ms)),
        str(row.uplink_bytes),
        str(row.downlink_bytes),
        _boolean(row.timing_valid),
        *([] if other is None else map(str, (other[0], other[1].uplink_bytes, other[1].downlink_bytes))),
    )


def _view(table: LookupTable, variable: str, data: str) -> Iterator[str]:
    texts = (
        table.pair_id,
        table.precision,
        table.count,
        table.device.target,
        table.device.fingerprint,
        table.server.target,
        table.server.fingerprint,
    )
    yield f"inline constexpr dsc_split::TableView {variable}{{"
    yield f"    {{{data}::choices, {len(table.choices)}}},"
    yield f"    {{{data}::batches, {len(table.batches)}}},"
    yield f"    {data}::link,"
    for text in texts:
        yield f"    {_string_view(text)},"
    yield f"    {_boolean(table.emulated is not None)},"
    yield "};"


def _assertions(table: LookupTable, variable: str, data: str) -> Iterator[str]:
    rows = sum(len(item.rows) for item in table.batches)
    yield f'static_assert({data}::in_order({variable}), "{variable} is out of order");'
    yield f'static_assert({data}::row_count({variable}) == {rows}, "{variable} has other rows");'
    for state in _states(table):
        try:
            pick = table.pick(state)
        except UsageError:  # there is no pick, because no time is finite or known at the 95th percentile
            continue
        if math.inf in pick.times_ms:  # an infinite time is no constant in C++
            continue
        yield (
            f"static_assert({data}::picks({variable}, {_state(state)}, {pick.choice.id}, "
            f'{_number(pick.latency_ms)}), "{variable} picks otherwise");'
        )


def _states(table: LookupTable) -> Iterator[State]:
    """Yield the states in which the compiler checks the pick."""
    rate_mb_s = 1.0
    for item in table.batches:
        try:
            segments = table.switch_rates(State(batch=item.batch))
        except UsageError:  # no time is finite at any rate
            continue
        ends = [segment.below_rate_mb_s for segment in segments if segment.below_rate_mb_s is not None]
        rate_mb_s = ends[0] / 2.0 if ends else 1.0
        for rate in (rate_mb_s, *ends):
            yield State(batch=item.batch, rate_mb_s=rate)
    last = table.batches[-1].batch
    for batch in sorted({table.batches[0].batch, last}):
        yield State(
            batch=batch, rate_mb_s=rate_mb_s, downlink_rate_mb_s=3.7, rtt_ms=12.5, server_load=1.5, queue_ms=3.0
        )
        yield State(batch=batch, rate_mb_s=rate_mb_s, percentile=95)
    measured = {0, *(item.batch for item in table.batches)}
    if last - 1 not in measured and len(table.choices) * len(table.batches) <= MOST_CELLS:
        yield State(batch=last - 1, rate_mb_s=rate_mb_s)


# ---- C++ ---------------------------------------------------------------------------------------------------


def _number(value: float) -> str:
    """Write the exact binary64 value of a number, so that the compiler does not round."""
    decimal = repr(float(value))
    if Decimal(decimal) == Decimal(value):
        return decimal
    return re.sub(r"\.?0*p", "p", float(value).hex())


def _time(value: float | None) -> str:
    return "dsc_split::unknown_ms" if value is None else _number(value)


def _optional(value: float | None) -> str:
    return "std::nullopt" if value is None else _number(value)


def _boolean(value: bool) -> str:
    return "true" if value else "false"


def _state(state: State) -> str:
    """Write a state without a mask; fields after batch size and rate are left out if all have their default."""
    texts = [str(state.batch), _number(state.rate_mb_s)]
    if state != State(batch=state.batch, rate_mb_s=state.rate_mb_s):
        texts += [
            _optional(state.downlink_rate_mb_s),
            _optional(state.rtt_ms),
            _number(1.0 if state.server_load is None else state.server_load),
            _number(0.0 if state.queue_ms is None else state.queue_ms),
            "nullptr",
            f"dsc_split::Percentile::{'median' if state.percentile is None else 'p95'}",
        ]
    return f"{{{', '.join(texts)}}}"


def _string_view(text: str) -> str:
    """Write a ``std::string_view`` with its length, because the text may contain a NUL."""
    return f"{{{_text(text)}, {len(text.encode())}}}"


def _text(text: str) -> str:
    """Write a string literal in ASCII that no character ends early, also inside a comment."""
    return '"' + "".join(map(_character, text.encode())) + '"'


def _character(byte: int) -> str:
    if byte in b'"\\':
        return f"\\{byte:c}"
    # A question mark may start a trigraph. An octal escape has at most three digits, so the next character is safe.
    return chr(byte) if 0x20 <= byte < 0x7F and byte != ord("?") else f"\\{byte:03o}"
