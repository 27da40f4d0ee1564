"""Forecasts: calm where loads are draws of the same shares, quick where they move, and aware of their errors."""

from __future__ import annotations

import random
from statistics import mean

import pytest

from ds_moe_ep.bench.candidates.workloads import Workload
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.schedule.copies.forecast import Forecast, LoadAverage, moved_share
from ds_moe_ep.schedule.placement import CopyCosts
from tests.schedule.replay import costs_of_quickstart, ratios

EXPERTS, ROWS = 16, 8192
TORUS = Torus(4, 4)


def drawn(passes: int) -> list[list[int]]:
    """Draws of shares that stay."""
    draw, shares = random.Random(1), [1 / (1 + expert) for expert in range(EXPERTS)]
    experts = range(EXPERTS)
    return [
        [chosen.count(e) for e in experts] for chosen in (draw.choices(experts, shares, k=ROWS) for _ in range(passes))
    ]


def moving(passes: int) -> list[list[int]]:
    """Shares that wander from pass to pass, as in the first steps of a training."""
    draw, logits, found = random.Random(2), [0.0] * EXPERTS, []
    for _ in range(passes):
        logits = [0.9 * logit + draw.gauss(0, 0.4) for logit in logits]
        weights = [2.718**logit for logit in logits]
        found.append([round(ROWS * weight / sum(weights)) for weight in weights])
    return found


def errors(loads: list[list[int]], average: Forecast | LoadAverage) -> list[float]:
    """The share of each pass's rows that was not foretold, from the ninth pass on."""
    found = []
    for rows_E in loads:
        found.append(moved_share(rows_E, average.rows_E))
        average.add(rows_E)
    return found[8:]


def test_a_forecast_is_about_as_near_as_the_best_of_its_averages_whether_loads_stay_or_move() -> None:
    for loads in (drawn(40), moving(60)):
        single = [mean(errors(loads, LoadAverage(EXPERTS, kept))) for kept in (0.875, 0.5, 0.0)]
        assert mean(errors(loads, Forecast(EXPERTS))) <= 1.1 * min(single)
        assert max(single) > 1.2 * min(single), "neither pace is right for both"


def test_a_burst_is_not_followed() -> None:
    forecast, load = Forecast(EXPERTS), Workload("W7", EXPERTS, EXPERTS)
    for step in range(33):
        forecast.add([round(ROWS * share) for share in load.shares_E(step)])
        if step >= 16:
            assert moved_share(forecast.rows_E, [1.0] * EXPERTS) < 0.05


@pytest.mark.parametrize(("loads", "moves"), [(drawn(40), False), (moving(40), True)], ids=["drawn", "moving"])
def test_other_loads_are_expected_where_the_forecast_errs(loads: list[list[int]], moves: bool) -> None:
    forecast, expected = Forecast(EXPERTS), 0
    for rows_E in loads:
        forecast.add(rows_E)
        expected += bool(forecast.others_E)
    assert expected > 30 if moves else expected == 0
    assert all(min(rows_E) >= 0 for rows_E in forecast.others_E)


def test_loads_that_are_others_from_now_on_are_expected_alone() -> None:
    forecast, before, after = Forecast(EXPERTS), [1000] * EXPERTS, [100] * (EXPERTS - 1) + [9000]
    for number, rows_E in enumerate([before] * 4 + [after] * 4):
        forecast.add(rows_E)
        assert bool(forecast.others_E) == (number == 4), "after one pass of them it may have been a burst"
    assert forecast.rows_E == pytest.approx(after)


def test_moving_loads_are_level_where_copies_move_in_the_pass_and_nearly_so_where_they_follow() -> None:
    loads = moving(24)
    without = [max(rows_E) * EXPERTS / sum(rows_E) for rows_E in loads[1:]]
    assert mean(without) > 2.0
    assert mean(ratios(loads, TORUS, CopyCosts(row_us=1.0))[0]) < 0.7 * mean(without)
    assert max(ratios(loads, TORUS, costs_of_quickstart(EXPERTS))[1]) <= 1.3
