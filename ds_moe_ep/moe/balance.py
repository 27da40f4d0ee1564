"""Keeping experts evenly loaded: auxiliary loss, z-loss, and the bias that needs no loss."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ds_moe_ep.config.knobs import MoEConfig

if TYPE_CHECKING:
    from ds_moe_ep.moe.router import Routing

logger = logging.getLogger(__name__)


def router_loss(routing: Routing, config: MoEConfig, sum_over_group: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """The weighted sum of auxiliary loss and z-loss, a scalar with gradient to the gate.

    `sum_over_group` adds a tensor over the expert group of `size` ranks; it is called with balance_scope "group"
    alone, and then the call is collective.
    """
    loss = routing.scores_TE.new_zeros(())
    if len(routing.scores_TE) == 0 and config.balance_scope == "rank":
        return loss + routing.logits_TE.sum()
    if config.balance == "aux_loss" and config.aux_loss_weight:
        loss = loss + config.aux_loss_weight * auxiliary_loss(routing, config, sum_over_group, size)
    if config.z_loss_weight:
        loss = loss + config.z_loss_weight * z_loss(routing.logits_TE)
    return loss


def auxiliary_loss(
    routing: Routing, config: MoEConfig, sum_over_group: Callable[[Tensor], Tensor], size: int
) -> Tensor:
    """E times the sum over experts of (mean score) * (share of tokens): 1 when balanced.

    Switch, arXiv 2101.03961, eq. 4, and GShard, arXiv 2006.16668, section 2.2. As DeepSpeed has it, the share counts
    the first choices for k <= 2, and all choices divided by k above. With balance_scope "group" the share is that of
    all tokens of the expert group; the mean of this loss over ranks is then the loss of the group's batch.
    """
    counted = slice(None) if config.top_k > 2 else slice(0, 1)
    scores_TE = routing.scores_TE
    if config.score == "sigmoid":
        scores_TE = scores_TE / scores_TE.sum(1, keepdim=True)
    with torch.no_grad():
        chosen_E = routing.load_E(counted)
        num_tokens = chosen_E.new_full((1,), len(scores_TE))
        if config.balance_scope == "group":
            *chosen, num_tokens = sum_over_group(torch.cat([chosen_E, num_tokens])).split([config.num_experts, 1])
            chosen_E = chosen[0]
        share_E = chosen_E / num_tokens.clamp(min=1) / (config.top_k if config.top_k > 2 else 1)
    if config.balance_scope == "group":
        mean_E = scores_TE.sum(0) * (size / num_tokens.clamp(min=1))
    else:
        mean_E = scores_TE.mean(0)
    return config.num_experts * (mean_E * share_E).sum()


def z_loss(logits_TE: Tensor) -> Tensor:
    """The mean squared log-sum-exp of the logits (ST-MoE, arXiv 2202.08906, eq. 5); 0 without tokens."""
    return logits_TE.logsumexp(1).square().sum() / max(len(logits_TE), 1)


class BiasBalance(nn.Module):
    """A bias per expert on the choice alone, moved one step against its load (arXiv 2408.15664, algorithm 1).

    The bias is a whole number of steps and is stored as one: exact in every precision that an engine casts to, and
    equal on all ranks. The load since the last step is kept beside it and is not saved.
    """

    steps_E: Tensor
    load_E: Tensor

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.step_size = config.bias_step
        self.register_buffer("steps_E", torch.zeros(config.num_experts, dtype=torch.int64))
        self.register_buffer("load_E", torch.zeros(config.num_experts, dtype=torch.int64), persistent=False)
        self._first_version: int | None = None  # of the gate's weight, in the first pass that was observed
        self._is_looked_after = False  # somebody steps it, or it was said that nobody does

    @property
    def bias_E(self) -> Tensor:
        """The bias that is added to the scores before the choice, in fp32."""
        return self.steps_E.float() * self.step_size

    @torch.no_grad()
    def observe(self, chosen_E: Tensor, weight: Tensor) -> None:
        """Adds the choices of one forward pass, counted per expert, to the load; `weight` is the gate's.

        A pass that is recomputed counts twice, which changes no sign: the step looks at nothing else.
        """
        self.load_E += chosen_E.to(torch.int64)
        if not self._is_looked_after and not weight.is_inference():
            self._look_for_a_step(weight._version)

    def _look_for_a_step(self, version: int) -> None:
        """Says once that nobody moves the bias: an optimizer has stepped (it wrote the weight), and the load stayed."""
        if self._first_version is None:
            self._first_version = version
        elif version != self._first_version:
            self._is_looked_after = True
            logger.warning(
                'moe_ep.balance="bias": the optimizer has stepped and nobody moved the bias, which stays as it is. '
                "An engine made by deepspeed.initialize moves it; in a training loop without one, call "
                "layer.gate.balance.step(sum_over_ranks) after each optimizer step"
            )

    @torch.no_grad()
    def step(self, sum_over_world: Callable[[Tensor], Tensor]) -> None:
        """Moves the bias against the load since the last step. Collective through `sum_over_world`."""
        load_E = sum_over_world(self.load_E)
        self.steps_E += torch.sign(load_E.sum() - load_E * len(load_E))
        self.forget()

    def forget(self) -> None:
        """Drops the load since the last step: that batch moves nothing. Local."""
        self.load_E.zero_()
        self._is_looked_after = True
