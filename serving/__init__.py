"""Use the table: the rate estimate and the switching policy, and the tails in a model repository for Triton.

::

    policy = SwitchPolicy(Bundle.open("b4").table())
    decision = policy.decide(time.monotonic(), batch=8)
    print(decision.choice.name, decision.reason)
"""

from dsc_split.serving.policy._estimator import EstimatorParameters, RateEstimate, RateEstimator
from dsc_split.serving.policy._policy import SwitchPolicy
from dsc_split.serving.policy._records import Decision, Observation, PolicyParameters
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
