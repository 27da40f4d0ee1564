"""Feed-forwards for the model's slot that need no group: real layers with every expert on one rank, and shapes."""

from __future__ import annotations

import torch
from torch import nn

from ds_moe_ep.config.knobs import ModelConfig, MoEConfig
from ds_moe_ep.model.initialize import init_weights
from ds_moe_ep.model.transformer import Transformer, build_transformer
from ds_moe_ep.moe.layer import ExpertParallel

TINY = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    expert_width=48,
    vocab_size=19,
    sequence_length=24,
    recompute=False,
)
FOUR_EXPERTS = MoEConfig(num_experts=4, top_k=2, aux_loss_weight=0.1, z_loss_weight=0.01)


def tiny_transformer(model: ModelConfig = TINY, moe: MoEConfig = FOUR_EXPERTS, seed: int = 0) -> Transformer:
    """A model of real layers on one device, in float64."""
    transformer = build_transformer(model, moe, ExpertParallel).double()
    init_weights(transformer, seed)
    return transformer


def token_ids(num_sequences: int, num_tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(TINY.vocab_size, (num_sequences, num_tokens), generator=generator)


class ShapesOfLayer(nn.Module):
    """The parameters of one MoE layer under their names, for `num_local_experts` of its experts; it cannot run."""

    def __init__(self, hidden_size: int, expert: nn.Module, config: MoEConfig, shared: nn.Module | None) -> None:
        super().__init__()
        self.deepspeed_moe = ExpertParallel(hidden_size, expert, config, shared)
