"""Pictures of a lookup table: the map of the best choice, latency against rate, and the terms in one state.

They show the table's own lines and segments, so they are exact. Needs matplotlib, the extra ``plots``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsc_split._support.files import make_folder, new_file
from dsc_split._support.optional import require
from dsc_split.benchmarks.report._phrases import batch_text, emulation_text, link_text, number_text
from dsc_split.errors import UsageError
from dsc_split.lookup_table import State

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from dsc_split.lookup_table import Choice, LookupTable, Segment

__all__ = [
    "add_legend",
    "choice_names",
    "choice_styles",
    "clip_segments",
    "draw_latency",
    "draw_map",
    "draw_plots",
    "draw_terms",
    "new_figure",
    "plain_ticks",
    "save_figure",
]

Style = dict[str, Any]
"""Keywords of matplotlib that draw a choice: ``facecolor`` and perhaps ``hatch``."""

LOWEST_MB_S, HIGHEST_MB_S = 1.0, 128.0
"""Rates that every picture shows, as in the paper; pictures show more if the best choice changes beyond these."""
MAX_BARS = 12
"""Most choices in the picture of terms: the fastest ones; full and no offload are always shown."""
MAX_NAME = 30
"""Longer names are shortened in the middle."""

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_FULL_OFFLOAD, _NO_OFFLOAD, _NEVER_BEST = "#0072B2", "#595959", "#C8C8C8"
_SPLITS = ("#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
_HATCHES = ("", "//", "..", "xx")
_TERMS = (
    ("head_ms", "head", "#009E73"),
    ("uplink_ms", "uplink", "#E69F00"),
    ("network_ms", "network, fixed", "#F0E442"),
    ("queue_ms", "server queue", "#CC79A7"),
    ("tail_ms", "tail", "#0072B2"),
    ("downlink_ms", "downlink", "#D55E00"),
)


def draw_plots(
    table: LookupTable,
    folder: str | os.PathLike[str],
    *,
    batch: int | None = None,
    rate_mb_s: float | None = None,
    suffix: str = ".png",
) -> tuple[Path, ...]:
    """Draw all pictures of a table.

    Args:
        table: The table.
        folder: Folder of the pictures; made if it does not exist.
        batch: Batch size of the pictures that show one; default: that at which the best choice changes most often.
        rate_mb_s: Data rate of the picture of terms, in MB/s; default: 8.
        suffix: ``.png`` or ``.svg``.

    Returns:
        The files: the map, latency against rate, the terms.

    Raises:
        BackendUnavailable: matplotlib is not installed.
        UsageError: The batch size, the rate or the suffix is out of range.
    """
    place = Path(folder)
    if batch is None:
        batch = max(table.batches, key=lambda item: len(item.segments)).batch
    if rate_mb_s is None:
        rate_mb_s = 8.0
    table.pick(batch, rate_mb_s)
    make_folder(place)
    return (
        draw_map(table, place / f"best_choice{suffix}"),
        draw_latency(table, place / f"latency_batch{batch}{suffix}", batch=batch),
        draw_terms(
            table,
            place / f"terms_batch{batch}_rate{rate_mb_s:g}{suffix}",
            batch=batch,
            rate_mb_s=rate_mb_s,
        ),
    )


# ---- the map -----------------------------------------------------------------------------------------------


def draw_map(table: LookupTable, path: str | os.PathLike[str]) -> Path:
    """Draw the best choice by batch size and data rate, with exact borders.

    Args:
        table: The table.
        path: File of the picture, ``.png`` or ``.svg``.
    """
    height = 2.4 + 0.42 * len(table.batches)
    figure, axes = new_figure(table, height, "Best choice by batch size and data rate")
    styles = choice_styles(table)
    low, high = _rate_range([segment for item in table.batches for segment in item.segments])
    names = choice_names(table)
    letter = 0.0084 * math.log(high / low)
    shown: set[int] = set()
    for row, item in enumerate(table.batches):
        for choice, start, end in clip_segments(item.segments, low, high):
            axes.barh(row, end - start, left=start, height=0.96, edgecolor="white", linewidth=0, **styles[choice])
            shown.add(choice)
            width = math.log(end / start)
            text = names[choice] if width > letter * len(names[choice]) else _in_two_lines(names[choice])
            if width > letter * max(len(line) for line in text.split("\n")):
                place = math.sqrt(start * end)
                axes.text(place, row, text, ha="center", va="center", fontsize=8, color=_text_colour(styles[choice]))
    _set_rate_axis(axes, low, high)
    axes.set_ylim(-0.5, len(table.batches) - 0.5)
    axes.set_yticks(range(len(table.batches)), [str(item.batch) for item in table.batches])
    axes.set_ylabel("batch size")
    axes.tick_params(axis="y", length=0)
    add_legend(figure, [(styles[choice], names[choice]) for choice in sorted(shown)])
    return save_figure(figure, path)


# ---- latency against rate ----------------------------------------------------------------------------------


def draw_latency(table: LookupTable, path: str | os.PathLike[str], *, batch: int) -> Path:
    """Draw the latency of every choice against the data rate at one batch size, and where the best choice changes.

    Args:
        table: The table.
        path: File of the picture, ``.png`` or ``.svg``.
        batch: Batch size.
    """
    segments = table.switch_rates(State(batch=batch))
    low, high = _rate_range(segments)
    asked = batch_text(batch, table.pick(batch, high).measured_batch)
    figure, axes = new_figure(table, 5.2, f"Latency against data rate, {asked}", room_above=True)
    from matplotlib.ticker import LogLocator

    styles = choice_styles(table)
    rates = [low * (high / low) ** (i / 200) for i in range(201)]
    best = {segment.choice for segment in segments}
    choices = [terms.choice for terms in table.ranking(State(batch=batch, rate_mb_s=high))]
    ends: list[tuple[float, Choice]] = []
    for choice in choices:
        times = [table.latency_ms(choice.id, State(batch=batch, rate_mb_s=rate)) for rate in rates]
        shown = choice.id in best
        colour = styles[choice.id]["facecolor"] if shown else _NEVER_BEST
        axes.plot(rates, times, color=colour, linewidth=1.8 if shown else 1.0, zorder=3 if shown else 1)
        ends.append((times[-1], choice))
    envelope = [table.pick(batch, rate).latency_ms for rate in rates]
    axes.plot(rates, envelope, color="black", linewidth=6, alpha=0.22, zorder=2, solid_capstyle="butt")
    _set_rate_axis(axes, low, high)
    axes.set_yscale("log")
    axes.set_ylim(min(envelope) / 1.25, max(envelope[0] * 3.0, max(end for end, _ in ends) * 1.4))
    axes.set_ylabel("latency T in ms")
    axes.yaxis.set_major_locator(LogLocator(base=10.0, subs=(1.0, 2.0, 5.0)))
    plain_ticks(axes.yaxis)
    axes.grid(visible=True, which="major", color="#E6E6E6", linewidth=0.6)
    _mark_switches(axes, segments, low, high)
    _name_lines(axes, ends, best, styles, choice_names(table))
    return save_figure(figure, path)


def _mark_switches(axes: Axes, segments: Sequence[Segment], low: float, high: float) -> None:
    """Draw a line at each switch rate and write the rate above the picture, without overlaps."""
    rates = [item.below_rate_mb_s for item in segments if item.below_rate_mb_s is not None]
    rates = [rate for rate in rates if low <= rate <= high]
    share = [math.log(rate / low) / math.log(high / low) for rate in rates]
    for rate, place in zip(rates, _spread(share, 0.075), strict=True):
        axes.axvline(rate, color="black", linewidth=0.8, linestyle=":", zorder=2)
        axes.annotate(
            number_text(float(f"{rate:.3g}")),
            xy=(rate, 1.0),
            xycoords=axes.get_xaxis_transform(),
            xytext=(place, 1.035),
            textcoords="axes fraction",
            ha="center",
            va="bottom",
            fontsize=8.5,
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "#606060", "shrinkA": 0, "shrinkB": 0},
            annotation_clip=False,
        )


def _name_lines(
    axes: Axes,
    ends: Sequence[tuple[float, Choice]],
    best: set[int],
    styles: dict[int, Style],
    names: dict[int, str],
) -> None:
    """Write every line's name at its right end; of more than ten lines, only those of best choices."""
    never = [item for item in ends if item[1].id not in best]
    if len(ends) > 10:
        ends = [item for item in ends if item[1].id in best]
    ends = sorted(ends, key=lambda item: item[0])
    low, high = (math.log(limit) for limit in axes.get_ylim())
    share = [(math.log(max(end, 1e-12)) - low) / (high - low) for end, _ in ends]
    for (_, choice), at, place in zip(ends, share, _spread(share, 0.05), strict=True):
        shown = choice.id in best
        axes.annotate(
            names[choice.id],
            xy=(1.0, at),
            xycoords="axes fraction",
            xytext=(1.035, place),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            fontweight="bold" if shown else "normal",
            color="black" if shown else "#808080",
            arrowprops={
                "arrowstyle": "-",
                "linewidth": 1.8 if shown else 1.0,
                "color": styles[choice.id]["facecolor"] if shown else _NEVER_BEST,
                "relpos": (0.0, 0.5),
                "shrinkA": 2,
                "shrinkB": 0,
            },
            annotation_clip=False,
        )
    note = "Shaded: the best choice; dotted: where it changes, in MB/s."
    if never:
        note += " Light grey: never the best at this batch size."
    axes.text(0.0, -0.17, note, transform=axes.transAxes, fontsize=8.5, color="#404040", va="top")


