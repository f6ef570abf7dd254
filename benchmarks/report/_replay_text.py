"""A replay for the terminal (Rich), as JSON, and request by request as CSV."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from dsc_split._support.numbers import finite_or_none
from dsc_split.benchmarks.replay._statistics import Summary, excess, gain, mean, summarise_method
from dsc_split.benchmarks.report._phrases import number_text
from dsc_split.benchmarks.report._table_text import choice_style, columns, fact_lines

if TYPE_CHECKING:
    from rich.console import RenderableType

    from dsc_split.benchmarks.replay._replay import Replay
    from dsc_split.benchmarks.replay._statistics import Method
    from dsc_split.lookup_table import LookupTable

__all__ = ["render_replay", "replay_csv", "replay_json"]

_LEAST_SHARE = 0.0005
"""Shares of time below this are not listed."""


def render_replay(replay: Replay, *, deadline_ms: float | None = None, against: str | None = None) -> RenderableType:
    """Show the latencies of every method, the gains over static choices, and the shares of time.

    Args:
        replay: The replay.
        deadline_ms: Requests that take longer are counted as missed.
        against: The static choice to compare with; default: all.
    """
    statics = _choose_statics(replay, against)
    methods = [method for method in replay.methods if not method.static or method in statics]
    summaries = {method.name: _summary(replay, method, deadline_ms) for method in methods}
    return Group(
        *_headline(replay, statics),
        Text(),
        *columns(_state_facts(replay)),
        *fact_lines(replay.table),
        Text(),
        *_latency_lines(replay, methods, summaries, deadline_ms),
        Text(),
        Text("Gain G, the mean share of each request's latency that is saved (Eq. 7), over each static choice:"),
        *_gain_lines(replay, statics),
        Text(),
        Text("Share of time:"),
        *_share_lines(replay, summaries),
        *_remarks(replay, methods, summaries),
    )


def replay_json(replay: Replay, *, deadline_ms: float | None = None, against: str | None = None) -> dict[str, Any]:
    """Return the numbers of :func:`render_replay` as plain data; infinite ones and NaN become ``None``."""
    statics = _choose_statics(replay, against)
    methods = [method for method in replay.methods if not method.static or method in statics]
    dynamic = [method for method in methods if not method.static]
    rates_mb_s = [timed.state.rate_mb_s for timed in replay.scenario.states]
    return {
        "scenario": {
            "name": replay.scenario.name,
            "states": len(replay.scenario.states),
            "start_s": replay.scenario.states[0].time_s,
            "end_s": replay.scenario.end_s,
            "rate_mb_s": {
                "min": finite_or_none(min(rates_mb_s)),
                "median": finite_or_none(statistics.median(rates_mb_s)),
                "max": finite_or_none(max(rates_mb_s)),
            },
        },
        "table": {
            "pair_id": replay.table.pair_id,
            "precision": replay.table.precision,
            "count": replay.table.count,
            "emulated": replay.table.emulated,
            "device": replay.table.device.target,
            "server": replay.table.server.target,
        },
        "requests": len(replay.requests),
        "period_ms": replay.period_ms,
        "percentile": replay.percentile,
        "deadline_ms": deadline_ms,
        "noise": replay.noise,
        "seed": replay.seed,
        "methods": [_method_json(replay, method, deadline_ms) for method in methods],
        "gain": {
            method.name: {static.name: finite_or_none(gain(method, static)) for static in statics} for method in dynamic
        },
    }


def replay_csv(replay: Replay) -> str:
    """Return one line per request as CSV: its state, and the latency of each method.

    A latency is ``inf`` if the answer never comes, and empty if a static choice has no row at the batch size.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    policy = replay.policy
    policy_columns = ("policy_choice", "policy_ms", "policy_reason", "policy_fallback")
    writer.writerow(
        [
            *("time_s", "batch", "rate_mb_s", "downlink_rate_mb_s", "server_load", "queue_ms", "rtt_ms"),
            *("ideal_choice", "ideal_ms"),
            *(() if policy is None else policy_columns),
            *(f"static_{method.name}_ms" for method in replay.statics),
        ]
    )
    for i, request in enumerate(replay.requests):
        state = request.state
        row: list[object] = [
            *(request.time_s, state.batch, state.rate_mb_s, state.downlink_rate_mb_s),
            *(state.server_load, state.queue_ms, state.rtt_ms),
            *(_choice_name(replay.ideal, i), replay.ideal.latencies_ms[i]),
        ]
        if policy is not None:
            fallback = "true" if policy.fallbacks[i] else "false"
            row += [_choice_name(policy, i), policy.latencies_ms[i], policy.reasons[i], fallback]
        times_ms = [method.latencies_ms[i] for method in replay.statics]
        writer.writerow([*row, *("" if math.isnan(time_ms) else time_ms for time_ms in times_ms)])
    return file.getvalue()


