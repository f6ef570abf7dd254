"""Time lookups in the split lookup table, in C++ and in Python, as the table grows."""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nlohmann_json

from dsc_split._support.strict_json import write_json
from dsc_split.engines._fingerprint import processor_name
from dsc_split.lookup_table import BatchTable, Choice, Link, LookupTable, Row, Side, State
from dsc_split.table._header import table_header

HERE = Path(__file__).resolve().parent
SIZES = ((7, 8), (16, 16), (32, 32), (64, 64))
"""Batch sizes and choices; the first is that of a usual table."""
LEAST_SIZE, MOST_SIZE, MOST_ROWS = (3, 2), (4096, 1000), 16384
"""Batch sizes and choices; the rows of the largest table fit into the 8 MiB that are read."""
USUAL_CHOICES = 8
LINKS = {
    "paper": Link(),
    "counted downlink": Link(
        c0_ms=0.6, c1_ms_per_mb=2.8, rtt_ms=7.7, round_trips=1.5, count_downlink=True, source="measured"
    ),
}
GOALS_NS = {("lookup", "C++"): 20.0, ("lookup", "Python"): 3e3, ("load", "C++"): 1e6}
"""For tables of up to USUAL_CHOICES choices, on the table's own link."""
STATES = 2048
SHOWN = {
    "own": "the table's own link and load",
    "between": "  a batch size that was not measured",
    "state": "  any rates, round-trip time, load, queue",
    "mask": "  a mask",
    "switch_rates": "switch rates of a batch size",
    "load": "load the file",
}


def make_table(batches: int, choices: int, link: Link) -> LookupTable:
    """Make a table as a model's is: later cuts take longer on the device and send less."""
    numbers = random.Random(batches * choices)
    kinds = ["full-offload", *["split"] * (choices - 2), "no-offload"]
    names = [f"features.{i}" if kind == "split" else kind for i, kind in enumerate(kinds)]
    sizes = [2**i for i in range(batches)] if batches < 10 else [2 * (i + 1) for i in range(batches)]
    tables = []
    for batch in sizes:
        rows = []
        for i, kind in enumerate(kinds):
            depth = i / (choices - 1)
            sends = kind != "no-offload"
            head_ms = 60.0 * batch * depth * numbers.uniform(0.9, 1.1)
            tail_ms = 10.0 * batch * (1.0 - depth) * numbers.uniform(0.9, 1.1) if sends else 0.0
            rows.append(
                Row(
                    choice=i,
                    head_ms=head_ms,
                    head_ci_ms=(0.99 * head_ms, 1.01 * head_ms),
                    head_p95_ms=1.2 * head_ms,
                    tail_ms=tail_ms,
                    tail_ci_ms=(0.99 * tail_ms, 1.01 * tail_ms),
                    tail_p95_ms=1.2 * tail_ms,
                    uplink_bytes=int(600_000 * batch * (1.0 - depth) ** 2 * numbers.uniform(0.9, 1.1)) if sends else 0,
                    downlink_bytes=4000 * batch if sends else 0,
                )
            )
        tables.append(BatchTable(batch=batch, rows=tuple(rows), segments=()))
    table = LookupTable(
        pair_id="sha256:" + "0" * 64,
        precision="fp32",
        emulated=None,
        device=Side(target="device", fingerprint="0" * 64),
        server=Side(target="server", fingerprint="1" * 64),
        link=link,
        choices=tuple(Choice(id=i, kind=kinds[i], name=names[i]) for i in range(choices)),
        batches=tuple(tables),
    )
    return replace(
        table,
        batches=tuple(replace(item, segments=table.switch_rates(State(batch=item.batch))) for item in table.batches),
    )


def time_cpp(program: Path, table: Path, rounds: int) -> dict[str, float]:
    """Run the C++ program; gives nanoseconds by name."""
    done = subprocess.run([program, table, str(rounds)], capture_output=True, text=True, check=True)
    return {name: float(value) for name, value in map(str.split, done.stdout.splitlines())}


