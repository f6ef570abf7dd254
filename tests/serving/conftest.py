"""Bundles to export for Triton, made once and copied."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.triton_networks import sequence, two_branches

from dsc_split.bundle import Bundle
from dsc_split.partitioner import CutOptions, ExportOptions, export_bundle


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Export a network, once: ``branches``, ``new-branches`` or ``sequence``."""
    folder = tmp_path_factory.mktemp("exported")

    def export(name: str) -> Path:
        if not (folder / name).exists():
            source = folder / "two-branches.onnx"
            cuts = "scale+a-2,scale+left______0+right"
            if name == "sequence":
                source, cuts = sequence(folder / "sequence.onnx"), "a"
            else:
                two_branches(source, seed=int(name != "branches"))
            options = ExportOptions(cut=CutOptions(cuts=cuts, max_tensors=3))
            export_bundle(str(source), folder / name, options)
        return folder / name

    return export


@pytest.fixture
def make(exported: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Bundle]:
    """Give a bundle to change: ``make("branches")``."""

    def copy(name: str) -> Bundle:
        return Bundle.open(shutil.copytree(exported(name), tmp_path / name))

    return copy
