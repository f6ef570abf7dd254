"""What people may import: ``__all__`` of the package and of its rooms, and nothing that only looks public."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import dsc_split

PACKAGES = ["dsc_split"] + [f"dsc_split.{room}" for room in ("benchmarks", "cli", "engines", "partitioner", "serving")]
SUB_PACKAGES = sorted(
    found.name
    for found in pkgutil.walk_packages(dsc_split.__path__, "dsc_split.")
    if found.ispkg and found.name not in PACKAGES
)
SHARED = {"dsc_split.bundle", "dsc_split.errors", "dsc_split.lookup_table", "dsc_split.packing"}
PROGRAM = {"dsc_split.cli.main"}  # what the console script names


def in_order(names: set[str]) -> list[str]:
    """Sort names as ruff does in ``__all__``: constants, then classes, then the rest."""
    return sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name))


def public_names(package: str) -> set[str]:
    """Collect what looks public in a package: no underscore in front, no module that it merely imported."""
    module = importlib.import_module(package)
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not (inspect.ismodule(value) and value.__name__ != f"{package}.{name}")
        and type(value).__name__ != "_Feature"  # from __future__ import annotations
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_all_is_sorted_and_each_name_exists_once(package: str) -> None:
    module = importlib.import_module(package)

    assert list(module.__all__) == in_order(set(module.__all__))
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_all_is_complete(package: str) -> None:
    submodules = {found.name for found in pkgutil.iter_modules(importlib.import_module(package).__path__)}

    assert public_names(package) - submodules <= set(importlib.import_module(package).__all__)


def test_public_modules_are_the_rooms_and_the_shared_ones() -> None:
    found = {
        module.name
        for module in pkgutil.walk_packages(dsc_split.__path__, "dsc_split.")
        if not any(part.startswith("_") for part in module.name.split("."))
    }

    assert found - set(SUB_PACKAGES) == (set(PACKAGES) - {"dsc_split"}) | SHARED | PROGRAM


@pytest.mark.parametrize("name", SUB_PACKAGES)
def test_sub_package_exports_nothing_and_says_what_it_is(name: str) -> None:
    module = importlib.import_module(name)

    assert module.__all__ == []
    assert inspect.getdoc(module)


@pytest.mark.parametrize("name", sorted(SHARED))
def test_shared_modules_declare_sorted_names_that_exist(name: str) -> None:
    module = importlib.import_module(name)

    assert list(module.__all__) == in_order(set(module.__all__))
    assert [item for item in module.__all__ if not hasattr(module, item)] == []


def test_every_public_function_and_class_of_the_rooms_has_a_docstring(rooms: tuple[str, ...]) -> None:
    bare = [
        f"{package}.{name}"
        for package in PACKAGES
        for name in importlib.import_module(package).__all__
        if callable(value := getattr(importlib.import_module(package), name)) and not inspect.getdoc(value)
    ]

    assert bare == []


def test_library_never_prints_to_stdout(root: Path, rooms: tuple[str, ...]) -> None:
    calls = [
        f"{path.name}:{node.lineno}"
        for folder in ("src/dsc_split", *(room for room in rooms if room != "cli"))
        for path in (root / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        if not any(keyword.arg == "file" for keyword in node.keywords)
    ]

    assert calls == []
