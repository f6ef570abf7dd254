"""What docs/cpp.md shows compiles, runs and prints what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.cpp.compiling import CACHE, build, run

from dsc_split._table_header import table_header
from dsc_split.lookup_table import LookupTable

GOLDEN = Path(__file__).parents[1] / "data" / "tables" / "golden.json"


def blocks(root: Path, language: str) -> list[str]:
    """List the fenced blocks of a language."""
    text = (root / "docs" / "cpp.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_programs_of_the_page_print_what_it_says(root: Path) -> None:
    folder = CACHE / "docs"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "b4.hpp").write_text(table_header(LookupTable.load(GOLDEN), "fleet::b4"), encoding="ascii")
    loading, constant = blocks(root, "cpp")
    (printed,) = blocks(root, "text")
    (folder / "loading.cpp").write_text(loading, encoding="utf-8")
    (folder / "constant.cpp").write_text(constant, encoding="utf-8")

    loads = build(folder / "loading.cpp", json=True)
    has = build(folder / "constant.cpp", flags=("-O2", f"-I{folder}"))

    assert run([str(loads), str(GOLDEN)]).stdout == printed
    assert run([str(has)]).stdout == printed.partition(":")[0] + "\n"
    nowhere = run([str(loads), "nowhere.json"])
    assert (nowhere.returncode, nowhere.stdout) == (1, "")
    assert "nowhere.json" in nowhere.stderr


def test_page_names_every_header_that_people_include(root: Path) -> None:
    text = (root / "docs" / "cpp.md").read_text(encoding="utf-8")

    for name in ("result.hpp", "lookup_table.hpp", "policy.hpp", "load.hpp"):
        assert f"| `{name}` |" in text
        assert (root / "cpp" / "include" / "dsc_split" / name).is_file()