def time_python(path: Path, rounds: int) -> dict[str, float]:
    """Ask the same kinds of questions in Python; gives nanoseconds by name."""
    table = LookupTable.load(path)
    numbers = random.Random(1)
    batches = [item.batch for item in table.batches]
    own = [(numbers.choice(batches), numbers.lognormvariate(2.0, 1.5)) for _ in range(STATES)]
    between = [(numbers.choice(batches[2:]) - 1, rate) for _, rate in own]
    states = [
        State(
            batch=batch,
            rate_mb_s=rate,
            downlink_rate_mb_s=numbers.lognormvariate(2.0, 1.5),
            rtt_ms=numbers.uniform(0.0, 50.0),
            server_load=numbers.uniform(1.0, 2.0),
            queue_ms=numbers.uniform(0.0, 10.0),
        )
        for batch, rate in own
    ]
    masks = [[choice.id for choice in table.choices[:-1] if numbers.random() < 0.5] for _ in own]
    masks = [[*mask, table.choices[-1].id] for mask in masks]
    few = slice(0, STATES // 16)

    def ask_own(questions: list[tuple[int, float]]) -> None:
        for batch, rate in questions:
            table.pick(batch, rate)

    def ask_states() -> None:
        for state in states[few]:
            table.pick(state)

    def ask_masks() -> None:
        for (batch, rate), mask in zip(own[few], masks[few], strict=True):
            table.pick(batch, rate, allow=mask)

    return {
        "own": median_ns(lambda: ask_own(own), rounds) / STATES,
        "between": median_ns(lambda: ask_own(between), rounds) / STATES,
        "state": median_ns(ask_states, rounds) / len(own[few]),
        "mask": median_ns(ask_masks, rounds) / len(own[few]),
        "switch_rates": median_ns(lambda: [table.switch_rates(State(batch=batch)) for batch in batches], 3)
        / len(batches),
        "load": median_ns(lambda: LookupTable.load(path), min(rounds, 11)),
    }


def median_ns(body: Callable[[], Any], rounds: int) -> float:
    """Time a call so many times, after one that does not count."""
    body()
    times_ns = []
    for _ in range(rounds):
        start_ns = time.perf_counter_ns()
        body()
        times_ns.append(time.perf_counter_ns() - start_ns)
    return statistics.median(times_ns)


def duration(value_ns: float) -> str:
    """Write nanoseconds with three digits."""
    for unit, size_ns in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if value_ns >= size_ns:
            return f"{value_ns / size_ns:.3g} {unit}"
    return f"{value_ns:.3g} ns"


def size(text: str) -> tuple[int, int]:
    """Read what ``--sizes`` is given."""
    try:
        batches, choices = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected batch sizes and choices, like 7x8") from None
    pairs = zip(LEAST_SIZE, (batches, choices), MOST_SIZE, strict=True)
    if not all(least <= given <= most for least, given, most in pairs) or batches * choices > MOST_ROWS:
        raise argparse.ArgumentTypeError(
            f"got {text!r}; expected {LEAST_SIZE[0]} to {MOST_SIZE[0]} batch sizes and {LEAST_SIZE[1]} to "
            f"{MOST_SIZE[1]} choices, and at most {MOST_ROWS} rows in all"
        )
    return batches, choices


def say_goals(slowest_ns: dict[tuple[str, str], float]) -> None:
    """Print whether each goal is met by the slowest of the tables that it is about."""
    print(f"\ngoals, for up to {USUAL_CHOICES} choices on the table's own link; the slowest of these tables")
    for goal, most_ns in GOALS_NS.items():
        found_ns = slowest_ns.get(goal)
        verdict = (
            "no such table"
            if found_ns is None
            else f"{duration(found_ns)}: {'met' if found_ns < most_ns else 'missed'}"
        )
        print(f"{' '.join(goal):<16}under {duration(most_ns):<8}{verdict}")


def compiled(compiler: str, flags: list[str], source: Path, output: Path, *more: str) -> float:
    """Compile; gives the seconds that it took."""
    headers = [f"-I{HERE.parents[1] / 'cpp' / 'include'}", "-isystem", f"{next(iter(nlohmann_json.__path__))}/include"]
    start_s = time.perf_counter()
    subprocess.run([compiler, *flags, *headers, *more, str(source), "-o", str(output)], check=True)
    return time.perf_counter() - start_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compiler", default=os.environ.get("CXX", "g++"))
    parser.add_argument("--flags", default="-std=c++17 -O2")
    parser.add_argument("--rounds", type=int, default=101, help="The median is that of so many rounds.")
    parser.add_argument(
        "--sizes", type=size, nargs="+", default=SIZES, metavar="NxM", help="Batch sizes x choices of the tables."
    )
    options = parser.parse_args()
    flags = options.flags.split()
    version = subprocess.run([options.compiler, "--version"], capture_output=True, text=True, check=True).stdout

    print(f"{processor_name()}, {os.cpu_count()} processors; Python {platform.python_version()}")
    print(f"{version.splitlines()[0]}, {options.flags}; medians of {options.rounds} rounds")
    slowest_ns: dict[tuple[str, str], float] = {}
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "lookup"
        compiled(options.compiler, flags, HERE / "lookup.cpp", program)
        for link_name, link in LINKS.items():
            results = []
            for batches, choices in options.sizes:
                path = Path(folder) / "table.json"
                write_json(path, make_table(batches, choices, link).to_json())
                cpp = time_cpp(program, path, options.rounds)
                python = time_python(path, max(3, options.rounds // 5))
                results.append((cpp, python))
                if choices > USUAL_CHOICES:
                    continue
                found_ns = {
                    ("lookup", "C++"): cpp["own"],
                    ("lookup", "Python"): python["own"],
                    ("load", "C++"): cpp["load"],
                }
                slowest_ns = {goal: max(value, slowest_ns.get(goal, 0.0)) for goal, value in found_ns.items()}
            print(f"\nlink: {link_name}; batch sizes x choices, C++ | Python")
            print(" " * 42 + "".join(f"{f'{batches} x {choices}':>22}" for batches, choices in options.sizes))
            for name, words in SHOWN.items():
                cells = [f"{duration(cpp[name])} | {duration(python[name])}" for cpp, python in results]
                print(f"{words:<42}" + "".join(f"{cell:>22}" for cell in cells))
        say_goals(slowest_ns)

        print("\ngenerated header: size, and compilation with its checks")
        source = Path(folder) / "table.cpp"
        for batches, choices in options.sizes:
            header = table_header(make_table(batches, choices, Link()), "table")
            source.write_text(header.replace("#pragma once", ""))
            took_s = compiled(options.compiler, flags, source, Path(folder) / "table.o", "-c")
            print(f"{f'{batches} x {choices}':>8} {len(header) / 1000:>6.0f} KB {took_s:>6.2f} s")
        source.write_text('#include "dsc_split/lookup_table.hpp"\n')
        print(f"core alone {compiled(options.compiler, flags, source, Path(folder) / 'table.o', '-c'):>14.2f} s")


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads this has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
