"""What docs/cpp.md shows compiles, runs and prints what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.support.cpp_compiler import CACHE, INCLUDE, build, run
from tests.support.paths import GOLDEN

from dsc_split.lookup_table import LookupTable
from dsc_split.table._header import table_header


def blocks(root: Path, language: str) -> list[str]:
    """List the fenced blocks of a language."""
    text = (root / "docs" / "cpp.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_programs_of_the_page_print_what_it_says(root: Path) -> None:
    folder = CACHE / "docs"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "b4.hpp").write_text(table_header(LookupTable.load(GOLDEN), "fleet::b4"), encoding="ascii")
    loading, asking, constant = blocks(root, "cpp")
    printed, answers = blocks(root, "text")
    (folder / "loading.cpp").write_text(loading, encoding="utf-8")
    (folder / "asking.cpp").write_text(asking, encoding="utf-8")
    (folder / "constant.cpp").write_text(constant, encoding="utf-8")

    loads = build(folder / "loading.cpp", json=True)
    asks = build(folder / "asking.cpp", json=True)
    has = build(folder / "constant.cpp", flags=("-O0", f"-I{folder}"))

    assert run([str(loads), str(GOLDEN)]).stdout == printed
    assert run([str(asks), str(GOLDEN)]).stdout == answers
    assert run([str(has)]).stdout == printed.partition(":")[0] + "\n"
    nowhere = run([str(loads), "nowhere.json"])
    assert (nowhere.returncode, nowhere.stdout) == (1, "")
    assert "nowhere.json" in nowhere.stderr


def test_page_names_every_header(root: Path) -> None:
    text = (root / "docs" / "cpp.md").read_text(encoding="utf-8")

    named = set(re.findall(r"`(\w+\.hpp)`", text))
    assert named == {path.name for path in (INCLUDE / "dsc_split").glob("*.hpp")}


def test_page_lists_what_the_headers_offer(root: Path) -> None:
    text = (root / "docs" / "cpp.md").read_text(encoding="utf-8")
    code = "".join(path.read_text(encoding="utf-8") for path in (INCLUDE / "dsc_split").glob("*.hpp"))
    state = re.search(r"^struct State \{$(.*?)^\};$", code, re.MULTILINE | re.DOTALL)

    calls = re.findall(r"^\| `(?:\w+::)?(\w+)\(", text, re.MULTILINE)
    assert len(calls) >= 15
    assert [name for name in calls if not re.search(rf"\]\] .*\b{name}\(", code)] == []
    assert state is not None
    fields = re.findall(r"^  [^/]*?(\w+) = .*;", state[1], re.MULTILINE)
    assert fields == re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
