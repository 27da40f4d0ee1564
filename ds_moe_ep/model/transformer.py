"""The 4-layer causal language model (the specification, section 1.1), for one device.

Each layer is pre-norm: x + attention(norm(x)), then x + feed_forward(norm(x)). The feed-forward is a slot
that the caller fills with a layer like MoE; parallelism comes from there, and the model knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ds_moe_ep.config.knobs import ModelConfig, MoEConfig
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.kernels.rotary import Rotation
from ds_moe_ep.model.attention import CausalAttention, rotation_of
from ds_moe_ep.model.feed_forward import make_expert, make_shared_expert
from ds_moe_ep.model.norm import layer_norm

LayerOutput = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class ModelOutput(NamedTuple):
    """Results of one forward pass.

    With targets, `loss` alone carries gradients and the rest are reports. Without targets, `loss` and
    `cross_entropy` are None, and `logits` and `l_aux` carry gradients.
    """

    loss: torch.Tensor | None  # cross_entropy + l_aux
    cross_entropy: torch.Tensor | None  # mean over the tokens, nats, fp32
    l_aux: torch.Tensor  # sum of the layers' weighted routing losses
    logits_BSV: torch.Tensor
    exp_counts_LE: torch.Tensor  # rows of this rank for each expert of each layer


class Layer(nn.Module):
    """One transformer layer around `feed_forward`, whose forward returns (output, l_aux, exp_counts)."""

    def __init__(self, model: ModelConfig, feed_forward: nn.Module) -> None:
        super().__init__()
        self.attention_norm = layer_norm(model.hidden_size)
        self.attention = CausalAttention(model.hidden_size, model.num_heads)
        self.feed_forward_norm = layer_norm(model.hidden_size)
        self.feed_forward = feed_forward

    def forward(self, x_BSD: torch.Tensor, rotation: Rotation) -> LayerOutput:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rotation)
        if getattr(self.feed_forward, "adds_residual", False):  # in the pass over memory that writes its output
            whole: LayerOutput = self.feed_forward(self.feed_forward_norm(x_BSD), residual=x_BSD)
            return whole
        y_BSD, l_aux, exp_counts_E = self.feed_forward(self.feed_forward_norm(x_BSD))
        return x_BSD + y_BSD, l_aux, exp_counts_E


class Transformer(nn.Module):
    """A causal language model; `feed_forward(layer_index)` fills the slot of each layer.

    With `model.recompute`, training keeps only the layers' inputs and computes each layer again in the
    backward pass: its traffic happens again there, in the same order on every rank.
    """

    def __init__(self, model: ModelConfig, feed_forward: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.config = model
        self.head_size = model.hidden_size // model.num_heads
        if self.head_size % 2:
            raise ConfigError(
                f"moe_ep.model.num_heads={model.num_heads} gives heads of width {self.head_size}: rotary "
                "positions turn pairs, so a head needs an even width; change num_heads or hidden_size"
            )
        self.embedding = nn.Embedding(model.vocab_size, model.hidden_size)
        self.layers = nn.ModuleList(Layer(model, feed_forward(index)) for index in range(model.num_layers))
        self.final_norm = layer_norm(model.hidden_size)
        self.head = nn.Linear(model.hidden_size, model.vocab_size, bias=False)

    def forward(self, token_ids_BS: torch.Tensor, target_ids_BS: torch.Tensor | None = None) -> ModelOutput:
        """Logits of the next token, and the loss where targets are given (-100 leaves a target out)."""
        num_tokens = token_ids_BS.shape[1]
        if num_tokens > self.config.sequence_length:
            raise ConfigError(
                f"moe_ep.model.sequence_length={self.config.sequence_length}: a sequence of {num_tokens} "
                "tokens is too long; cut it or raise sequence_length"
            )
        x_BSD = self.embedding(token_ids_BS)
        rotation = rotation_of(num_tokens, self.head_size, x_BSD.device)
        losses, counts = [], []
        for layer in self.layers:
            x_BSD, l_aux, exp_counts_E = run_layer(layer, x_BSD, rotation, recompute=self.config.recompute)
            losses.append(l_aux.float())
            counts.append(exp_counts_E)
        logits_BSV = self.head(self.final_norm(x_BSD))
        return with_loss(logits_BSV, torch.stack(losses).sum(), torch.stack(counts), target_ids_BS)


def run_layer(layer: nn.Module, x_BSD: torch.Tensor, rotation: Rotation, *, recompute: bool) -> LayerOutput:
    """The layer's output; with recompute, of its inputs alone is kept what a backward pass needs."""
    keep_all = not (recompute and layer.training and torch.is_grad_enabled())
    result: LayerOutput = (
        layer(x_BSD, rotation) if keep_all else checkpoint(layer, x_BSD, rotation, use_reentrant=False)
    )
    return result


def with_loss(
    logits_BSV: torch.Tensor,
    l_aux: torch.Tensor,
    exp_counts_LE: torch.Tensor,
    target_ids_BS: torch.Tensor | None,
) -> ModelOutput:
    """The pass as a ModelOutput; the loss is in fp32, since a softmax of fp16 logits is not exact enough."""
    if target_ids_BS is None:
        return ModelOutput(None, None, l_aux, logits_BSV, exp_counts_LE)
    cross_entropy = F.cross_entropy(logits_BSV.float().flatten(0, 1), target_ids_BS.flatten())
    # Reports are detached: DeepSpeed hooks every output that has a gradient and would scale l_aux twice.
    return ModelOutput(
        cross_entropy + l_aux, cross_entropy.detach(), l_aux.detach(), logits_BSV.detach(), exp_counts_LE
    )


def build_transformer(model: ModelConfig, moe: MoEConfig, make_moe: Callable[..., nn.Module]) -> Transformer:
    """The model with an MoE layer in every slot.

    Each is `make_moe(hidden_size, expert, config=moe, shared=<module or None>)`. Build under
    `torch.device("meta")` to have every shape and no memory.
    """

    def feed_forward(layer_index: int) -> nn.Module:
        return make_moe(model.hidden_size, make_expert(model), config=moe, shared=make_shared_expert(model))

    transformer = Transformer(model, feed_forward)
    for module in transformer.modules():
        if isinstance(module, CausalAttention) and moe.kernels == "torch":
            module.use_triton = False
    return transformer
