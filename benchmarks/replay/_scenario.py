"""Scenarios: the link, the batch size and the server's load over time, read from files.

A file is a CSV with a header, or a packet-delivery trace of Mahimahi; ``docs/replay.md`` describes both.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import os
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dsc_split._support.numbers import number, whole
from dsc_split.errors import DamagedError, UsageError
from dsc_split.lookup_table import State

if TYPE_CHECKING:
    from _csv import Reader

__all__ = [
    "COLUMNS",
    "MAX_BATCH",
    "MAX_SCENARIO_BYTES",
    "MAX_STATES",
    "MAX_TIME_S",
    "PACKET_GOODPUT_BYTES",
    "Scenario",
    "TimedState",
    "read_scenario",
]

COLUMNS = ("time_s", "rate_mb_s", "downlink_rate_mb_s", "batch", "server_load", "queue_ms", "rtt_ms")
"""Columns of a CSV, in any order; the first two are required."""
MAX_SCENARIO_BYTES = 64 * 1024 * 1024
"""A larger file is refused before it is parsed."""
MAX_STATES = 1_000_000
"""A scenario of more states is refused."""
MAX_TIME_S = 1e9
"""Later times (32 years) are refused: they are too large to keep milliseconds exactly."""
MAX_BATCH = 2**20
"""Larger batch sizes are refused, as in tables."""
PACKET_GOODPUT_BYTES = 1448
"""Payload of one delivery opportunity of Mahimahi: a packet of 1504 bytes less IP, TCP and timestamp headers."""

_DEFAULT_SPACING_S = 1.0
"""How long a state lasts that is the only one of its scenario."""
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_WHOLE = re.compile(r"\d{1,15}", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedState:
    """A state, and when it begins; it lasts until the next one."""

    time_s: float
    """When it begins, in seconds."""
    state: State
    """The state from then on."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """States over time."""

    name: str
    """The name of the file that they are from."""
    states: tuple[TimedState, ...]
    """By ascending time; never empty."""
    end_s: float
    """When the last state ends, in seconds."""

    @classmethod
    def of(cls, states: Sequence[TimedState], *, name: str = "scenario") -> Scenario:
        """Make a scenario; the last state lasts as long as the median of the others, or a second if it is the only one.

        Raises:
            UsageError: There is no state, or times do not ascend.
        """
        if not states:
            raise UsageError(f"scenario {name!r} has no states; at least one was expected.")
        times_s = [timed.time_s for timed in states]
        lasting_s = [later - time_s for time_s, later in itertools.pairwise(times_s)]
        if not all(duration_s > 0.0 for duration_s in lasting_s):
            raise UsageError(f"the states of scenario {name!r} are not by ascending time; sort them.")
        last_s = statistics.median(lasting_s) if lasting_s else _DEFAULT_SPACING_S
        return cls(name=name, states=tuple(states), end_s=times_s[-1] + last_s)


def read_scenario(
    path: str | os.PathLike[str],
    *,
    batch: int = 1,
    bin_s: float = 1.0,
    downlink: str | os.PathLike[str] | None = None,
) -> Scenario:
    """Read a CSV with a header, or a packet-delivery trace of Mahimahi: a file whose first line is a whole number.

    Args:
        path: The file.
        batch: Batch size where the file has none.
        bin_s: A packet trace is counted in bins of this many seconds.
        downlink: A packet trace of the downlink, if ``path`` is one of the uplink; repeated if it is shorter.

    Raises:
        UsageError: There is no such file, or an argument does not fit.
        DamagedError: The file cannot be read, is too large, not UTF-8, or has a wrong line; the message names the line.
    """
    place = Path(path)
    batch = whole(
        "batch", batch, least=1, most=MAX_BATCH, expected=f"a whole number from 1 to {MAX_BATCH} was expected"
    )
    bin_s = number("bin of", bin_s, least=0.001, most=MAX_TIME_S, unit="s")
    text = _read_text(place)
    if not _is_packet_trace(text):
        if downlink is not None:
            raise UsageError(
                f"scenario {str(place)!r} is a CSV, whose downlink is its column 'downlink_rate_mb_s'; a second file "
                "goes with a packet trace alone."
            )
        return _read_csv(text, place, batch)
    up_mb_s, ends_s = _count_rates_mb_s(text, place, bin_s)
    down_mb_s: Sequence[float | None] = [None]
    if downlink is not None:
        down_text = _read_text(Path(downlink))
        if not _is_packet_trace(down_text):
            _fail(Path(downlink), 1, "no packet trace: a line with one whole number, milliseconds, was expected")
        down_mb_s = _count_rates_mb_s(down_text, Path(downlink), bin_s)[0]
    states = [
        TimedState(
            time_s=i * bin_s,
            state=State(batch=batch, rate_mb_s=rate_mb_s, downlink_rate_mb_s=down_mb_s[i % len(down_mb_s)]),
        )
        for i, rate_mb_s in enumerate(up_mb_s)
    ]
    return Scenario(name=place.name, states=tuple(states), end_s=ends_s)


# ---- CSV ---------------------------------------------------------------------------------------------------


def _read_csv(text: str, path: Path, batch: int) -> Scenario:
    reader = csv.reader(io.StringIO(text), strict=True)
    header: list[str] | None = None
    states: list[TimedState] = []
    for fields in _read_rows(reader, path):
        if header is None:
            header = _check_header(fields, path, reader.line_num)
            continue
        if len(fields) != len(header):
            _fail(path, reader.line_num, f"{len(fields)} fields; {len(header)} were expected, as in the header")
        state = _read_state(dict(zip(header, fields, strict=True)), path, reader.line_num, batch)
        if states and state.time_s <= states[-1].time_s:
            _fail(
                path,
                reader.line_num,
                f"time_s {state.time_s:g} is not after {states[-1].time_s:g}, the one before; sort the lines by time",
            )
        if len(states) == MAX_STATES:
            _fail(path, reader.line_num, f"more than {MAX_STATES} states; replay a part of them")
        states.append(state)
    if not states:
        _fail(path, max(1, reader.line_num), "no states; a header (time_s,rate_mb_s) and lines were expected")
    return Scenario.of(states, name=path.name)


def _read_rows(reader: Reader, path: Path) -> Iterator[list[str]]:
    """Yield the fields of every line that is not blank, without spaces around them."""
    try:
        for fields in reader:
            stripped = [field.strip() for field in fields]
            if any(stripped):
                yield stripped
    except csv.Error as e:
        _fail(path, reader.line_num, f"no CSV ({e})")


def _check_header(fields: list[str], path: Path, line: int) -> list[str]:
    unknown = [name for name in fields if name not in COLUMNS]
    if unknown:
        hint = "" if set(fields) & set(COLUMNS) else " The first line names the columns, separated by commas."
        _fail(path, line, f"unknown columns {_quote_names(unknown)}; known are {_quote_names(COLUMNS)}.{hint}")
    missing = [name for name in COLUMNS[:2] if name not in fields]
    if missing:
        _fail(path, line, f"the header lacks {_quote_names(missing)}")
    twice = sorted({name for name in fields if fields.count(name) > 1})
    if twice:
        _fail(path, line, f"columns {_quote_names(twice)} stand twice in the header")
    return fields


def _read_state(fields: Mapping[str, str], path: Path, line: int, batch: int) -> TimedState:
    def read(name: str, *, most: float = math.inf, infinite: bool = False) -> float | None:
        text = fields.get(name, "")
        if not text:
            return None
        value = math.inf if infinite and text.lower() == "inf" else _parse_number(text)
        expected = f"a number from 0{f' to {most:g}' if most < math.inf else ''}{', or inf,' if infinite else ''}"
        if value is None or not 0.0 <= value <= most:
            _fail(path, line, f"{name}: got {_quote_short(text)}; {expected} was expected")
        return value + 0.0

    def need(name: str, *, most: float = math.inf, infinite: bool = False) -> float:
        value = read(name, most=most, infinite=infinite)
        if value is None:
            _fail(path, line, f"{name} is empty; a number was expected")
        return value

    text = fields.get("batch", "")
    if text and not (_WHOLE.fullmatch(text) and 1 <= int(text) <= MAX_BATCH):
        _fail(path, line, f"batch: got {_quote_short(text)}; a whole number from 1 to {MAX_BATCH} was expected")
    return TimedState(
        time_s=need("time_s", most=MAX_TIME_S),
        state=State(
            batch=int(text) if text else batch,
            rate_mb_s=need("rate_mb_s", infinite=True),
            downlink_rate_mb_s=read("downlink_rate_mb_s", infinite=True),
            server_load=read("server_load"),
            queue_ms=read("queue_ms"),
            rtt_ms=read("rtt_ms"),
        ),
    )


def _parse_number(text: str) -> float | None:
    """Read a finite number; ``None`` for anything else."""
    value = float(text) if len(text) <= 400 and _NUMBER.fullmatch(text) else math.inf
    return value if math.isfinite(value) else None


# ---- packet traces -----------------------------------------------------------------------------------------


def _is_packet_trace(text: str) -> bool:
    first = next((line.strip() for line in io.StringIO(text) if line.strip()), "")
    return _WHOLE.fullmatch(first) is not None


def _count_rates_mb_s(text: str, path: Path, bin_s: float) -> tuple[list[float], float]:
    """Count a trace in bins; return the rate of each bin in MB/s, and the end of the last one in seconds.

    The last line is the trace's length: Mahimahi repeats it from there. A last bin that is not full is left out,
    unless it is the only one.
    """
    counts: dict[int, int] = {}
    previous_ms = line_number = 0
    for line_number, line in enumerate(io.StringIO(text), start=1):
        field = line.strip()
        if not field:
            continue
        if not _WHOLE.fullmatch(field):
            _fail(path, line_number, f"got {_quote_short(field)}; one whole number, milliseconds, was expected")
        time_ms = int(field)
        if time_ms > MAX_TIME_S * 1000:
            _fail(path, line_number, f"{time_ms} ms is out of range; at most {MAX_TIME_S * 1000:g} ms were expected")
        if time_ms < previous_ms:
            _fail(
                path, line_number, f"{time_ms} ms is before {previous_ms} ms, the line before; sort the lines by time"
            )
        previous_ms = time_ms
        position = max(0, math.ceil(time_ms / 1000 / bin_s - 1e-9) - 1)
        counts[position] = counts.get(position, 0) + 1
    length_s = previous_ms / 1000
    if length_s == 0.0:
        _fail(path, line_number, "the trace ends at 0 ms; its last line is its length, and has to be above 0")
    bins = max(1, math.floor(length_s / bin_s + 1e-9))
    if bins > MAX_STATES:
        raise DamagedError(
            f"scenario {str(path)!r} has {bins} bins of {bin_s:g} s; at most {MAX_STATES} are read. Take longer bins."
        )
    each_s = min(length_s, bin_s)
    rates_mb_s = [counts.get(position, 0) * PACKET_GOODPUT_BYTES / 1e6 / each_s for position in range(bins)]
    return rates_mb_s, bins * each_s


# ---- shared by both ----------------------------------------------------------------------------------------


def _read_text(path: Path) -> str:
    what = f"scenario {str(path)!r}"
    if not path.exists():
        raise UsageError(f"no {what}: there is no such file.")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_SCENARIO_BYTES + 1)
    except OSError as e:
        raise DamagedError(f"{what} cannot be read: {e.strerror or e}.") from e
    if len(data) > MAX_SCENARIO_BYTES:
        raise DamagedError(f"{what} has more than {MAX_SCENARIO_BYTES} bytes, which is as much as is read.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise DamagedError(f"{what}, line {line}: not UTF-8 ({e.reason} at byte {e.start} of the file).") from e


def _fail(path: Path, line: int, what: str) -> NoReturn:
    raise DamagedError(f"scenario {str(path)!r}, line {line}: {what}.")


def _quote_names(names: Sequence[str]) -> str:
    return ", ".join(map(_quote_short, names))


def _quote_short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")
