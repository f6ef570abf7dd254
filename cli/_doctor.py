"""``dsc-split doctor``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dsc_split.engines._doctor import Examination, TargetState

__all__ = ["doctor"]

GIB = 2**30


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Say what is installed here, and what is missing for what.

    Every back-end is tried. If one does not work, the reason is printed, and the command that repairs it. Nothing is
    changed. Exit code 0: at least one back-end works; 1: one works, and something that is installed is broken; 5: none
    works.
    """
    from dsc_split.cli._console import print_json
    from dsc_split.engines._doctor import examine

    examination = examine()
    if as_json:
        print_json(examination.to_json())
    else:
        _show(examination)
    raise typer.Exit(examination.exit_code)


def _show(found: Examination) -> None:
    from rich import box
    from rich.table import Table

    from dsc_split.cli._console import err, out

    cores = f"{found.cores} cores" if found.cores else "cores unknown"
    memory = f"{found.memory_bytes / GIB:.1f} GiB, {found.available_memory_bytes / GIB:.1f} GiB available"
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_row("dsc-split", found.dsc_split)
    facts.add_row("Python", found.python)
    facts.add_row("platform", found.platform + (f" (Jetson Linux {found.jetson})" if found.jetson else ""))
    facts.add_row("processor", f"{found.processor} ({cores}, {found.usable_cores} usable threads)")
    facts.add_row("memory", memory)
    facts.add_row("CUDA driver", f"CUDA {found.cuda_driver}" if found.cuda_driver else "none")
    facts.add_row("ONNX Runtime providers", ", ".join(found.onnxruntime_providers) or "none")
    facts.add_row("GPUs seen by PyTorch", ", ".join(found.torch_cuda_devices) or "none")
    if not found.gpus:
        facts.add_row("GPUs", f"none ({found.no_gpu})")
    out.print(facts)
    if found.gpus:
        gpus = Table("GPU", "", "memory", "driver", "can run", box=box.SIMPLE_HEAD, pad_edge=False)
        for gpu in found.gpus:
            memory = f"{gpu.memory_bytes / GIB:.1f} GiB" if gpu.memory_bytes else "shared"
            can_run = ", ".join(gpu.targets) + (f". {gpu.note}" if gpu.note else "")
            gpus.add_row(gpu.name, gpu.architecture.upper(), memory, gpu.driver or "", can_run)
        out.print(gpus)
    targets = Table("target", "here", "library, and what is missing", box=box.SIMPLE_HEAD, pad_edge=False)
    for label, state in _group_targets(found.targets):
        here = "works" if state.runs else "builds only" if state.builds else "no"
        targets.add_row(label, here, "; ".join(filter(None, [state.library, state.why])))
    out.print(targets)
    packages = Table("package", "installed", "extra", box=box.SIMPLE_HEAD, pad_edge=False)
    for package in found.packages:
        packages.add_row(package.name, package.version or "missing", package.extra)
    out.print(packages)
    # Not in a table: a command must stay on one line, so that it can be copied.
    commands = {package.pip: package.name for package in found.packages if not package.version}
    commands |= {state.mend: label for label, state in _group_targets(found.targets) if state.mend}
    for command, what in commands.items():
        out.print(f"{command}  # {what}", soft_wrap=True)
    for problem in found.problems:
        err.print(problem, style="yellow")


def _group_targets(states: tuple[TargetState, ...]) -> list[tuple[str, TargetState]]:
    """Join the targets of one back-end that have the same state into one row: ``tensorrt-rtx:sm75, sm80``."""
    rows: dict[tuple[object, ...], tuple[str, TargetState]] = {}
    for state in states:
        backend, _, architecture = state.target.partition(":")
        key = (backend, state.builds, state.runs, state.library, state.why)
        label = f"{rows[key][0]}, {architecture}" if key in rows else state.target
        rows[key] = (label, state)
    return list(rows.values())
