"""Without `bit_equal` schedules differ in the sums of weight gradients alone, by no more than their rounding.

A sum of n products in fp32 errs by at most n * u * (the sum of their magnitudes) whatever its order, with u = 2^-24
(Higham, Accuracy and Stability of Numerical Algorithms, section 3.1); so two orders differ by at most twice that.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from ds_moe_ep.moe.experts import GeluMLP, SwiGLU, start_pass
from ds_moe_ep.moe.match_expert import match_expert
from ds_moe_ep.moe.rows import buffers
from tests.moe.layer_cases import LayerCase
from tests.moe.layer_runs import Links, config, run_case
from tests.moe.test_schedules import EDGE_VARIANTS, differences
from tests.ranks import RankPool

ROWS, WIDTH, INNER = 64, 16, 32
UNIT = 2.0**-24
CUTS = (0, 16, 20, 51, ROWS)


def weight_gradients(expert: nn.Module, cuts: Sequence[int], x_RD: Tensor, dy_RD: Tensor) -> list[Tensor]:
    """The expert's weight gradients as sums over these blocks of rows."""
    form = match_expert(expert)
    assert form is not None
    started = start_pass(form, [form.weights_of(expert)], [(0, ROWS)])
    everything = slice(0, ROWS)
    with torch.no_grad():
        started.compute(0, everything, x_RD, torch.empty_like(x_RD))
        started.input_grads(0, everything, dy_RD, torch.empty_like(x_RD))
        for start, stop in pairwise(cuts):
            started.add_weight_grads(0, slice(start, stop), x_RD[start:stop], dy_RD[start:stop])
        return [grad for grad in started.weight_grads(0) if grad is not None]


def magnitudes(expert: nn.Module, x_RD: Tensor, dy_RD: Tensor) -> list[Tensor]:
    """For each weight gradient the sum of the magnitudes of its terms."""
    inputs: dict[nn.Module, Tensor] = {}
    grads: dict[nn.Module, Tensor] = {}
    linears = [module for module in expert.modules() if isinstance(module, nn.Linear)]
    for module in linears:
        module.register_forward_hook(lambda m, args, out: inputs.update({m: args[0].detach()}))
        module.register_full_backward_hook(lambda m, into, out: grads.update({m: out[0].detach()}))
    expert(x_RD.clone().requires_grad_()).backward(dy_RD)
    return [grads[module].abs().t() @ inputs[module].abs() for module in linears]


@pytest.mark.parametrize("make", [GeluMLP, SwiGLU])
def test_a_weight_gradient_in_one_product_is_the_sum_over_blocks_up_to_its_rounding(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    expert = make(WIDTH, INNER)
    x_RD, dy_RD = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    one, several = (weight_gradients(expert, cuts, x_RD, dy_RD) for cuts in ((0, ROWS), CUTS))
    less = weight_gradients(expert, (0, ROWS), x_RD, dy_RD * (torch.arange(ROWS) != 7).unsqueeze(1))
    bounds = [2 * ROWS * UNIT * terms for terms in magnitudes(expert, x_RD, dy_RD)]
    for whole, summed, without_a_row, bound in zip(one, several, less, bounds, strict=True):
        assert ((whole - summed).abs() <= bound).all()
        assert ((whole - without_a_row).abs() > bound).any(), "the control: a row of 64 that is lost"


def test_half_precision_sums_of_several_products_stay_in_fp32() -> None:
    torch.manual_seed(0)
    expert = GeluMLP(WIDTH, INNER).bfloat16()
    x_RD, dy_RD = torch.randn(2, ROWS, WIDTH, dtype=torch.bfloat16).unbind()
    one, many = (weight_gradients(expert, cuts, x_RD, dy_RD) for cuts in ((0, ROWS), tuple(range(ROWS + 1))))
    for whole, summed in zip(one, many, strict=True):
        assert summed.dtype is torch.bfloat16
        # Each product of one row is rounded to bf16 once on the CPU, by 2^-9 of it, and so is the sum.
        assert (whole - summed).abs().max() <= 4 * 2**-9 * whole.abs().max()


def compare(cases: Sequence[LayerCase], variants: Sequence[dict[str, object]]) -> list[tuple[set[str], float]]:
    """Of each variant on this rank: the kinds of tensors that differ from serial's, and how far weight gradients do."""
    links, found = Links(), []
    for case in cases:
        serial = case.with_config(schedule="serial", transport="pairwise", depth=0)
        expected = run_case(serial, links.of(serial))
        for knobs in variants:
            result = run_case(case.with_config(**knobs), links.of(case.with_config(**knobs)))
            names = differences(result, expected)
            kinds = {"weights" if name.startswith("d ") and name != "d gate" else name for name in names}
            pairs = [
                (weight, expected.expert_grads[expert][name])
                for expert, weights in result.expert_grads.items()
                for name, weight in weights.items()
            ]
            largest = max(float(wanted.abs().max()) for _, wanted in pairs)
            found.append((kinds, max(float((a - b).abs().max()) for a, b in pairs) / max(largest, 1e-30)))
    return found


def test_schedules_differ_in_weight_gradients_alone_by_rounding_and_each_is_deterministic(pool: RankPool) -> None:
    cases = [
        LayerCase(name="one local", config=config(num_experts=4, ep_size=4, top_k=2), rows=(30, 30, 30, 30)),
        LayerCase(name="two local", config=config(ep_size=4, top_k=2), rows=(41, 3, 0, 18), expert="swiglu_bias"),
    ]
    variants = [*EDGE_VARIANTS, {"schedule": "peers", "node_size": 2, "weight_blocks": 4, "transport": "pairwise"}]
    first, second = (pool.run(4, compare, cases, variants, timeout_s=120) for _ in range(2))
    assert first == second
    for rank in first:
        assert all(kinds <= {"weights"} for kinds, _ in rank), rank
        assert max(error for _, error in rank) <= 2e-6, rank
    assert any("weights" in kinds for rank in first for kinds, _ in rank), "some sums are made in another order"


def compare_moves(cases: Sequence[LayerCase], variants: Sequence[dict[str, object]]) -> list[str]:
    """On this rank: what differs where rows move by index, as on a GPU, from where they move run by run."""
    links, wrong = Links(), []
    for case in cases:
        for knobs in variants:
            variant = case.with_config(**knobs)
            expected = run_case(variant, links.of(variant))
            with mock.patch.object(buffers, "moves_by_index", lambda device: True):
                found = run_case(variant, links.of(variant))
            wrong += [f"{case.name} {knobs}: {name}" for name in differences(found, expected)]
    return wrong


def test_rows_that_move_by_index_give_the_same_bits(pool: RankPool) -> None:
    cases = [
        LayerCase(name="by index", config=config(ep_size=4, top_k=2), rows=(30, 1, 0, 17), expert="gelu_bias"),
        LayerCase(name="by index, many", config=config(num_experts=32, ep_size=4, top_k=4), rows=(30, 7, 2, 17)),
        LayerCase(name="by index, bits", config=config(ep_size=4, top_k=2, bit_equal=True), rows=(30, 1, 0, 17)),
        LayerCase(name="by index, none", config=config(ep_size=4, top_k=2), rows=(0, 0, 0, 0)),
    ]
    variants = [{"schedule": "serial"}, *EDGE_VARIANTS]
    assert pool.run(4, compare_moves, cases, variants, timeout_s=120) == [[]] * 4
