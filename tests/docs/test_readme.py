"""The README's program prints what the README says it prints, times and rates aside."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_program_of_the_readme_prints_what_it_says(root: Path, tmp_path: Path) -> None:
    readme = (root / "README.md").read_text(encoding="utf-8")
    program, printed = re.search(r"```python\n(.*?)```.*?```text\n(.*?)```", readme, re.DOTALL).groups()  # type: ignore[union-attr]  # it is there
    program = program.replace("time_limit_s=2", "time_limit_s=0.1")  # the times that it prints are not compared

    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600
    )

    assert done.returncode == 0, done.stderr
    assert stable(done.stdout) == stable(printed)


def stable(text: str) -> list[str]:
    """Keep the lines that do not depend on how fast the machine is, errors without their digits."""
    lines = [re.sub(r"\d+e[-+]\d+", "N", line.rstrip()) for line in text.splitlines()]
    return [
        line
        for line in lines
        if " ms; next: " not in line and " MB/s" not in line and "any higher" not in line and "unstable" not in line
    ]
