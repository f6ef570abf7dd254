"""Every command that an example's README shows is run, as a reader would: from the checkout's root, in order.

A command is a fenced block of the language ``sh``. ``<!-- slow -->`` on the line above a block leaves its
README out of ``make check``; ``<!-- not run -->`` is for a block that needs what a test has not. The first line
``<!-- needs: ... -->`` lists what else has to be there: programs, ``nlohmann-json``, ``onnxruntime``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.cpp_compiler import json_include, require
from tests.support.cpp_onnxruntime import require_onnxruntime
from tests.support.paths import EXAMPLES
from tests.support.readme_commands import scripts

READMES = sorted(EXAMPLES.glob("*/README.md"))
NEEDS = re.compile(r"\A<!-- needs: (?P<names>.*) -->\n")
TIME_LIMIT_S = 900


def require_needs(readme: Path) -> dict[str, str]:
    """Skip the test where something that a README needs is missing; else give the variables that say where it is."""
    match = NEEDS.match(readme.read_text(encoding="utf-8"))
    variables = {}
    for name in match["names"].split() if match else ():
        if name == "nlohmann-json":
            variables["CMAKE_PREFIX_PATH"] = str(json_include().parent)
        elif name == "onnxruntime":
            variables["ONNXRUNTIME_ROOT"] = str(require_onnxruntime())
        else:
            require(name)
    return variables


def cases() -> list[object]:
    return [
        pytest.param(
            readme,
            id=readme.parent.name,
            marks=[pytest.mark.slow] if any(slow for _, slow in scripts(readme)) else [],
        )
        for readme in READMES
    ]


def test_every_example_has_a_readme_with_a_command() -> None:
    folders = [path for path in EXAMPLES.iterdir() if path.is_dir() and path.name != "__pycache__"]

    assert {folder.name for folder in folders} == {readme.parent.name for readme in READMES}
    assert [readme.parent.name for readme in READMES if not scripts(readme)] == []


@pytest.mark.parametrize("readme", cases())
def test_commands_of_the_readme_work(readme: Path, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(EXAMPLES)
    environment = {
        **os.environ,
        **require_needs(readme),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }

    for script, _ in scripts(readme):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT_S,
            check=False,
        )

        assert done.returncode == 0, f"$ {script}\n{done.stdout}\n{done.stderr}"
