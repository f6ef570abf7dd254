"""Where the tests' own code lies: what several of them share is in tests/support."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TEST_FILE = re.compile(r"(?:^|\.)(?:test_\w+|conftest)(?:\.|$)")
IMPORTING = {"__import__", "import_module", "run_module", "run_path", "spec_from_file_location"}
"""Functions that import or run what their arguments name."""


def imported_tests(path: Path) -> list[str]:
    """List the test files and conftests that a file imports, as it names them, wherever in the file that is."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module or ''}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            texts = [item.value for item in ast.walk(node) if isinstance(item, ast.Constant)]
            if called in IMPORTING:
                names += [text.removesuffix(".py").replace("/", ".") for text in texts if isinstance(text, str)]
    return [name for name in names if TEST_FILE.search(name)]


def test_no_test_imports_a_test(root: Path) -> None:
    files = sorted((root / "tests").rglob("*.py"))
    assert len(files) > 100

    found = {path.relative_to(root).as_posix(): names for path in files if (names := imported_tests(path))}

    assert found == {}, "put what they share into tests/support"


@pytest.mark.parametrize(
    "line",
    [
        "from tests.cpp.test_load import verdicts",
        "from tests.cpp import test_load",
        "import tests.cpp.test_load as load",
        "from tests.faults.conftest import base",
        "from tests.faults import conftest",
        "import conftest",
        "def f():\n    from .test_load import verdicts",
        "importlib.import_module('tests.cpp.test_load')",
        "runpy.run_path(str(ROOT / 'tests/cpp/test_load.py'))",
    ],
)
def test_every_way_to_import_a_test_is_found(line: str, tmp_path: Path) -> None:
    (tmp_path / "test_other.py").write_text(f"import json\nfrom tests.support.paths import ROOT\n{line}\n")

    assert len(imported_tests(tmp_path / "test_other.py")) == 1
