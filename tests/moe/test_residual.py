"""The residual that a layer adds to its output, against adding it outside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ds_moe_ep.config.knobs import ModelConfig, MoEConfig
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.model.transformer import Transformer
from ds_moe_ep.moe.experts import GeluMLP
from ds_moe_ep.moe.layer import ExpertParallel
from tests.moe.layer_cases import OddExpert

D = 16
CASES = {  # experts, shared expert, type, under autocast
    "gelu": (lambda: GeluMLP(D, 32), False, torch.float32, False),
    "with a shared expert": (lambda: GeluMLP(D, 32), True, torch.float32, False),
    "in bf16": (lambda: GeluMLP(D, 32), True, torch.bfloat16, False),
    "modules": (OddExpert, False, torch.float32, False),
    "autocast": (lambda: GeluMLP(D, 32), True, torch.float32, True),
    "modules under autocast": (OddExpert, True, torch.float32, True),
}


def outcome(case: str, how: str, capacity_factor: float | None = None) -> list[Tensor]:
    """The output and all gradients, with the residual added "inside", "outside" or not at all."""
    make_expert, shared, dtype, under_autocast = CASES[case]
    torch.manual_seed(0)
    config = MoEConfig(num_experts=4, top_k=2, capacity_factor=capacity_factor)
    layer = ExpertParallel(D, make_expert(), config, shared=make_expert() if shared else None).to(dtype)
    x, r = (torch.randn(3, 7, D).to(dtype).requires_grad_() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16, enabled=under_autocast):
        y, *_ = layer(x, residual=r) if how == "inside" else layer(x)
    y = r + y if how == "outside" else y
    y.float().square().sum().backward()
    grads = [each.grad for each in (x, r, *layer.parameters())]
    return [y.detach(), *(torch.zeros(()) if each is None else each for each in grads)]


@pytest.mark.parametrize("capacity_factor", [None, 0.5])
@pytest.mark.parametrize("case", CASES)
def test_a_residual_inside_equals_one_outside(case: str, capacity_factor: float | None) -> None:
    inside, outside, none = (outcome(case, how, capacity_factor) for how in ("inside", "outside", ""))
    # In bf16 the sum inside is rounded once, and outside twice; else the same numbers are added in the same order.
    tolerance = 2**-7 if CASES[case][2] is torch.bfloat16 else 1e-6
    for one, other in zip(inside, outside, strict=True):
        assert one.dtype == other.dtype
        scale = max(float(other.abs().max()), 1e-3)  # what cancels to nothing is rounding alone
        assert float((one - other).abs().max()) <= tolerance * scale
    assert float((none[0] - outside[0]).abs().max()) > 0.1


def test_a_residual_of_another_shape_is_refused() -> None:
    layer = ExpertParallel(D, GeluMLP(D, 32), MoEConfig(num_experts=4))
    with pytest.raises(ConfigError, match=r"residual.shape=\(16,\)"):
        layer(torch.randn(3, D), residual=torch.randn(D))


class Slot(nn.Module):
    """A layer in a model's slot that does not say that it adds a residual."""

    def __init__(self, inner: ExpertParallel) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, loss, counts = self.inner(x)
        return y, loss, counts


def test_the_model_gives_its_residual_stream_to_layers_that_add_it() -> None:
    model = ModelConfig(num_layers=2, hidden_size=D, num_heads=2, expert_width=32, vocab_size=16, sequence_length=8)
    moe = MoEConfig(num_experts=4, top_k=2)
    outputs = []
    for wrap in (lambda layer: layer, Slot):
        torch.manual_seed(0)
        transformer = Transformer(model, lambda _, wrap=wrap: wrap(ExpertParallel(D, GeluMLP(D, 32), moe)))
        output = transformer(torch.arange(8).view(1, 8), torch.arange(8).view(1, 8))
        output.loss.backward()
        outputs.append([output.loss.detach(), *(p.grad for p in transformer.parameters())])
    for one, other in zip(*outputs, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)
