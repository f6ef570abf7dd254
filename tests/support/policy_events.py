"""What happens to a switching policy and what it answers, in a form that every language reads without a parser.

A sequence is a table, a policy with its parameters, and events; a line each. Times and rates are the sixteen
hexadecimal digits of their binary64 bits, ``-`` is what was not given, a mask is a 0 or 1 for each choice, and choices
are given by position. Every event has an answer: what the call returned or ``error``, then the estimate of the rate
(rate, deviation, age, whether it is stale), the server's load and its queue.

``python -m tests.support.policy_events`` writes the golden file anew.
"""

from __future__ import annotations

import dataclasses
import gzip
import math
import random
from collections.abc import Iterator
from typing import Any

from tests.support.paths import DATA
from tests.support.vectors import bits, number, random_table

from dsc_split.errors import UsageError
from dsc_split.lookup_table import BatchTable, Choice, Link, LookupTable, Row, Side, State
from dsc_split.serving import Decision, EstimatorParameters, Observation, PolicyParameters, RateEstimator, SwitchPolicy

GOLDEN = DATA / "policy" / "golden.txt.gz"
GOLDEN_TABLE = DATA / "tables" / "golden.json"
SEQUENCES = 40
EVENTS = 60
_NO_CHOICE = 1_000_000


def table_line(table: LookupTable) -> str:
    link = table.link
    words = ["table", *map(bits, (link.c0_ms, link.c1_ms_per_mb, link.rtt_ms, link.round_trips))]
    words += [_flag(link.count_downlink), bits(link.downlink_rate_mb_s), str(len(table.choices))]
    for choice in table.choices:
        words += [str(choice.id), _flag(choice.uses_server)]
    positions = {choice.id: position for position, choice in enumerate(table.choices)}
    words.append(str(len(table.batches)))
    for item in table.batches:
        words += [str(item.batch), str(len(item.rows))]
        for row in item.rows:
            words.append(str(positions[row.choice]))
            words += map(bits, (row.head_ms, row.tail_ms, row.head_p95_ms, row.tail_p95_ms))
            words += [str(row.uplink_bytes), str(row.downlink_bytes)]
    return " ".join(words)


def table_of(words: list[str]) -> LookupTable:
    """Make the table of a line, without its first word; what a policy does not ask for is made up."""
    given = iter(words)

    def take(count: int) -> list[str]:
        return [next(given) for _ in range(count)]

    c0, c1, rtt, trips, counts, downlink = take(6)
    kinds = [take(2) for _ in range(int(next(given)))]
    choices = tuple(
        Choice(id=int(id_), kind="split" if sends == "1" else "no-offload", name=f"choice{id_}") for id_, sends in kinds
    )
    batches = []
    for _ in range(int(next(given))):
        batch, count = take(2)
        rows = []
        for _ in range(int(count)):
            position, head, tail, head_p95, tail_p95, up, down = take(7)
            rows.append(
                Row(
                    choice=choices[int(position)].id,
                    head_ms=_number(head),
                    head_ci_ms=None,
                    head_p95_ms=number(head_p95),
                    tail_ms=_number(tail),
                    tail_ci_ms=None,
                    tail_p95_ms=number(tail_p95),
                    uplink_bytes=int(up),
                    downlink_bytes=int(down),
                )
            )
        batches.append(BatchTable(batch=int(batch), rows=tuple(rows), segments=()))
    return LookupTable(
        pair_id="sha256:" + "0" * 64,
        precision="fp32",
        emulated=None,
        device=Side(target="device", fingerprint="d"),
        server=Side(target="server", fingerprint="s"),
        link=Link(
            c0_ms=_number(c0),
            c1_ms_per_mb=_number(c1),
            rtt_ms=_number(rtt),
            round_trips=_number(trips),
            count_downlink=counts == "1",
            downlink_rate_mb_s=number(downlink),
        ),
        choices=choices,
        batches=tuple(batches),
    )


def parameter_words(parameters: PolicyParameters | EstimatorParameters) -> list[str]:
    words = []
    for field in dataclasses.fields(parameters):
        value = getattr(parameters, field.name)
        plain = field.type == "int" or field.name == "percentile"
        words.append("-" if value is None else str(value) if plain else bits(value))
    return words


