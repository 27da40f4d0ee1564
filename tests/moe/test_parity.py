"""The parallel layer equals the dense float64 reference on the concatenated batch, and damage is seen.

fp32: 1e-6 of the largest value of a tensor's kind. One rounding is 6e-8; the longest sums here have about 100 terms,
and rounding errors of random signs grow with the square root: 6e-7. DeepSpeed's own layer stays within 5e-7 of the
same reference (tests/engine/test_native_parity.py).
bf16: twice the error of the reference itself when its experts run in bf16, plus one rounding of the result (2^-8): both
round at the same places but in another order. Routing and losses stay in fp32 and are exact to 1e-6.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
import torch

from tests.moe.layer_cases import EXPERT_SHAPES, LayerCase, LayerResult, errors, reference_results
from tests.moe.layer_runs import TAMPERS, config, run_cases
from tests.ranks import RankPool

SHAPES: list[dict[str, object]] = [
    {},
    {"row_cuts": 3, "chunks": 3, "peer_group_size": 2},
    {"node_size": 2, "depth": 1},
]
EXCHANGES = [(s, t) for s in ("serial", "chunks", "peers") for t in ("auto", "pairwise", "collective")]


def routing_cases(world_size: int, ep_size: int, locals_: tuple[int, ...] = (1, 3)) -> list[LayerCase]:
    """k = 1, 2, 4, dropless and both capacities, one and several experts per rank."""
    cases = []
    for num_local in locals_:
        for top_k in (1, 2, 4):
            if top_k > num_local * ep_size:
                continue
            for factor, policy in ((None, "position"), (0.75, "position"), (0.75, "score")):
                knobs = config(
                    num_experts=num_local * ep_size,
                    ep_size=ep_size,
                    top_k=top_k,
                    capacity_factor=factor,
                    drop_policy=policy,
                )
                name = f"EP={ep_size} of {world_size}, {num_local} local, k={top_k}, capacity={factor} by {policy}"
                cases.append(LayerCase(name=name, config=knobs, rows=(21,) * world_size))
    return cases


def exchange_cases(world_size: int) -> list[LayerCase]:
    """Every schedule and transport, dropless with unequal rows and with a capacity, each two with every shape."""
    cases = []
    for index, (schedule, transport) in enumerate(EXCHANGES):
        for number, factor in enumerate((None, 1.0)):
            shape = SHAPES[(index + index // 3 + number) % 3]
            knobs = config(
                ep_size=world_size, top_k=2, schedule=schedule, transport=transport, capacity_factor=factor, **shape
            )
            rows = tuple(17 + 5 * r for r in range(world_size)) if factor is None else (20,) * world_size
            name = f"{schedule} over {transport}, capacity={factor}, {shape}"
            cases.append(LayerCase(name=name, config=knobs, rows=rows))
    return cases


def expert_cases() -> list[LayerCase]:
    """Every kind of expert with every two of: a shared one, a capacity, a schedule."""
    return [
        LayerCase(
            name=f"{kind}, shared={shared}, capacity={factor}, {schedule}",
            config=config(ep_size=4, top_k=2, capacity_factor=factor, schedule=schedule),
            rows=(24, 24, 24, 24),
            expert=kind,
            shared=shared,
        )
        for kind in EXPERT_SHAPES
        for shared in (False, True)
        for factor in (None, 1.0)
        for schedule in ("serial", "peers")
        if shared ^ (factor is None) ^ (schedule == "peers")
    ]


def router_cases() -> list[LayerCase]:
    """Scores, weights, losses, masks and modes."""
    table: list[dict[str, object]] = [
        {"score": "sigmoid", "top_k": 1},
        {"score": "sigmoid", "top_k": 4, "z_loss_weight": 0.1},
        {"renormalize": True, "top_k": 1, "z_loss_weight": 0.1},
        {"renormalize": False, "top_k": 2},
        {"renormalize": False, "top_k": 4, "capacity_factor": 0.75},
        {"z_loss_weight": 0.3, "aux_loss_weight": 0.01, "top_k": 2},
        {"balance": "none", "z_loss_weight": 0.3, "top_k": 1},
        {"balance_scope": "group", "top_k": 2},
        {"balance_scope": "group", "top_k": 4, "score": "sigmoid"},
        {"top_k": 8},
        {"balance": "bias", "top_k": 2, "z_loss_weight": 0.1},
        {"balance": "bias", "top_k": 4, "score": "sigmoid", "bias_step": 0.003},
        {"capacity_factor": 0.3, "min_capacity": 1, "top_k": 2},
        {"capacity_factor": 20.0, "top_k": 2},
    ]
    cases = []
    for knobs in table:
        for masked in (False, True):
            name = f"{knobs}, masked={masked}"
            cases.append(LayerCase(name=name, config=config(ep_size=4, **knobs), rows=(24,) * 4, masked=masked))
    skewed = config(ep_size=4, top_k=2, eval_capacity_factor=0.5)
    cases.append(LayerCase(name="eval with a capacity", config=skewed, rows=(24,) * 4, training=False, skew=2.0))
    cases.append(LayerCase(name="training without", config=skewed, rows=(24,) * 4, skew=2.0))
    return cases


def compare(pool: RankPool, cases: list[LayerCase], tamper: str = "") -> dict[str, tuple[str, float]]:
    """The cases that are off: by name the worst tensor and its error."""
    return off_in(cases, pool.run(cases[0].world_size, run_cases, cases, tamper, timeout_s=240))


def off_in(cases: list[LayerCase], by_rank: Sequence[Sequence[LayerResult]]) -> dict[str, tuple[str, float]]:
    """The cases that are off in what each rank found."""
    off = {}
    for index, case in enumerate(cases):
        found, expected = [results[index] for results in by_rank], reference(case)
        worst = worst_error(case, found, expected)
        if worst[1] > case.bound or [r.exp_counts for r in found] != [r.exp_counts for r in expected]:
            off[case.name] = worst
    return off


@functools.cache
def reference(case: LayerCase) -> list[LayerResult]:
    """Expected results of the case, computed once for it and its controls."""
    return reference_results(case)


def worst_error(case: LayerCase, found: list[LayerResult], expected: list[LayerResult]) -> tuple[str, float]:
    """The tensor that is furthest off, in units of the bound for its kind times `case.bound`."""
    by_name = errors(found, expected)
    if case.dtype is torch.bfloat16:
        own = errors(reference_results(case, torch.bfloat16), expected)
        allowed = {name: 2 * largest_of_kind(own, name) + 2**-8 for name in by_name if not name.startswith("l_aux")}
        by_name = {name: error * case.bound / allowed.get(name, case.bound) for name, error in by_name.items()}
    return max(by_name.items(), key=lambda item: item[1])


def largest_of_kind(by_name: dict[str, float], name: str) -> float:
    kind = name.split("[")[0].split()[-1]
    return max(error for other, error in by_name.items() if other.split("[")[0].split()[-1] == kind)


@pytest.mark.parametrize(("world_size", "ep_size"), [(1, 1), (2, 2), (4, 4), (8, 8), (4, 2), (2, 1)])
def test_layer_equals_the_reference_for_every_routing(pool: RankPool, world_size: int, ep_size: int) -> None:
    locals_ = {1: (3, 6), 8: (2,)}.get(ep_size, (1, 3))
    assert compare(pool, routing_cases(world_size, ep_size, locals_)) == {}


def run_right_and_swapped(cases: list[LayerCase], swapped: list[LayerCase]) -> tuple[list[LayerResult], ...]:
    return run_cases(cases), run_cases(swapped, "swap two ranks")


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_layer_equals_the_reference_on_sixteen_ranks_and_swapped_experts_are_seen(pool: RankPool, every: int) -> None:
    """Each number of choices and each capacity once, which fewer ranks meet in every pair; two on nodes of four."""
    cases = routing_cases(16, 16, (1,))[::every]
    swapped = cases[:1] if every > 1 else cases[:3]
    cases += [case.with_config(node_size=4, schedule="peers") for case in cases[:2]]
    right, wrong = zip(*pool.run(16, run_right_and_swapped, cases, swapped, timeout_s=240), strict=True)
    assert off_in(cases, right) == {}
    assert set(off_in(swapped, wrong)) == {case.name for case in swapped}


def test_layer_equals_the_reference_for_every_schedule_and_transport(pool: RankPool) -> None:
    assert compare(pool, exchange_cases(4)) == {}


def test_layer_equals_the_reference_for_every_kind_of_expert(pool: RankPool) -> None:
    assert compare(pool, expert_cases()) == {}


def test_layer_equals_the_reference_for_every_kind_of_router(pool: RankPool) -> None:
    assert compare(pool, router_cases()) == {}


def test_layer_in_bf16_is_as_close_to_the_reference_as_bf16_experts_allow(pool: RankPool) -> None:
    cases = [
        LayerCase(
            name=f"bf16 {kind} k={top_k} {factor}",
            config=config(ep_size=4, top_k=top_k, capacity_factor=factor),
            rows=(40, 40, 40, 40),
            expert=kind,
            dtype=torch.bfloat16,
        )
        for index, kind in enumerate(EXPERT_SHAPES)
        for top_k in (1, 2, 4)
        for factor in (None, 1.0)
        if (index + top_k + (factor is None)) % 2
    ]
    assert compare(pool, cases) == {}


def controls() -> list[LayerCase]:
    """Cases of every table in which each expert gets rows from every rank."""
    chosen = [
        *routing_cases(4, 4)[::2],
        *exchange_cases(4)[2::5],  # every schedule, transport and capacity
        *expert_cases()[::3],
        *[c for c in router_cases() if not c.masked and c.config.min_capacity > 1],
    ]
    bf16 = LayerCase(name="bf16", config=config(ep_size=4, top_k=2), rows=(40,) * 4, dtype=torch.bfloat16)
    return [*chosen, bf16]


@pytest.mark.parametrize("tamper", TAMPERS)
def test_damage_to_one_remote_weight_or_row_is_seen_in_every_case(pool: RankPool, tamper: str) -> None:
    """Each case meets one of the three damages."""
    cases = controls()[TAMPERS.index(tamper) :: 3]
    off = compare(pool, cases, tamper)
    assert [case.name for case in cases if case.name not in off] == []


def test_swapped_experts_are_seen_across_groups(pool: RankPool) -> None:
    cases = routing_cases(4, 2)
    assert set(compare(pool, cases, "swap two ranks")) == {case.name for case in cases}
