"""The same questions to Python, to the C++ loader and to generated headers: the same bits."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.support.cpp_compiler import CACHE, FUSING, INCLUDE, PROGRAMS, SANITIZED, build, has_fma, run
from tests.support.vectors import Question, answer, golden_tables, golden_vectors, random_questions, random_table

from dsc_split.errors import UsageError
from dsc_split.lookup_table import LookupTable
from dsc_split.table._header import table_header

OTHERS = [
    ("g++", "c++20", ("-O0",)),
    ("g++", "c++17", SANITIZED),
    ("clang++", "c++20", ("-O3", *FUSING[1:])),
]
"""With g++, C++17 and ``FUSING``, which every run compiles: each compiler, standard and kind of optimisation."""


def answers(program: Path, questions: Sequence[str], *tables: Path) -> list[str]:
    """Ask a program: one that loads ``tables``, or one that was generated with its own."""
    task = ["answer"] if tables else []
    done = run([str(program), *task, *map(str, tables)], text="".join(f"{line}\n" for line in questions))
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def differences(questions: Sequence[str], expected: Sequence[str], got: Sequence[str]) -> list[tuple[str, str, str]]:
    return [item for item in zip(questions, expected, got, strict=True) if item[1] != item[2]][:5]


def generated_program(
    tables: Sequence[LookupTable],
    *,
    compiler: str = "g++",
    standard: str = "c++17",
    flags: tuple[str, ...] = FUSING,
    folder: Path | None = None,
) -> Path:
    """Build a program that answers from generated headers.

    Args:
        tables: What it answers for; all go into one translation unit.
        compiler: As for ``build``.
        standard: As for ``build``.
        flags: As for ``build``.
        folder: Where the source is written; by default in the cache.
    """
    headers = [table_header(table, f"vectors::table_{i}") for i, table in enumerate(tables)]
    folder = folder or CACHE / f"headers-{hashlib.sha256(''.join(headers).encode()).hexdigest()[:32]}"
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(headers):
        (folder / f"table_{i}.hpp").write_text(text, encoding="utf-8")
    source = folder / "main.cpp"
    source.write_text(
        '#include "answer.hpp"\n'
        + "".join(f'#include "table_{i}.hpp"\n' for i in range(len(headers)))
        + "int main() {\n  const dsc_split::TableView tables[] = {"
        + ", ".join(f"vectors::table_{i}" for i in range(len(headers)))
        + "};\n  answer::answer_all(tables);\n}\n",
        encoding="utf-8",
    )
    return build(source, flags=(*flags, f"-I{PROGRAMS}", f"-I{folder}"), compiler=compiler, standard=standard)


def has_header(table: LookupTable) -> bool:
    """Return whether the table's numbers are small enough for constants: no sum of times is infinite."""
    try:
        table_header(table, "t")
    except UsageError:
        return False
    return True


def tables_with_headers() -> tuple[list[LookupTable], list[str], list[str]]:
    """Return the golden tables that have headers, with the questions about them and the answers."""
    tables = [LookupTable.load(path) for path in golden_tables()]
    kept = [i for i, table in enumerate(tables) if has_header(table)]
    assert len(kept) >= 8
    asked, expected = [], []
    for line, answered in zip(*golden_vectors(), strict=True):
        number, _, rest = line.partition(" ")
        if int(number) in kept:
            asked.append(f"{kept.index(int(number))} {rest}")
            expected.append(answered)
    assert len(asked) >= 8000
    return [tables[i] for i in kept], asked, expected


def check_generated(compiler: str, standard: str, flags: tuple[str, ...]) -> None:
    tables, asked, expected = tables_with_headers()
    program = generated_program(tables, compiler=compiler, standard=standard, flags=flags)

    assert differences(asked, expected, answers(program, asked)) == []


def test_python_gives_the_golden_answers() -> None:
    tables = [LookupTable.load(path) for path in golden_tables()]
    questions, expected = golden_vectors()
    assert sum(not line.startswith("error") for line in expected) >= 10_000

    got = [answer(tables[question.table], question) for question in map(Question.of, questions)]

    assert differences(questions, expected, got) == []


def test_the_loader_gives_the_golden_answers_where_the_compiler_may_fuse() -> None:
    questions, expected = golden_vectors()
    assert len(questions) >= 10_000

    got = answers(build(PROGRAMS / "load_tables.cpp", flags=FUSING, json=True), questions, *golden_tables())

    assert differences(questions, expected, got) == []


@pytest.mark.slow
@pytest.mark.parametrize(("compiler", "standard", "flags"), OTHERS)
def test_the_loader_gives_the_golden_answers_however_it_is_compiled(
    compiler: str, standard: str, flags: tuple[str, ...]
) -> None:
    questions, expected = golden_vectors()
    program = build(PROGRAMS / "load_tables.cpp", flags=flags, compiler=compiler, standard=standard, json=True)

    assert differences(questions, expected, answers(program, questions, *golden_tables())) == []


def test_generated_headers_give_the_golden_answers() -> None:
    check_generated("g++", "c++17", FUSING)


@pytest.mark.slow
@pytest.mark.parametrize(("compiler", "standard", "flags"), OTHERS)
def test_generated_headers_give_the_golden_answers_however_they_are_compiled(
    compiler: str, standard: str, flags: tuple[str, ...]
) -> None:
    check_generated(compiler, standard, flags)


def test_fresh_tables_and_questions_have_the_same_answers(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    numbers = random.Random(seed)
    tables = [random_table(numbers) for _ in range(40)]
    tables += [random_table(numbers, most_choices=30) for _ in range(3)]
    paths = [tmp_path / f"{i}.json" for i in range(len(tables))]
    for path, table in zip(paths, tables, strict=True):
        path.write_text(json.dumps(table.to_json(), allow_nan=False), encoding="utf-8")
    asked = list(random_questions(numbers, tables, 5000))
    lines = [question.line() for question in asked]
    expected = [answer(tables[question.table], question) for question in asked]

    got = answers(build(PROGRAMS / "load_tables.cpp", flags=FUSING, json=True), lines, *paths)

    assert differences(lines, expected, got) == [], f"seed {seed}"


@pytest.mark.slow
def test_fresh_generated_headers_have_the_same_answers(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    numbers = random.Random(seed)
    tables = [table for table in (random_table(numbers) for _ in range(12)) if has_header(table)]
    asked = list(random_questions(numbers, tables, 5000))
    lines = [question.line() for question in asked]
    program = generated_program(tables, folder=tmp_path)

    got = answers(program, lines)

    shutil.rmtree(program.parent)
    assert differences(lines, [answer(tables[q.table], q) for q in asked], got) == [], f"seed {seed}"


@pytest.mark.skipif(not has_fma(), reason="the processor fuses nothing")
@pytest.mark.slow
def test_without_the_barrier_a_compiler_that_fuses_gives_other_answers(tmp_path: Path) -> None:
    # What the tests above would say if the header did not keep products from being fused.
    copy = tmp_path / "include" / "dsc_split"
    shutil.copytree(INCLUDE / "dsc_split", copy)
    text = (copy / "arithmetic.hpp").read_text(encoding="utf-8")
    without = text.replace("? product : opaque(product)", "? product : product")
    assert without != text
    (copy / "arithmetic.hpp").write_text(without, encoding="utf-8")
    tables, asked, expected = tables_with_headers()

    program = generated_program(tables, flags=(*FUSING, f"-I{copy.parent}"), folder=tmp_path / "program")
    got = answers(program, asked)

    shutil.rmtree(program.parent)
    assert sum(a != b for a, b in zip(expected, got, strict=True)) > 100
