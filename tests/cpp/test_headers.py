"""The headers compile wherever C++17 does, stay quiet, and round every operation whatever the compiler may fuse."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.support.cpp_compiler import FUSING, INCLUDE, WARNINGS, build, has_fma, json_include, require, run
from tests.support.paths import ROOT
from tests.support.vectors import bits

HEADERS = sorted(str(path.relative_to(INCLUDE / "dsc_split")) for path in (INCLUDE / "dsc_split").rglob("*.hpp"))
COMPILERS = ["g++", "clang++"]
PAIRS = [("g++", "c++17"), ("clang++", "c++20")]
"""Each compiler and each standard, once."""
BARE = ("-fno-exceptions", "-fno-rtti")

REFUSED = [
    ("g++", ["-ffast-math"]),
    ("g++", ["-Ofast"]),
    ("g++", ["-ffinite-math-only"]),
    ("g++", ["-freciprocal-math"]),
    ("g++", ["-funsafe-math-optimizations"]),
    ("g++", ["-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math"]),
    ("clang++", ["-ffast-math"]),
    ("clang++", ["-Ofast"]),
    ("clang++", ["-ffinite-math-only"]),
]
"""clang++ hides the parts of -ffast-math from the preprocessor, but for this one."""

COMPARE = """\
#include <cinttypes>
#include <cstdio>

#include "dsc_split/lookup_table.hpp"

namespace {

// The formula as one writes it down: the compiler may fuse what it likes.
double plain_ms(const dsc_split::Row& row, const dsc_split::Link& link, const dsc_split::State& state, double rtt_ms) {
  const double up_mb = static_cast<double>(row.uplink_bytes) / 1e6;
  const double fixed_ms = row.tail_ms * state.server_load + state.queue_ms + rtt_ms * link.round_trips + link.c0_ms +
                          link.c1_ms_per_mb * up_mb;
  return row.head_ms + (fixed_ms + 1000.0 * (up_mb / state.rate_mb_s));
}

}  // namespace

