from __future__ import annotations

import pytest

from dsc_split.engines import Target, opset_limits
from dsc_split.engines._opset import highest_opset


@pytest.mark.parametrize(
    ("library", "version", "opset"),
    [
        ("tensorrt", "10.3.0", 20),
        ("tensorrt", "10.14.1.48", 20),
        ("tensorrt", "10.15.1.29", 24),
        ("tensorrt", "11.4.0.106", 25),
        ("tensorrt_rtx", "1.7.1.116", 25),
        ("onnxruntime", "1.32.0", None),
    ],
)
def test_each_version_has_the_opset_that_its_documentation_names(library: str, version: str, opset: int | None) -> None:
    assert highest_opset(library, version) == opset


def test_targets_without_a_limit_of_their_own_have_none() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    targets = [Target.parse(text) for text in ("tensorrt-rtx:sm75", "onnxruntime:cpu")]

    assert opset_limits(targets) == {"tensorrt-rtx:sm75": 25}
