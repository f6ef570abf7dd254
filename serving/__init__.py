"""Use the table: the rate estimate and the switching policy.

::

    policy = SwitchPolicy(LookupTable.load("b4"))
    decision = policy.decide(time.monotonic(), batch=8)
    print(decision.choice.name, decision.reason)
"""

from dsc_split.serving._estimator import EstimatorParameters, RateEstimate, RateEstimator
from dsc_split.serving._policy import SwitchPolicy
from dsc_split.serving._records import Decision, Observation, PolicyParameters

__all__ = [
    "Decision",
    "EstimatorParameters",
    "Observation",
    "PolicyParameters",
    "RateEstimate",
    "RateEstimator",
    "SwitchPolicy",
]
