"""The output of the commands that check whether engines and times are for this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsc_split.cli._console import out

if TYPE_CHECKING:
    from dsc_split.engines import Fit

__all__ = ["print_fit"]


def print_fit(fit: Fit) -> None:
    """Print whether engines and times are for this machine, and the commands to run if they are not."""
    out.print(f"engines for this machine: {'yes' if fit.loadable else 'no'}")
    out.print(f"times taken on a machine like this: {'yes' if fit.timing_valid else 'no'}")
    for reason in fit.reasons:
        out.print(f"  {reason}")
    for what, command in (("build again", fit.rebuild), ("time again", fit.retime)):
        if command is not None:
            out.print(f"  {what}: {command}")
