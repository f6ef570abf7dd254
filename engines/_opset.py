"""The newest ONNX operator set that a target's parser is documented to read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsc_split.engines._target import Target

__all__ = ["highest_opset", "opset_limits"]

HIGHEST = {
    "tensorrt": (((10, 0), 20), ((10, 15), 24), ((11, 0), 25)),
    "tensorrt_rtx": (((1, 0), 25),),
}
"""For each library, pairs of a first version and the highest opset from then on. Source: ``docs/operators.md`` of
onnx-tensorrt at the release's branch, and the ONNX opset guide of TensorRT 11. The parser silently accepts higher
opsets."""


def highest_opset(library: str, version: str) -> int | None:
    """Return the highest opset of a library's version; ``None`` where the library sets no limit."""
    if library not in HIGHEST:
        return None
    numbers = tuple(int(part) for part in version.split(".")[:2])
    found = [opset for since, opset in HIGHEST[library] if since <= numbers]
    return found[-1] if found else None


def opset_limits(targets: Iterable[Target]) -> dict[str, int]:
    """Return the highest opset of each target that has one.

    Raises:
        BackendUnavailable: A target's library is missing, or the device that its facts depend on.
    """
    from dsc_split.engines._registry import get_backend

    limits = {}
    for target in targets:
        facts = get_backend(target).build_fingerprint()
        limit = highest_opset(str(facts["library"]), str(facts["version"]))
        if limit is not None:
            limits[str(target)] = limit
    return limits
