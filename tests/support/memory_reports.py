"""Reports of memory, and the tables that go with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dsc_split.benchmarks.memory._reports import EngineMemory, MemoryReport, SetMemory
from dsc_split.lookup_table import BatchTable, Choice, Link, LookupTable, Row, Side, State

FULL, NONE = "full-offload", "no-offload"


def engine(choice: str, size_bytes: int | None, **changes: Any) -> EngineMemory:
    facts: dict[str, Any] = {
        "choice": choice,
        "graph": f"onnx/{choice}.onnx",
        "graph_digest": "0" * 64,
        "batch": 64,
        "resident_bytes": size_bytes,
        "gpu_bytes": None,
        "load_ms": 1.0,
        "first_run_ms": 2.0,
        "source": "measured",
    }
    return EngineMemory(**{**facts, **changes})


def held(size_bytes: int, *choices: str) -> SetMemory:
    return SetMemory(choices=choices, resident_bytes=size_bytes, gpu_bytes=None, source="measured")


def report(side: str, sizes_bytes: Mapping[str, int], *sets: SetMemory, **changes: Any) -> MemoryReport:
    facts: dict[str, Any] = {
        "pair_id": "sha256:" + 64 * "0",
        "side": side,
        "target": "onnxruntime:cpu",
        "fingerprint": "f" * 64,
        "run_fingerprint": {"host": "here", "threads": 1},
        "engines": tuple(engine(name, size) for name, size in sizes_bytes.items()),
        "sets": sets,
    }
    return MemoryReport(**{**facts, **changes})


def make_table(choices: list[Choice], times_ms: Mapping[int, Mapping[str, tuple[float, float, int]]]) -> LookupTable:
    """Make a table of head, tail and uplink bytes by batch size and choice; what is not given has no row."""
    batches = []
    for batch, rows in times_ms.items():
        made = []
        for choice in choices:
            if choice.name in rows:
                head_ms, tail_ms, uplink_bytes = rows[choice.name]
                row = Row(
                    choice=choice.id,
                    head_ms=head_ms,
                    head_ci_ms=None,
                    head_p95_ms=None,
                    tail_ms=tail_ms,
                    tail_ci_ms=None,
                    tail_p95_ms=None,
                    uplink_bytes=uplink_bytes,
                    downlink_bytes=0,
                )
                made.append(row)
        batches.append(BatchTable(batch=batch, rows=tuple(made), segments=()))
    side = Side(target="onnxruntime:cpu", fingerprint="f" * 64)
    table = LookupTable(
        pair_id="sha256:" + 64 * "0",
        precision="fp32",
        emulated=None,
        device=side,
        server=side,
        link=Link(),
        choices=tuple(choices),
        batches=tuple(batches),
    )
    return with_segments(table)


def with_segments(table: LookupTable) -> LookupTable:
    items = [dataclasses.replace(item, segments=table.switch_rates(State(batch=item.batch))) for item in table.batches]
    return dataclasses.replace(table, batches=tuple(items))


def choices_of(splits: int) -> list[Choice]:
    return [
        Choice(id=0, kind=FULL, name=FULL),
        *(Choice(id=i, kind="split", name=f"s{i}") for i in range(1, splits + 1)),
        Choice(id=splits + 1, kind=NONE, name=NONE),
    ]
