"""Tables by path: a bundle's, a folder's, a file's."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.paths import GOLDEN

from dsc_split.bundles._tables import load_table
from dsc_split.errors import UsageError
from dsc_split.lookup_table import LookupTable


def test_a_table_is_read_from_its_file_and_from_a_folder_that_holds_it(tmp_path: Path) -> None:
    (tmp_path / "table.json").write_bytes(GOLDEN.read_bytes())

    assert load_table(tmp_path) == load_table(str(tmp_path / "table.json")) == LookupTable.load(GOLDEN)


def test_a_missing_table_is_a_usage_error_that_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="dsc-split bench"):
        load_table(tmp_path)
    with pytest.raises(UsageError, match="no such file or folder"):
        load_table(tmp_path / "table.json")


@pytest.mark.parametrize("path", ["x" * 5000, "x\0y"])
def test_a_path_that_no_system_takes_is_a_usage_error(path: str) -> None:
    with pytest.raises(UsageError, match="no bundle and no lookup table"):
        load_table(path)
