"""Find ONNX Runtime for C++."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.paths import ROOT

FOLDER = ROOT / ".cache" / "onnxruntime"
"""Where .ci/install-onnxruntime-headers puts ``include`` and ``lib``."""


def require_onnxruntime() -> Path:
    """Find the folder with ONNX Runtime's headers and library; skip the test where it is not there."""
    if not ((FOLDER / "include" / "onnxruntime_cxx_api.h").exists() and (FOLDER / "lib/libonnxruntime.so").exists()):
        pytest.skip("ONNX Runtime for C++ is not there: .ci/install-onnxruntime-headers")
    return FOLDER
