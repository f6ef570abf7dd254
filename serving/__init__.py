"""Use the table: estimate the rate, switch between choices, and write tails to a model repository for Triton.

::

    policy = SwitchPolicy(Bundle.open("b4").table())
    decision = policy.decide(time.monotonic(), batch=8)
    print(decision.choice.name, decision.reason)

The estimate and the policy need only Python's standard library; the export for Triton is imported when it is used.
"""

import typing

from dsc_split.serving.policy._estimator import EstimatorParameters, RateEstimate, RateEstimator
from dsc_split.serving.policy._policy import SwitchPolicy
from dsc_split.serving.policy._records import Decision, Observation, PolicyParameters

if typing.TYPE_CHECKING:
    from dsc_split.serving.triton._export import TritonModel, TritonResult, export_triton
    from dsc_split.serving.triton._repository import triton_model_name

__all__ = [
    "Decision",
    "EstimatorParameters",
    "Observation",
    "PolicyParameters",
    "RateEstimate",
    "RateEstimator",
    "SwitchPolicy",
    "TritonModel",
    "TritonResult",
    "export_triton",
    "triton_model_name",
]


def __getattr__(name: str) -> object:
    if name in ("TritonModel", "TritonResult", "export_triton"):
        from dsc_split.serving.triton import _export

        return getattr(_export, name)
    if name == "triton_model_name":
        from dsc_split.serving.triton._repository import triton_model_name

        return triton_model_name
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
