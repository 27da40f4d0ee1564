"""Verdicts in words, each case done by hand."""

from __future__ import annotations

import pytest

from ds_moe_ep.specification.verdicts import (
    agree,
    at_least,
    compared,
    compared_range,
    near,
    reached,
    rounded_percent,
    slower,
    within_limit,
)


@pytest.mark.parametrize(
    ("stated", "derived", "verdict"),
    [
        (2.2, 2.222, "holds"),
        (100.0, 103.0, "does not hold: stated is 0.97 times what follows"),
        (43.9, 0.0439, "off by 1,000"),
        (0.0439, 43.9, "off by 1,000"),
        (12.0, 1.2, "off by 10"),
        (139.0, 1.0, "does not hold: stated is 139 times what follows"),
        (0.0, 5.0, "does not hold: stated is 0 times what follows"),
        (5.0, 0.0, "does not hold"),
    ],
)
def test_a_number_holds_is_off_by_a_power_of_ten_or_does_not_hold(stated: float, derived: float, verdict: str) -> None:
    assert compared(stated, derived) == verdict


def test_rounding_is_two_percent_and_no_more() -> None:
    assert agree(98.0, 100.0) and agree(102.0, 100.0)
    assert not agree(97.9, 100.0) and not agree(102.1, 100.0)


@pytest.mark.parametrize(
    ("stated", "verdict"),
    [
        (101.0, "holds"),
        (110.0, "close: 10 % more"),
        (80.0, "close: 20 % less"),
        (130.0, "does not hold: stated is 1.3"),
    ],
)
def test_what_is_close_says_by_how_much(stated: float, verdict: str) -> None:
    assert near(stated, 100.0).startswith(verdict)


def test_a_limit_is_kept_or_broken() -> None:
    assert within_limit(450.0, 743.0, "peak", "450 k is ") == "possible: 450 k is 61 % of peak"
    assert within_limit(139.0, 1.0, "the peak") == "impossible: 139 times the peak"
    assert within_limit(1.0, 1.0, "peak") == "possible: 100 % of peak"


def test_less_than_the_least_is_impossible() -> None:
    assert at_least(668.0, 6452.0, "the weights alone are") == "impossible: the weights alone are 9.7 times as much"
    assert at_least(6452.0, 6452.0, "the weights alone are") == "possible"


def test_a_simulated_bar_reaches_exceeds_or_misses_what_is_stated() -> None:
    assert reached(450.0, 347.0, 504.0) == "reached"
    assert reached(450.0, 500.0, 600.0) == "exceeded"
    assert reached(450.0, 261.0, 379.0) == "not reached, 84 % at best"
    assert slower(26.2, 20.0, 30.0) == "reached" and slower(26.2, 20.0, 25.0) == "reached"
    assert slower(26.2, 172.0, 212.0) == "6.6 times as long at best"
    bars = ((50.0, 59.0), (58.0, 61.0), (71.0, 72.0))
    assert [compared_range((60.0, 70.0), low, high) for low, high in bars] == ["below", "within", "above"]


def test_small_shares_keep_a_digit() -> None:
    assert [rounded_percent(share) for share in (0.614, 1.0, 0.0, 0.004)] == ["61 %", "100 %", "0 %", "0.4 %"]
