"""What docs/triton.md shows works: its commands here, its client in test_server.py."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.readme_commands import scripts

from dsc_split.bundle import Bundle


@pytest.mark.slow
def test_commands_of_the_page_work(make: Callable[[str], Bundle], root: Path, tmp_path: Path) -> None:
    for name, source in (("b0", "branches"), ("b0-new", "new-branches")):
        make(source).path.rename(tmp_path / name)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    commands = "".join(script for script, _ in scripts(root / "docs" / "triton.md"))
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert commands.count("export-triton") == 3
    assert len(list((tmp_path / "models").glob("*/config.pbtxt"))) == 2 * 3
    assert len(list((tmp_path / "models").glob("*.json"))) == 2
