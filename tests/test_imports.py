"""Imports point one way, and heavy packages are imported where they are used."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

# Each room may import itself and the rooms before it in this list. The names that the root re-exports belong to a room.
LAYERS = [
    "errors",
    "_support",
    "table",
    "bundles",
    "partitioner",
    "engines",
    "shipping",
    "benchmarks",
    "serving",
    "cli",
]
SAME_LAYER = {"lookup_table": "table", "bundle": "bundles", "packing": "shipping"}
# These stand on less than their layer would allow.
STAND_ON = {"serving.policy": {"errors", "_support", "table"}}
TOP_FOLDERS = {"partitioner", "engines", "benchmarks", "serving", "cli"}

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


def module_of(path: Path, root: Path) -> str:
    """Name the module of a source file, without ``dsc_split``; "" for the package itself."""
    parts = list(path.relative_to(root).with_suffix("").parts)
    if parts[0] == "src":
        parts = parts[2:]
    return ".".join(part for part in parts if part != "__init__")


def layer_of(module: str) -> str:
    """Name the layer of a module, given without ``dsc_split``; "" for the package itself."""
    first = module.partition(".")[0]
    return SAME_LAYER.get(first, first)


def imports_of(source: str, modules: Collection[str], *, in_strings: bool = True) -> Iterator[tuple[int, str]]:
    """Yield (line, module) for each import of ours: at any depth, and where a module is named in a string."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise AssertionError(f"line {node.lineno}: relative import")
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif (
            in_strings
            and isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.fullmatch(r"dsc_split(\.\w+)+", node.value)
        ):
            names = [node.value]
        for name in names:
            first, _, rest = name.partition(".")
            if first in TOP_FOLDERS:
                raise AssertionError(f"line {getattr(node, 'lineno', 0)}: bare import of {name}")
            if first == "dsc_split":
                while rest and rest not in modules:  # a name in a module
                    rest = rest.rpartition(".")[0]
                yield getattr(node, "lineno", 0), rest


def forbidden(source: str, module: str, modules: Collection[str]) -> list[str]:
    """List the imports of a source file that point the wrong way."""
    layer = layer_of(module)
    if not layer:  # the package itself, which collects what is public
        return []
    allowed = set(LAYERS[: LAYERS.index(layer) + 1])
    for name, stands_on in STAND_ON.items():
        if f"{module}.".startswith(f"{name}."):
            allowed = stands_on
    return [
        f"line {line}: {module} imports {other}"
        for line, other in imports_of(source, modules)
        if other and layer_of(other) not in allowed and not f"{other}.".startswith(f"{module.rpartition('.')[0]}.")
    ]


@pytest.fixture(scope="module")
def sources(root: Path) -> dict[str, str]:
    """Read every source file of ours, by module."""
    files = [
        *(root / "src" / "dsc_split").rglob("*.py"),
        *(path for top in TOP_FOLDERS for path in (root / top).rglob("*.py")),
    ]
    return {module_of(path, root): path.read_text(encoding="utf-8") for path in files}


def test_imports_point_down(sources: dict[str, str]) -> None:
    assert len(sources) > 100

    wrong = {module: found for module, text in sources.items() if (found := forbidden(text, module, sources))}
    assert wrong == {}


def test_no_files_import_each_other_in_a_circle(sources: dict[str, str]) -> None:
    """Function-level imports count, and those for annotations. Names in strings, as in tables of back-ends, do not."""
    graph = {
        module: {other for _, other in imports_of(text, sources, in_strings=False) if other != module}
        for module, text in sources.items()
        if module
    }

    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the files


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("_support.files", "from dsc_split.engines import Target"),
        ("table._types", "from dsc_split.bundle import Bundle"),
        ("partitioner.cuts._find", "def f():\n    from dsc_split import engines"),
        ("engines._base", "if TYPE_CHECKING:\n    import dsc_split.benchmarks.cells._cells"),
        ("benchmarks.sweep._sweep", "from dsc_split.serving import Policy"),
        ("serving.policy._policy", "importlib.import_module('dsc_split.bundles._bundle')"),
    ],
)
def test_wrong_import_is_seen(module: str, source: str, sources: dict[str, str]) -> None:
    assert len(forbidden(source, module, sources)) == 1


@pytest.mark.parametrize("source", ["from engines import Target", "import cli.main", "from . import _files"])
def test_bare_and_relative_imports_are_seen(source: str) -> None:
    with pytest.raises(AssertionError, match="line 1"):
        forbidden(source, "cli.main", ())


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
