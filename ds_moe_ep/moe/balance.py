"""Keeping experts evenly loaded: auxiliary loss, z-loss, and the bias that needs no loss."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.kernels.eager import is_inside_backward
from ds_moe_ep.kernels.gate_losses import gate_losses
from ds_moe_ep.moe.routes import Routing

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Surroundings of a pass's tokens that its loss reads: the ranks of the group, sequences, the batch so far."""

    sum_over_group: Callable[[Tensor], Tensor]  # of `size` ranks; collective
    size: int
    sequence_T: Tensor | None = None  # the sequence of each token, from 0, where balance_scope is "sequence"
    num_sequences: int = 0
    load: BatchLoad | None = None  # where balance_scope is "batch"
    training: bool = True


def router_loss(routing: Routing, config: MoEConfig, batch: Batch | None) -> Tensor:
    """The weighted sum of auxiliary loss and z-loss, a scalar with gradient to the gate.

    With balance_scope "rank" there need be no batch.
    Collective over the expert group with balance_scope "group", over the data-parallel ranks with "batch".
    """
    terms = []
    if routing.scores_TE.shape[0] == 0 and config.balance_scope in ("rank", "sequence"):
        terms.append(routing.logits_TE.sum())
    elif config.balance_scope == "rank" and (config.has_aux_loss or config.z_loss_weight):
        terms.append(losses_of_rank(routing, config))
    else:
        if config.has_aux_loss:
            assert batch is not None, "the loss reads more than the rank's own tokens"
            terms.append(config.aux_loss_weight * auxiliary_loss(routing, config, batch))
        if config.z_loss_weight:
            terms.append(config.z_loss_weight * z_loss(routing.logits_TE))
    loss = functools.reduce(torch.add, terms) if terms else routing.scores_TE.new_zeros(())
    return loss.to(routing.weights_TK.dtype)


def losses_of_rank(routing: Routing, config: MoEConfig) -> Tensor:
    """Both losses by this rank's own tokens, of which there are some: the load is theirs alone."""
    num_tokens, chosen_E = routing.scores_TE.shape[0], None
    if config.has_aux_loss:
        chosen_E = _first_choices(routing, config)
    # E * sum(mean score * share of the tokens), and the mean of squares.
    aux_weight = config.aux_loss_weight * config.num_experts / num_tokens**2
    weights = aux_weight, config.z_loss_weight / num_tokens, config.score == "softmax"
    return gate_losses(_shares(routing, config), routing.logits_TE, chosen_E, *weights)


def auxiliary_loss(routing: Routing, config: MoEConfig, batch: Batch) -> Tensor:
    """E times the sum over experts of (mean score) * (share of tokens): 1 when balanced.

    Switch, arXiv 2101.03961, eq. 4, and GShard, arXiv 2006.16668, section 2.2. As DeepSpeed has it, the share counts
    the first choices for k <= 2, and all choices divided by k above. With balance_scope "group" the share is that of
    all tokens of the expert group; the mean of this loss over ranks is then the loss of the group's batch. With
    "sequence" and "batch" all choices count, for every k.
    """
    scores_TE = _shares(routing, config)
    if config.balance_scope == "sequence":
        return _sequence_loss(routing, scores_TE, config, batch)
    if config.balance_scope == "batch":
        return _batch_loss(routing, scores_TE, config, batch)
    with torch.no_grad():
        chosen_E = _first_choices(routing, config)
        told = torch.cat([chosen_E, chosen_E.new_full((1,), len(scores_TE))])
        chosen_E, of_group = batch.sum_over_group(told).split([config.num_experts, 1])
        of_group = of_group.clamp(min=1)
    mean_E = scores_TE.sum(0) * (batch.size / of_group)
    loss: Tensor = config.num_experts * (mean_E * (chosen_E / of_group)).sum()
    return loss


def _shares(routing: Routing, config: MoEConfig) -> Tensor:
    """The scores of each token, which sum to 1."""
    scores_TE = routing.scores_TE
    return scores_TE / scores_TE.sum(1, keepdim=True) if config.score == "sigmoid" else scores_TE


def _first_choices(routing: Routing, config: MoEConfig) -> Tensor:
    """The tokens of each expert that the loss counts: first choices for k <= 2, above all choices over k."""
    return routing.load_E() / config.top_k if config.top_k > 2 else routing.first_choices_E


def _sequence_loss(routing: Routing, scores_TE: Tensor, config: MoEConfig, batch: Batch) -> Tensor:
    """The mean over sequences of each one's own loss (DeepSeek-V3, arXiv 2412.19437, eq. 17 to 20).

    Tokens that take no part are no part of their sequence.
    """
    assert batch.sequence_T is not None, "the layer knows its sequences"
    sums_SE = scores_TE.new_zeros(batch.num_sequences, config.num_experts)
    used_T = scores_TE.new_ones(len(scores_TE)) if routing.is_used_TK is None else routing.is_used_TK[:, 0].to(sums_SE)
    with torch.no_grad():
        length_S1 = sums_SE.new_zeros(batch.num_sequences).index_add(0, batch.sequence_T, used_T)[:, None]
        chosen_SE = sums_SE.index_add(0, batch.sequence_T, routing.chosen_TE())
        share_SE = chosen_SE / (config.top_k * length_S1.clamp(min=1))
    mean_SE = sums_SE.index_add(0, batch.sequence_T, scores_TE * used_T[:, None]) / length_S1.clamp(min=1)
    return config.num_experts * (mean_SE * share_SE).sum() / (length_S1 > 0).sum().clamp(min=1)


