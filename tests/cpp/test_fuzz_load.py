"""Fuzz the C++ loader with libFuzzer, under the sanitizers; ``DSC_SPLIT_FUZZ_S=600`` fuzzes for ten minutes."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from tests.support.cpp_compiler import PROGRAMS, build, require, run
from tests.support.paths import GOLDEN
from tests.support.table_documents import HOSTILE_FOLDER

FLAGS = ("-O1", "-fno-sanitize-recover=all")
SANITIZERS = "address,undefined"
VALUES = ["null", "true", "false", "0.0", "1e308", "5e-324", "1048576", "2147483647", "4398046511104", "},{", "],["]


def has_libfuzzer(folder: Path) -> bool:
    """Return whether clang++ can link a fuzz target."""
    source = folder / "target.cpp"
    source.write_text('extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }\n')
    command = [require("clang++"), f"-fsanitize=fuzzer,{SANITIZERS}", str(source), "-o", str(folder / "target")]
    return run(command).returncode == 0


def words(value: object) -> set[str]:
    """Collect all keys and texts of a document."""
    if isinstance(value, dict):
        return set(value).union(*map(words, value.values()))
    if isinstance(value, list):
        return set().union(*map(words, value))
    return {value} if isinstance(value, str) else set()


@pytest.mark.slow
def test_the_loader_and_its_answers_survive_fuzzing(tmp_path: Path) -> None:
    if not has_libfuzzer(tmp_path):
        pytest.skip("clang++ has no libFuzzer; it is in the package libclang-rt-dev")
    program = build(
        PROGRAMS / "fuzz_load.cpp", flags=(*FLAGS, f"-fsanitize=fuzzer,{SANITIZERS}"), compiler="clang++", json=True
    )
    seconds = int(os.environ.get("DSC_SPLIT_FUZZ_S", "5"))
    corpus = tmp_path / "corpus"
    shutil.copytree(HOSTILE_FOLDER, corpus)
    shutil.copy(GOLDEN, corpus)
    dictionary = tmp_path / "table.dict"
    texts = words(json.loads(GOLDEN.read_text())) | {"passthrough", "elements"}
    entries = [*VALUES, *(json.dumps(text) for text in sorted(texts))]
    dictionary.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))

    done = run(
        [
            str(program),
            f"-max_total_time={seconds}",
            "-max_len=16384",
            "-timeout=10",
            "-rss_limit_mb=2048",
            f"-dict={dictionary}",
            f"-artifact_prefix={tmp_path}/",
            str(corpus),
        ],
        timeout_s=seconds + 120,
    )

    assert done.returncode == 0, done.stderr[-3000:]
    executions = re.search(r"Done (\d+) runs", done.stderr)
    assert executions is not None
    assert int(executions[1]) > 1000