def _choose_statics(replay: Replay, against: str | None) -> list[Method]:
    return [method for method in replay.statics if against is None or method.name == against]


def _summary(replay: Replay, method: Method, deadline_ms: float | None) -> Summary:
    return summarise_method(method, [request.lasts_s for request in replay.requests], deadline_ms)


def _choice_name(method: Method, position: int) -> str:
    choice = method.choices[position]
    return "none" if choice is None else choice.name


def _method_json(replay: Replay, method: Method, deadline_ms: float | None) -> dict[str, object]:
    summary = _summary(replay, method, deadline_ms)
    return {
        "method": method.name,
        "kind": "static" if method.static else method.name,
        "answerable": summary.answerable,
        "mean_ms": finite_or_none(summary.mean_ms),
        "p50_ms": finite_or_none(summary.p50_ms),
        "p95_ms": finite_or_none(summary.p95_ms),
        "p99_ms": finite_or_none(summary.p99_ms),
        "never": summary.never,
        "missed": summary.missed,
        "switches": summary.switches,
        "shares": summary.shares,
        "fallbacks": summary.fallbacks,
        "probes": summary.probes,
        "probe_bytes": summary.probe_bytes,
        "over_ideal": excess(method, replay.ideal).to_json(),
    }


# ---- text --------------------------------------------------------------------------------------------------


def _headline(replay: Replay, statics: Sequence[Method]) -> list[Text]:
    """Return the gain over the best static choice, or over the one asked for, and the policy's loss to the ideal."""
    known = [static for static in statics if not any(map(math.isnan, static.latencies_ms))] or list(statics)
    best = min(known, key=lambda static: mean(static.latencies_ms))
    parts = [f"ideal {_percent_text(gain(replay.ideal, best))}"]
    if replay.policy is not None:
        parts.append(f"policy {_percent_text(gain(replay.policy, best))}")
    role = "the static choice" if len(statics) == 1 else "the best static choice"
    lines = [Text(f"Gain over {role}, {best.name}: {', '.join(parts)}.", style="bold")]
    if replay.policy is not None:
        lines.append(Text(_over_ideal(excess(replay.policy, replay.ideal).of_mean), style="bold"))
    return lines


def _over_ideal(of_mean: float) -> str:
    """Return a sentence that compares the policy's mean latency with the ideal's."""
    if math.isnan(of_mean):
        return "Nothing that is allowed could answer any of the requests."
    if math.isinf(of_mean):
        return "The policy's mean latency is infinitely longer than the ideal's."
    return f"The policy's mean latency is {_percent_text(of_mean)} above the ideal's."


def _state_facts(replay: Replay) -> list[list[Text]]:
    states = [timed.state for timed in replay.scenario.states]
    rates_mb_s = [state.rate_mb_s for state in states]
    batches = sorted({state.batch for state in states})
    every = "one per state" if replay.period_ms is None else f"one every {number_text(replay.period_ms)} ms"
    low, middle, high = (
        number_text(value) for value in (min(rates_mb_s), statistics.median(rates_mb_s), max(rates_mb_s))
    )
    facts = [
        ("scenario", f"{replay.scenario.name}: {len(states)} states in {_duration_text(replay)} s"),
        ("uplink", f"{low} to {high} MB/s, median {middle}"),
        ("requests", f"{len(replay.requests)}, {every}, batch {', '.join(map(str, batches))}"),
    ]
    if replay.percentile is not None:
        facts.append(("times", f"percentile {replay.percentile:g} of head and tail"))
    if replay.policy is not None and replay.noise > 0.0:
        facts.append(("noise", f"{number_text(replay.noise)} (lognormal) on what the policy measures"))
    return [[Text(word) for word in fact] for fact in facts]


