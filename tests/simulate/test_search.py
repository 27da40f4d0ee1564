"""A search without derivatives finds what explains, and leaves alone what nothing tells of."""

from __future__ import annotations

import math

import pytest

from ds_moe_ep.simulate.calibrate.search import compass_search


def test_it_finds_the_lowest_point_of_a_valley() -> None:
    def loss(values: dict[str, float]) -> float:
        return 1e-3 + math.log(values["a"] * values["b"] / 12) ** 2 + 5 * math.log(values["a"] / 3) ** 2

    found = compass_search(loss, {"a": 100.0, "b": 0.1})
    assert found["a"] == pytest.approx(3, rel=0.02) and found["b"] == pytest.approx(4, rel=0.02)


def test_what_the_loss_does_not_tell_of_stays() -> None:
    found = compass_search(lambda values: math.log(values["a"] / 2) ** 2 + 1e-9 * values["b"], {"a": 9.0, "b": 5.0})
    assert found["b"] == 5.0 and found["a"] == pytest.approx(2, rel=0.02)


def test_a_finer_tolerance_comes_closer() -> None:
    def loss(values: dict[str, float]) -> float:
        return math.log(values["a"] / math.pi) ** 2

    coarse, fine = (abs(compass_search(loss, {"a": 1.0}, tolerance=t)["a"] / math.pi - 1) for t in (1.3, 1.0005))
    assert fine < 1e-3 < coarse