int main() {
  double head_ms, tail_ms, load, queue_ms, rtt_ms, round_trips, c0_ms, c1_ms_per_mb, rate_mb_s;
  std::int64_t up_bytes;
  while (std::scanf("%la %la %la %la %la %la %la %la %la %" SCNd64, &head_ms, &tail_ms, &load, &queue_ms, &rtt_ms,
                    &round_trips, &c0_ms, &c1_ms_per_mb, &rate_mb_s, &up_bytes) == 10) {
    dsc_split::Link link;
    link.c0_ms = c0_ms;
    link.c1_ms_per_mb = c1_ms_per_mb;
    link.rtt_ms = rtt_ms;
    link.round_trips = round_trips;
    dsc_split::Choice choice{0, dsc_split::Kind::split, false, "cut"};
    dsc_split::Row row;
    row.head_ms = head_ms;
    row.tail_ms = tail_ms;
    row.uplink_bytes = up_bytes;
    row = dsc_split::completed(row, choice, link);
    dsc_split::Batch batch{1, {&row, 1}};
    dsc_split::TableView table;
    table.choices = {&choice, 1};
    table.batches = {&batch, 1};
    table.link = link;
    dsc_split::State state;
    state.batch = 1;
    state.rate_mb_s = rate_mb_s;
    state.server_load = load;
    state.queue_ms = queue_ms;
    const auto pick = table.pick(state);
    const auto own = table.pick(1, rate_mb_s);
    dsc_split::State as_measured;
    as_measured.rate_mb_s = rate_mb_s;
    if (!pick || !own) return 1;
    std::printf("%a %a %a %a\\n", pick->latency_ms, own->latency_ms, plain_ms(row, link, state, rtt_ms),
                plain_ms(row, link, as_measured, rtt_ms));
  }
}
"""


def write_sources(folder: Path, sources: Sequence[str]) -> list[Path]:
    paths = [folder / f"source_{i}.cpp" for i in range(len(sources))]
    for path, text in zip(paths, sources, strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


def first_error(printed: str) -> str:
    """Return the first line that says what is wrong."""
    return next(line for line in printed.splitlines() if "error: " in line)


def test_every_header_is_looked_at() -> None:
    assert {"arithmetic.hpp", "load.hpp", "lookup_table.hpp", "policy.hpp", "result.hpp"} <= set(HEADERS)


@pytest.mark.slow
@pytest.mark.parametrize(("compiler", "standard"), PAIRS)
def test_every_header_compiles_alone(tmp_path: Path, compiler: str, standard: str) -> None:
    sources = write_sources(tmp_path, [f'#include "dsc_split/{name}"\n' for name in HEADERS])
    command = [require(compiler), f"-std={standard}", *WARNINGS, *BARE, "-fsyntax-only", f"-I{INCLUDE}"]

    done = run([*command, "-isystem", str(json_include()), *map(str, sources)])

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize(("compiler", "standard"), PAIRS)
def test_all_headers_in_two_translation_units_link(tmp_path: Path, compiler: str, standard: str) -> None:
    includes = "".join(f'#include "dsc_split/{name}"\n' for name in HEADERS)
    load = "decltype(&dsc_split::load) other()"
    sources = write_sources(
        tmp_path,
        [
            f"{includes}{load};\nint main() {{ return other() == &dsc_split::load ? 0 : 1; }}\n",
            f"{includes}{load};\n{load} {{ return &dsc_split::load; }}\n",
        ],
    )

    program = build(*sources, flags=("-O0", *BARE), compiler=compiler, standard=standard, json=True)

    assert run([str(program)]).returncode == 0


@pytest.mark.parametrize(
    ("compiler", "flags"), REFUSED, ids=lambda value: value if isinstance(value, str) else value[0]
)
def test_flags_that_change_arithmetic_are_refused(compiler: str, flags: list[str]) -> None:
    command = [require(compiler), "-std=c++17", "-fsyntax-only", f"-I{INCLUDE}", "-include", "dsc_split/arithmetic.hpp"]
    empty = ["-x", "c++", "/dev/null"]

    assert run([*command, *empty]).returncode == 0
    done = run([*command, *flags, *empty])
    assert done.returncode != 0
    assert "dsc_split: -ffast-math and its parts" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(HEADERS) - {"result.hpp"}))
@pytest.mark.parametrize("compiler", COMPILERS)
def test_older_standards_are_refused_in_the_first_line(compiler: str, name: str) -> None:
    command = [require(compiler), "-std=c++14", "-Wfatal-errors", "-fsyntax-only", f"-I{INCLUDE}"]

    done = run([*command, "-isystem", str(json_include()), "-include", f"dsc_split/{name}", "-x", "c++", "/dev/null"])

    assert done.returncode != 0
    assert "dsc_split needs C++17: compile with -std=c++17" in first_error(done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("compiler", COMPILERS)
def test_older_json_is_refused_with_its_version(tmp_path: Path, compiler: str) -> None:
    (tmp_path / "nlohmann").mkdir()
    minor = "NLOHMANN_JSON_VERSION_MINOR"
    (tmp_path / "nlohmann" / "json.hpp").write_text(
        f"#include_next <nlohmann/json.hpp>\n#undef {minor}\n#define {minor} 10\n", encoding="utf-8"
    )
    command = [require(compiler), "-std=c++17", "-Wfatal-errors", "-fsyntax-only", f"-I{INCLUDE}"]
    folders = ["-isystem", str(tmp_path), "-isystem", str(json_include())]

    done = run([*command, *folders, "-include", "dsc_split/load.hpp", "-x", "c++", "/dev/null"])

    assert done.returncode != 0
    assert "dsc_split/load.hpp needs nlohmann/json 3.11 or later; found 3.10" in first_error(done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("compiler", COMPILERS)
def test_no_product_and_sum_are_fused_where_the_compiler_fuses_the_plain_formula(tmp_path: Path, compiler: str) -> None:
    if not has_fma():
        pytest.skip("this processor has no fused multiply-add")
    numbers = random.Random(1)
    questions, expected = [], []
    for _ in range(2000):
        head, tail, queue, rtt, c0 = (numbers.uniform(0.0, 100.0) for _ in range(5))
        load, trips, c1 = numbers.uniform(0.5, 4.0), numbers.uniform(0.5, 3.0), numbers.uniform(0.0, 5.0)
        rate, up_bytes = numbers.lognormvariate(2.0, 1.0), numbers.randrange(1_000, 10_000_000)
        questions.append(
            " ".join([*(value.hex() for value in (head, tail, load, queue, rtt, trips, c0, c1, rate)), str(up_bytes)])
        )
        up = up_bytes / 1e6
        times = [
            head + ((tail * now_load + now_queue + rtt * trips + c0 + c1 * up) + 1000.0 * (up / rate))
            for now_load, now_queue in ((load, queue), (1.0, 0.0))
        ]
        expected.append([bits(time_ms) for time_ms in times])

    program = build(*write_sources(tmp_path, [COMPARE]), flags=FUSING, compiler=compiler)
    done = run([str(program)], text="\n".join(questions) + "\n")

    assert done.returncode == 0
    answers = [[bits(float.fromhex(word)) for word in line.split()] for line in done.stdout.splitlines()]
    assert [answer[:2] for answer in answers] == expected
    fused = sum(answer[2:] != times for answer, times in zip(answers, expected, strict=True))
    assert fused > 100, "the plain formula, compiled alike, differs: this test can fail"


def tidy(source: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run clang-tidy on a file and on our headers that it includes."""
    command = [require("clang-tidy"), f"--config-file={ROOT / 'cpp' / '.clang-tidy'}", "--quiet", str(source)]
    return run([*command, "--", "-std=c++17", *flags])


@pytest.mark.slow
def test_clang_tidy_finds_nothing(tmp_path: Path) -> None:
    (source,) = write_sources(tmp_path, ["".join(f'#include "dsc_split/{name}"\n' for name in HEADERS)])

    done = tidy(source, f"-I{INCLUDE}", "-isystem", str(json_include()))

    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.slow
def test_clang_tidy_would_find_something(tmp_path: Path) -> None:
    (tmp_path / "dsc_split").mkdir()
    (tmp_path / "dsc_split" / "odd.hpp").write_text("inline double half(int number) { return number / 2; }\n")
    (source,) = write_sources(tmp_path, ['#include "dsc_split/odd.hpp"\n'])

    done = tidy(source, f"-I{tmp_path}")

    assert done.returncode != 0
    assert "bugprone-integer-division" in done.stdout
