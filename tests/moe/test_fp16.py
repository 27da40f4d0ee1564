"""The whole layer in fp16, the reference job's type, against float64: with a loss scale, and with an overflow.

Both compute from the same fp16 numbers. A rounding is at most 2^-11, 4.9e-4, of a number:

1. From numbers that are stored as fp16 has them, and are else exact (`stored_experts.py`), the layer is one rounding
   away, its own last one: 6e-4 of the largest value of a tensor's kind. Gradients of tokens have two, since autograd
   adds those of the rows and of the gate in the tokens' type: 1e-3.
2. From float64 it is what storing costs away besides. In sums over few columns, as these, nothing averages out: 1.2e-3.
   Over the columns of a wide expert the last roundings are what is left: 6e-4 for weight gradients, and 1e-3 for
   outputs and gradients of tokens, which are rounded where rows travel and where they are weighed.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.moe.experts import GeluMLP
from ds_moe_ep.moe.layer import ExpertParallel
from tests.moe.layer_cases import LayerCase, LayerResult, case_data, errors, reference_results
from tests.moe.layer_runs import Links, build_layer, config, gather_result, torus_for
from tests.moe.stored_experts import stored_expert
from tests.ranks import RankPool
from tests.reference import gelu_expert, moe_reference

BOUND = 1.2e-3
LAST_ROUNDING, TWO_ROUNDINGS = 6e-4, 1e-3
SCALE = 2.0**12
SMALL = 2.0**-17  # of output gradients: in fp16 those of the rows would be denormal, or zero
KNOBS = {"ep_size": 4, "top_k": 2, "node_size": 2}


def case_of(name: str, expert: str = "gelu", rows: tuple[int, ...] = (20, 9, 14, 17), **knobs: object) -> LayerCase:
    made = config(**{**KNOBS, **knobs})
    return LayerCase(name=f"fp16: {name}", config=made, rows=rows, expert=expert, dtype=torch.float16)


CASES = [
    case_of("serial", schedule="serial"),
    case_of("peers, biases", "gelu_bias"),
    case_of("SwiGLU in chunks, k=1", "swiglu", schedule="chunks", top_k=1),
    case_of("k=8, blocks", "swiglu_bias", top_k=8, weight_blocks=4),
    case_of("a capacity", rows=(16,) * 4, capacity_factor=0.75),
    case_of("grouped", "swiglu", grouped_products="on"),
    replace(case_of("shared and masked", rows=(16,) * 4), shared=True, masked=True),
    replace(case_of("one expert draws"), skew=3.0),
]


def run_scaled(cases: list[LayerCase], scale: float, size: float, overflow_rank: int | None) -> list[LayerResult]:
    """Each case with output gradients of `size` and a loss times `scale`; one rank's overflows on its way back."""
    links, results = Links(), []
    for case in cases:
        data, rank = case_data(case), dist.get_rank()
        layer = build_layer(case, data)
        layer.connect(links.of(case), torus_for(case))
        x = data.inputs[rank].clone().requires_grad_()
        used = data.used_tokens[rank] if data.used_tokens is not None else None
        y, l_aux, counts = layer(x, used)
        own_scale = scale * (2.0**24 if rank == overflow_rank else 1.0)  # no number of fp16 is as large
        loss = (y.float() * data.output_grads[rank].float() * size).sum() + l_aux * size
        (loss * own_scale).backward()
        results.append(gather_result(layer, case, x, y, l_aux, counts))
    return results


def unscaled(result: LayerResult, scale: float) -> LayerResult:
    """The result in float64, its gradients divided by the scale."""
    grads = {e: {name: grad.double() / scale for name, grad in each.items()} for e, each in result.expert_grads.items()}
    return replace(
        result,
        output=result.output.double(),
        l_aux=result.l_aux.double(),
        input_grad=result.input_grad.double() / scale,
        gate_grad=result.gate_grad.double() / scale,
        expert_grads=grads,
    )


@pytest.mark.parametrize("size", [1.0, SMALL], ids=["as it is", "small gradients"])
def test_a_layer_in_fp16_equals_float64_within_its_rounding(pool: RankPool, size: float) -> None:
    scale = 1.0 if size == 1.0 else SCALE / SMALL * 2.0**-12
    by_rank = pool.run(4, run_scaled, CASES, scale, size, None, timeout_s=240)
    off: dict[str, dict[str, float]] = {}
    for index, case in enumerate(CASES):
        found = [unscaled(results[index], scale * size) for results in by_rank]
        from_exact = errors(found, reference_results(case))
        from_stored = errors(found, reference_results(case, make=stored_expert))
        bounds = {name: TWO_ROUNDINGS if name.startswith("dx") else LAST_ROUNDING for name in from_stored}
        off[case.name] = {name: error for name, error in from_exact.items() if error > BOUND}
        off[case.name] |= {f"{name}, stored": e for name, e in from_stored.items() if e > bounds[name]}
    assert {name: worst for name, worst in off.items() if worst} == {}


def test_without_a_scale_small_gradients_are_lost(pool: RankPool) -> None:
    by_rank = pool.run(4, run_scaled, CASES[:1], 1.0, SMALL, None, timeout_s=240)
    found = [unscaled(results[0], SMALL) for results in by_rank]
    assert max(errors(found, reference_results(CASES[0])).values()) > 5 * BOUND


@pytest.mark.parametrize("top_k", [1, 2])
def test_over_the_columns_of_a_wide_expert_the_last_roundings_are_left(top_k: int) -> None:
    torch.manual_seed(0)
    config = MoEConfig(num_experts=2, top_k=top_k, aux_loss_weight=0.0)
    layer = ExpertParallel(256, GeluMLP(256, 1024), config).half()
    x_TD, dy_TD = torch.randn(2, 512, 256).half()
    experts = layer.experts.deepspeed_experts
    wide = [{name: p.detach().double().requires_grad_() for name, p in e.named_parameters()} for e in experts]
    ours, exact = x_TD.clone().requires_grad_(), x_TD.double().requires_grad_()
    y_TD, _, _ = layer(ours)
    y_TD.backward(dy_TD)
    gate = layer.gate.wg.weight.detach().double()
    (expected,) = moe_reference(config, gate, [gelu_expert(weights) for weights in wide], [exact])
    expected.output_TD.backward(dy_TD.double())
    pairs = [(y_TD, expected.output_TD), (ours.grad, exact.grad)]
    for expert, weights in zip(experts, wide, strict=True):
        pairs += [(p.grad, weights[name].grad) for name, p in expert.named_parameters()]
    found = [float((a.double() - b).detach().abs().max() / b.abs().max()) for a, b in pairs]
    assert max(found[:2]) < TWO_ROUNDINGS and 2e-4 < max(found[2:]) < LAST_ROUNDING, found


def test_an_overflow_on_one_rank_stays_with_what_its_rows_reach(pool: RankPool) -> None:
    case = CASES[1]
    results = [each[0] for each in pool.run(4, run_scaled, [case], 1.0, 1.0, 2, timeout_s=240)]
    expected = reference_results(case)
    assert not results[2].input_grad.isfinite().all()
    touched = [
        not grad.isfinite().all()
        for result in results
        for each in result.expert_grads.values()
        for grad in each.values()
    ]
    assert any(touched), "experts that the rank's rows visited say so: the engine skips the step on every rank"
    for rank in (0, 1, 3):  # rows of other ranks meet none of its rows
        scale = float(expected[rank].input_grad.abs().max())
        off = (results[rank].input_grad.double() - expected[rank].input_grad).abs().max()
        assert float(off) <= BOUND * scale
