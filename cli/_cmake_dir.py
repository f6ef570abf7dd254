"""``dsc-split cmake-dir``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import dsc_split

__all__ = ["cmake_dir"]

PACKAGE = Path(dsc_split.__file__).parent
"""The installed package, which contains the headers and their CMake files."""


def cmake_dir(
    include: Annotated[
        bool, typer.Option("--include", help="Print the folder of the headers instead, for the compiler's -I.")
    ] = False,
) -> None:
    """Print where the CMake files of the C++ headers lie.

    For CMake: -Ddsc_split_DIR="$(dsc-split cmake-dir)".
    """
    from dsc_split.cli._console import out
    from dsc_split.errors import DscError

    folder, wanted = ("include", "dsc_split/lookup_table.hpp") if include else ("cmake", "dsc_splitConfig.cmake")
    if not (PACKAGE / folder / wanted).is_file():
        raise DscError(
            f"this installation of dsc-split lacks its C++ part: there is no file {str(PACKAGE / folder / wanted)!r}. "
            "Install dsc-split again; a checkout needs its links under src/dsc_split."
        )
    out.print(str(PACKAGE / folder), soft_wrap=True)
