"""Three ways to the headers with CMake: installed, out of the wheel, and with FetchContent; each builds a program."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.support.cpp_compiler import json_include, require, run
from tests.support.paths import GOLDEN

from dsc_split import __version__
from dsc_split.cli import _cmake_dir
from dsc_split.lookup_table import LookupTable
from dsc_split.table._header import table_header

BATCH, RATE_MB_S = 1, 8.0

NOTHING_OF_THE_SYSTEM = """\
set(CMAKE_FIND_USE_CMAKE_SYSTEM_PATH OFF)
set(CMAKE_FIND_USE_CMAKE_ENVIRONMENT_PATH OFF)
set(CMAKE_FIND_USE_SYSTEM_ENVIRONMENT_PATH OFF)
set(CMAKE_FIND_USE_PACKAGE_REGISTRY OFF)
"""
"""So that no nlohmann/json of this machine is found."""
CORE = f"""\
#include <cstdio>

#include "b4.hpp"

int main() {{ std::printf("%s", b4.pick({BATCH}, {RATE_MB_S})->choice->name.data()); }}
"""
LOADING = f"""\
#include <cstdio>

#include <dsc_split/load.hpp>

int main(int, char** arguments) {{
  const auto table = dsc_split::load(arguments[1]);
  if (table) std::printf("%s", table->pick({BATCH}, {RATE_MB_S})->choice->name.data());
}}
"""


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to get the targets."""

    lines: str
    """What a project's CMakeLists.txt says for it."""
    definition: str
    """What the command line says for it."""


def cmake(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the CMake of this environment, or else the system's."""
    program = shutil.which("cmake", path=Path(sys.executable).parent) or require("cmake")
    return run([program, *map(str, arguments)])


def configure(folder: Path, way: Way, *definitions: str, before: str = "", source: str | None = CORE) -> str:
    """Write and configure a project in ``folder``; return what CMake complained about.

    Args:
        folder: Where it is written.
        way: How it gets the targets.
        definitions: More for the command line.
        before: Lines of CMakeLists.txt that stand before those of ``way``.
        source: The program; ``None`` for a project that builds nothing and so looks for no compiler, which is most of
            the time that CMake takes.
    """
    languages, program = "NONE", ""
    if source is not None:
        (folder / "main.cpp").write_text(source, encoding="utf-8")
        (folder / "b4.hpp").write_text(table_header(LookupTable.load(GOLDEN), "b4"), encoding="ascii")
        target = "load" if source == LOADING else "dsc_split"
        program = f"add_executable(program main.cpp)\ntarget_link_libraries(program PRIVATE dsc_split::{target})\n"
        languages, definitions = "CXX", (f"-DCMAKE_CXX_COMPILER={require('g++')}", *definitions)
    (folder / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.16)\n"
        f"project(consumer LANGUAGES {languages})\n"
        f"{NOTHING_OF_THE_SYSTEM}{before}\n{way.lines}\n{program}",
        encoding="utf-8",
    )
    done = cmake("-S", folder, "-B", folder / "build", way.definition, *definitions)
    assert (done.returncode != 0) == ("CMake Error" in done.stderr), done.stderr
    return " ".join(done.stderr.split())


def answer(folder: Path) -> str:
    """Build the project that was configured, and run its program."""
    done = cmake("--build", folder / "build")
    assert done.returncode == 0, done.stdout + done.stderr
    return run([str(folder / "build" / "program"), str(GOLDEN)]).stdout


def expected() -> str:
    return LookupTable.load(GOLDEN).pick(BATCH, RATE_MB_S).choice.name


def projects(root: Path) -> list[str]:
    """List what docs/cpp.md shows as CMakeLists.txt."""
    return re.findall(r"^```cmake\n(.*?)^```$", (root / "docs" / "cpp.md").read_text(encoding="utf-8"), re.M | re.S)


def found(wanted: str = "0.1 CONFIG REQUIRED") -> str:
    return f"find_package(dsc_split {wanted})"


def install(root: Path, folder: Path) -> Way:
    """Run ``cmake --install``, and forget what it was installed from."""
    configured = cmake("-S", root / "cpp", "-B", folder / "build", f"-DCMAKE_INSTALL_PREFIX={folder / 'prefix'}")
    assert configured.returncode == 0, configured.stderr
    done = cmake("--install", folder / "build")
    assert done.returncode == 0, done.stderr
    return Way(lines=found(), definition=f"-DCMAKE_PREFIX_PATH={folder / 'prefix'}")