def _duration_text(replay: Replay) -> str:
    return number_text(replay.scenario.end_s - replay.scenario.states[0].time_s)


def _latency_lines(
    replay: Replay, methods: Sequence[Method], summaries: dict[str, Summary], deadline_ms: float | None
) -> list[Text]:
    heads = ["T in ms", "mean", "p50", "p95", "p99", "over ideal", "switches"]
    heads += [f"> {number_text(deadline_ms)}"] if deadline_ms is not None else []
    never = any(summary.never for summary in summaries.values())
    heads += ["never"] if never else []
    lines = [[Text(head, style="bold") for head in heads]]
    for method in methods:
        summary = summaries[method.name]
        over = "" if method is replay.ideal else _percent_text(excess(method, replay.ideal).of_mean)
        times = (summary.mean_ms, summary.p50_ms, summary.p95_ms, summary.p99_ms)
        fields = [*map(_time_text, times), over, "" if method.static else str(summary.switches)]
        fields += [str(summary.missed)] if deadline_ms is not None else []
        fields += [str(summary.never)] if never else []
        style = choice_style(replay.table, method.choices[0].id) if method.static and method.choices[0] else "bold"
        lines.append([Text(method.name, style=style), *map(Text, fields)])
    return columns(lines, right=range(1, len(heads)))


def _gain_lines(replay: Replay, statics: Sequence[Method]) -> list[Text]:
    dynamic = [method for method in (replay.ideal, replay.policy) if method is not None]
    lines = [[Text(word, style="bold") for word in ("over", *(method.name for method in dynamic))]]
    for static in statics:
        style = "" if static.choices[0] is None else choice_style(replay.table, static.choices[0].id)
        gains = [Text(_percent_text(gain(method, static))) for method in dynamic]
        lines.append([Text(static.name, style=style), *gains])
    return columns(lines, right=range(1, len(lines[0])))


def _share_lines(replay: Replay, summaries: dict[str, Summary]) -> list[Text]:
    dynamic = [method for method in (replay.ideal, replay.policy) if method is not None]
    lines = []
    for method in dynamic:
        shares = {name: share for name, share in summaries[method.name].shares.items() if share >= _LEAST_SHARE}
        lines.append([Text(method.name), _share_text(replay.table, shares)])
    return columns(lines)


def _share_text(table: LookupTable, shares: dict[str, float]) -> Text:
    text = Text()
    for name, share in shares.items():
        text.append(", " if text else "")
        style = "red" if name == "none" else choice_style(table, table.choice(name).id)
        text.append(f"{name} {_percent_text(share)}", style=style)
    return text


def _remarks(replay: Replay, methods: Sequence[Method], summaries: dict[str, Summary]) -> list[Text]:
    remarks = []
    total = len(replay.requests)
    for method in methods:
        left_out = total - summaries[method.name].answerable
        if left_out:
            remarks.append(
                f"{method.name} has no times for {left_out} of {total} requests; they are left out of its line."
            )
    if replay.delayed is not None:
        remarks.append("delayed: the best choice in the state of the last request that was over, known exactly.")
    if replay.policy is not None:
        summary = summaries[replay.policy.name]
        if summary.fallbacks:
            remarks.append(
                f"{summary.fallbacks} of the policy's requests missed their timeout and were run again on the device."
            )
        if summary.probes:
            remarks.append(
                f"The policy sent {summary.probes} probes, {number_text(summary.probe_bytes / 1e6)} MB in all."
            )
    return [Text(), *map(Text, remarks)] if remarks else []


def _time_text(value_ms: float) -> str:
    return "" if math.isnan(value_ms) else number_text(value_ms)


def _percent_text(ratio: float) -> str:
    """Format a ratio in percent; ``-`` for NaN."""
    if math.isnan(ratio):
        return "-"
    if math.isinf(ratio):
        return number_text(ratio)
    if abs(ratio) >= 1e5:
        return f"{number_text(100 * ratio)} %"
    return f"{100 * ratio:.1f} %" if abs(ratio) < 10 else f"{100 * ratio:.0f} %"
