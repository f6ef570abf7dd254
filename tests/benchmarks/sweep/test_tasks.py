from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from dsc_split.benchmarks import BenchSettings
from dsc_split.bundle import Bundle
from dsc_split.engines.side._batches import choose_batches
from dsc_split.errors import UsageError


def limits(fixed: int | None, largest: int) -> dict[str, Any]:
    return {"batch": {"symbol": None if fixed else "batch", "fixed": fixed, "max": largest}}


@pytest.mark.parametrize(
    ("fixed", "largest", "asked", "chosen"),
    [
        (None, 64, None, (1, 2, 4, 8, 16, 32, 64)),
        (None, 24, None, (1, 2, 4, 8, 16)),
        (None, 24, [24, 3, 3], (3, 24)),
        (5, 5, None, (5,)),
        (5, 5, [5], (5,)),
    ],
)
def test_batches_are_those_asked_for_or_the_usual_ones_that_the_model_takes(
    make_bundle: Callable[..., Bundle],
    fixed: int | None,
    largest: int,
    asked: Sequence[int] | None,
    chosen: tuple[int, ...],
) -> None:
    assert choose_batches(make_bundle(**limits(fixed, largest)), asked) == chosen


@pytest.mark.parametrize(
    ("fixed", "asked", "words"),
    [
        (None, [9], "batch 9 is larger than 8"),
        (None, [0], "batch 0 is no batch size"),
        (None, [True], "batch True is no batch size"),
        (None, [], "no batch size is given"),
        (8, [4], "takes batch 8 only"),
    ],
)
def test_batches_that_cannot_be_measured_are_refused(
    make_bundle: Callable[..., Bundle], fixed: int | None, asked: list[int], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        choose_batches(make_bundle(**limits(fixed, 8)), asked)


@pytest.mark.parametrize("name", ["precision_goal", "time_limit_s", "period_ms", "memory_limit_bytes"])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    numbers: dict[str, Any] = {name: value}
    with pytest.raises(UsageError, match=name):
        BenchSettings(**numbers)