def unpack_wheel(root: Path, folder: Path) -> Way:
    """Build the wheel, unpack it as pip does, and ask its own ``dsc-split cmake-dir``."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder), "-t", "wheel"]
    built = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert built.returncode == 0, built.stderr
    site = folder / "site-packages"
    with zipfile.ZipFile(folder / f"dsc_split-{__version__}-py3-none-any.whl") as wheel:
        wheel.extractall(site)
    printed = subprocess.run(
        [sys.executable, "-m", "dsc_split.cli", "cmake-dir"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (printed.stdout, printed.stderr) == (f"{site / 'dsc_split' / 'cmake'}\n", "")
    return Way(lines=found(), definition=f"-Ddsc_split_DIR={printed.stdout.strip()}")


def fetch(root: Path, folder: Path) -> Way:
    """Take the checkout in place of what FetchContent would fetch, with the lines that the page shows."""
    lines = projects(root)[1].partition("\n\n")[2].partition("\n\n")[0]
    return Way(lines=lines, definition=f"-DFETCHCONTENT_SOURCE_DIR_DSC_SPLIT={root}")


WAYS: dict[str, Callable[[Path, Path], Way]] = {"install": install, "wheel": unpack_wheel, "FetchContent": fetch}


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Way:
    return WAYS[request.param](root, tmp_path_factory.mktemp("way"))


@pytest.fixture(scope="module")
def installed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Way:
    return install(root, tmp_path_factory.mktemp("installed"))


@pytest.mark.slow
def test_core_needs_nothing_but_the_standard_library(way: Way, tmp_path: Path) -> None:
    assert configure(tmp_path, way) == ""
    assert answer(tmp_path) == expected()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["wheel"], indirect=True)
def test_loader_takes_the_folder_of_json_headers_that_the_user_names(way: Way, tmp_path: Path) -> None:
    named = f"-Ddsc_split_JSON_INCLUDE_DIR={json_include()}"

    assert configure(tmp_path, way, named, source=LOADING) == ""
    assert answer(tmp_path) == expected()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["FetchContent"], indirect=True)
def test_loader_takes_the_projects_own_json_target(way: Way, tmp_path: Path) -> None:
    own = (
        "add_library(nlohmann_json INTERFACE)\n"
        "add_library(nlohmann_json::nlohmann_json ALIAS nlohmann_json)\n"
        f"target_include_directories(nlohmann_json INTERFACE {json_include()})"
    )

    assert configure(tmp_path, way, before=own, source=LOADING) == ""
    assert answer(tmp_path) == expected()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["install", "FetchContent"], indirect=True)
def test_loader_takes_an_installed_json_package(way: Way, tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "nlohmann_jsonConfig.cmake").write_text(
        "add_library(nlohmann_json::nlohmann_json INTERFACE IMPORTED)\n"
        "set_target_properties(nlohmann_json::nlohmann_json PROPERTIES "
        f"INTERFACE_INCLUDE_DIRECTORIES {json_include()})\n"
    )
    (package / "nlohmann_jsonConfigVersion.cmake").write_text(
        "set(PACKAGE_VERSION 3.12.0)\nset(PACKAGE_VERSION_COMPATIBLE TRUE)\n"
    )

    assert configure(tmp_path, way, f"-Dnlohmann_json_DIR={package}", source=LOADING) == ""
    assert answer(tmp_path) == expected()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ("0.1 CONFIG REQUIRED COMPONENTS load", "the component 'load' needs nlohmann/json, which was not found"),
        ("0.1 CONFIG REQUIRED COMPONENTS policy", "unknown component 'policy'; there is 'load'"),
        ("0.2 CONFIG REQUIRED", 'compatible with requested version "0.2"'),
        ("0.0 CONFIG REQUIRED", 'compatible with requested version "0.0"'),
        (f"{__version__}.1 CONFIG REQUIRED", "compatible with requested version"),
        (f"0.0...<{__version__} CONFIG REQUIRED", "compatible with requested version range"),
        ("0.2...1 CONFIG REQUIRED", "compatible with requested version range"),
    ],
)
def test_what_is_not_there_is_refused_by_name(installed: Way, tmp_path: Path, wanted: str, says: str) -> None:
    asking = Way(lines=found(wanted), definition=installed.definition)

    assert says in configure(tmp_path, asking, source=None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "wanted",
    [
        "CONFIG REQUIRED",
        f"{__version__} EXACT CONFIG REQUIRED",
        "0.1...<1 CONFIG REQUIRED",
        f"0.0...{__version__} CONFIG REQUIRED",
        "0.1 CONFIG REQUIRED OPTIONAL_COMPONENTS load",
    ],
)
def test_version_that_fits_is_found(installed: Way, tmp_path: Path, wanted: str) -> None:
    asking = Way(
        lines=f"{found(wanted)}\nmessage(WARNING dsc_split=${{dsc_split_VERSION}}.)", definition=installed.definition
    )

    assert f"dsc_split={__version__}." in configure(tmp_path, asking, source=None)


@pytest.mark.slow
def test_headers_stay_out_of_what_the_project_that_fetches_them_installs(root: Path, tmp_path: Path) -> None:
    way = fetch(root, tmp_path)
    assert configure(tmp_path, way, f"-DCMAKE_INSTALL_PREFIX={tmp_path / 'prefix'}") == ""
    assert answer(tmp_path) == expected()

    assert cmake("--install", tmp_path / "build").returncode == 0
    assert not (tmp_path / "prefix").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("way", "position"), [("wheel", 0), ("FetchContent", 1)], indirect=["way"])
def test_project_of_the_page_builds(way: Way, position: int, root: Path, tmp_path: Path) -> None:
    project = projects(root)[position]
    (tmp_path / "CMakeLists.txt").write_text(project, encoding="utf-8")
    (tmp_path / "server.cpp").write_text(LOADING, encoding="utf-8")
    named = f"-Ddsc_split_JSON_INCLUDE_DIR={json_include()}"

    configured = cmake("-S", tmp_path, "-B", tmp_path / "build", way.definition, named)
    assert configured.returncode == 0, configured.stderr
    built = cmake("--build", tmp_path / "build")
    assert built.returncode == 0, built.stderr
    assert run([str(tmp_path / "build" / "server"), str(GOLDEN)]).stdout == expected()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["FetchContent"], indirect=True)
def test_fetching_without_json_says_why_there_is_no_loader(way: Way, tmp_path: Path) -> None:
    complaint = configure(tmp_path, way, source=LOADING)
    again = " ".join(cmake("-S", tmp_path, "-B", tmp_path / "build").stdout.split())

    assert "dsc_split::load" in complaint
    assert "dsc_split: there is no target dsc_split::load: it needs nlohmann/json, which was not found" in again
    assert "-Ddsc_split_JSON_INCLUDE_DIR=FOLDER" in again


@pytest.mark.slow
def test_example_names_the_variable_where_onnx_runtime_is_not_found(root: Path, installed: Way, tmp_path: Path) -> None:
    example = root / "examples" / "cpp_head_tail"
    (tmp_path / "after_project.cmake").write_text(NOTHING_OF_THE_SYSTEM, encoding="utf-8")
    definitions = [
        installed.definition,
        f"-Ddsc_split_JSON_INCLUDE_DIR={json_include()}",
        f"-DCMAKE_PROJECT_INCLUDE={tmp_path / 'after_project.cmake'}",
        f"-DONNXRUNTIME_ROOT={tmp_path}",
    ]

    done = cmake("-S", example, "-B", tmp_path / "build", *definitions)

    assert done.returncode != 0
    assert f"ONNX Runtime for C++ was not found; ONNXRUNTIME_ROOT is '{tmp_path}'" in " ".join(done.stderr.split())


def test_command_prints_the_folders_that_exist(dsc: Callable[..., Any]) -> None:
    found = dsc("cmake-dir")
    include = dsc("cmake-dir", "--include")

    assert (found.exit_code, found.stderr, include.exit_code, include.stderr) == (0, "", 0, "")
    assert (Path(found.stdout.removesuffix("\n")) / "dsc_splitConfig.cmake").is_file()
    assert (Path(include.stdout.removesuffix("\n")) / "dsc_split" / "result.hpp").is_file()


@pytest.mark.parametrize("arguments", [[], ["--include"]], ids=["cmake", "include"])
def test_command_names_the_file_that_is_missing(
    dsc: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str]
) -> None:
    monkeypatch.setattr(_cmake_dir, "PACKAGE", tmp_path)

    outcome = dsc("cmake-dir", *arguments)

    assert (outcome.exit_code, outcome.stdout) == (1, "")
    assert f"there is no file '{tmp_path}" in outcome.stderr
    assert "Install dsc-split again" in outcome.stderr
