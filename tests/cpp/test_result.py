"""What a function gives instead of an exception holds values and errors of any type."""

import pytest
from tests.support.cpp_compiler import PROGRAMS, build, run

SANITIZED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.mark.parametrize(
    ("compiler", "standard"), [("g++", "c++17"), ("clang++", "c++17"), ("g++", "c++20")], ids=lambda value: value
)
def test_a_result_holds_what_has_no_default_constructor(compiler: str, standard: str) -> None:
    program = build(PROGRAMS / "check_result.cpp", flags=SANITIZED, compiler=compiler, standard=standard)

    done = run([str(program)])

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
