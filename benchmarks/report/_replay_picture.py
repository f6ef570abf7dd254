"""The picture of a replay: data rate, choice and latency over time. Needs matplotlib, the extra ``plots``."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dsc_split._support.optional import require
from dsc_split.benchmarks.replay._statistics import mean
from dsc_split.benchmarks.report._phrases import number_text
from dsc_split.benchmarks.report._table_pictures import (
    add_legend,
    choice_names,
    choice_styles,
    clip_segments,
    new_figure,
    plain_ticks,
    save_figure,
)
from dsc_split.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from dsc_split.benchmarks.replay._replay import Replay
    from dsc_split.benchmarks.replay._statistics import Method

__all__ = ["check_picture", "draw_replay"]

_NOTHING = {"facecolor": "white", "hatch": "////", "edgecolor": "#B00000"}
"""Style of the times at which no allowed choice can answer."""
_MOST_RANGE = 1000.0
"""Largest ratio of the rates that are shown."""


def check_picture(path: Path) -> None:
    """Check that a picture can be drawn and written, before the work begins.

    Raises:
        BackendUnavailable: matplotlib is not installed.
        UsageError: The suffix is not ``.png`` or ``.svg``, the path is a folder, or its folder is not writable.
    """
    require("matplotlib", extra="plots", purpose="draw a picture of the replay")
    if path.suffix.lower() not in (".png", ".svg"):
        raise UsageError(f"picture {str(path)!r} has suffix {path.suffix!r}; .png or .svg was expected.")
    if path.is_dir():
        raise UsageError(f"picture {str(path)!r} is a folder; a file was expected.")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as e:
        raise UsageError(
            f"picture {str(path)!r} cannot be written: {e.strerror or e}. Give a folder that is there, and writable."
        ) from e


def draw_replay(replay: Replay, path: str | os.PathLike[str]) -> Path:
    """Draw over time: the data rate, the choices of the ideal and the policy, and their latencies.

    Args:
        replay: The replay.
        path: File of the picture, ``.png`` or ``.svg``.

    Raises:
        BackendUnavailable: matplotlib is not installed.
        UsageError: The suffix is something else.
    """
    dynamic = [method for method in (replay.ideal, replay.policy) if method is not None]
    figure, whole = new_figure(replay.table, 6.2 + 0.3 * len(dynamic), f"Replay of {replay.scenario.name}")
    facts = whole.get_title(loc="left")
    figure.delaxes(whole)
    above, middle, below = figure.subplots(
        3, 1, sharex=True, gridspec_kw={"height_ratios": [3.0, 0.5 * len(dynamic), 3.0]}
    )
    above.set_title(facts, loc="left", fontsize=8.5, color="#404040", pad=8)
    for axes in (above, middle, below):
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    shaded = _draw_rate(above, replay)
    shown = _draw_choices(middle, replay, dynamic)
    _draw_latency(below, replay)
    below.set_xlim(replay.requests[0].time_s, replay.scenario.end_s)
    below.set_xlabel("time in s")
    names, styles = choice_names(replay.table), choice_styles(replay.table)
    entries = [(styles[choice], names[choice]) for choice in sorted(shown | shaded)]
    if any(choice is None for method in dynamic for choice in method.choices):
        entries.append((_NOTHING, "nothing can answer"))
    add_legend(figure, entries)
    return save_figure(figure, path)


def _draw_rate(axes: Axes, replay: Replay) -> set[int]:
    """Draw the uplink's rate, on the colours of the best choices if these do not change; return the choices' ids."""
    states = replay.scenario.states
    rates = [timed.state.rate_mb_s for timed in states]
    inside = [rate for rate in rates if 0.0 < rate < math.inf] or [1.0]
    low, high = max(min(inside), max(inside) / _MOST_RANGE) / 1.5, max(inside) * 1.5
    times_s = [*(timed.time_s for timed in states), replay.scenario.end_s]
    clipped = [min(max(rate, low), high) for rate in rates]
    axes.step(times_s, [*clipped, clipped[-1]], where="post", color="black", linewidth=0.9, zorder=3)
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.set_ylabel("uplink in MB/s")
    _few_ticks(axes)
    beyond = [number_text(rate) for rate in (min(rates), max(rates)) if not low <= rate <= high]
    if beyond:
        note = f"{' and '.join(beyond)} MB/s: drawn at the edge"
        axes.text(0.995, 0.02, note, transform=axes.transAxes, fontsize=8, color="#404040", ha="right", va="bottom")
    questions = [dataclasses.replace(timed.state, rate_mb_s=0.0) for timed in states]
    if any(question != questions[0] for question in questions) or not any(replay.ideal.choices):
        return set()
    styles = choice_styles(replay.table)
    spans = clip_segments(replay.table.switch_rates(questions[0]), low, high)
    for choice, start, end in spans:
        axes.axhspan(start, end, zorder=0, **{**styles[choice], "edgecolor": "white", "linewidth": 0, "alpha": 0.3})
    return {choice for choice, _, _ in spans}


def _draw_choices(axes: Axes, replay: Replay, dynamic: Sequence[Method]) -> set[int]:
    """Draw one band per method, its choice over time; return the ids of the choices."""
    styles = choice_styles(replay.table)
    shown: set[int] = set()
    for row, method in enumerate(dynamic):
        spans: dict[int | None, list[tuple[float, float]]] = {}
        for choice, group in itertools.groupby(
            zip(method.choices, replay.requests, strict=True),
            key=lambda item: None if item[0] is None else item[0].id,
        ):
            requests = [request for _, request in group]
            end_s = requests[-1].time_s + requests[-1].lasts_s
            spans.setdefault(choice, []).append((requests[0].time_s, end_s - requests[0].time_s))
        for choice, where in spans.items():
            style = _NOTHING if choice is None else styles[choice]
            axes.broken_barh(where, (row - 0.4, 0.8), **{"edgecolor": "white", "linewidth": 0, **style})
        shown |= {choice for choice in spans if choice is not None}
    axes.set_ylim(len(dynamic) - 0.5, -0.5)
    axes.set_yticks(range(len(dynamic)), [method.name for method in dynamic])
    axes.tick_params(axis="both", length=0)
    axes.spines["bottom"].set_visible(False)
    return shown


def _draw_latency(axes: Axes, replay: Replay) -> None:
    """Draw the latency of the best static choice, the policy and the ideal."""
    times_s = [request.time_s for request in replay.requests]
    best = min(replay.statics, key=_mean_ms)
    lines = [(best, f"always {best.name}", "#D55E00", 0.9), (replay.ideal, "ideal", "black", 0.8)]
    if replay.policy is not None:
        lines.insert(1, (replay.policy, "policy", "#0072B2", 1.1))
    for method, name, colour, width in lines:
        shown = [latency_ms if math.isfinite(latency_ms) else math.nan for latency_ms in method.latencies_ms]
        axes.plot(times_s, shown, color=colour, linewidth=width, label=name)
    axes.set_yscale("log")
    _few_ticks(axes)
    axes.set_ylabel("latency T in ms")
    axes.grid(visible=True, color="#E6E6E6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=len(lines), frameon=False, fontsize=8.5, borderpad=0)


def _mean_ms(method: Method) -> float:
    """Return the mean latency; infinite if the choice has no times for a request."""
    mean_ms = mean(method.latencies_ms)
    return math.inf if math.isnan(mean_ms) else mean_ms


def _few_ticks(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator

    axes.yaxis.set_major_locator(LogLocator(base=10.0, subs=(1.0, 2.0, 5.0)))
    plain_ticks(axes.yaxis)
