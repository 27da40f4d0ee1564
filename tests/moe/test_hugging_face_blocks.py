"""A layer with the knobs of a family is that family's own block, outputs and gradients, a shared expert included.

float64 but for the routers of Hugging Face, which compute their scores in fp32: 2e-6 of the largest number.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_moe_ep import ExpertParallel, SharedWithGate, SwiGLU
from ds_moe_ep.comm.transport import Loopback
from ds_moe_ep.config.knobs import MoEConfig

WIDTH, EXPERT_WIDTH, SHARED_WIDTH, NUM_EXPERTS, TOP_K, BOUND = 8, 12, 20, 8, 3, 2e-6
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH, "moe_intermediate_size": EXPERT_WIDTH, "num_experts_per_tok": TOP_K, "norm_topk_prob": True,
}  # fmt: skip


def block_of(family: str) -> tuple[nn.Module, dict[str, Any], nn.Module]:
    """A block with random weights, the knobs that stand for it, and the shared expert of our layer."""
    from transformers import DeepseekV3Config, Qwen2MoeConfig
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    torch.manual_seed(0)
    if family == "deepseek_v3":
        groups = {"n_group": 4, "topk_group": 2}
        block: nn.Module = DeepseekV3MoE(
            DeepseekV3Config(
                **SIZES, **groups, n_routed_experts=NUM_EXPERTS, n_shared_experts=2, routed_scaling_factor=2.5
            )
        )
        knobs = {"score": "sigmoid", "route_scale": 2.5, "balance": "bias", **groups}
        shared: nn.Module = SwiGLU(WIDTH, 2 * EXPERT_WIDTH)
    else:
        sizes = {"num_experts": NUM_EXPERTS, "shared_expert_intermediate_size": SHARED_WIDTH}
        block = Qwen2MoeSparseMoeBlock(Qwen2MoeConfig(**SIZES, **sizes))
        knobs, shared = {}, SharedWithGate(WIDTH, SHARED_WIDTH)
    for tensor in (*block.parameters(), *block.buffers()):
        tensor.data.normal_(std=0.7)
    return block.double(), knobs, shared.double()


def pairs_of(block: Any, layer: ExpertParallel) -> list[tuple[Tensor, Tensor, slice, int]]:
    """Our parameter and the block's, which holds ours in a span of rows, of an expert where it is a stack (else -1)."""
    whole, pairs = slice(None), [(layer.gate.wg.weight, block.gate.weight, slice(None), -1)]
    for index, expert in enumerate(layer.experts.deepspeed_experts):
        stacks = block.experts
        pairs += [
            (expert.gate.weight, stacks.gate_up_proj, slice(0, EXPERT_WIDTH), index),
            (expert.up.weight, stacks.gate_up_proj, slice(EXPERT_WIDTH, None), index),
            (expert.down.weight, stacks.down_proj, whole, index),
        ]
    shared: Any = layer.shared
    mine = shared.expert if isinstance(shared, SharedWithGate) else shared
    theirs = block.shared_expert if isinstance(shared, SharedWithGate) else block.shared_experts
    for name in ("gate", "up", "down"):
        pairs.append((getattr(mine, name).weight, getattr(theirs, f"{name}_proj").weight, whole, -1))
    if isinstance(shared, SharedWithGate):
        pairs.append((shared.weight.weight, block.shared_expert_gate.weight, whole, -1))
    return pairs


def part(tensor: Tensor, rows: slice, index: int) -> Tensor:
    return (tensor if index < 0 else tensor[index])[rows]


@pytest.mark.parametrize(
    ("family", "control"),
    [("deepseek_v3", {"n_group": 1, "topk_group": 1}), ("deepseek_v3", {"route_scale": 1.0}), ("qwen2_moe", {})],
)
def test_outputs_and_gradients_are_those_of_the_familys_block(family: str, control: dict[str, Any]) -> None:
    block, knobs, shared = block_of(family)
    x = torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def worst(**changes: Any) -> float:
        given = {"balance": "none", "renormalize": True, **knobs, **changes}
        config = MoEConfig(num_experts=NUM_EXPERTS, top_k=TOP_K, **given)
        layer = ExpertParallel(WIDTH, SwiGLU(WIDTH, EXPERT_WIDTH), config, shared).double()
        layer.connect(Loopback())
        pairs = pairs_of(block, layer)
        for mine, theirs, rows, index in pairs:
            mine.data.copy_(part(theirs.data, rows, index))
        if layer.gate.balance is not None:
            layer.gate.balance.start_from(block.gate.e_score_correction_bias)
        if family == "qwen2_moe" and changes.get("balance") == "aux_loss":  # the control: a gate of another token
            layer.shared.weight.weight.data.neg_()
        block.zero_grad()
        layer.zero_grad()
        ours, theirs_x = x.clone().requires_grad_(), x.clone().requires_grad_()
        found, expected = layer(ours)[0], block(theirs_x)
        found.square().sum().backward()
        expected.square().sum().backward()
        compared = [(found, expected), (ours.grad, theirs_x.grad)]
        compared += [(mine.grad, part(theirs.grad, rows, index)) for mine, theirs, rows, index in pairs]
        return max(((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in compared)

    assert worst() <= BOUND
    assert worst(**(control or {"balance": "aux_loss"})) > 1e-2
