"""MoE blocks of a Hugging Face model: the package's layer in a block's place, and the blocks of a model.

`MoEBlock` is the package's layer in a block's place; `ExpertBlock` says what a block's names in files stand for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.engine import seams
from ds_moe_ep.engine.hugging_face.expert_block import ExpertBlock
from ds_moe_ep.engine.hugging_face.families import Family
from ds_moe_ep.engine.hugging_face.routing import decided_by
from ds_moe_ep.engine.layer import HAS_BIAS, MoE
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.kernels.activation import Clamp
from ds_moe_ep.moe.experts import ClampedSwiGLU, SharedWithGate, SwiGLU


class MoEBlock(nn.Module):
    """`MoE` in the place of a Hugging Face block: takes and gives hidden states [..., D].

    `l_aux` [] is the weighted balance loss of the last forward pass, with gradient; `balance_loss` sums a model's.
    """

    def __init__(self, config: Any, family: Family, knobs: MoEConfig) -> None:
        super().__init__()
        hidden_size, width = int(config.hidden_size), int(getattr(config, family.expert_width))
        shared: nn.Module | None = None
        if family.shared:
            shared_width = int(getattr(config, family.shared_width))
            shared_width *= int(getattr(config, family.shared_count)) if family.shared_count else 1
            shared = (SharedWithGate if family.shared_gate else SwiGLU)(hidden_size, shared_width)
        self.gives_scores = family.gives_scores
        self.moe = MoE(hidden_size, _expert(config, family, width), config=knobs, shared=shared)
        self.moe.decided = decided_by(config, family) | ({HAS_BIAS: True} if family.router_bias else {})
        self.l_aux = torch.zeros(())

    def forward(self, hidden_states: Tensor) -> Tensor | tuple[Tensor, None]:
        output: Tensor
        output, self.l_aux, _ = self.moe(hidden_states)
        return (output, None) if self.gives_scores else output


def _expert(config: Any, family: Family, width: int) -> nn.Module:
    if not family.stacked:
        return SwiGLU(int(config.hidden_size), width)
    return ClampedSwiGLU(int(config.hidden_size), width, **clamp_of(config)._asdict())


def clamp_of(config: Any) -> Clamp:
    """The bounds of gpt-oss's experts; releases whose configuration has none compute with its first ones."""
    return Clamp(float(getattr(config, "swiglu_alpha", 1.702)), float(getattr(config, "swiglu_limit", 7.0)))


def balance_loss(model: nn.Module) -> Tensor:
    """The sum [] of the weighted balance losses of a model's blocks in the last forward pass, to add to its loss."""
    losses = [module.l_aux.float() for module in model.modules() if isinstance(module, MoEBlock)]
    if not losses:
        raise ConfigError(
            f"model={type(model).__name__}: has no block of ds_moe_ep.from_pretrained, and so no balance loss of one"
        )
    return torch.stack(losses).sum()


def blocks_of(model: nn.Module, family: Family) -> list[ExpertBlock]:
    """The MoE blocks of a model in its order: the package's layers, DeepSpeed's and AutoEP's."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if seams.is_autoep_layer(module) or seams.is_moe_layer(module)
    }
    return [ExpertBlock(name.removesuffix(".moe"), family, layer) for name, layer in layers.items()]
