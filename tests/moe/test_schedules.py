"""Overlapped equals serial bit for bit with `bit_equal`, whatever the schedule, transport, delays and routing.

Rows of a product do not depend on how many rows are computed together (kernels/linear.py), weight gradients are summed
over blocks that no schedule changes, and each token's results are added in the order of its choices: so nothing is left
that a schedule could change. Two exceptions, both within 2e-6 of the largest value (some ten roundings of 6e-8, and the
larger terms that cancel): modules of unknown shape compute and give weight gradients piece by piece in products of
their own, and torch's silu and tanh-gelu round the last few elements of a piece differently unless the expert width is
a multiple of 32 (they finish a vector loop with scalar code).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch

from ds_moe_ep.config.knobs import MoEConfig
from tests.moe.faulty_transports import Counting, Delayed
from tests.moe.layer_cases import LayerCase, LayerResult, case_data, errors, reference_results
from tests.moe.layer_runs import Links, build_layer, config, forward_backward, run_case, torus_for
from tests.ranks import RankPool

SHAPES: list[dict[str, object]] = [
    {"schedule": "chunks", "chunks": 1},
    {"schedule": "chunks", "chunks": 4},
    {"schedule": "chunks", "chunks": 7},
    {"schedule": "peers"},
    {"schedule": "peers", "row_cuts": 3},
    {"schedule": "peers", "peer_group_size": 2, "row_cuts": 3},
    {"schedule": "peers", "node_size": 2},
    {"schedule": "peers", "node_size": 2, "row_cuts": 3, "peer_group_size": 1},
]
INEXACT = ("module", "swiglu_odd")
VARIANTS = [
    {**shape, "transport": transport, "depth": depth}
    for shape in SHAPES
    for transport in ("auto", "pairwise", "collective")
    for depth in (0, 1, 2, 3)
]


def exact(**knobs: object) -> MoEConfig:
    """A configuration under which every schedule gives the same bits."""
    return config(bit_equal=True, **knobs)


def base_cases() -> list[LayerCase]:
    """Balanced and skewed routing, one and several local experts, dropless and capacity, every form of expert."""
    table = [
        LayerCase(name="one local", config=exact(num_experts=4, ep_size=4, top_k=2), rows=(30, 30, 30, 30)),
        LayerCase(name="unequal rows", config=exact(ep_size=4, top_k=1), rows=(41, 3, 0, 18), expert="gelu_bias"),
        LayerCase(name="skewed", config=exact(ep_size=4, top_k=2), rows=(25,) * 4, skew=3.0, expert="swiglu_bias"),
        LayerCase(name="capacity", config=exact(ep_size=4, top_k=4, capacity_factor=1.0), rows=(21,) * 4),
        LayerCase(name="shared", config=exact(ep_size=4), rows=(31, 7, 0, 18), shared=True, expert="gelu_bias"),
        LayerCase(name="swiglu", config=exact(num_experts=4, ep_size=4), rows=(13, 14, 15, 16), expert="swiglu"),
        LayerCase(name="module", config=exact(ep_size=4, top_k=2), rows=(19, 20, 21, 22), expert="module"),
        LayerCase(name="odd width", config=exact(ep_size=4, top_k=2), rows=(19,) * 4, expert="swiglu_odd"),
        LayerCase(name="bf16", config=exact(ep_size=4, top_k=2), rows=(33,) * 4, dtype=torch.bfloat16),
    ]
    return table


def edge_cases() -> list[LayerCase]:
    """Routing at its limits."""
    wide, one_each = exact(ep_size=4, top_k=2), exact(num_experts=4, ep_size=4)
    return [
        LayerCase(name="every row to one expert", config=one_each, rows=(20,) * 4, skew=3.0, gate_scale=0.05),
        LayerCase(
            name="every row to one of two local experts",
            config=exact(ep_size=4),
            rows=(20,) * 4,
            skew=3.0,
            gate_scale=0.05,
        ),
        LayerCase(name="a rank without rows", config=wide, rows=(20, 0, 7, 31)),
        LayerCase(name="only one rank has rows", config=wide, rows=(0, 0, 0, 9)),
        LayerCase(name="no rows anywhere", config=wide, rows=(0, 0, 0, 0)),
        LayerCase(
            name="no rows anywhere, group balance", config=exact(ep_size=4, balance_scope="group"), rows=(0,) * 4
        ),
        LayerCase(name="no rows, modules", config=wide, rows=(0, 0, 0, 0), expert="module"),
        LayerCase(name="one row", config=wide, rows=(1, 0, 0, 0)),
        LayerCase(name="one row each", config=one_each, rows=(1, 1, 1, 1)),
        LayerCase(name="fewer rows than pieces", config=exact(ep_size=4, top_k=8), rows=(1, 2, 3, 1)),
        LayerCase(name="a prime number of rows", config=wide, rows=(23, 29, 31, 37)),
        LayerCase(name="every expert chosen", config=exact(ep_size=4, top_k=8), rows=(9,) * 4),
        LayerCase(name="an expert without rows", config=exact(num_experts=32, ep_size=4), rows=(3, 2, 4, 1)),
        LayerCase(name="no token used", config=wide, rows=(0, 5, 5, 0), masked=True),
        LayerCase(
            name="one place an expert", config=exact(ep_size=4, capacity_factor=0.01, min_capacity=1), rows=(9,) * 4
        ),
        LayerCase(name="more places than rows", config=exact(ep_size=4, capacity_factor=64.0), rows=(5,) * 4),
        LayerCase(name="capacity, no rows", config=exact(ep_size=4, capacity_factor=1.0), rows=(0,) * 4),
    ]


def serial(case: LayerCase) -> LayerCase:
    return case.with_config(schedule="serial", transport="pairwise", depth=0)


def differences(result: LayerResult, expected: LayerResult) -> list[str]:
    """Names of tensors that are not equal bit for bit."""
    pairs = {
        "y": (result.output, expected.output),
        "l_aux": (result.l_aux, expected.l_aux),
        "dx": (result.input_grad, expected.input_grad),
        "d gate": (result.gate_grad, expected.gate_grad),
    }
    for expert, weights in expected.expert_grads.items():
        pairs |= {f"d {expert} {name}": (result.expert_grads[expert][name], w) for name, w in weights.items()}
    return [name for name, (a, b) in pairs.items() if not same_bits(a, b)]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0))


def compare_with_serial(cases: Sequence[tuple[LayerCase, Sequence[dict[str, object]]]]) -> list[str]:
    """On a rank: what of each case's variants differs from the serial schedule, as sentences."""
    links, wrong = Links(), []
    for case, variants in cases:
        expected_on: dict[int, LayerResult] = {}  # weight gradients are summed by the nodes that rows come from
        for knobs in variants:
            variant = case.with_config(**knobs)
            node_size = variant.config.node_size
            if node_size not in expected_on:
                expected_on[node_size] = run_case(serial(variant), links.of(serial(variant)))
            expected = expected_on[node_size]
            result = run_case(variant, links.of(variant))
            names = differences(result, expected)
            if case.expert in INEXACT and max(errors([result], [expected]).values()) <= 2e-6:
                names = []
            wrong += [f"{case.name} {knobs}: {names}"] if names else []
    return wrong


