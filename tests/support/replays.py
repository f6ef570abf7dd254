"""A golden table, scenarios and a policy by script, which the tests of replays share."""

import functools
import io
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from rich.console import Console
from tests.support.paths import GOLDEN

from dsc_split.benchmarks.replay._device import PolicyUnderTest
from dsc_split.benchmarks.replay._replay import Replay
from dsc_split.benchmarks.replay._scenario import Scenario, TimedState
from dsc_split.benchmarks.replay._statistics import Method
from dsc_split.benchmarks.report._replay_text import render_replay
from dsc_split.lookup_table import Choice, LookupTable, State

# At batch 1: full-offload 10 + 600/rate, features.4.0 28 + 150/rate, no-offload 60; batch 8 lacks no-offload.


@functools.cache
def golden() -> LookupTable:
    return LookupTable.load(GOLDEN)


def timed(time_s: float, rate_mb_s: float, *, batch: int = 1, **rest: Any) -> TimedState:
    return TimedState(time_s=time_s, state=State(batch=batch, rate_mb_s=rate_mb_s, **rest))


def at_rates(*rates_mb_s: float, every_s: float = 1.0, **rest: Any) -> Scenario:
    return Scenario.of([timed(i * every_s, rate_mb_s, **rest) for i, rate_mb_s in enumerate(rates_mb_s)])


def fading() -> Scenario:
    """A link that fades, is gone, steps up and then wanders, with everything else varying too."""
    chance = random.Random(3)
    log_rate, states = 0.0, []
    for i in range(300):
        log_rate = 0.9 * log_rate + 0.5 * chance.gauss(0.0, 1.0)
        rate = 8.0 * math.exp(log_rate) if i % 50 else 0.0
        states.append(
            timed(
                i * 0.5,
                20.0 * 0.8**i if i < 40 else rate,
                batch=chance.choice([1, 3, 4]),
                rtt_ms=chance.uniform(1.0, 30.0),
                server_load=chance.uniform(0.5, 4.0),
                queue_ms=chance.choice([None, 5.0]),
            )
        )
    return Scenario.of(states)


@dataclass
class Scripted:
    """A policy that takes what a function says, and writes down all it is told."""

    says: Callable[[float, int], str]
    timeout_ms: float = math.inf
    probe_bytes: int = 0
    told: list[tuple[Any, ...]] = field(default_factory=list)

    def decide(self, time_s: float, batch: int) -> Any:
        self.told.append(("decide", time_s))
        choice = golden().choice(self.says(time_s, batch))
        timeout_ms = self.timeout_ms if choice.uses_server else math.inf
        return SimpleNamespace(choice=choice, reason="best", timeout_ms=timeout_ms, probe_bytes=self.probe_bytes)

    def observe(self, observation: Any) -> None:
        self.told.append(("observe", observation["time_s"], observation))

    def failed(self, time_s: float, choice: Choice, *, started_s: float | None = None) -> None:
        self.told.append(("failed", time_s, choice.name, started_s))

    def probed(self, time_s: float, size_bytes: int, transfer_ms: float, *, rtt_ms: float | None = None) -> None:
        self.told.append(("probed", time_s, size_bytes, transfer_ms, rtt_ms))

    def probe_failed(self, time_s: float) -> None:
        self.told.append(("probe_failed", time_s))


def under_test(policy: Scripted) -> PolicyUnderTest:
    return PolicyUnderTest(policy=policy, observation=dict)


def by_name(result: Replay) -> dict[str, Method]:
    return {method.name: method for method in result.methods}


def text_of(result: Replay, *, width: int = 80, **options: Any) -> str:
    console = Console(width=width, record=True, file=io.StringIO(), markup=False, highlight=False)
    console.print(render_replay(result, **options))
    return console.export_text()
