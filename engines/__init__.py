"""One subgraph on one target: what a target is, the back-ends, and a side's engines built and checked.

::

    with get_backend("onnxruntime:cpu,threads=1").load(bundle.model_path) as engine:
        outputs = engine.run({"x": image})
"""

from dsc_split.engines._base import Backend, BackendLike, Engine, EngineLike, TensorSpec
from dsc_split.engines._build import BuildResult, BuildRow, build_engines
from dsc_split.engines._check import CheckResult, CheckRow, check_engines
from dsc_split.engines._fingerprint import fingerprint_id, target_id
from dsc_split.engines._registry import get_backend
from dsc_split.engines._target import Target

__all__ = [
    "Backend",
    "BackendLike",
    "BuildResult",
    "BuildRow",
    "CheckResult",
    "CheckRow",
    "Engine",
    "EngineLike",
    "Target",
    "TensorSpec",
    "build_engines",
    "check_engines",
    "fingerprint_id",
    "get_backend",
    "target_id",
]
