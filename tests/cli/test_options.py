from __future__ import annotations

import math

import pytest
import typer

from dsc_split.cli._options import number, positive_integers, positive_numbers, size_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 * 2**30), ("8 gib", 8 * 2**30), ("1.5kB", 1500), ("500MB", 500_000_000), ("1048576", 2**20)],
)
def test_size_is_read_with_its_unit(text: str, size: int) -> None:
    assert size_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "8 XB", "-1GiB", "0", "0.1B", "1e3", "nan", "inf", "9999999TiB", "1,5GiB"])
def test_what_is_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="size"):
        size_bytes(text)


def test_list_of_batches_is_sorted_and_each_comes_once() -> None:
    assert positive_integers("16, 1,4,1") == (1, 4, 16)


@pytest.mark.parametrize("text", ["", "1,,2", "1,", "0,1", "-4", "1.5", "x", "1;2", "99999999999", "٣"])
def test_list_of_batches_refuses_what_is_no_whole_number_from_one(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="1,2,4"):
        positive_integers(text)


def test_list_of_rates_is_sorted_and_each_comes_once() -> None:
    assert positive_numbers("8,0.5,8.0,1e2") == (0.5, 8.0, 100.0)


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "inf", "1,x"])
def test_list_of_rates_refuses_what_is_no_rate(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        positive_numbers(text)


def test_number_keeps_to_its_limits() -> None:
    rate = number(at_least=0, infinite=True)
    share = number(above=0, at_most=1)

    assert (rate("0"), rate("inf"), share("1"), share("0.02")) == (0.0, math.inf, 1.0, 0.02)
    for parse, text in [
        (rate, "nan"),
        (rate, "-1"),
        (share, "0"),
        (share, "1.01"),
        (share, "inf"),
        (share, ""),
    ]:
        with pytest.raises(typer.BadParameter):
            parse(text)


def test_number_out_of_range_is_told_the_range() -> None:
    with pytest.raises(typer.BadParameter, match=r"'2'.*above 0, at most 1"):
        number(above=0, at_most=1)("2")
