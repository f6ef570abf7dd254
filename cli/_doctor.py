"""``dsc-split doctor``."""

from __future__ import annotations

from typing import Annotated

import typer

from dsc_split._doctor import Examination, examine

__all__ = ["doctor"]

GIB = 2**30


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Say what is installed here, and what is missing for what.

    Optional packages are listed with the pip command that brings them. Nothing is changed.
    """
    from dsc_split.cli._console import print_json

    examination = examine()
    if as_json:
        print_json(examination.to_json())
    else:
        _show(examination)


def _show(found: Examination) -> None:
    from rich import box
    from rich.table import Table

    from dsc_split.cli._console import err, out

    cores = f"{found.cores} cores" if found.cores else "cores unknown"
    memory = f"{found.memory_bytes / GIB:.1f} GiB, {found.available_memory_bytes / GIB:.1f} GiB available"
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_row("dsc-split", found.dsc_split)
    facts.add_row("Python", found.python)
    facts.add_row("platform", found.platform)
    facts.add_row("processor", f"{found.processor} ({cores}, {found.usable_cores} usable threads)")
    facts.add_row("memory", memory)
    facts.add_row("ONNX Runtime providers", ", ".join(found.onnxruntime_providers) or "none")
    facts.add_row("GPUs seen by PyTorch", ", ".join(found.torch_cuda_devices) or "none")
    out.print(facts)
    out.print()
    packages = Table("package", "installed", "install it with", box=box.SIMPLE_HEAD, pad_edge=False)
    for package in found.packages:
        packages.add_row(package.name, package.version or "missing", "" if package.version else package.pip)
    out.print(packages)
    for problem in found.problems:
        err.print(problem, style="yellow")
