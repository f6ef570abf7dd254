"""The consoles of all commands: results go to stdout, messages and progress to stderr.

Only a terminal gets colours (``NO_COLOR`` is respected), and in a pipe no line is wrapped. Markup is off, because
names of models and files may contain brackets; use ``rich.text.Text`` for styles.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

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
"""Width of the output without a terminal: so wide that no line is broken."""
SECONDS_BETWEEN_LINES = 15.0
"""Without a terminal, a long stage prints its progress this often."""
REFRESHES_PER_SECOND = 2
"""Few, because drawing disturbs measurements."""
SMOOTHING_S = 120.0
"""The remaining time is estimated from the steps of the last two minutes."""


def _make_console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PIPE_WIDTH
    return Console(stderr=stderr, width=width, markup=False, highlight=False, emoji=False)


out = _make_console(stderr=False)
"""Standard output: only the result."""
err = _make_console(stderr=True)
"""Standard error: messages, warnings and progress."""


def print_json(document: object) -> None:
    """Print ``document`` to stdout as one JSON document, in ASCII, which every locale can print."""
    sys.stdout.write(json.dumps(document, indent=1, allow_nan=False) + "\n")


@contextlib.contextmanager
def progress() -> Iterator[ProgressListener]:
    """Show the progress of the block: bars on a terminal, else one line per stage."""
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
    # The bars keep the original stream, because `sys.stderr` is replaced while PyTorch exports.
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
    """The number of finished steps, if the total is known."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.total is not None else Text()


class _Lines:
    """A listener that prints a line when a stage begins, and its progress now and then."""

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
    """A listener that shows one bar per stage; finished stages stay visible with their duration."""

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
        """End the current stage: stop its clock, and fill a bar without a total."""
        if not self._current:
            return
        task = self._tasks[self._current]
        if self._total is None:
            self._bars.update(task, total=1, completed=1)
        self._bars.update(task, label="")
        self._bars.stop_task(task)
