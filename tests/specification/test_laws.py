"""The four laws fitted to values whose fits were done by hand."""

from __future__ import annotations

import pytest

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.names import LAWS
from ds_moe_ep.specification.laws import SHAPES, fit

SIZES = (1, 2, 4, 8, 16)


def test_the_shapes_are_those_of_the_laws_that_the_report_prints() -> None:
    assert SHAPES.keys() == LAWS.keys()
    assert [SHAPES[law](4) for law in LAWS] == [4, 0.25, 0.75, 0.25]


@pytest.mark.parametrize("law", LAWS)
def test_values_that_follow_a_law_give_back_its_coefficient_and_an_r2_of_1(law: str) -> None:
    found = fit(law, {ep: 28_125 * SHAPES[law](ep) for ep in SIZES})
    assert found.coefficient == pytest.approx(28_125)
    assert found.r2 == pytest.approx(1) and found.n == len(SIZES)
    assert found.at(32) == pytest.approx(28_125 * SHAPES[law](32))


def test_a_fit_done_by_hand() -> None:
    # y = a*EP through (1, 1), (2, 3): a = (1 + 6)/(1 + 4) = 1.4; residuals -0.4 and 0.2; the mean is 2.
    found = fit("tps", {1: 1.0, 2: 3.0})
    assert found.coefficient == pytest.approx(1.4)
    assert found.r2 == pytest.approx(1 - (0.16 + 0.04) / 2)
    # y = a*(1 - 1/EP) through (1, 1), (2, 2), (4, 3): a = (1 + 2.25)/(0.25 + 0.5625) = 4; residuals 1, 0, 0.
    found = fit("busy", {1: 1.0, 2: 2.0, 4: 3.0})
    assert found.coefficient == pytest.approx(4) and found.r2 == pytest.approx(1 - 1 / 2)


def test_values_that_contradict_the_law_give_a_negative_r2() -> None:
    # Falls where the law rises: a = (4 + 2)/(1 + 16) = 6/17, far from both, while their mean is 1.5 from each.
    found = fit("tps", {1: 4.0, 4: 0.5})
    assert found.coefficient == pytest.approx(6 / 17)
    assert found.r2 == pytest.approx(1 - ((4 - 6 / 17) ** 2 + (0.5 - 24 / 17) ** 2) / (2 * 1.75**2))
    assert found.r2 is not None and found.r2 < 0


@pytest.mark.parametrize("value", [3.0, 0.1, 0.0])
def test_equal_values_have_no_r2(value: float) -> None:
    assert fit("tpot", dict.fromkeys(SIZES, value)).r2 is None


@pytest.mark.parametrize(
    ("law", "values", "complaint"),
    [
        ("tsp", {1: 1.0, 2: 2.0}, "did you mean 'tps'"),
        ("tps", {4: 1.0}, "measure more sizes"),
        ("busy", {}, "two EP sizes"),
        ("tpot", {0: 1.0, 2: 1.0}, "of 1 or more"),
    ],
)
def test_what_cannot_be_fitted_is_refused(law: str, values: dict[int, float], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        fit(law, values)
