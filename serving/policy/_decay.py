"""Exponential decay, 2^-x, with the same bits in Python and in C++."""

from __future__ import annotations

import math

__all__ = ["decay"]

_COEFFICIENTS = (
    1.0,
    -0.6931471805599453,
    0.24022650695910072,
    -0.05550410866482158,
    0.009618129107628477,
    -0.0013333558146428443,
    0.0001540353039338161,
    -1.5252733804059841e-05,
    1.321548679014431e-06,
    -1.01780860092397e-07,
    7.054911620801123e-09,
    -4.4455382718708116e-10,
    2.5678435993488206e-11,
    -1.3691488853904128e-12,
)
"""(-ln 2)^k / k!, the Taylor series of 2^-x about 0."""
_NOTHING_LEFT = 1100.0
"""2^-x is 0 in binary64 from here on."""


def decay(half_lives: float) -> float:
    """Return 2^-x, the part that is left after x ``half_lives``, which are 0 or more.

    The error is at most 2 units in the last place, unless the result is subnormal; whole numbers are exact. Functions
    of libraries differ in their last bits, so only operations that IEEE 754 defines exactly are used.
    """
    if half_lives >= _NOTHING_LEFT:
        return 0.0
    whole = math.floor(half_lives + 0.5)
    part = half_lives - whole
    value = _COEFFICIENTS[-1]
    for coefficient in reversed(_COEFFICIENTS[:-1]):
        value = value * part + coefficient
    return math.ldexp(value, -whole)
