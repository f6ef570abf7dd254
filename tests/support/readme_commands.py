"""Commands that README files and pages show."""

from __future__ import annotations

import re
from pathlib import Path

BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>slow|not run)(?:; tests add: (?P<options>[^\n]*))? -->\n)?^```sh\n(?P<script>.*?)\n```$",
    re.MULTILINE | re.DOTALL,
)


def scripts(readme: Path) -> list[tuple[str, bool]]:
    """List a README's commands, each with whether it is slow.

    ``<!-- slow; tests add: --rounds 3 -->`` adds options to the last command, so that a benchmark ends sooner.
    """
    blocks = BLOCK.finditer(readme.read_text(encoding="utf-8"))
    return [
        (f"{block['script']} {block['options'] or ''}\n", block["mark"] == "slow")
        for block in blocks
        if block["mark"] != "not run"
    ]
