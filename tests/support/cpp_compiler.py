"""Build C++ test programs, once for each content of the files that they are made of, and on one worker alone."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
from pathlib import Path

import filelock
import pytest
from tests.support.paths import ROOT

INCLUDE = ROOT / "cpp" / "include"
PROGRAMS = ROOT / "cpp" / "tests"
CACHE = ROOT / ".cache" / "cpp"
WARNINGS = ("-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wsign-conversion", "-Wshadow", "-Werror")
FUSING = ("-O2", "-march=native", "-ffp-contract=fast")
"""The compiler may fuse a product and a sum, and the processor can."""
SANITIZED = ("-Og", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
"""With -O1 in place of -Og, g++ takes twice as long to compile; with -O0 the programs run four times as long."""


def build(
    *sources: Path,
    flags: tuple[str, ...] = ("-O0",),
    compiler: str = "g++",
    standard: str = "c++17",
    json: bool = False,
) -> Path:
    """Compile and link ``sources`` with warnings as errors; skip the test where the compiler is missing.

    A program that was built before from the same files, with the same compiler and flags, is returned as it is; where
    another worker builds it now, this one waits.

    Args:
        sources: C++ files.
        flags: Further flags.
        compiler: Name of the compiler's program.
        standard: What ``-std`` is given.
        json: Whether nlohmann/json is needed.
    """
    command = [
        require(compiler),
        f"-std={standard}",
        *WARNINGS,
        *flags,
        f"-I{INCLUDE}",
    ]  # an -I among the flags comes first
    libraries = []
    if json:
        command += ["-isystem", str(json_include())]
        libraries.append(importlib.metadata.version("nlohmann-json"))
    program = CACHE / _key([*command, *libraries], sources) / "program"
    program.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(program.parent / "lock"):
        if not program.exists():
            partial = program.with_name("partial")
            done = run([*command, *map(str, sources), "-o", str(partial)])
            assert done.returncode == 0, done.stderr
            partial.rename(program)
    return program


def run(command: list[str], *, text: str | None = None, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a program with ``text`` on its standard input, and give what it printed."""
    return subprocess.run(command, input=text, capture_output=True, encoding="utf-8", timeout=timeout_s, check=False)


def require(program: str) -> str:
    """Find a program; skip the test where it is missing."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed")
    return found


def json_include() -> Path:
    """Find the folder of nlohmann/json's headers; skip the test where there is none."""
    try:
        import nlohmann_json
    except ImportError:
        pytest.skip("nlohmann-json is not installed: pip install nlohmann-json")
    return Path(os.fspath(nlohmann_json.__path__[0])) / "include"


def has_fma() -> bool:
    """Return whether the processor fuses a product and a sum where the compiler lets it."""
    info = Path("/proc/cpuinfo")
    return info.exists() and bool({"fma", "asimd"} & set(info.read_text(encoding="utf-8").split()))


@functools.cache
def _version(compiler: str) -> str:
    return run([compiler, "--version"]).stdout


def _key(command: list[str], sources: tuple[Path, ...]) -> str:
    digest = hashlib.sha256("\0".join([_version(command[0]), *command]).encode())
    beside = {path for source in sources for path in source.parent.glob("*.hpp")}
    for path in [*sources, *sorted(INCLUDE.rglob("*.hpp")), *sorted(beside | set(PROGRAMS.glob("*.hpp")))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]