# ---- the terms ---------------------------------------------------------------------------------------------


def draw_terms(table: LookupTable, path: str | os.PathLike[str], *, batch: int, rate_mb_s: float) -> Path:
    """Draw the parts of every choice's latency in one state, and mark the best choice.

    Args:
        table: The table.
        path: File of the picture, ``.png`` or ``.svg``.
        batch: Batch size.
        rate_mb_s: Data rate in MB/s, above 0.
    """
    pick = table.pick(batch, rate_mb_s)
    ranking = [terms for terms in pick.ranking if math.isfinite(terms.latency_ms)]
    shown = [terms for i, terms in enumerate(ranking) if i < MAX_BARS or terms.choice.kind != "split"]
    shown.sort(key=lambda terms: terms.choice.id)
    title = f"Where the time goes, {batch_text(batch, pick.measured_batch)} at {number_text(rate_mb_s)} MB/s"
    if len(shown) < len(ranking):
        title += f" ({len(shown)} of {len(ranking)} choices)"
    figure, axes = new_figure(table, 2.4 + 0.42 * len(shown), title)
    names = choice_names(table)
    entries: list[tuple[Style, str]] = []
    rows = range(len(shown))
    left = [0.0] * len(shown)
    for key, name, colour in _TERMS:
        values = [getattr(terms, key) for terms in shown]
        if not any(values):
            continue
        axes.barh(rows, values, left=left, height=0.66, color=colour, edgecolor="white", linewidth=0.5)
        left = [start + value for start, value in zip(left, values, strict=True)]
        entries.append(({"facecolor": colour}, name))
    for row, terms in enumerate(shown):
        best = terms.choice == pick.choice
        mark = "  best" + (" (a tie)" if pick.tie else "") if best else ""
        axes.text(
            left[row],
            row,
            f" {number_text(terms.latency_ms)} ms{mark}",
            va="center",
            fontsize=9,
            fontweight="bold" if best else "normal",
        )
    axes.set_yticks(rows, [names[terms.choice.id] for terms in shown])
    for tick, terms in zip(axes.get_yticklabels(), shown, strict=True):
        tick.set_fontweight("bold" if terms.choice == pick.choice else "normal")
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0.0, max(left) * 1.28)
    axes.set_xlabel("latency T in ms")
    axes.grid(visible=True, axis="x", color="#E6E6E6", linewidth=0.6)
    axes.set_axisbelow(True)
    add_legend(figure, entries)
    return save_figure(figure, path)


