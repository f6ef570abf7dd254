from __future__ import annotations

import io
import json
import math

import pytest
from rich.console import Console
from rich.table import Table

from dsc_split._support.progress import Progress
from dsc_split.cli import _console


def step(stage: str, label: str, done: int, total: int) -> Progress:
    return Progress(stage=stage, label=label, done=done, total=total)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Standard error as a terminal of 120 columns."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, markup=False, highlight=False)
    monkeypatch.setattr(_console, "err", console)
    monkeypatch.setenv("COLUMNS", "120")
    return screen


def test_progress_in_a_pipe_is_one_line_per_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with _console.progress() as listener:
        for done in range(50):
            listener(step("bench device", f"head[{done}] batch 8", done, 50))
        listener(step("bench server", "model", 0, 3))

    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "bench device (50 steps): head[0] batch 8",
        "bench server (3 steps): model",
    ]


def test_progress_on_a_terminal_shows_stage_label_and_counts(terminal: io.StringIO) -> None:
    with _console.progress() as listener:
        listener(step("prove", "cut [features.4.0]", 3, 7))
        listener(step("bench device", "features.4.0 head, batch 8", 0, 0))
        listener(step("bench device", "features.4.0 head, batch 8", 5, 42))

    shown = terminal.getvalue()
    assert "prove" in shown
    assert "3/7" in shown
    assert "5/42" in shown
    assert "features.4.0 head, batch 8" in shown


def test_error_inside_progress_ends_the_bar_and_goes_on(terminal: io.StringIO) -> None:
    def fail() -> None:
        with _console.progress() as listener:
            listener(step("prove", "", 0, 1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()

    assert terminal.getvalue().endswith("\x1b[?25h")  # the cursor is back


def test_text_in_a_pipe_is_neither_wrapped_nor_coloured_nor_read_as_markup(
    capsys: pytest.CaptureFixture[str],
) -> None:
    long = "name[bold]x[/bold] :smile: " + "word " * 100 + "end"
    table = Table("name", "size")
    table.add_row("blocks[0]" * 9, "1")

    _console.out.print(long, style="red")
    _console.out.print(table)

    captured = capsys.readouterr()
    assert captured.out.splitlines()[0] == long
    assert "blocks[0]" * 9 in captured.out
    assert "\x1b" not in captured.out
    assert captured.err == ""


def test_json_is_one_document_in_ascii_without_nan(capsys: pytest.CaptureFixture[str]) -> None:
    document = {"name": "modèle ≈ 1", "rate": 1.5, "none": None}

    _console.print_json(document)

    printed = capsys.readouterr().out
    assert json.loads(printed) == document
    assert printed.isascii()
    with pytest.raises(ValueError, match="JSON"):
        _console.print_json({"rate": math.nan})
