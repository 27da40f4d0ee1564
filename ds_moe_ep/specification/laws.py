"""Least-squares fits of the specification's four scaling laws (section 4.3): each is one coefficient times a shape.

A law says y = a * g(EP) and nothing else: no offset, no exponent that could be fitted. So a = sum(y*g) / sum(g*g), and

    R2 = 1 - SS_res / SS_tot,  SS_res = sum((y - a*g)^2),  SS_tot = sum((y - mean(y))^2)

compares the law with the best constant. A law without an offset does not contain the constants, so R2 is negative where
the mean of the values describes them better than the law does; that is a finding, and it is not clipped. Its size says
nothing, so people read "does not fit" instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ds_moe_ep.errors import ConfigError, nearest
from ds_moe_ep.records.quantity import NONE, number
from ds_moe_ep.specification.stated import STATED

SHAPES: Mapping[str, Callable[[float], float]] = {  # the keys of records.names.LAWS
    "tps": lambda ep: ep,
    "tpot": lambda ep: 1 / ep,
    "busy": lambda ep: 1 - 1 / ep,
    "memory_per_expert": lambda ep: 1 / ep,
}
STATED_R2: Mapping[str, float] = dict(zip(SHAPES, STATED.r2, strict=True))


@dataclass(frozen=True)
class LawFit:
    """One law fitted to values: y = coefficient * shape(EP), in the unit of the values."""

    law: str
    coefficient: float
    r2: float | None  # None where all values are equal: there is no variation that a law could explain
    n: int

    def at(self, ep: float) -> float:
        """The law's value at an EP size."""
        return self.coefficient * SHAPES[self.law](ep)


def fit(law: str, values: Mapping[int, float]) -> LawFit:
    """The coefficient of a law and its R2 for the values by EP size.

    Raises ConfigError for an unknown law, fewer than two EP sizes, or one below 1.
    """
    if law not in SHAPES:
        raise ConfigError(f"law={law!r}: not a law of the specification; {nearest(law, SHAPES)}")
    if len(values) < 2 or min(values) < 1:
        raise ConfigError(
            f"law.sizes={sorted(values)}: a law is fitted to two EP sizes or more, of 1 or more; measure more sizes"
        )
    shape = [SHAPES[law](ep) for ep in values]
    measured = list(values.values())
    coefficient = sum(y * g for y, g in zip(measured, shape, strict=True)) / sum(g * g for g in shape)
    mean = sum(measured) / len(measured)
    residual = sum((y - coefficient * g) ** 2 for y, g in zip(measured, shape, strict=True))
    total = sum((y - mean) ** 2 for y in measured)
    equal = max(measured) == min(measured)  # rounding of the mean would leave a total that is not quite 0
    return LawFit(law, coefficient, None if equal else 1 - residual / total, len(measured))


def r2_text(r2: float | None, decimals: int | None = None) -> str:
    """R2 for people: "does not fit" where the mean of the values describes them better than the law does."""
    if r2 is None:
        return NONE
    return "does not fit" if r2 < 0 else number(r2, decimals)
