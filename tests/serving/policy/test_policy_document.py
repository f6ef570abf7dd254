"""What docs/policy.md says is so."""

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
from tests.support.paths import ROOT
from tests.support.policy_events import GOLDEN_TABLE

from dsc_split.serving import EstimatorParameters, PolicyParameters

DOCUMENT = (ROOT / "docs" / "policy.md").read_text(encoding="utf-8")


def test_the_python_example_prints_what_the_document_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = re.search(r"```python\n(.*?)```\n\nprints[^\n]*\n\n```\n(.*?)```", DOCUMENT, re.DOTALL)
    assert found is not None
    shutil.copy(GOLDEN_TABLE, tmp_path / "table.json")
    monkeypatch.chdir(tmp_path)

    exec(found[1], {})

    assert capsys.readouterr().out == found[2]


def test_every_parameter_is_in_the_document_with_its_default() -> None:
    listed = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \| [^|]+ \| [^|]+ \|$", DOCUMENT, re.MULTILINE))
    fields = [*dataclasses.fields(EstimatorParameters), *dataclasses.fields(PolicyParameters)]
    words = {"deadline_ms": "none", "percentile": "the median"}

    assert listed == {field.name: words.get(field.name, str(field.default)) for field in fields}
