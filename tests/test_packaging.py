"""What people get: the wheel, the sdist, and the links that editable installs and type checkers need."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from dsc_split import __version__

WHEEL = f"dsc_split-{__version__}-py3-none-any.whl"
SDIST = f"dsc_split-{__version__}.tar.gz"
CPP_FOLDERS = ("cmake", "include")  # of cpp/, that the wheel has too


def build(project: Path, folder: Path, *targets: str) -> None:
    """Build with the back-end itself: no network, no isolation."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    command += [word for target in targets for word in ("-t", target)]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build(root, folder, "wheel", "sdist")
    return folder


def wheel_content(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as wheel:
        return {name: wheel.read(name) for name in wheel.namelist()}


def python_files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.py") if not path.is_symlink()}


def test_wheel_puts_nothing_but_dsc_split_into_site_packages(built: Path) -> None:
    tops = {name.partition("/")[0] for name in wheel_content(built / WHEEL)}

    assert tops == {"dsc_split", f"dsc_split-{__version__}.dist-info"}


def test_wheel_has_every_file_of_the_root_and_of_every_room(built: Path, root: Path, rooms: tuple[str, ...]) -> None:
    names = set(wheel_content(built / WHEEL))

    expected = {f"dsc_split/{name}" for name in python_files(root / "src" / "dsc_split")}
    for room in rooms:
        expected |= {f"dsc_split/{room}/{name}" for name in python_files(root / room)}
    assert {name for name in names if name.endswith(".py")} == expected
    assert "dsc_split/py.typed" in names
    assert [name for name in names if "tests" in name or "__pycache__" in name] == []


def test_wheel_has_the_cpp_headers_their_cmake_files_and_the_schemas(built: Path, root: Path) -> None:
    content = wheel_content(built / WHEEL)

    files = {
        f"dsc_split/{folder}/{path.relative_to(root / 'cpp' / folder).as_posix()}": path.read_bytes()
        for folder in CPP_FOLDERS
        for path in (root / "cpp" / folder).rglob("*")
        if path.is_file()
    }
    assert {"dsc_split/include/dsc_split/lookup_table.hpp", "dsc_split/cmake/dsc_splitConfig.cmake"} <= set(files)
    files |= {
        f"dsc_split/schemas/{path.name}": path.read_bytes()
        for path in (root / "src" / "dsc_split" / "schemas").glob("*.json")
    }
    assert {name: content.get(name) for name in files} == files


def test_wheel_declares_the_program_and_the_licence(built: Path) -> None:
    content = wheel_content(built / WHEEL)
    info = f"dsc_split-{__version__}.dist-info"

    assert b"dsc-split = dsc_split.cli.main:main" in content[f"{info}/entry_points.txt"]
    assert b"Apache License" in content[f"{info}/licenses/LICENSE"]
    assert b"License-Expression: Apache-2.0" in content[f"{info}/METADATA"]


def test_sdist_has_the_rooms_the_tests_and_nothing_generated(built: Path, rooms: tuple[str, ...]) -> None:
    with tarfile.open(built / SDIST) as sdist:
        names = [member.name.partition("/")[2] for member in sdist.getmembers()]
        links = [member.name for member in sdist.getmembers() if member.issym() or member.islnk()]

    tops = {name.partition("/")[0] for name in names}
    assert {*rooms, "cpp", "src", "tests", "pyproject.toml", "README.md", "LICENSE", "Makefile"} <= tops
    assert tops & {".venv", "demo", "dist", "build", ".git"} == set()
    assert "cpp/CMakeLists.txt" in names
    assert [name for name in names if "__pycache__" in name] == []
    assert links == []


def test_sdist_builds_the_same_wheel(built: Path, tmp_path: Path) -> None:
    with tarfile.open(built / SDIST) as sdist:
        sdist.extractall(tmp_path, filter="data")
    build(tmp_path / SDIST.removesuffix(".tar.gz"), tmp_path, "wheel")

    assert wheel_content(tmp_path / WHEEL) == wheel_content(built / WHEEL)


def test_each_room_and_the_cpp_folders_have_their_links_for_editable_installs(
    root: Path, rooms: tuple[str, ...]
) -> None:
    links = {path.name: path.readlink() for path in (root / "src" / "dsc_split").iterdir() if path.is_symlink()}

    up = Path("..") / ".."
    assert links == {room: up / room for room in rooms} | {name: up / "cpp" / name for name in CPP_FOLDERS}


def test_pyproject_names_every_room_wherever_rooms_are_named(root: Path, rooms: tuple[str, ...]) -> None:
    text = (root / "pyproject.toml").read_text(encoding="utf-8")

    for room in rooms:
        assert f'"src/dsc_split/{room}",' in text, "the link is excluded from the builds"
        assert f'"{room}" = "dsc_split/{room}"' in text, "the wheel maps the folder"
        assert f'"{room}".msg = ' in text, "ruff bans the bare name"
    for folder in CPP_FOLDERS:
        assert f'"src/dsc_split/{folder}",' in text, "the link is excluded from the builds"
        assert f'"cpp/{folder}" = "dsc_split/{folder}"' in text, "the wheel maps the folder"


def test_headers_have_the_packages_version(root: Path) -> None:
    text = (root / "cpp" / "include" / "dsc_split" / "result.hpp").read_text(encoding="utf-8")
    parts = dict(re.findall(r"^#define DSC_SPLIT_VERSION_(MAJOR|MINOR|PATCH) (\d+)$", text, re.MULTILINE))

    assert f"{parts['MAJOR']}.{parts['MINOR']}.{parts['PATCH']}" == __version__


def test_no_file_of_the_repository_names_a_home_folder(root: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    home = re.compile(rb"/(?:home|Users|root)/(?!me\b)\w")  # "me" is nobody: tests of leaked paths use it

    found = [
        name
        for name in listed.stdout.split("\0")
        if name and (path := root / name).is_file() and not path.is_symlink() and home.search(path.read_bytes())
    ]

    assert "pyproject.toml" in listed.stdout.split("\0")
    assert found == []


def test_continuous_integration_runs_the_readmes_test_command(root: Path) -> None:
    script = root / ".ci" / "run"

    assert os.access(script, os.X_OK)
    assert "\nmake test\n" in script.read_text(encoding="utf-8")


def test_makefile_is_understood(root: Path) -> None:
    for goal in ("demo", "test", "check", "lint", "format", "clean"):
        done = subprocess.run(
            ["make", "--dry-run", goal], cwd=root, capture_output=True, text=True, timeout=60, check=False
        )

        assert done.returncode == 0, done.stderr


def test_interrupted_set_up_is_done_again(root: Path, tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_bytes((root / "Makefile").read_bytes())
    (tmp_path / "pyproject.toml").write_text("")
    # A python that fails in pip, as an interrupted or offline install does.
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@" >>calls\ncase "$*" in *install*) exit "$(cat status)";; esac\n')
    python.chmod(0o755)
    setup = ["make", "setup"]

    (tmp_path / "status").write_text("1")
    first = subprocess.run(setup, cwd=tmp_path, capture_output=True, timeout=60, check=False).returncode
    (tmp_path / "status").write_text("0")
    second = subprocess.run(setup, cwd=tmp_path, capture_output=True, timeout=60, check=False).returncode
    third = subprocess.run(setup, cwd=tmp_path, capture_output=True, timeout=60, check=False).returncode

    assert (first != 0, second, third) == (True, 0, 0)
    installs = [line for line in (tmp_path / "calls").read_text().splitlines() if "install" in line]
    assert len(installs) == 2


@pytest.mark.parametrize("goal", ["check", "test"])
@pytest.mark.parametrize("failing", ["none", "ruff check", "ruff format", "mypy", "python -m pytest"])
def test_check_and_test_fail_when_any_part_fails(root: Path, tmp_path: Path, goal: str, failing: str) -> None:
    (tmp_path / "Makefile").write_bytes((root / "Makefile").read_bytes())
    (tmp_path / "pyproject.toml").write_text("")
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "ruff", "mypy"):
        script = f'#!/bin/sh\necho "{name} $*"\ncase "{name} $*" in "{failing}"*) exit 3;; esac\n'
        (programs / name).write_text(script)
        (programs / name).chmod(0o755)

    done = subprocess.run(["make", goal], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)

    assert (done.returncode != 0) == (failing != "none")
    if not failing.startswith("ruff"):  # which ends it at once
        marks = " -m not slow and not gpu" if goal == "check" else ""
        assert f"python -m pytest -n 2{marks}\nmypy \n" in done.stdout