def policy_of(table: LookupTable, words: list[str]) -> SwitchPolicy:
    """Make the policy of a line, without its first word."""
    of_policy, of_estimator = dataclasses.fields(PolicyParameters), dataclasses.fields(EstimatorParameters)
    *parameters, rate, mask = words
    allow = None if mask == "-" else [choice.id for choice, bit in zip(table.choices, mask, strict=True) if bit == "1"]
    estimator = RateEstimator(
        EstimatorParameters(**_values(of_estimator, parameters[len(of_policy) :])), initial_rate_mb_s=number(rate)
    )
    return SwitchPolicy(table, PolicyParameters(**_values(of_policy, parameters[: len(of_policy)])), estimator, allow)


class Player:
    """Plays events on a policy in Python."""

    def __init__(self, policy: SwitchPolicy) -> None:
        self.policy = policy
        self.table = policy.table
        self.decision: Decision | None = None

    def play(self, line: str) -> str:
        event, time, *words = line.split()
        time_s = number(time)
        assert time_s is not None
        try:
            answer = self._call(event, time_s, words)
        except UsageError:
            answer = "error"
        at_s = time_s if 0.0 <= time_s < math.inf else 0.0
        estimate = self.policy.estimator.estimate(at_s)
        said = [answer]
        if estimate is not None:
            said += map(bits, (estimate.rate_mb_s, estimate.deviation_s_per_mb, estimate.age_s))
            said.append(_flag(estimate.stale))
        return " ".join([*said, bits(self.policy.server_load(at_s)), bits(self.policy.queue_ms(at_s))])

    def _call(self, event: str, time_s: float, words: list[str]) -> str:
        policy = self.policy
        if event == "decide":
            self.decision = None
            made = self.decision = policy.decide(time_s, int(words[0]))
            numbers = f"{bits(made.predicted_ms)} {bits(made.timeout_ms)}"
            return f"{made.choice.id} {made.reason} {numbers} {made.probe_bytes}"
        if event == "observe":
            policy.observe(self._observation(time_s, words))
        elif event == "failed":
            policy.failed(time_s, self._id(words[0]), started_s=number(words[1]))
        elif event == "probed":
            size, transfer, rtt, limited = words
            return policy.probed(
                time_s, int(size), _number(transfer), rtt_ms=number(rtt), window_limited=limited == "1"
            )
        elif event == "restart":
            policy.restart()
        else:
            policy.probe_failed(time_s)
        return "ok"

    def _observation(self, time_s: float, words: list[str]) -> Observation:
        position, batch, latency, head, *others, limited = words
        rpc_ms, server_ms, queue_ms, rtt_ms = map(number, others)
        return Observation(
            time_s=time_s,
            choice=self._id(position),
            batch=int(batch),
            latency_ms=_number(latency),
            head_ms=_number(head),
            rpc_ms=rpc_ms,
            server_ms=server_ms,
            queue_ms=queue_ms,
            rtt_ms=rtt_ms,
            window_limited=limited == "1",
        )

    def _id(self, position: str) -> int:
        at = int(position)
        return self.table.choices[at].id if 0 <= at < len(self.table.choices) else _NO_CHOICE


