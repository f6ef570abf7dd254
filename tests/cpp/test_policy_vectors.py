"""The policy in C++ gives what it gives in Python, bit for bit."""

import random
import re
from pathlib import Path

import pytest
from tests.support.cpp_compiler import FUSING, INCLUDE, PROGRAMS, SANITIZED, build, run
from tests.support.paths import ROOT
from tests.support.policy_events import GOLDEN_TABLE, golden_lines, parameter_words, replayed, sequence
from tests.support.vectors import bits

from dsc_split.serving import EstimatorParameters, PolicyParameters
from dsc_split.serving.policy._decay import decay

SOURCE = PROGRAMS / "run_policy.cpp"
DOCUMENT = ROOT / "docs" / "policy.md"
NATIVE = ("-O2", "-march=native")


def played(program: Path, lines: list[str]) -> list[str]:
    done = run([str(program)], text="\n".join(lines) + "\n")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def fresh_sequences(count: int) -> tuple[int, list[str], list[str]]:
    """Make sequences that no run had before; gives the seed, the lines and the answers."""
    seed = random.SystemRandom().randrange(2**32)
    numbers = random.Random(seed)
    pairs = [pair for _ in range(count) for pair in sequence(numbers)]
    return seed, [line for line, _ in pairs], [answer for _, answer in pairs if answer is not None]


def first_difference(lines: list[str], expected: list[str], found: list[str]) -> str:
    events = [line for line in lines if not line.startswith(("table", "policy"))]
    for event, ours, theirs in zip(events, expected, found, strict=True):
        if ours != theirs:
            return f"{event}\nPython {ours}\nC++    {theirs}"
    return ""


def test_cpp_gives_the_golden_answers_whatever_the_processor_can_fuse() -> None:
    lines, expected = golden_lines()

    assert len(expected) >= 2000
    assert first_difference(lines, expected, played(build(SOURCE, flags=NATIVE), lines)) == ""


def test_cpp_and_python_agree_on_sequences_that_nobody_has_seen() -> None:
    seed, lines, expected = fresh_sequences(60)

    assert first_difference(lines, expected, played(build(SOURCE, flags=NATIVE), lines)) == "", f"seed {seed}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiler", "flags"),
    [
        ("g++", ("-O0",)),
        ("g++", ("-O3", "-march=native", "-ffp-contract=fast", "-flto")),
        ("clang++", FUSING),
        ("g++", SANITIZED),
    ],
)
def test_every_compiler_and_optimisation_gives_the_same_bits(compiler: str, flags: tuple[str, ...]) -> None:
    program = build(SOURCE, flags=flags, compiler=compiler)
    golden, golden_answers = golden_lines()
    seed, lines, expected = fresh_sequences(150)

    assert first_difference(golden, golden_answers, played(program, golden)) == ""
    assert first_difference(lines, expected, played(program, lines)) == "", f"seed {seed}"


def test_python_still_gives_the_golden_answers() -> None:
    lines, expected = golden_lines()

    assert first_difference(lines, expected, list(replayed(lines))) == ""


def test_both_languages_have_the_same_defaults() -> None:
    [line] = played(build(SOURCE, flags=NATIVE), ["defaults"])

    assert line.split() == parameter_words(PolicyParameters()) + parameter_words(EstimatorParameters())


def test_both_languages_forget_alike_at_any_age() -> None:
    numbers = random.Random(1)
    ages = [0.0, 0.5, 1.0, 1074.0, 1075.5, 1099.9, 1100.0, 1e300, float("inf")]
    ages += [numbers.choice([1.0, 30.0, 1100.0]) * numbers.random() for _ in range(5000)]

    found = played(build(SOURCE, flags=NATIVE), [f"decay {bits(age)}" for age in ages])

    assert found == [bits(decay(age)) for age in ages]


@pytest.mark.slow
def test_the_cpp_example_of_the_document_compiles_and_runs(tmp_path: Path) -> None:
    [example] = re.findall(r"```cpp\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    source = tmp_path / "example.cpp"
    source.write_text(example, encoding="utf-8")

    done = run([str(build(source, json=True)), str(GOLDEN_TABLE)])

    assert (done.returncode, done.stdout) == (0, "no-offload unknown-rate 131072\nfull-offload best 0\n")


@pytest.mark.parametrize("name", ["policy.hpp", "rate_estimator.hpp"])
def test_what_the_headers_include_is_of_the_core_and_the_standard_library(name: str) -> None:
    included = re.findall(r"#include [<\"](.+)[>\"]", (INCLUDE / "dsc_split" / name).read_text(encoding="utf-8"))

    of_ours = {header for header in included if "/" in header}
    assert of_ours <= {f"dsc_split/{part}.hpp" for part in ("arithmetic", "lookup_table", "rate_estimator", "result")}
    assert not any("." in header for header in included if header not in of_ours)
