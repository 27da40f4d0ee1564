"""A layer whose hot experts have copies on other ranks gives what it gives without, and what one device gives.

Bounds are those of `test_parity.py` (fp32: 1e-6 of the largest value of a tensor's kind; bf16: twice the error of the
reference with bf16 experts, plus a rounding) and of `test_fp16.py`; beside the layer without replicas twice as much.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.moe.layer_cases import LayerCase, errors
from tests.moe.replica_cases import hosted_case, run_hosted
from tests.moe.test_parity import reference, worst_error
from tests.ranks import RankPool


def cases() -> list[LayerCase]:
    """Schedules, transports, experts, k, capacities, masks, nodes, several local experts and slots, groups."""
    table = [
        hosted_case("serial", schedule="serial"),
        hosted_case("peers, row cuts", row_cuts=3, depth=1),
        hosted_case("chunks", schedule="chunks", chunks=3, transport="pairwise"),
        hosted_case("two nodes", node_size=2, transport="collective"),
        hosted_case("weight blocks", node_size=2, weight_blocks=2),
        hosted_case("bit equal", node_size=2, bit_equal=True),
        hosted_case("one local expert", num_experts=4),
        hosted_case("two slots", replicas=2, num_experts=12),
        hosted_case("as many as pay", replicas="auto", num_experts=12),
        hosted_case("grouped", replicas=2, num_experts=12, grouped_products="on", row_cuts=2, node_size=2),
        hosted_case("grouped, chunks", num_experts=8, grouped_products="on", schedule="chunks", expert="swiglu_bias"),
        hosted_case("grouped, a draw", rows=(24, 3, 0, 1), top_k=1, grouped_products="on", expert="gelu_bias"),
        hosted_case("top-1", top_k=1),
        hosted_case("top-4, sigmoid", top_k=4, score="sigmoid"),
        hosted_case("capacity", rows=(24,) * 4, capacity_factor=1.0),
        hosted_case("capacity by score", rows=(24,) * 4, capacity_factor=0.75, drop_policy="score", masked=True),
        hosted_case("a mask and a shared expert", masked=True, shared=True),
        hosted_case("no tokens but on one rank", rows=(0, 0, 40, 0)),
        hosted_case("two groups", rows=(24, 9, 31, 5), ep_size=2),
        hosted_case("all at once", rows=(24,) * 4, top_k=3, capacity_factor=1.0, masked=True, shared=True, node_size=2),
        hosted_case("weights on the way", schedule="peers", expert="swiglu_bias"),
        hosted_case("gelu with biases", expert="gelu_bias", row_cuts=2),
        hosted_case("odd widths", expert="swiglu_odd"),
        hosted_case("evaluation", training=False),
    ]
    fp16 = {"dtype": torch.float16, "rows": (12, 9, 0, 14)}
    table += [
        replace(hosted_case(f"fp16 {kind}", expert=kind, **fp16), bound=1.5e-3) for kind in ("gelu", "swiglu_bias")
    ]
    bf16 = {"dtype": torch.bfloat16, "top_k": 8}
    table += [hosted_case(f"bf16 {kind}", expert=kind, **bf16) for kind in ("gelu", "swiglu")]
    return [*table, hosted_case("bf16 grouped", expert="swiglu", grouped_products="on", num_experts=8, **bf16)]


def test_a_layer_with_replicas_equals_one_without_and_the_reference(pool: RankPool) -> None:
    chosen = cases()
    by_rank = pool.run(4, run_hosted, chosen, timeout_s=200)
    in_use = 0
    for index, case in enumerate(chosen):
        hosted, plain = zip(*(results[index] for results in by_rank), strict=True)
        assert len({each.copies for each in hosted[: case.config.ep_size]}) == 1, case.name
        in_use += bool(hosted[0].copies)
        found = [each.result for each in hosted]
        assert worst_error(case, found, reference(case))[1] <= case.bound, case.name
        bound = 2**-6 if case.dtype is torch.bfloat16 else 2 * case.bound
        worst = max(errors(found, plain).items(), key=lambda item: item[1])
        assert worst[1] <= bound, (case.name, worst)
        assert [r.exp_counts for r in found] == [r.exp_counts for r in plain], case.name
        assert all(torch.equal(a.l_aux, b.l_aux) for a, b in zip(found, plain, strict=True)), case.name
    assert in_use >= len(chosen) - 1, "copies must be in use"