def values_of(variants: Sequence[dict[str, object]]) -> set[tuple[str, object]]:
    return {item for variant in variants for item in variant.items()}


def test_every_schedule_equals_serial_bit_for_bit(pool: RankPool) -> None:
    """Each case takes every seventh variant, which has every shape, transport and depth, from another one on: all of
    them together take every variant."""
    cases = [(case, VARIANTS[i % 7 :: 7]) for i, case in enumerate(base_cases())]
    assert all(values_of(variants) == values_of(VARIANTS) for _, variants in cases)
    assert all(any(variant in variants for _, variants in cases) for variant in VARIANTS)
    assert pool.run(4, compare_with_serial, cases, timeout_s=240) == [[]] * 4


@pytest.mark.slow
def test_every_schedule_of_one_case_equals_serial_bit_for_bit(pool: RankPool) -> None:
    assert pool.run(4, compare_with_serial, [(base_cases()[1], VARIANTS)], timeout_s=240) == [[]] * 4


def compare_delayed(cases: Sequence[LayerCase], seeds: Sequence[int]) -> list[str]:
    links, wrong = Links(), []
    expected_of: dict[LayerCase, LayerResult] = {}
    for case in cases:
        if (alike := serial(case)) not in expected_of:
            expected_of[alike] = run_case(alike, links.of(alike))
        expected = expected_of[alike]
        for seed in seeds:
            result = run_case(case, Delayed(links.of(case), seed, longest_s=0.01))
            names = differences(result, expected)
            wrong += [f"{case.name} {case.config.transport} seed {seed}: {names}"] if names else []
    return wrong


