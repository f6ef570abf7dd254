"""Questions to lookup tables and their answers, in a form that every language reads without a parser.

A line is a question: table, batch, rate, downlink rate, round-trip time, server load, queue, percentile, mask, and a
choice's position. Numbers are the sixteen hexadecimal digits of their binary64 bits, ``-`` is what was not given, and a
mask is a 0 or 1 for each choice. Its answer: ids of the choice and of the runner-up, T of both, uncertainty, measured
batch, T of the choice at the position, and the segments (id and boundary); ``error`` where there is none.

``python -m tests.support.vectors`` writes the golden file anew.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import random
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tests.support.paths import DATA

from dsc_split.errors import UsageError
from dsc_split.lookup_table import BatchTable, Choice, Link, LookupTable, Side, State
from dsc_split.table._types import Row, Segment

FOLDER = DATA / "vectors"
GOLDEN = FOLDER / "golden.txt.gz"
QUESTIONS = 14_000

ODD_RATES = [0.0, -0.0, math.inf, 5e-324, 2.2e-308, 1e-300, 1e-12, 1e12, 1e300, 1.7976931348623157e308, math.nan, -1.0]


@dataclass(frozen=True, kw_only=True)
class Question:
    """One state of one table."""

    table: int
    batch: int
    rate_mb_s: float
    downlink_rate_mb_s: float | None = None
    rtt_ms: float | None = None
    server_load: float | None = None
    queue_ms: float | None = None
    percentile: int | None = None
    allow: tuple[bool, ...] | None = None
    position: int = 0

    def line(self) -> str:
        numbers = [self.rate_mb_s, self.downlink_rate_mb_s, self.rtt_ms, self.server_load, self.queue_ms]
        mask = "-" if self.allow is None else "".join(str(int(allowed)) for allowed in self.allow)
        words = [self.table, self.batch, *map(bits, numbers), self.percentile or "-", mask, self.position]
        return " ".join(map(str, words))

    @staticmethod
    def of(line: str) -> Question:
        table, batch, *numbers, percentile, mask, position = line.split()
        rate, downlink, rtt, load, queue = map(number, numbers)
        assert rate is not None
        return Question(
            table=int(table),
            batch=int(batch),
            rate_mb_s=rate,
            downlink_rate_mb_s=downlink,
            rtt_ms=rtt,
            server_load=load,
            queue_ms=queue,
            percentile=None if percentile == "-" else int(percentile),
            allow=None if mask == "-" else tuple(bit == "1" for bit in mask),
            position=int(position),
        )


def bits(value: float | None) -> str:
    return "-" if value is None else struct.pack(">d", value).hex()


def number(text: str) -> float | None:
    return None if text == "-" else float(struct.unpack(">d", bytes.fromhex(text))[0])


def answer(table: LookupTable, question: Question) -> str:
    """Answer in Python."""
    allow = None
    if question.allow is not None:
        allow = [choice.id for choice, allowed in zip(table.choices, question.allow, strict=True) if allowed]
    plain = State(batch=question.batch, rate_mb_s=question.rate_mb_s)
    state = replace(
        plain,
        downlink_rate_mb_s=question.downlink_rate_mb_s,
        rtt_ms=question.rtt_ms,
        server_load=question.server_load,
        queue_ms=question.queue_ms,
        allow=allow,
        percentile=question.percentile,
    )
    words: list[object] = []
    try:
        pick = table.pick(question.batch, question.rate_mb_s) if state == plain else table.pick(state)
        second = None if pick.runner_up is None else pick.runner_up.id
        second_ms = pick.times_ms[pick.lines.choices.index(pick.runner_up)] if pick.runner_up else math.inf
        words += [pick.choice.id, second, bits(pick.latency_ms), bits(second_ms), bits(pick.uncertainty_ms)]
        words += [pick.measured_batch, int(pick.timing_valid)]
    except UsageError:
        words.append("error")
    try:
        words.append(bits(table.latency_ms(table.choices[question.position].id, state)))
    except UsageError:
        words.append("error")
    try:
        for segment in table.switch_rates(state):
            words += [segment.choice, bits(math.inf if segment.below_rate_mb_s is None else segment.below_rate_mb_s)]
    except UsageError:
        words.append("error")
    return " ".join(map(str, words))


def random_table(numbers: random.Random, *, most_choices: int = 8) -> LookupTable:
    """Make a table of few or many choices; often with equal times and bytes, so that there are ties."""
    ids = sorted(numbers.sample(range(40), numbers.randint(1, most_choices)))
    kinds = ["split"] * len(ids)
    if numbers.random() < 0.7:
        kinds[0] = "full-offload"
    if len(ids) > 1 and numbers.random() < 0.8:
        kinds[-1] = "no-offload"
    choices = tuple(
        Choice(
            id=id_,
            kind=kind,
            name=f"cut{id_}" if kind == "split" else kind,
            passthrough=kind == "split" and numbers.random() < 0.2,
        )
        for id_, kind in zip(ids, kinds, strict=True)
    )
    style = numbers.choice(["measured", "round", "extreme"])
    sizes = sorted(numbers.sample([1, 2, 3, 4, 7, 8, 16, 32, 64, 1 << 20], numbers.randint(1, 5)))
    rows = [
        [_random_row(numbers, choice, batch, style) for choice in choices if numbers.random() < 0.9] for batch in sizes
    ]
    table = LookupTable(
        pair_id="sha256:" + "0" * 64,
        precision="fp32",
        emulated=None,
        device=Side(target="device", fingerprint="d"),
        server=Side(target="server", fingerprint="s"),
        link=_random_link(numbers, style),
        choices=choices,
        batches=tuple(
            BatchTable(batch=batch, rows=tuple(some), segments=())
            for batch, some in zip(sizes, rows, strict=True)
            if some
        ),
    )
    try:
        batches = tuple(replace(item, segments=table.switch_rates(State(batch=item.batch))) for item in table.batches)
    except UsageError:  # times so large that every sum is infinite
        batches = ()
    return replace(table, batches=batches) if batches else random_table(numbers, most_choices=most_choices)


def _random_row(numbers: random.Random, choice: Choice, batch: int, style: str) -> Row:
    def time_ms() -> float:
        if style == "round":
            return float(numbers.choice([0, 1, 2, 5, 10, 10, 20]))
        if style == "extreme":
            return numbers.choice([0.0, 5e-324, 1e-300, 1e-9, 1.0, 1e9, 1e100, 1e200])
        return numbers.lognormvariate(2.0, 2.0)

    def size_bytes() -> int:
        if style == "round":
            return numbers.choice([0, 1000, 1000, 2000, 500_000]) * batch
        if style == "extreme":
            return numbers.choice([0, 1, 2**42, 2**42 - 1, numbers.randrange(2**42)])
        return min(int(numbers.lognormvariate(11.0, 2.0)) * batch, 2**40) + numbers.choice([0, 0, 12])

    def interval(middle: float) -> tuple[float, float] | None:
        return None if numbers.random() < 0.2 else (middle * 0.98, middle * numbers.choice([1.0, 1.02, 1.3]))

    head, tail = time_ms(), time_ms()
    sends = choice.uses_server
    return Row(
        choice=choice.id,
        head_ms=head,
        head_ci_ms=interval(head),
        head_p95_ms=None if numbers.random() < 0.1 else head * 1.25,
        tail_ms=tail if sends else 0.0,
        tail_ci_ms=interval(tail) if sends else None,
        tail_p95_ms=None if numbers.random() < 0.1 else tail * 1.5 if sends else 0.0,
        uplink_bytes=size_bytes() if sends else 0,
        downlink_bytes=size_bytes() if sends else 0,
        timing_valid=numbers.random() < 0.9,
    )


def _random_link(numbers: random.Random, style: str) -> Link:
    if numbers.random() < 0.3:
        return Link()
    extreme = style == "extreme"
    return Link(
        c0_ms=numbers.choice([0.0, 0.61, 1e200 if extreme else 2.0]),
        c1_ms_per_mb=numbers.choice([0.0, 2.83, 1e-300 if extreme else 5.3]),
        rtt_ms=numbers.choice([0.0, 7.7, 40.0]),
        round_trips=numbers.choice([1.0, 0.0, 1.5]),
        count_downlink=numbers.random() < 0.6,
        downlink_rate_mb_s=numbers.choice([None, None, 33.3, 1e-9 if extreme else 1.0]),
        source="random",
    )


def random_questions(numbers: random.Random, tables: Sequence[LookupTable], count: int) -> Iterator[Question]:
    """Make questions: rates at and beside the boundaries, odd ones, and any; batches measured and not; masks."""
    for i in range(count):
        index = i % len(tables)
        table = tables[index]
        measured = [item.batch for item in table.batches]
        batch = numbers.choice(measured)
        if numbers.random() < 0.3:
            batch = numbers.choice(
                [1, 2, 3, 5, 6, 9, numbers.randint(1, max(measured)), numbers.choice([0, -1, max(measured) + 1])]
            )
        allow = None
        if numbers.random() < 0.3:
            allow = tuple(numbers.random() < 0.7 for _ in table.choices)
        plain = numbers.random() < 0.4

        def maybe(values: list[float], numbers: random.Random = numbers, plain: bool = plain) -> float | None:
            if plain or numbers.random() < 0.4:
                return None
            return numbers.choice([math.nan, -1.0, math.inf] if numbers.random() < 0.02 else values)

        yield Question(
            table=index,
            batch=batch,
            rate_mb_s=_random_rate(numbers, numbers.choice(table.batches).segments),
            downlink_rate_mb_s=maybe([numbers.lognormvariate(2.0, 2.0), *ODD_RATES[:-2]]),
            rtt_ms=maybe([0.0, 12.5, numbers.uniform(0.0, 100.0), 1e300, 5e-324]),
            server_load=maybe([1.0, 0.0, 1.5, numbers.uniform(0.0, 5.0), 1e308]),
            queue_ms=maybe([0.0, 3.0, numbers.uniform(0.0, 50.0), 1e308]),
            percentile=None if plain else numbers.choice([None] * 20 + [50] * 10 + [95] * 19 + [99]),
            allow=allow,
            position=numbers.randrange(len(table.choices)),
        )


def _random_rate(numbers: random.Random, segments: Sequence[Segment]) -> float:
    boundaries = [segment.below_rate_mb_s for segment in segments if segment.below_rate_mb_s is not None]
    chance = numbers.random()
    if boundaries and chance < 0.35:
        boundary = numbers.choice(boundaries)
        as_bits = struct.unpack("<q", struct.pack("<d", boundary))[0] + numbers.choice([-1, 0, 0, 1])
        return float(struct.unpack("<d", struct.pack("<q", as_bits))[0])
    if chance < 0.5:
        return numbers.choice(ODD_RATES)
    return numbers.lognormvariate(2.0, 3.0)


def golden_tables() -> list[Path]:
    """List the tables of the golden file, by their number there."""
    return sorted(FOLDER.glob("table-*.json"))


def golden_vectors() -> tuple[list[str], list[str]]:
    """Read the golden questions and answers."""
    lines = gzip.decompress(GOLDEN.read_bytes()).decode().splitlines()
    pairs = [line.split(" = ") for line in lines if not line.startswith("#")]
    return [question for question, _ in pairs], [expected for _, expected in pairs]


def write_golden() -> None:
    numbers = random.Random(20)
    tables = [random_table(numbers) for _ in range(11)] + [random_table(numbers, most_choices=30)]
    for i, table in enumerate(tables):
        text = json.dumps(table.to_json(), separators=(",", ":"), allow_nan=False)
        (FOLDER / f"table-{i:02}.json").write_text(text + "\n", encoding="utf-8")
    lines = [f"# {line}" for line in (__doc__ or "").splitlines()[2:-2]]
    for question in itertools.islice(random_questions(numbers, tables, QUESTIONS), QUESTIONS):
        lines.append(f"{question.line()} = {answer(tables[question.table], question)}")
    GOLDEN.write_bytes(gzip.compress("\n".join(lines).encode() + b"\n", mtime=0))


if __name__ == "__main__":
    write_golden()