# ---- shared by all pictures --------------------------------------------------------------------------------


def new_figure(table: LookupTable, height: float, title: str, *, room_above: bool = False) -> tuple[Figure, Axes]:
    """Make a figure with one pair of axes, the title, and a description of targets and link below it."""
    require("matplotlib", extra="plots", purpose="draw pictures of the table")
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    lines = [f"device {table.device.target}, server {table.server.target}", f"link: {link_text(table)}"]
    if table.emulated is not None:
        lines.append(f"EMULATED: {emulation_text(table)}")
    figure = Figure(
        figsize=(8.4, height + 0.19 * len(lines)), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    )
    axes = figure.add_subplot()
    figure.suptitle(title, x=0.02, ha="left", fontsize=13, fontweight="bold")
    axes.set_title("\n".join(lines), loc="left", fontsize=8.5, color="#404040", pad=26 if room_above else 8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def choice_styles(table: LookupTable) -> dict[int, Style]:
    """Choose a colour for every choice; best choices come first, so that they get different colours."""
    best = {segment.choice for item in table.batches for segment in item.segments}
    splits = [choice.id for choice in table.choices if choice.kind == "split"]
    splits.sort(key=lambda choice: choice not in best)
    styles: dict[int, Style] = {}
    for choice in table.choices:
        if choice.id in splits:
            turn, colour = divmod(splits.index(choice.id), len(_SPLITS))
            styles[choice.id] = {"facecolor": _SPLITS[colour], "hatch": _HATCHES[turn % len(_HATCHES)]}
        else:
            styles[choice.id] = {"facecolor": _FULL_OFFLOAD if choice.uses_server else _NO_OFFLOAD}
    return styles


def _text_colour(style: Style) -> str:
    """Return black or white, for text on a style's colour."""
    return "white" if style["facecolor"] in (_FULL_OFFLOAD, _NO_OFFLOAD) else "black"


def _rate_range(segments: Sequence[Segment]) -> tuple[float, float]:
    """Return the range of rates to show: the paper's, and every switch rate from 0.01 to 10000 MB/s."""
    rates = [item.below_rate_mb_s for item in segments if item.below_rate_mb_s is not None]
    near = [rate for rate in rates if 0.01 <= rate <= 10_000.0]
    return min([LOWEST_MB_S, *(rate / 2.0 for rate in near)]), max([HIGHEST_MB_S, *(rate * 2.0 for rate in near)])


def clip_segments(segments: Sequence[Segment], low: float, high: float) -> list[tuple[int, float, float]]:
    """Clip segments to a range of rates; return tuples of choice, start and end."""
    spans = []
    start = 0.0
    for segment in segments:
        end = math.inf if segment.below_rate_mb_s is None else segment.below_rate_mb_s
        if end > low and start < high:
            spans.append((segment.choice, max(start, low), min(end, high)))
        start = end
    return spans


def _set_rate_axis(axes: Axes, low: float, high: float) -> None:
    from matplotlib.ticker import FixedLocator

    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    steps = range(math.ceil(math.log2(low) - 1e-9), math.floor(math.log2(high) + 1e-9) + 1)
    every = 1 + len(steps) // 14
    axes.xaxis.set_major_locator(FixedLocator([2.0**step for step in steps if step % every == 0]))
    plain_ticks(axes.xaxis)
    axes.set_xlabel("data rate in MB/s (logarithmic)")


def plain_ticks(axis: Axis) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: number_text(value)))
    axis.set_minor_formatter(NullFormatter())


