"""``dsc-split compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsc_split.cli._options import number

__all__ = ["compare"]

FAIL_ON = ("slower", "change", "never")


def compare(
    before: Annotated[Path, typer.Argument(metavar="A", help="What is compared with: a bundle or a table.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="What is judged: a bundle or a table.")],
    tolerance: Annotated[
        float,
        typer.Option(parser=number(at_least=0), metavar="SHARE", help="Smaller relative differences are none."),
    ] = 0.02,
    fail_on: Annotated[
        str,
        typer.Option(
            metavar="slower|change|never",
            help="What ends with exit code 1: something slower or gone, any change, or nothing.",
        ),
    ] = "slower",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Compare the times and choices of two bundles or tables.

    A difference counts if the 95 % confidence intervals do not overlap and it is larger than the tolerance. A bundle
    is compared by its table.json; its other tables are in tables/. Without a common batch size it is an error.
    """
    from dsc_split.benchmarks import compare_tables
    from dsc_split.benchmarks.report._compare_text import render_comparison
    from dsc_split.bundles._tables import load_table
    from dsc_split.cli._console import out, print_json
    from dsc_split.errors import UsageError

    if fail_on not in FAIL_ON:
        raise UsageError(f"--fail-on is {fail_on!r}; {', '.join(FAIL_ON[:-1])} or {FAIL_ON[-1]} was expected.")
    comparison = compare_tables(load_table(before), load_table(after), tolerance=tolerance)
    if json:
        print_json(comparison.to_json())
    else:
        out.print(render_comparison(comparison))
    if {"slower": comparison.is_slower, "change": comparison.is_changed, "never": False}[fail_on]:
        raise typer.Exit(1)
