"""Prices respect what no schedule can beat, and order schedules as arithmetic done by hand does."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.schedule.price import Costs, candidates, price_us, probe_pieces, ranked

FOUR_NODES = Torus(4, 4)
ANY_TORUS = st.builds(Torus, st.integers(1, 5), st.integers(1, 5))
TIME_US = st.floats(0, 1e6)
ANY_COSTS = st.builds(
    Costs,
    near_us=TIME_US,
    far_us=TIME_US,
    latency_us=st.floats(0, 1e3),
    forward_us=TIME_US,
    input_grad_us=TIME_US,
    weight_grad_us=TIME_US,
)


def costs(ratio: float) -> Costs:
    """One second of compute a third, and traffic of `ratio` times the forward pass's."""
    return Costs(near_us=0, far_us=ratio * 0.5e6, latency_us=0, forward_us=1e6, input_grad_us=1e6, weight_grad_us=1e6)


def price(torus: Torus, found: Costs, **knobs: object) -> float:
    return price_us(MoEConfig(**knobs), torus, found)


def compute_us(found: Costs) -> float:
    return found.forward_us + found.input_grad_us + found.weight_grad_us


@given(torus=ANY_TORUS, found=ANY_COSTS)
def test_no_candidate_beats_compute_or_the_link(torus: Torus, found: Costs) -> None:
    traffic_us = 4 * found.far_us if torus.size > 1 else 0.0
    for knobs in candidates(torus):
        assert price(torus, found, **knobs) >= max(compute_us(found), traffic_us) * (1 - 1e-9) - 1e-3


@given(torus=ANY_TORUS, found=ANY_COSTS)
def test_without_traffic_every_candidate_takes_exactly_the_compute(torus: Torus, found: Costs) -> None:
    free = dataclasses.replace(found, near_us=0.0, far_us=0.0, latency_us=0.0)
    for knobs in candidates(torus):
        assert price(torus, free, **knobs) == pytest.approx(compute_us(found), abs=1e-2)


@given(torus=ANY_TORUS, found=ANY_COSTS, share=st.floats(0, 1))
def test_the_serial_schedule_takes_the_sum_of_its_parts(torus: Torus, found: Costs, share: float) -> None:
    found = dataclasses.replace(found, far_us=share * found.far_us)
    near_us = found.near_us if torus.node_size > 1 < torus.num_nodes else 0.0
    far_us = found.far_us if torus.size > 1 else 0.0
    exchanges_us = 4 * (found.latency_us + max(near_us, far_us))
    assert price(torus, found, schedule="serial") == pytest.approx(compute_us(found) + exchanges_us, rel=1e-6, abs=1e-2)


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.6])
def test_peers_hide_everything_while_traffic_is_short(ratio: float) -> None:
    assert price(FOUR_NODES, costs(ratio), schedule="peers", weight_blocks=4) == pytest.approx(3e6)
    assert price(FOUR_NODES, costs(ratio), schedule="serial") == pytest.approx(3e6 + 4 * ratio * 0.5e6)


def test_chunks_leave_the_first_dispatch_and_the_last_combine_of_the_forward_pass_exposed() -> None:
    # Forward: 2 x 0.15 s / 4 chunks. Backward: the first dispatch alone, since weight gradients hide the last combine.
    assert price(FOUR_NODES, costs(0.3), schedule="chunks", chunks=4) == pytest.approx(3e6 + 3 * 0.15e6 / 4)


def test_equal_traffic_and_compute_want_row_cuts() -> None:
    # By hand, forward with whole groups: 1.083 (the tail of the last group is exposed); with two cuts all is hidden.
    knobs = {"schedule": "peers", "weight_blocks": 4}
    whole, cut = (price(FOUR_NODES, costs(1.0), **knobs | more) for more in ({}, {"row_cuts": 2}))
    assert whole == pytest.approx(3.083e6, rel=1e-3)
    assert cut < 3.02e6


def test_one_product_for_a_weight_gradient_leaves_the_far_dispatches_of_a_slow_link_to_the_input_gradients_alone() -> (
    None
):
    one, four = (price(FOUR_NODES, costs(2.0), schedule="peers", weight_blocks=blocks) for blocks in (1, 4))
    assert one > 1.1 * four
    assert price(FOUR_NODES, costs(0.2), schedule="peers") == pytest.approx(3e6)


def test_the_cheapest_candidate_comes_first_and_a_fast_link_makes_all_alike() -> None:
    config = MoEConfig(num_experts=16, ep_size=16)
    prices = [us for us, _ in ranked(config, FOUR_NODES, costs(1.0))]
    assert prices == sorted(prices)
    assert ranked(config, FOUR_NODES, costs(1.0))[0][1]["schedule"] == "peers"
    assert max(us for us, _ in ranked(config, FOUR_NODES, costs(0.0))) == pytest.approx(3e6)


def test_probe_pieces_are_the_near_rows_the_far_rows_and_about_one_row_a_peer() -> None:
    near, far, little = probe_pieces(FOUR_NODES, num_rows=64)
    assert near.offsets == tuple((0, place) for place in range(4))
    assert set(near.offsets) | set(far.offsets) == set(FOUR_NODES.offsets())
    assert (little.offsets, little.num_cuts) == (far.offsets, 4)
