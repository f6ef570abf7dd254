"""Imports point one way, and heavy packages are imported where they are used."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# room -> the rooms it may import besides itself; "" is the root, dsc_split's own modules
MAY_IMPORT = {
    "": set[str](),
    "partitioner": {""},
    "engines": {"", "partitioner"},
    "benchmarks": {"", "partitioner", "engines"},
    "serving": {"", "partitioner", "engines"},
    "cli": {"", "partitioner", "engines", "benchmarks", "serving"},
}
ROOMS = set(MAY_IMPORT) - {""}

HEAVY = [
    "cuda",
    "grpc",
    "matplotlib",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxscript",
    "pycuda",
    "pynvml",
    "ray",
    "safetensors",
    "tensorrt",
    "tensorrt_rtx",
    "timm",
    "torch",
    "torchvision",
]

SCRIPT = """
import contextlib, importlib, io, pkgutil, sys
for name in {heavy!r}:
    sys.modules[name] = None
import dsc_split
modules = [found.name for found in pkgutil.walk_packages(dsc_split.__path__, "dsc_split.")]
for name in modules:
    importlib.import_module(name)
from dsc_split.cli.main import COMMANDS, main
for command in COMMANDS:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        try:
            main([command, "--help"])
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"dsc-split {{command}} --help ended with {{end.code}}") from None
    if "--help" not in text.getvalue():
        raise RuntimeError(f"dsc-split {{command}} --help printed {{text.getvalue()!r}}")
print(len(modules))
"""


def room_of(path: Path, root: Path) -> str:
    """Name the room of a source file; "" for the root."""
    room = path.relative_to(root).parts[0]
    return "" if room == "src" else room


def imports_of(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, room) for each import of ours: at any depth, and where a module is named in a string."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise AssertionError(f"line {node.lineno}: relative import")
            # from dsc_split import partitioner
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.fullmatch(r"dsc_split(\.\w+)+", node.value)
        ):
            names = [node.value]
        for name in names:
            first, *rest = name.split(".")
            if first in ROOMS:
                raise AssertionError(f"line {getattr(node, 'lineno', 0)}: bare import of {name}")
            if first == "dsc_split":
                yield getattr(node, "lineno", 0), rest[0] if rest and rest[0] in ROOMS else ""


def forbidden(source: str, room: str) -> list[str]:
    """List the imports of a source file that point the wrong way."""
    return [
        f"line {line}: {room or 'root'} imports {other}"
        for line, other in imports_of(source)
        if other != room and other not in MAY_IMPORT[room]
    ]


def test_imports_point_from_cli_down_to_the_root(root: Path) -> None:
    files = sorted((root / "src" / "dsc_split").glob("*.py"))
    for room in sorted(ROOMS):
        files += sorted((root / room).rglob("*.py"))
    assert len(files) > 10

    wrong = {
        str(path.relative_to(root)): found
        for path in files
        if (found := forbidden(path.read_text(encoding="utf-8"), room_of(path, root)))
    }
    assert wrong == {}


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("", "from dsc_split.engines import Target"),
        ("partitioner", "def f():\n    from dsc_split import engines"),
        ("engines", "if TYPE_CHECKING:\n    import dsc_split.benchmarks.cells._cells"),
        ("benchmarks", "from dsc_split.serving import Policy"),
        ("serving", "importlib.import_module('dsc_split.benchmarks.cells._cells')"),
    ],
)
def test_wrong_import_is_seen(room: str, source: str) -> None:
    assert len(forbidden(source, room)) == 1


@pytest.mark.parametrize("source", ["from engines import Target", "import cli.main", "from . import _files"])
def test_bare_and_relative_imports_are_seen(source: str) -> None:
    with pytest.raises(AssertionError, match="line 1"):
        forbidden(source, "cli")


def test_every_module_imports_and_every_command_has_help_without_heavy_packages() -> None:
    script = SCRIPT.format(heavy=HEAVY)

    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10