def add_legend(figure: Figure, entries: Sequence[tuple[Style, str]]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(**{"edgecolor": "white", "linewidth": 0, **style}) for style, _ in entries]
    longest = max(len(name) for _, name in entries)
    figure.legend(
        handles,
        [name for _, name in entries],
        loc="outside lower left",
        ncols=max(1, min(len(entries), 100 // (longest + 6))),
        frameon=False,
        fontsize=9,
        handlelength=1.2,
    )


def choice_names(table: LookupTable) -> dict[int, str]:
    """Return short names by id: long names are shortened in the middle, and equal ones get their id."""
    short = {}
    for choice in table.choices:
        half = (MAX_NAME - 3) // 2
        name = choice.name
        short[choice.id] = name if len(name) <= MAX_NAME else f"{name[:half]}...{name[-half:]}"
    names = list(short.values())
    return {key: name if names.count(name) == 1 else f"#{key} {name}" for key, name in short.items()}


def _in_two_lines(name: str) -> str:
    """Break a name after the dot, dash or underscore that is nearest to its middle."""
    places = [i + 1 for i, letter in enumerate(name[:-1]) if letter in "._-"]
    if not places:
        return name
    place = min(places, key=lambda i: abs(i - len(name) / 2))
    return f"{name[:place]}\n{name[place:]}"


def _spread(places: Sequence[float], apart: float) -> list[float]:
    """Move ascending places as little as needed, so that neighbours are at least ``apart``."""
    groups: list[tuple[float, int]] = []
    for place in places:
        centre, count = place, 1
        while groups and groups[-1][0] + apart * (groups[-1][1] + count) / 2 > centre:
            before, many = groups.pop()
            centre = (before * many + centre * count) / (many + count)
            count += many
        groups.append((centre, count))
    return [centre + apart * (i - (count - 1) / 2) for centre, count in groups for i in range(count)]


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    place = Path(path)
    kind = place.suffix.lower().lstrip(".")
    if kind not in ("png", "svg"):
        raise UsageError(f"picture {str(place)!r} has suffix {place.suffix!r}; .png or .svg was expected.")
    with new_file(place) as file:
        figure.savefig(file, format=kind)
    return place
