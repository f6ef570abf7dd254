"""The tiny bundle of the benchmarks' tests, and its kin."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any


def _shared() -> Any:
    path = Path(__file__).parent.parent / "benchmarks" / "conftest.py"
    spec = importlib.util.spec_from_file_location("tiny_bundles", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_tiny_bundles = _shared()
bundle = _tiny_bundles.bundle
make_bundle = _tiny_bundles.make_bundle
replace_graph = _tiny_bundles.replace_graph
