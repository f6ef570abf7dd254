"""Commands that README files and pages show."""

from __future__ import annotations

import re
from pathlib import Path

BLOCK = re.compile(r"(?:^<!-- (?P<mark>slow|not run) -->\n)?^```sh\n(?P<script>.*?)^```$", re.MULTILINE | re.DOTALL)


def scripts(readme: Path) -> list[tuple[str, bool]]:
    """List a README's commands, each with whether it is slow."""
    blocks = BLOCK.finditer(readme.read_text(encoding="utf-8"))
    return [(block["script"], block["mark"] == "slow") for block in blocks if block["mark"] != "not run"]
