"""Run one subgraph on one target: targets, back-ends, and building and checking a side's engines.

::

    with get_backend("onnxruntime:cpu,threads=1").load(bundle.model_path) as engine:
        outputs = engine.run({"x": image})
"""

from dsc_split.bundles._records import CheckResult, CheckRow, EngineFacts
from dsc_split.engines._base import Backend, BackendLike, BuildJob, BuiltEngine, Engine, EngineLike, TensorSpec
from dsc_split.engines._engine_file import export_raw
from dsc_split.engines._fingerprint import fingerprint_id, target_id
from dsc_split.engines._opset import opset_limits
from dsc_split.engines._options import BuildOptions
from dsc_split.engines._registry import get_backend
from dsc_split.engines._source import EngineSource
from dsc_split.engines._target import Target
from dsc_split.engines.side._batches import DEFAULT_BATCHES, choose_batches
from dsc_split.engines.side._build import BuildResult, BuildRow, build_engines
from dsc_split.engines.side._check import check_engines
from dsc_split.engines.side._fit import Fit, fit_here, table_here
from dsc_split.engines.side._load import SideEngines

__all__ = [
    "DEFAULT_BATCHES",
    "Backend",
    "BackendLike",
    "BuildJob",
    "BuildOptions",
    "BuildResult",
    "BuildRow",
    "BuiltEngine",
    "CheckResult",
    "CheckRow",
    "Engine",
    "EngineFacts",
    "EngineLike",
    "EngineSource",
    "Fit",
    "SideEngines",
    "Target",
    "TensorSpec",
    "build_engines",
    "check_engines",
    "choose_batches",
    "export_raw",
    "fingerprint_id",
    "fit_here",
    "get_backend",
    "opset_limits",
    "table_here",
    "target_id",
]
