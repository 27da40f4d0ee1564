"""The whole layer in fp16 at sizes that users have, against float64: as far off as the numbers that it stores.

A number that is stored in fp16 is off by 2^-11 of a power of two at most; in the mean square over mantissas that is
ROUNDING, 1.9e-4, of its size. Sums over many columns keep that share, and independent roundings add up by squares: a
tensor that is n roundings away is off by sqrt(n) * ROUNDING of its norm. Stored, and so rounded, are:

    outputs                 hidden rows, active rows, results, outputs: four, and five of a SwiGLU
    the last matrix's       hidden rows, active rows, gradients of results, its own: four, and five
    the first matrices'     gradients of results, of active rows, of hidden rows, their own, and hidden rows at which
                            the activation's slope is taken: five, and six
    of tokens               the same, and the sum with the gate's: six, and seven

A hidden row's rounding weighs up to twice as much behind the activation, so that eight of them, 5.4e-4, are the most.
That each is rounded no more often than it is stored, `test_fp16.py` shows with numbers that fp16 holds.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.moe.experts import GeluMLP, SwiGLU
from ds_moe_ep.moe.layer import ExpertParallel
from tests.reference import gelu_expert, moe_reference, swiglu_expert

ROUNDING = math.sqrt(2.0**-20 / 12 / (1.5 / math.log(2)))  # 1.9e-4
BOUND = 6e-4
D, F, T = 512, 2048, 256


def relative_errors(kind: type[nn.Module], top_k: int, dtype: torch.dtype = torch.float16) -> dict[str, float]:
    """The norm of each tensor's error over its own, of a forward and backward pass with four experts."""
    torch.manual_seed(0)
    config = MoEConfig(num_experts=4, top_k=top_k, aux_loss_weight=0.0)
    layer = ExpertParallel(D, kind(D, F), config)
    for linear in layer.experts.modules():  # as made, all experts are the same
        if isinstance(linear, nn.Linear):
            linear.reset_parameters()
    layer.to(dtype)
    x_TD, dy_TD = torch.randn(2, T, D).to(dtype)
    experts = layer.experts.deepspeed_experts
    wide = [{name: p.detach().double().requires_grad_() for name, p in e.named_parameters()} for e in experts]
    ours, exact = x_TD.clone().requires_grad_(), x_TD.double().requires_grad_()
    y_TD, _, _ = layer(ours)
    y_TD.backward(dy_TD)
    gate = layer.gate.wg.weight.detach().double().requires_grad_()
    make = gelu_expert if kind is GeluMLP else swiglu_expert
    (expected,) = moe_reference(config, gate, [make(weights) for weights in wide], [exact])
    expected.output_TD.backward(dy_TD.double())
    pairs = {
        "y": (y_TD, expected.output_TD),
        "dx": (ours.grad, exact.grad),
        "dwg": (layer.gate.wg.weight.grad, gate.grad),
    }
    for index, (expert, weights) in enumerate(zip(experts, wide, strict=True)):
        pairs |= {f"{index}.{name}": (p.grad, weights[name].grad) for name, p in expert.named_parameters()}
    return {name: off(*pair) for name, pair in pairs.items()}


def off(found: Tensor | None, exact: Tensor | None) -> float:
    assert found is not None and exact is not None
    return float((found.detach().double() - exact.detach()).norm() / exact.detach().norm())


@pytest.mark.parametrize("kind", [GeluMLP, SwiGLU])
@pytest.mark.parametrize("top_k", [1, 2])
def test_every_tensor_of_a_layer_is_within_its_roundings(kind: type[nn.Module], top_k: int) -> None:
    found = relative_errors(kind, top_k)
    assert {name: error for name, error in found.items() if error > BOUND} == {}
    assert min(found.values()) > math.sqrt(3) * ROUNDING, "the numbers are stored in fp16"


def test_a_type_of_fewer_bits_is_as_many_times_further_off() -> None:
    """The control: bf16 has three bits less."""
    found = relative_errors(GeluMLP, top_k=1, dtype=torch.bfloat16)
    assert min(found.values()) > 6 * math.sqrt(3) * ROUNDING > BOUND