def _batch_loss(routing: Routing, scores_TE: Tensor, config: MoEConfig, batch: Batch) -> Tensor:
    """The loss by the share of all ranks' tokens since the last step of the optimizer (arXiv 2501.11873, section 3)."""
    assert batch.load is not None, "the layer has a load of its batch"
    share_E = batch.load.share(routing.load_E(), batch.training)
    return config.num_experts * (scores_TE.sum(0) / max(len(scores_TE), 1) * share_E).sum()


class BatchLoad:
    """Choices of each expert by the tokens of all data-parallel ranks since the last step of the optimizer.

    The micro-batches of a batch come one by one: the first sees its own tokens, the last sees all. A pass that is
    recomputed sees what its first pass saw, where it is the layer's last one.
    """

    def __init__(self) -> None:
        self._load_E: Tensor | None = None
        self.sum_over_ranks: Callable[[Tensor], Tensor] | None = None  # set by whoever knows the ranks

    @torch.no_grad()
    def share(self, chosen_E: Tensor, training: bool) -> Tensor:
        """Each expert's share of the choices, those of this pass included. Collective but in a recomputation."""
        if training and is_inside_backward() and self._load_E is not None:
            load_E = self._load_E
        elif self.sum_over_ranks is None:
            raise ConfigError(
                "moe_ep.balance_scope='batch': nobody said which ranks share the batch; train in an engine of "
                "DeepSpeed's, or set it to 'rank', 'group' or 'sequence'"
            )
        else:
            load_E = self.sum_over_ranks(chosen_E)
            if training:
                load_E = self._load_E = load_E if self._load_E is None else self._load_E + load_E
        return load_E / load_E.sum().clamp(min=1)

    def forget(self) -> None:
        """Begins another batch. Local."""
        self._load_E = None


def z_loss(logits_TE: Tensor) -> Tensor:
    """The mean squared log-sum-exp of the logits (ST-MoE, arXiv 2202.08906, eq. 5); 0 without tokens."""
    return logits_TE.logsumexp(1).square().sum() / max(len(logits_TE), 1)


class StepsBias(Protocol):
    """A bias that moves once per optimizer step."""

    def step(self, sum_over_world: Callable[[Tensor], Tensor]) -> None:
        """Moves the bias against the load since the last step. Collective through `sum_over_world`."""

    def forget(self) -> None:
        """Drops the load since the last step. Local."""


class BiasBalance(nn.Module):
    """A bias per expert on the choice alone, moved one step against its load (arXiv 2408.15664, algorithm 1).

    The bias is a whole number of steps and is stored as one: exact in every precision that an engine casts to, and
    equal on all ranks. Where it starts from a given one, that one's fp32 bits are stored beside it, as whole numbers
    too. The load since the last step is not saved.
    """

    start_bits_E: Tensor | None
    steps_E: Tensor
    load_E: Tensor

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.step_size = config.bias_step
        self.register_buffer("steps_E", torch.zeros(config.num_experts, dtype=torch.int64))
        self.register_buffer("load_E", torch.zeros(config.num_experts, dtype=torch.int64), persistent=False)
        self.start_bits_E = None
        self._first_version: int | None = None  # of the gate's weight, in the first pass that was observed
        self._is_looked_after = False  # somebody steps it, or it was said that nobody does

    @property
    def bias_E(self) -> Tensor:
        """The bias that is added to the scores before the choice, in fp32."""
        moved_E = self.steps_E.float() * self.step_size
        return moved_E if self.start_bits_E is None else self.start_bits_E.view(torch.float32) + moved_E

    @torch.no_grad()
    def start_from(self, bias_E: Tensor) -> None:
        """Takes a bias that was learnt before; steps count from it. Local."""
        bits_E = bias_E.to(self.steps_E.device, torch.float32).clone().view(torch.int32)
        del self.start_bits_E
        self.register_buffer("start_bits_E", bits_E)
        self.steps_E.zero_()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        if self.start_bits_E is None and f"{prefix}start_bits_E" in state_dict:
            self.start_from(torch.zeros_like(self.bias_E))
        super()._load_from_state_dict(state_dict, prefix, *others)

    @torch.no_grad()
    def observe(self, chosen_E: Tensor, weight: Tensor) -> None:
        """Adds the choices of one forward pass, counted per expert, to the load; `weight` is the gate's.

        A pass that is recomputed counts twice, which changes no sign: the step looks at nothing else.
        """
        self.load_E += chosen_E
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
        if self.step_size:  # else it stands still, and whoever gives it a step later starts from here
            load_E = sum_over_world(self.load_E)
            self.steps_E += torch.sign(load_E.sum() - load_E * len(load_E))
        self.forget()

    def forget(self) -> None:
        """Drops the load since the last step: that batch moves nothing. Local."""
        self.load_E.zero_()
        self._is_looked_after = True
