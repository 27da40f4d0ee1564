"""The whole layer in fp16, the reference job's type, against float64: with a loss scale, and with an overflow.

Both compute from the same fp16 numbers. Bound: 1.5e-3 of the largest value of a tensor's kind, three roundings of fp16
(2^-11 is 4.9e-4 each): of hidden rows, of active rows, and of results, or of a weight gradient at its end.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from tests.moe.layer_cases import LayerCase, LayerResult, case_data, errors, reference_results
from tests.moe.layer_runs import Links, build_layer, config, gather_result, torus_for
from tests.ranks import run_ranks

BOUND = 1.5e-3
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


def worst(found: list[LayerResult], scale: float, expected: list[LayerResult]) -> tuple[str, float]:
    """The tensor that is furthest off."""
    by_name = errors([unscaled(result, scale) for result in found], expected)
    return max(by_name.items(), key=lambda item: item[1])


@pytest.mark.parametrize("size", [1.0, SMALL], ids=["as it is", "small gradients"])
def test_a_layer_in_fp16_equals_float64_within_its_rounding(size: float) -> None:
    scale = 1.0 if size == 1.0 else SCALE / SMALL * 2.0**-12
    by_rank = run_ranks(4, run_scaled, CASES, scale, size, None, timeout_s=240)
    found = {case.name: worst(case, [r[i] for r in by_rank], scale * size) for i, case in enumerate(CASES)}
    assert {name: error for name, error in found.items() if error[1] > BOUND} == {}


def test_without_a_scale_small_gradients_are_lost() -> None:
    by_rank = run_ranks(4, run_scaled, CASES[:1], 1.0, SMALL, None, timeout_s=240)
    assert worst(CASES[0], [r[0] for r in by_rank], SMALL)[1] > 5 * BOUND


def test_an_overflow_on_one_rank_stays_with_what_its_rows_reach() -> None:
    case = CASES[1]
    results = [each[0] for each in run_ranks(4, run_scaled, [case], 1.0, 1.0, 2, timeout_s=240)]
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
