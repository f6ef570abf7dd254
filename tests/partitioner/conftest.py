"""Tiny graphs for the partitioner's tests, written as ONNX text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from dsc_split.bundle import Bundle
from dsc_split.partitioner import CutList, CutOptions, ExportOptions, SourceOptions, export_bundle, list_cuts

Save = Callable[[str], Path]
Cuts = Callable[..., CutList]
Export = Callable[..., Bundle]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Write a graph, given as ONNX text, to a file."""

    def write(text: str) -> Path:
        path = tmp_path / "net.onnx"
        onnx.save(onnx.parser.parse_model(text), str(path))
        return path

    return write


@pytest.fixture
def cuts(save: Save) -> Cuts:
    """List the cuts of a graph given as ONNX text."""

    def find(text: str, *shapes: str, **options: object) -> CutList:
        return list_cuts(str(save(text)), SourceOptions(input_shapes=shapes), CutOptions(**options))  # type: ignore[arg-type]  # a test's shorthand

    return find


@pytest.fixture
def export(save: Save, tmp_path: Path) -> Export:
    """Export a graph given as ONNX text, every cut of it, each pair proven."""

    def make(text: str, *shapes: str, cuts: str = "all", **options: object) -> Bundle:
        return export_bundle(
            str(save(text)),
            tmp_path / "bundle",
            ExportOptions(
                source=SourceOptions(input_shapes=shapes, max_batch=3),
                cut=CutOptions(cuts=cuts, **options),  # type: ignore[arg-type]  # a test's shorthand
            ),
        )

    return make