class World:
    """A link and a server that change: the rate steps, fades, wanders or goes away, and the load comes and goes."""

    def __init__(self, numbers: random.Random) -> None:
        self._numbers = numbers
        self._style = numbers.choice(["still", "step", "fade", "wander", "outage"])
        self._middle = numbers.lognormvariate(1.5, 1.5)
        self._log = 0.0
        self._step = 0
        self.noise = numbers.choice([0.0, 0.05, 0.2, 0.6])
        self.rtt_ms = numbers.choice([None, None, 1.0, 20.0, 150.0])
        self.reports = numbers.choice(["nothing", "server", "queue"])
        self.load = 1.0
        self.queue_ms = 0.0

    def rate_mb_s(self) -> float:
        numbers = self._numbers
        self._step += 1
        if numbers.random() < 0.05:
            self.load, self.queue_ms = numbers.choice([(1.0, 0.0), (3.0, 20.0), (0.5, 0.0), (1.0, 500.0)])
        if self._style == "step":
            return self._middle * (1.0 if self._step // 15 % 2 else 0.05)
        if self._style == "fade":
            return self._middle * (0.01 if self._step % 12 in (5, 6) else 1.0)
        if self._style == "outage":
            return 0.0 if 20 <= self._step % 40 < 30 else self._middle
        if self._style == "wander":
            self._log = 0.95 * self._log + numbers.gauss(0.0, 0.3)
            return self._middle * math.exp(self._log)
        return self._middle

    def noisy(self, value: float) -> float:
        return value * self._numbers.lognormvariate(0.0, self.noise)


def sequence(numbers: random.Random, *, events: int = EVENTS) -> Iterator[tuple[str, str | None]]:
    """Make a table, a policy and events, each with its answer in Python."""
    table = LookupTable.load(GOLDEN_TABLE) if numbers.random() < 0.4 else random_table(numbers)
    world = World(numbers)
    policy_words = [
        *parameter_words(_random_parameters(numbers) if numbers.random() < 0.6 else PolicyParameters()),
        *parameter_words(_random_estimator(numbers) if numbers.random() < 0.4 else EstimatorParameters()),
        bits(numbers.lognormvariate(1.0, 2.0) if numbers.random() < 0.3 else None),
        "".join(_flag(numbers.random() < 0.7) for _ in table.choices) if numbers.random() < 0.3 else "-",
    ]
    player = Player(policy_of(table, policy_words))
    yield table_line(table), None
    yield " ".join(["policy", *policy_words]), None
    sizes = [item.batch for item in table.batches]
    period_s = numbers.choice([0.05, 0.4, 1.0, 5.0])
    time_s = numbers.uniform(0.0, 1e5)
    for _ in range(events // 2):
        time_s += 45.0 if numbers.random() < 0.03 else numbers.expovariate(1.0 / period_s)
        batch = numbers.choice(sizes) if numbers.random() < 0.2 else sizes[0]
        if numbers.random() < 0.03:
            batch = numbers.choice([0, -1, 1, 5, max(sizes) + 1])
        if numbers.random() < 0.01:
            line = f"restart {bits(time_s)}"
            yield line, player.play(line)
        asked_s = numbers.choice([math.nan, -1.0, math.inf, time_s - 3.0]) if numbers.random() < 0.02 else time_s
        line = f"decide {bits(asked_s)} {batch}"
        yield line, player.play(line)
        for line in _consequences(numbers, world, player, time_s, batch):
            yield line, player.play(line)


def _consequences(numbers: random.Random, world: World, player: Player, time_s: float, batch: int) -> Iterator[str]:
    rate = world.rate_mb_s()
    decision = player.decision
    if decision is None:
        return
    rtt = bits(world.rtt_ms if numbers.random() < 0.8 else None)
    limited = _flag(numbers.random() < 0.05)
    if decision.probe_bytes:
        probe_ms = world.noisy(decision.probe_bytes / 1e3 / rate) if rate > 0.0 else math.inf
        if probe_ms < 5000.0:
            if numbers.random() < 0.05:
                probe_ms = numbers.choice([0.0, -0.5])
            yield f"probed {bits(time_s + abs(probe_ms) / 1e3)} {decision.probe_bytes} {bits(probe_ms)} {rtt} {limited}"
        else:
            yield f"probe-failed {bits(time_s + 5.0)}"
    position = player.table.choices.index(decision.choice)
    if numbers.random() < 0.02:
        position = numbers.choice([-1, 0, len(player.table.choices) - 1, len(player.table.choices)])
    [terms] = player.table.ranking(
        State(batch=batch, rate_mb_s=rate, server_load=world.load, queue_ms=world.queue_ms, allow=[decision.choice.id])
    )
    latency_ms = world.noisy(terms.latency_ms)
    if latency_ms > decision.timeout_ms or latency_ms > 1e8:
        if numbers.random() < 0.7:
            started_s = numbers.choice([None, time_s, time_s, max(time_s - 2.0, 0.0), -1.0])
            yield f"failed {bits(time_s + min(decision.timeout_ms, 5e3) / 1e3)} {position} {bits(started_s)}"
            return
        latency_ms = min(latency_ms, 1e8)
    server_ms = queue_ms = rpc_ms = None
    if decision.choice.uses_server:
        rpc_ms = max(latency_ms - terms.head_ms, 0.0)
        if world.reports != "nothing":
            server_ms = min(terms.tail_ms + terms.queue_ms, 1e9)
        if world.reports == "queue":
            queue_ms = world.queue_ms
    values: list[Any] = [latency_ms, min(terms.head_ms, 1e9), rpc_ms, server_ms, queue_ms]
    if numbers.random() < 0.02:
        values[numbers.randrange(5)] = numbers.choice([math.nan, -1.0, math.inf, 1e10, 0.0, 5e-324, 1e9])
    if numbers.random() < 0.2:
        values[2] = None
    yield " ".join(
        ["observe", bits(time_s + latency_ms / 1e3), str(position), str(batch), *map(bits, values), rtt, limited]
    )


def _random_parameters(numbers: random.Random) -> PolicyParameters:
    pick = numbers.choice
    return PolicyParameters(
        hysteresis=pick([0.0, 0.05, 0.3, 1.0]),
        switch_cost_ms=pick([0.0, 0.0, 5.0]),
        dwell_requests=pick([0, 1, 3, 10]),
        probe_bytes=pick([0, 1000, 131072, 131072]),
        max_probe_bytes=pick([0, 500_000, 1048576]),
        probe_interval_s=pick([0.0, 1.0, math.inf]),
        max_probe_interval_s=pick([0.5, 10.0, math.inf]),
        probe_timeout_s=pick([0.5, 5.0, 1e9]),
        deadline_factor=pick([1.0, 1.3, 3.0]),
        deadline_ms=pick([None, None, None, 30.0, 100.0]),
        retry_s=pick([0.0, 0.3, 1.0]),
        max_retry_s=pick([0.0, 2.0, 30.0]),
        server_weight=pick([0.0, 0.3, 0.77, 1.0]),
        server_half_life_s=pick([1e-3, 3.3, 30.0]),
        percentile=pick([None, None, 95]),
    )


def _random_estimator(numbers: random.Random) -> EstimatorParameters:
    pick = numbers.choice
    return EstimatorParameters(
        half_life_s=pick([1e-3, 0.7, 5.0, 1e9]),
        min_bytes=pick([0, 10_000, 131072]),
        min_transfer_ms=pick([0.0, 1.0, 5.0]),
        idle_restart_s=pick([0.0, 0.2, math.inf]),
        initial_window_bytes=pick([1, 14480]),
        surprise_sigmas=pick([0.0, 2.0, 3.0, math.inf]),
        surprise_change=pick([0.0, 0.1, 0.3, math.inf]),
        stale_after_s=pick([0.0, 10.0, math.inf]),
    )


def replayed(lines: list[str]) -> Iterator[str]:
    """Play lines in Python from their text alone, and give the answers to the events."""
    table = player = None
    for line in lines:
        kind, *words = line.split()
        if kind == "table":
            table = table_of(words)
        elif kind == "policy":
            assert table is not None
            player = Player(policy_of(table, words))
        else:
            assert player is not None
            yield player.play(line)


def golden_lines() -> tuple[list[str], list[str]]:
    """Read the golden lines, and the answers of those that are events."""
    lines = gzip.decompress(GOLDEN.read_bytes()).decode().splitlines()
    pairs = [line.split(" = ") for line in lines if not line.startswith("#")]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs if len(pair) == 2]


def write_golden() -> None:
    numbers = random.Random(4)
    lines = [f"# {line}" for line in (__doc__ or "").splitlines()[2:-2]]
    for _ in range(SEQUENCES):
        lines += [line if answer is None else f"{line} = {answer}" for line, answer in sequence(numbers)]
    GOLDEN.write_bytes(gzip.compress("\n".join(lines).encode() + b"\n", mtime=0))


def _flag(value: bool) -> str:
    return "1" if value else "0"


def _values(fields: tuple[dataclasses.Field[Any], ...], words: list[str]) -> dict[str, Any]:
    """Read parameters by the types of their fields."""
    values: dict[str, Any] = {}
    for field, word in zip(fields, words, strict=True):
        whole = field.type == "int" or field.name == "percentile"
        values[field.name] = int(word) if whole and word != "-" else number(word)
    return values


def _number(word: str) -> float:
    value = number(word)
    assert value is not None
    return value


if __name__ == "__main__":
    write_golden()
