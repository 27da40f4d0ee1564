"""The method of measurement, on a clock that only moves when a candidate says so; no test waits for real time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest

from ds_moe_ep.bench.harness.collector import ratios
from ds_moe_ep.bench.harness.method import Ranks, Round, measure, rotation, summarize, trimmed
from ds_moe_ep.errors import ConfigError


def nothing() -> None:
    return None


@dataclass(frozen=True)
class Work:
    """A candidate of two functions."""

    run: Callable[[], object]
    prepare: Callable[[], object] = nothing


def times_of(rounds: Sequence[Round], name: str) -> list[float]:
    return [times[name] for times in rounds]


class Clock:
    """A clock that candidates move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_ratio_of_known_sleeps_is_exact() -> None:
    clock = Clock()
    candidates = {"slow": Work(lambda: clock.sleep(0.5)), "fast": Work(lambda: clock.sleep(0.25))}
    rounds = measure(candidates, rounds=7, warm_ups=2, clock=clock)
    assert len(rounds) == 7
    assert summarize(times_of(rounds, "slow")).value == 0.5
    ratio = summarize(ratios(times_of(rounds, "slow"), times_of(rounds, "fast")))
    assert (ratio.value, ratio.low, ratio.high) == (2.0, 2.0, 2.0)


def test_a_machine_that_slows_down_moves_the_times_and_not_the_ratio() -> None:
    clock, slowness = Clock(), iter(range(1, 1000))

    def work(seconds: float) -> Work:
        return Work(lambda: clock.sleep(seconds * level[0]), prepare=lambda: None)

    level = [1.0]
    candidates = {"a": work(1.0), "b": work(4.0)}
    rounds = measure(
        candidates, rounds=20, warm_ups=0, clock=clock, on_round=lambda *_: level.__setitem__(0, float(next(slowness)))
    )
    times = summarize(times_of(rounds, "a"))
    assert times.high - times.low > 5
    ratio = summarize(ratios(times_of(rounds, "a"), times_of(rounds, "b")))
    assert (ratio.low, ratio.value, ratio.high) == (0.25, 0.25, 0.25)


def test_warm_ups_preparation_and_callbacks_are_not_timed() -> None:
    clock = Clock()
    runs = iter([100.0, 100.0, 1.0, 1.0, 1.0])
    candidates = {"a": Work(lambda: clock.sleep(next(runs)), prepare=lambda: clock.sleep(50))}
    ranks = Ranks(barrier=lambda: clock.sleep(7), slowest=tuple)
    rounds = measure(candidates, rounds=3, warm_ups=2, ranks=ranks, clock=clock, on_round=lambda *_: clock.sleep(1000))
    assert times_of(rounds, "a") == [1.0, 1.0, 1.0]


def test_a_round_takes_the_time_of_the_slowest_rank() -> None:
    def slowest(values: Sequence[float]) -> list[float]:
        return [max(value, other) for value, other in zip(values, (3.0, 0.5), strict=True)]  # the other rank's

    clock = Clock()
    candidates = {"a": Work(lambda: clock.sleep(1)), "b": Work(lambda: clock.sleep(1))}
    ranks = Ranks(barrier=lambda: None, slowest=slowest)
    assert measure(candidates, rounds=1, warm_ups=0, ranks=ranks, clock=clock) == [{"a": 3.0, "b": 1.0}]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_every_candidate_stands_equally_often_at_every_place(count: int) -> None:
    names = tuple("abcde"[:count])
    orders = [rotation(names, index) for index in range(2 * count)]
    assert all(sorted(order) == sorted(names) for order in orders)
    assert set(Counter((name, order.index(name)) for order in orders for name in names).values()) == {2}


def test_reversed_rotations_give_a_candidate_another_predecessor() -> None:
    names = ("a", "b", "c")
    before_b = {order[order.index("b") - 1] for order in (rotation(names, i) for i in range(6)) if order[0] != "b"}
    assert before_b == {"a", "c"}


def test_the_candidates_run_in_the_rotated_order() -> None:
    ran: list[str] = []
    candidates = {name: Work(lambda name=name: ran.append(name)) for name in "abc"}  # type: ignore[misc]
    measure(candidates, rounds=4, warm_ups=1)
    assert "".join(ran) == "abc" + "abc" + "bca" + "cab" + "cba"


@pytest.mark.parametrize(("count", "kept"), [(1, 1), (19, 19), (20, 18), (39, 37), (100, 90)])
def test_five_percent_are_dropped_at_each_end(count: int, kept: int) -> None:
    values = [float((7 * i) % count) for i in range(count)] if count % 7 else [float(i) for i in range(count)]
    dropped = (count - kept) // 2
    assert trimmed(values) == [float(i) for i in range(dropped, count - dropped)]


def test_one_outlier_at_each_end_leaves_the_summary_alone() -> None:
    values = [10.0] * 18
    assert summarize([*values, 1e9, -1e9]) == summarize(values)
    assert summarize([*values, 1e9, 1e9, -1e9, -1e9]).value == 10.0


def test_nothing_to_measure_is_refused() -> None:
    for candidates, rounds, warm_ups in (
        ({}, 1, 0),
        ({"a": Work(lambda: None)}, 0, 0),
        ({"a": Work(lambda: None)}, 1, -1),
    ):
        with pytest.raises(ConfigError, match=r"bench\.candidates"):
            measure(candidates, rounds=rounds, warm_ups=warm_ups)
    with pytest.raises(ConfigError, match="nothing to summarize"):
        summarize([])