@pytest.mark.parametrize("are_all", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_random_delays_of_every_peer_change_no_bit(pool: RankPool, are_all: bool) -> None:
    """All, or half of all combinations, in which every two values of two knobs meet."""
    combinations = itertools.product(range(3), ("chunks", "peers"), ("auto", "pairwise", "collective"), (1, 3))
    cases = [
        base_cases()[base].with_config(schedule=schedule, transport=transport, row_cuts=2, depth=depth)
        for base, schedule, transport, depth in combinations
        if are_all or (base + (schedule == "peers") + (depth == 3)) % 2
    ]
    assert pool.run(4, compare_delayed, cases, (1, 2) if are_all else (1,), timeout_s=240) == [[]] * 4


EDGE_VARIANTS = [
    {"schedule": "chunks", "chunks": 5, "transport": "collective", "depth": 1},
    {"schedule": "peers", "row_cuts": 3, "transport": "pairwise", "depth": 2},
    {"schedule": "peers", "node_size": 2, "transport": "collective", "depth": 3},
]


@pytest.mark.parametrize("num_variants", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_edge_routing_equals_serial_bit_for_bit(pool: RankPool, num_variants: int) -> None:
    """Each case with two of the three variants in turn, or with all of them."""
    cases = [(case, [EDGE_VARIANTS[(i + j) % 3] for j in range(num_variants)]) for i, case in enumerate(edge_cases())]
    assert pool.run(4, compare_with_serial, cases, timeout_s=240) == [[]] * 4


def run_variants(cases: Sequence[LayerCase]) -> list[LayerResult]:
    links = Links()
    return [run_case(case, links.of(case)) for case in cases]


def test_edge_routing_equals_the_reference(pool: RankPool) -> None:
    cases = [case.with_config(**EDGE_VARIANTS[1]) for case in edge_cases()]
    by_rank = pool.run(4, run_variants, cases, timeout_s=240)
    assert all(results[0].exp_counts == [0, 0, 0, 20] for results in by_rank), "every row to one expert"
    for index, case in enumerate(cases):
        found, expected = [results[index] for results in by_rank], reference_results(case)
        assert max(errors(found, expected).values()) <= case.bound, case.name
        assert [r.exp_counts for r in found] == [r.exp_counts for r in expected], case.name


def test_unequal_numbers_of_tokens_with_a_capacity_are_refused_on_every_rank(pool: RankPool) -> None:
    case = LayerCase(name="unequal", config=config(ep_size=2, capacity_factor=1.0), rows=(16, 64))
    assert pool.run(2, refused, case, timeout_s=30) == ["EngineError"] * 2


def refused(case: LayerCase) -> str:
    try:
        run_case(case, Links().of(case))
    except Exception as error:
        assert "capacity=" in str(error), error
        return type(error).__name__
    return "nothing"


def with_nan_row(case: LayerCase) -> tuple[LayerResult, LayerResult]:
    """The case as it is, and with a NaN in row 3 of rank 1; the NaN row's choices must not move other rows."""
    links, results = Links(), []
    for value in (None, float("nan")):
        data = case_data(case)
        layer = build_layer(case, data)
        layer.connect(links.of(case), torus_for(case))
        if value is not None:
            data.inputs[1][3, 5] = value
        results.append(forward_backward(layer, case, data))
    return results[0], results[1]


@pytest.mark.parametrize("knobs", EDGE_VARIANTS)
def test_a_nan_row_stays_in_its_own_row(pool: RankPool, knobs: dict[str, object]) -> None:
    base = LayerCase(name="nan", config=config(ep_size=4, top_k=2, aux_loss_weight=0.0), rows=(20,) * 4)
    for rank, (clean, nan) in enumerate(pool.run(4, with_nan_row, base.with_config(**knobs))):
        expected_y, expected_dx = clean.output.clone(), clean.input_grad.clone()
        if rank == 1:
            assert nan.output[3].isnan().all()
            assert nan.input_grad[3].isnan().all()
            expected_y[3], expected_dx[3] = nan.output[3], nan.input_grad[3]
        assert same_bits(nan.output, expected_y)
        assert same_bits(nan.input_grad, expected_dx)


def count_transfers(case: LayerCase) -> tuple[list[tuple[str, int]], int]:
    transport = Counting(Links().of(case))
    run_case(case, transport)
    return transport.started, transport.num_waits


def test_each_transfer_is_waited_for_once_and_every_rank_starts_the_same_ones(pool: RankPool) -> None:
    base = base_cases()[1]
    for knobs in ({"schedule": "chunks"}, {"schedule": "peers", "row_cuts": 3}):
        results = pool.run(4, count_transfers, base.with_config(**knobs))
        assert all(len(started) == waits for started, waits in results)
        lanes = [sorted(lane for lane, _ in started) for started, _ in results]  # each lane has its own order
        assert all(lanes[0] == other for other in lanes)


def compare_wrong_data(case: LayerCase) -> list[str]:
    """The control: other inputs on one rank must be seen by the same comparison."""
    links = Links()
    expected = run_case(serial(case), links.of(serial(case)))
    layer = build_layer(case, data := case_data(case))
    layer.connect(links.of(case))
    data.inputs[0][0, 0] += 2**-20
    return differences(forward_backward(layer, case, data), expected)


def test_the_comparison_sees_one_changed_bit(pool: RankPool) -> None:
    by_rank = pool.run(4, compare_wrong_data, base_cases()[0])
    assert "y" in by_rank[0]
    assert any(name.endswith("fc1.weight") for names in by_rank for name in names)
