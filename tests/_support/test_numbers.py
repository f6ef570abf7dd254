"""Numbers that callers give come back as plain numbers in range, or an error names them."""

import json
import math
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from dsc_split._support.numbers import as_float, as_int, finite_or_none, number, store_checked, whole
from dsc_split.errors import UsageError


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.int8(2), Fraction(2)], ids=repr)
def test_every_kind_of_number_becomes_a_plain_float(value: object) -> None:
    assert type(as_float(value)) is float
    assert as_float(value) == 2.0


@pytest.mark.parametrize("value", ["2", b"2", True, None, 2j, Decimal(2), [2.0], 10**400], ids=repr)
def test_what_is_no_number_is_none(value: object) -> None:
    assert as_float(value) is None
    with pytest.raises(UsageError, match=r"^delay .* is no number; a number from 0 to inf ms was expected\.$"):
        number("delay", value, unit="ms")


@pytest.mark.parametrize("value", [2.0, "2", True, None])
def test_what_is_no_whole_number_is_none(value: object) -> None:
    assert as_int(value) is None
    with pytest.raises(UsageError, match=r"^count .* is no whole number; 1 to 9 were expected\.$"):
        whole("count", value, least=1, most=9, expected="1 to 9 were expected")


def test_whole_numbers_of_numpy_become_plain_ones() -> None:
    assert json.dumps(whole("count", np.int64(7), most=9, expected="")) == "7"


@pytest.mark.parametrize(
    ("value", "limits"),
    [
        (-0.1, {}),
        (math.nan, {}),
        (math.nan, {"least": -math.inf}),
        (0.0, {"above": 0.0}),
        (1.1, {"most": 1.0}),
        (math.inf, {"most": 1e308}),
    ],
)
def test_a_number_out_of_range_is_refused_with_the_range(value: float, limits: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=r"^share \S+ is out of range; a number from \S+ to \S+ was expected\.$"):
        number("share", value, **limits)  # type: ignore[arg-type]  # limits alone


def test_the_ends_of_a_range_are_in_it_and_infinity_is_a_number() -> None:
    assert number("rate", math.inf) == math.inf
    assert (number("share", 0.0, most=1.0), number("share", 1, most=1.0)) == (0.0, 1.0)
    assert (whole("count", 1, least=1, most=9, expected=""), whole("count", 9, least=1, most=9, expected="")) == (1, 9)
    for value in (0, 10):
        with pytest.raises(UsageError, match=f"^count {value} is out of range"):
            whole("count", value, least=1, most=9, expected="1 to 9 were expected")


def test_a_checked_field_is_stored_as_a_plain_number() -> None:
    @dataclass(frozen=True)
    class Record:
        share: float

    record = Record(np.float32(0.5))
    store_checked(record, "share", number, most=1.0)

    assert type(record.share) is float
    with pytest.raises(UsageError, match="share 2 is out of range"):
        store_checked(Record(2.0), "share", number, most=1.0)


@pytest.mark.parametrize(("value", "expected"), [(1.5, 1.5), (math.inf, None), (-math.inf, None), (math.nan, None)])
def test_json_has_no_infinity_and_no_nan(value: float, expected: float | None) -> None:
    assert finite_or_none(value) == expected
