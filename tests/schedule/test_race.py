"""The benchmark of schedules: which of them is taken, from times with a known truth behind them."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from ds_moe_ep.schedule.race import SERIAL, STAGES, Knobs, Measure, described, race

FINALISTS: list[Knobs] = [{"schedule": "peers", "row_cuts": cuts} for cuts in (1, 2, 3, 4)] + [
    {"schedule": "chunks", "chunks": chunks} for chunks in (2, 4)
]


def clock(truth_s: Sequence[float], serial_s: float = 9.1, noise: float = 0.0, seed: int = 0) -> Measure:
    """Times of the finalists in their order, a share longer at most: what disturbs a pass makes no pass shorter."""
    draws, counted = random.Random(seed), dict(zip(map(described, FINALISTS), truth_s, strict=True))
    counted[described(SERIAL)] = serial_s

    def measure(sides: Sequence[Knobs], rounds: int, warm_ups: int) -> list[list[float]]:
        drift = [draws.uniform(1, 1 + noise) for _ in range(rounds)]  # of a round: all sides have it
        return [
            [counted[described(side)] * drift[index] * draws.uniform(1, 1 + noise / 2) for index in range(rounds)]
            for side in sides
        ]

    return measure


AT_2 = (7.10, 6.46, 6.52, 6.60, 6.91, 7.07)  # seconds of a step where traffic takes twice its compute


@pytest.mark.parametrize("seed", range(20))
def test_what_is_taken_is_at_most_two_percent_slower_than_the_fastest(seed: int) -> None:
    taken = race(FINALISTS, clock(AT_2, noise=0.04, seed=seed)).leader
    assert AT_2[FINALISTS.index(taken)] <= 1.02 * min(AT_2), taken


def test_a_busy_machine_costs_a_percent_or_two_in_the_mean() -> None:
    """Each pass is up to 30 % longer, and rounds differ as much; 50 machines."""
    taken = [AT_2[FINALISTS.index(race(FINALISTS, clock(AT_2, noise=0.3, seed=seed)).leader)] for seed in range(50)]
    assert sum(taken) / len(taken) <= 1.02 * min(AT_2)


def test_without_noise_the_fastest_is_taken_and_of_equal_ones_the_first() -> None:
    assert race(FINALISTS, clock(AT_2)).leader == FINALISTS[1]
    assert race(FINALISTS, clock((7.0, 6.5, 6.501, 6.5, 8.0, 8.0))).leader == FINALISTS[1]


def test_a_gain_within_the_spread_keeps_serial_and_one_beyond_it_does_not() -> None:
    close = (8.95, 9.3, 9.3, 9.3, 9.3, 9.3)
    assert race(FINALISTS, clock(close)).leader == FINALISTS[0]
    assert race(FINALISTS, clock(close, noise=0.2, seed=3)).leader == SERIAL


def test_close_ones_get_more_rounds_and_hopeless_ones_end_it() -> None:
    found = race(FINALISTS, clock(AT_2))
    assert [len(found.seconds[described(knobs)]) for knobs in FINALISTS] == [3, sum(STAGES), sum(STAGES), 5, 3, 3]
    over = race(FINALISTS, clock((11.0,) * 6))
    assert over.leader == SERIAL and all(len(seconds) == STAGES[0] for seconds in over.seconds.values())


def test_one_schedule_or_none_beside_serial_is_a_race_too() -> None:
    assert race(FINALISTS[:1], clock(AT_2)).leader == FINALISTS[0]
    assert race([], clock(AT_2)).leader == SERIAL
