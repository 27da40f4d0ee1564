"""Drift of the link: seen where it has changed and matters, and not in noise."""

from __future__ import annotations

import random

import pytest

from ds_moe_ep.schedule.drift import IN_A_ROW, SAMPLE_EVERY, WINDOW, LinkDrift, LinkSample
from ds_moe_ep.schedule.spans import Span, Tags

LEAST, ROWS = 200, 1000


def passes_until_seen(
    drift: LinkDrift, transfer_us: float, compute_us: float, most: int, noise: float = 0.0
) -> int | None:
    """How many passes it takes, each at least so long, until the drift is seen; None where it is not."""
    draws = random.Random(7)
    for number in range(most):
        if drift.passes():
            wire_us = transfer_us * (1 + noise * draws.expovariate(1.0))
            drift.see(LinkSample(wire_us + compute_us * (1 + noise * draws.random()), wire_us, ROWS))
        if drift.is_beyond_bound():
            return number + 1
    return None


def settled(bound: float = 0.5, transfer_us: float = 1000.0, compute_us: float = 3000.0) -> LinkDrift:
    drift = LinkDrift(bound, LEAST)
    assert passes_until_seen(drift, transfer_us, compute_us, LEAST) is None
    return drift


@pytest.mark.parametrize("factor", [10.0, 2.0, 0.3])
def test_a_link_that_has_changed_is_seen_within_a_few_windows(factor: float) -> None:
    seen = passes_until_seen(settled(), factor * 1000, 3000, 10_000)
    assert seen is not None and seen <= (IN_A_ROW + 1) * WINDOW * SAMPLE_EVERY


@pytest.mark.parametrize(
    ("factor", "noise", "why"),
    [
        (1.0, 0.0, "nothing changed"),
        (1.0, 1.0, "late peers in every pass, twice as long in the mean"),
        (1.3, 0.0, "less than the bound"),
        (0.8, 0.3, "less than the bound"),
    ],
)
def test_noise_and_small_changes_are_no_drift(factor: float, noise: float, why: str) -> None:
    assert passes_until_seen(settled(), factor * 1000, 3000, 50_000, noise) is None, why


def test_what_is_nothing_beside_the_pass_is_no_drift() -> None:
    assert passes_until_seen(settled(transfer_us=20.0), 100.0, 3000, 50_000) is None
    assert passes_until_seen(settled(transfer_us=20.0), 1000.0, 3000, 50_000) is not None


def test_a_bound_of_zero_records_nothing() -> None:
    assert not any(LinkDrift(0.0, LEAST).passes() for _ in range(1000))


def test_measurements_that_change_nothing_come_ever_later_and_one_that_does_ends_that() -> None:
    drift, waits = settled(), []
    for has_changed in (False, False, True):
        drift.restart(has_changed)
        assert passes_until_seen(drift, 1000.0, 3000.0, WINDOW * SAMPLE_EVERY) is None
        waits.append(passes_until_seen(drift, 9000.0, 3000.0, 10_000))
    assert waits == [patience * LEAST - WINDOW * SAMPLE_EVERY for patience in (2, 4, 1)]


def test_a_sample_is_of_the_forward_pass_and_counts_transfers_side_by_side_once() -> None:
    forward, backward = Tags("layer", "forward"), Tags("layer", "backward")
    spans = [
        Span("D0", 0, "dispatch", 10.0, 40.0, forward),
        Span("C0", 0, "combine", 30.0, 60.0, forward),
        Span("E0", 0, "compute", 40.0, 110.0, forward),
        Span("D0", 0, "dispatch", 500.0, 900.0, backward),
    ]
    assert LinkSample.of(spans, 25) == LinkSample(100.0, 50.0, 25)
    assert LinkSample.of(spans, 25).row_us == 2.0  # type: ignore[union-attr]
    assert LinkSample.of(spans[3:], 25) is LinkSample.of(spans, 0) is None
