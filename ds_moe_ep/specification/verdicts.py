"""Verdicts: how a stated number stands to the numbers that follow from shapes and links, in words, all computed."""

from __future__ import annotations

import math

from ds_moe_ep.records.quantity import number, percent

ROUNDING = 0.02  # a document rounds to two or three digits


def agree(stated: float, derived: float) -> bool:
    """True where both are one number up to rounding."""
    return abs(stated - derived) <= ROUNDING * abs(derived)


def compared(stated: float, derived: float) -> str:
    """`holds`, `off by 1,000`, or how many times as much is stated."""
    if agree(stated, derived):
        return "holds"
    power = round(math.log10(stated / derived)) if stated > 0 and derived > 0 else 0
    if power and agree(stated / 10**power, derived):
        return f"off by {number(10 ** abs(power), 0)}"
    return f"does not hold: stated is {times(stated / derived)} what follows" if derived else "does not hold"


def near(stated: float, derived: float, within: float = 0.25) -> str:
    """`holds` or `close`, and by how much; where it is neither, how many times as much is stated."""
    if agree(stated, derived) or abs(stated / derived - 1) > within:
        return compared(stated, derived)
    return f"close: {rounded_percent(abs(stated / derived - 1))} {'more' if stated > derived else 'less'}"


def within_limit(stated: float, limit: float, limit_name: str, what: str = "") -> str:
    """`possible` with the share of the limit that it takes, or `impossible` and by how much it is over."""
    share = stated / limit
    if share > 1:
        return f"impossible: {times(share)} {limit_name}"
    return f"possible: {what}{rounded_percent(share)} of {limit_name}"


def at_least(stated: float, least: float, least_name: str) -> str:
    """`possible` where no less is stated than is needed at least, else `impossible` and by how much."""
    if stated >= least or agree(stated, least):
        return "possible"
    return f"impossible: {least_name} {times(least / stated)} as much"


def reached(stated: float, low: float, high: float) -> str:
    """A simulated number between `low` and `high` against what is stated: reached, exceeded, or by how much not."""
    if low <= stated <= high:
        return "reached"
    return "exceeded" if low > stated else f"not reached, {rounded_percent(high / stated)} at best"


def slower(stated: float, low: float, high: float) -> str:
    """`reached`, where a simulated time between `low` and `high` is no longer than what is stated; else by how much."""
    return "reached" if low <= stated else f"{times(low / stated)} as long at best"


def place_in_range(number: float, low: float, high: float) -> str:
    """`below`, `within` or `above` a range."""
    if number < low:
        return "below"
    return "above" if number > high else "within"


def compared_range(stated: tuple[float, float], low: float, high: float) -> str:
    """Place of a simulated number between `low` and `high` in a stated range: `within` where the two overlap."""
    if high < stated[0] or low > stated[1]:
        return "below" if high < stated[0] else "above"
    return "within"


def times(ratio: float) -> str:
    """`139 times`, `9.7 times`, `0.34 times`."""
    return f"{number(ratio, 0)} times" if ratio >= 20 else f"{number(ratio, significant=2)} times"


def rounded_percent(share: float) -> str:
    """`61 %`; small shares keep a digit that counts."""
    return percent(share, 0) if share >= 0.0095 or share == 0 else f"{number(100 * share, significant=1)} %"
