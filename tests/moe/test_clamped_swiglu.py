"""gpt-oss's experts as a known form: against a float64 reference, and against Hugging Face's own block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_moe_ep import ClampedSwiGLU, ExpertParallel, SwiGLU
from ds_moe_ep.comm.transport import Loopback
from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.moe.match_expert import match_expert

WIDTH, EXPERT_WIDTH, NUM_EXPERTS, TOP_K = 8, 12, 4, 2


class Swapped(ClampedSwiGLU):
    """The same, with every product and sum the other way round."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = torch.clamp(self.gate(x), None, self.limit), torch.clamp(self.up(x), -self.limit, self.limit)
        return self.down((torch.sigmoid(self.alpha * gate) * gate) * (1 + up))


class Variant(ClampedSwiGLU):
    """Mathematics that are close by."""

    def __init__(self, kind: str) -> None:
        super().__init__(WIDTH, EXPERT_WIDTH)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        lower = 0.5 if self.kind == "other bound" else self.limit
        gate = self.gate(x).clamp(min=-self.limit if self.kind == "gate from below" else None, max=self.limit)
        up = self.up(x).clamp(min=-lower, max=self.limit)
        share = torch.sigmoid((up if self.kind == "share of up" else gate) * self.alpha)
        return self.down((up + (2 if self.kind == "plus two" else 1)) * (gate * share))


@pytest.mark.parametrize("make", [ClampedSwiGLU, Swapped])
def test_the_form_is_read_with_its_bounds_however_it_is_written(make: Callable[..., nn.Module]) -> None:
    form = match_expert(make(WIDTH, EXPERT_WIDTH, alpha=1.5, limit=3.0))
    assert form is not None and form.kind == "swiglu" and form.clamp == (1.5, 3.0)
    assert form.linears == {"gate": "gate", "up": "up", "down": "down"}
    plain = match_expert(SwiGLU(WIDTH, EXPERT_WIDTH))
    assert plain is not None and plain.clamp is None


@pytest.mark.parametrize("kind", ["other bound", "gate from below", "share of up", "plus two"])
def test_what_is_close_by_is_another_function(kind: str) -> None:
    assert match_expert(Variant(kind)) is None


def reference(x_D: Tensor, weights: dict[str, Tensor], limit: float) -> Tensor:
    """One row by the definition, number by number."""
    gate_F = weights["gate.weight"] @ x_D + weights["gate.bias"]
    up_F = weights["up.weight"] @ x_D + weights["up.bias"]
    active = []
    for gate, up in zip(gate_F, up_F, strict=True):
        g = gate if gate <= limit else gate * 0 + limit
        u = up if abs(up) <= limit else up * 0 + (limit if up > 0 else -limit)
        active.append((u + 1) * g / (1 + torch.exp(-1.702 * g)))
    return weights["down.weight"] @ torch.stack(active) + weights["down.bias"]


@pytest.mark.parametrize("schedule", [{"schedule": "serial"}, {"schedule": "serial", "grouped_products": "on"}])
def test_outputs_and_gradients_are_those_of_the_definition(schedule: dict[str, Any]) -> None:
    torch.manual_seed(0)
    limit = 1.0
    config = MoEConfig(num_experts=NUM_EXPERTS, top_k=1, renormalize=True, balance="none", **schedule)
    layer = ExpertParallel(WIDTH, ClampedSwiGLU(WIDTH, EXPERT_WIDTH, limit=limit), config).double()
    layer.connect(Loopback())
    for parameter in layer.experts.parameters():
        parameter.data.normal_()
    x_TD = torch.randn(16, WIDTH, dtype=torch.float64, requires_grad=True)
    ids_T = layer.gate(x_TD).expert_ids_TK[:, 0].tolist()
    experts = [dict(expert.named_parameters()) for expert in layer.experts.deepspeed_experts]
    expected = torch.stack([reference(x_TD[t], experts[e], limit) for t, e in enumerate(ids_T)])
    hidden = torch.cat([experts[e]["up.weight"] @ x_TD[t] + experts[e]["up.bias"] for t, e in enumerate(ids_T)])
    assert 0.1 < (hidden.abs() > limit).double().mean() < 0.9, "some numbers are bounded, and some are not"
    parameters = [x_TD, *layer.experts.parameters()]
    grads = torch.autograd.grad(expected.square().sum(), parameters)
    found = layer(x_TD)[0]
    found_grads = torch.autograd.grad(found.square().sum(), parameters)
    for mine, theirs in zip((found, *found_grads), (expected, *grads), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_a_layer_is_the_block_of_gpt_oss() -> None:
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

    sizes = {"hidden_size": WIDTH, "intermediate_size": EXPERT_WIDTH, "num_local_experts": NUM_EXPERTS}
    block = GptOssMLP(GptOssConfig(num_experts_per_tok=TOP_K, **sizes)).eval()
    torch.manual_seed(0)
    for parameter in block.parameters():
        parameter.data.normal_(std=2.0)

    def layer_of(expert: nn.Module, **knobs: Any) -> ExpertParallel:
        config = MoEConfig(
            num_experts=NUM_EXPERTS, top_k=TOP_K, renormalize=True, gate_bias=True, balance="none", **knobs
        )
        layer = ExpertParallel(WIDTH, expert, config)
        layer.connect(Loopback())
        layer.gate.wg.load_state_dict({"weight": block.router.weight, "bias": block.router.bias})
        stacks = block.experts
        for index, mine in enumerate(layer.experts.deepspeed_experts):
            both_FD, both_F = stacks.gate_up_proj[index].T, stacks.gate_up_proj_bias[index]
            down_DF, down_D = stacks.down_proj[index].T, stacks.down_proj_bias[index]
            named = {
                "gate": (both_FD[::2], both_F[::2]),
                "up": (both_FD[1::2], both_F[1::2]),
                "down": (down_DF, down_D),
            }
            for name, (weight, bias) in named.items():
                getattr(mine, name).load_state_dict({"weight": weight, "bias": bias})
        return layer.eval()

    x = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    expected, _ = block(x)
    scale = expected.abs().max()
    assert (layer_of(ClampedSwiGLU(WIDTH, EXPERT_WIDTH))(x)[0] - expected).abs().max() <= 1e-6 * scale
    for control in (SwiGLU(WIDTH, EXPERT_WIDTH, bias=True), ClampedSwiGLU(WIDTH, EXPERT_WIDTH, limit=1.0)):
        assert (layer_of(control)(x)[0] - expected).abs().max() > 1e-2 * scale
