"""Where commands print: results on stdout, talk and progress on stderr.

Colours are for terminals alone (``NO_COLOR`` is respected), and in a pipe no line is wrapped. Text is printed
as it is, for names of models and files may hold brackets: markup is off; style with ``rich.text.Text``.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Column
from rich.text import Text

if TYPE_CHECKING:
    from dsc_split._support.progress import Progress, ProgressListener

__all__ = ["err", "out", "print_json", "progress"]

PIPE_WIDTH = 1000
"""Columns where there is no terminal: wide enough that data stays on its line."""
SECONDS_BETWEEN_LINES = 15.0
"""In a pipe, a long stage says how far it is this often."""
REFRESHES_PER_SECOND = 2
"""Few, because drawing takes time from what is being measured."""
SMOOTHING_S = 120.0
"""The time left is judged by the steps of the last two minutes."""


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PIPE_WIDTH
    return Console(stderr=stderr, width=width, markup=False, highlight=False, emoji=False)


out = _console(stderr=False)
"""Standard output: the result, and nothing else."""
err = _console(stderr=True)
"""Standard error: talk, warnings and progress."""


def print_json(document: Any) -> None:
    """Print ``document`` to stdout as one JSON document, in ASCII so that any locale can print it."""
    sys.stdout.write(json.dumps(document, indent=1, allow_nan=False) + "\n")


@contextlib.contextmanager
def progress() -> Iterator[ProgressListener]:
    """Show the progress of what runs in the block: bars on a terminal, else one line per stage."""
    if not err.is_interactive:
        yield _Lines()
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        _Steps(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn(
            "{task.fields[label]}",
            markup=False,
            table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
        ),
    )
    # The bars keep their own hold of the stream: `sys.stderr` is swapped while PyTorch exports.
    with Bars(
        *columns,
        console=Console(file=err.file, force_terminal=True, markup=False, highlight=False, emoji=False),
        expand=True,
        refresh_per_second=REFRESHES_PER_SECOND,
        speed_estimate_period=SMOOTHING_S,
    ) as bars:
        stages = _Stages(bars)
        yield stages
        stages.end()


class _Steps(MofNCompleteColumn):
    """How many steps are done, where it is known how many there are."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.total is not None else Text()


class _Lines:
    """A listener that prints a line when a stage begins, and now and then how far it is."""

    def __init__(self) -> None:
        self._stage = ""
        self._printed_s = 0.0

    def __call__(self, step: Progress) -> None:
        now_s = time.monotonic()
        if step.stage == self._stage:
            if step.total and now_s - self._printed_s >= SECONDS_BETWEEN_LINES:
                self._printed_s = now_s
                unit = "" if step.unit == "steps" else f" {step.unit}"
                err.print(f"{step.stage}: {step.done} of {step.total}{unit} done, now {step.label}")
            return
        self._stage, self._printed_s = step.stage, now_s
        steps = f" ({step.total} {step.unit})" if step.total > 1 else ""
        err.print(f"{step.stage}{steps}: {step.label}" if step.label else f"{step.stage}{steps}")


class _Stages:
    """A listener that keeps one bar per stage; finished stages stay visible with the time they took."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._current = ""
        self._total: int | None = None

    def __call__(self, step: Progress) -> None:
        total = step.total or None
        if step.stage != self._current:
            self.end()
            self._current = step.stage
        if step.stage not in self._tasks:
            self._tasks[step.stage] = self._bars.add_task(step.stage, total=total, label=step.label)
        self._total = total
        self._bars.update(self._tasks[step.stage], total=total, completed=step.done, label=step.label)

    def end(self) -> None:
        """End the current stage: its clock stops, and a bar without a total is full."""
        if not self._current:
            return
        task = self._tasks[self._current]
        if self._total is None:
            self._bars.update(task, total=1, completed=1)
        self._bars.update(task, label="")
        self._bars.stop_task(task)
