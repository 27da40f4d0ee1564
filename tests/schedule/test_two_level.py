"""Schedules of two-level dispatch: sound, priced by fewer far copies, and refused where a copy would be cut."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.moe.two_level.copies import is_copied
from ds_moe_ep.schedule.build import OpKind, Schedule, backward_schedule, forward_schedule
from ds_moe_ep.schedule.check import check
from ds_moe_ep.schedule.price import Costs, candidates, price_us
from ds_moe_ep.schedule.two_level import copies_share

TWO_NODES, FOUR_NODES = Torus(2, 2), Torus(4, 4)


def config(**knobs: Any) -> MoEConfig:
    return MoEConfig(
        **({"num_experts": 16, "ep_size": 4, "top_k": 2, "schedule": "peers", "two_level": "copies"} | knobs)
    )


@pytest.mark.parametrize(("top_k", "percent"), [(1, 0.0), (2, 23.3), (4, 51.9), (8, 75.0)])
def test_far_copies_of_sixteen_experts_on_two_nodes_are_as_many_fewer_as_counted_over_all_choices(
    top_k: int, percent: float
) -> None:
    node_TK = torch.tensor(list(combinations(range(16), top_k))) // 8
    copies, rows = int(is_copied(node_TK, 0, 2).sum()), int((node_TK == 1).sum())
    assert 100 * (1 - copies / rows) == pytest.approx(percent, abs=0.05)
    assert copies_share(16, top_k, 2) == pytest.approx(copies / rows)


@pytest.mark.parametrize("two_level", ["copies", "sums"])
@pytest.mark.parametrize("torus", [TWO_NODES, FOUR_NODES, Torus(3, 1)], ids=str)
def test_every_schedule_is_sound(two_level: str, torus: Torus) -> None:
    for knobs in ({"schedule": "serial"}, {}, {"peer_group_size": 2 * torus.node_size}):
        for depth in range(4):
            known = config(num_experts=48, ep_size=torus.size, two_level=two_level, depth=depth, **knobs)
            for make in (forward_schedule, backward_schedule):
                assert check(make(known, torus)) == [], (knobs, depth, make)


def test_copies_change_the_way_out_alone_and_sums_both_ways() -> None:
    torus = Torus(3, 2)
    schedules = [
        str(make(config(num_experts=12, ep_size=6, two_level=kind), torus))
        for kind in ("copies", "sums")
        for make in (forward_schedule, backward_schedule)
    ]
    assert schedules == [
        "D0 D1 D2 S1 E0 C0 D3 S2 E1 C1 E2 C2 E3 C3",
        "D0 D3 D1 E0 C0 D2 E3 C3 E1 C1 E2 C2 W0",
        "D0 D1 D2 S1 E0 C0 D3 S2 E1 G1 C1 E2 G2 C2 E3 C3",
        "D0 D3 D1 E0 C0 D2 S1 E3 C3 S2 E1 G1 C1 E2 G2 C2 W0",
    ]


def without(schedule: Schedule, kind: OpKind, piece: int) -> Schedule:
    """The schedule in which nobody waits for an op."""
    index = next(i for i, op in enumerate(schedule.ops) if (op.kind, op.piece) == (kind, piece))
    ops = tuple(replace(op, after=tuple(i for i in op.after if i != index)) for op in schedule.ops)
    return replace(schedule, ops=ops)


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        (OpKind.DISPATCH, "spread 1 does not wait for dispatch 1"),
        (OpKind.SPREAD, "compute 1 does not wait for spread 1"),
        (OpKind.COMPUTE, "gather 1 does not wait for compute 1"),
        (OpKind.GATHER, "combine 1 does not wait for gather 1"),
    ],
)
def test_a_leg_that_nobody_waits_for_is_found(kind: OpKind, fault: str) -> None:
    schedule = forward_schedule(config(two_level="sums"), TWO_NODES)
    assert fault in check(without(schedule, kind, 1))


def test_a_spread_of_a_node_that_is_cut_is_found() -> None:
    schedule = forward_schedule(config(), TWO_NODES)
    near, far, last = schedule.pieces
    cut = replace(schedule, pieces=(near, replace(far, offsets=far.offsets[:1]), last))
    assert "piece 1 has a leg inside of its node, and not the node's rows as a whole" in check(cut)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"schedule": "chunks"}, "schedule='chunks'"),
        ({"row_cuts": 2}, "row_cuts=2"),
        ({"replicas": 1}, "replicas=1"),
        ({"two_level": "auto", "replicas": 1}, "replicas=1"),
    ],
)
def test_knobs_that_would_cut_a_copy_are_refused(knobs: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(**knobs)


@pytest.mark.parametrize(
    ("torus", "knobs", "words"),
    [
        (TWO_NODES, {"top_k": 1}, "top_k=1"),
        (Torus(1, 4), {}, "share one node"),
        (TWO_NODES, {"peer_group_size": 1}, "peer_group_size=1"),
    ],
)
def test_one_expert_per_token_groups_on_one_node_and_parts_of_nodes_are_refused(
    torus: Torus, knobs: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        forward_schedule(config(**knobs), torus)
    forward_schedule(config(two_level="auto", **knobs), torus)  # which takes them as they are


def test_auto_has_every_whole_schedule_twice_and_copies_have_no_others() -> None:
    one, both, copies = (candidates(FOUR_NODES, kind) for kind in ("off", "auto", "copies"))
    whole = [
        knobs
        for knobs in one
        if knobs["schedule"] == "peers" and knobs.get("row_cuts") == 1 and "peer_group_size" not in knobs
    ]
    assert both == one + [{**knobs, "two_level": "copies"} for knobs in whole]
    assert copies == [{"schedule": "serial"}, *whole]
    for knobs in both:
        replace(config(ep_size=16, two_level="auto", schedule="auto"), **knobs)
    assert candidates(Torus(1, 4), "auto") == candidates(Torus(1, 4))


def test_a_price_falls_with_the_copies_where_the_far_link_is_slow_and_rises_where_the_near_one_is() -> None:
    def price(two_level: str, near_us: float, far_us: float) -> float:
        costs = Costs(
            near_us=near_us, far_us=far_us, latency_us=0.0, forward_us=0.0, input_grad_us=0.0, weight_grad_us=0.0
        )
        return price_us(config(two_level=two_level, schedule="serial"), TWO_NODES, costs)

    share = copies_share(16, 2, 2)
    assert price("off", 0.0, 100.0) == pytest.approx(400.0)
    assert price("copies", 0.0, 100.0) == pytest.approx(300.0 + share * 100)
    assert price("sums", 0.0, 100.0) == pytest.approx(share * 400)
    assert price("copies", 100.0, 0.0) == pytest.approx(300.0 + 2 * 100)  # near rows and spread ones
