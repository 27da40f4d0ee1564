"""The losses that keep a gate balanced, as one node of autograd: step by step they are a dozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ds_moe_ep.kernels.eager import not_compiled


def gate_losses(
    scores_TE: Tensor, logits_TE: Tensor, chosen_E: Tensor | None, aux_weight: float, z_weight: float, is_softmax: bool
) -> Tensor:
    """aux_weight * sum(scores of an expert * its choices) + z_weight * sum(logsumexp(logits)^2), of at least one token.

    Differentiable to scores and logits. `chosen_E` None leaves out the first term; `is_softmax`: the scores are the
    softmax of these logits.
    """
    loss: Tensor = _GateLosses.apply(scores_TE, logits_TE, chosen_E, aux_weight, z_weight, is_softmax)  # type: ignore[no-untyped-call]
    return loss


class _GateLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        scores_TE: Tensor,
        logits_TE: Tensor,
        chosen_E: Tensor | None,
        aux_weight: float,
        z_weight: float,
        is_softmax: bool,
    ) -> Tensor:
        ctx.weights = aux_weight, 2 * z_weight
        loss, log_sum_T = None, None
        if chosen_E is not None:
            loss = torch.dot(scores_TE.sum(0), chosen_E).mul_(aux_weight)
        if z_weight:
            # A softmax's largest score tells how far above the largest logit the sum is; logsumexp is nine launches.
            log_sum_T = logits_TE.amax(1) - scores_TE.amax(1).log() if is_softmax else logits_TE.logsumexp(1)
            squares = torch.dot(log_sum_T, log_sum_T)
            loss = squares * z_weight if loss is None else loss.add_(squares, alpha=z_weight)
        ctx.save_for_backward(scores_TE if is_softmax else None, logits_TE, chosen_E, log_sum_T)
        assert loss is not None, "one of the losses is wanted"
        return loss

    @staticmethod
    @once_differentiable
    @not_compiled
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        scores_TE, logits_TE, chosen_E, log_sum_T = ctx.saved_tensors
        aux_weight, z_weight = ctx.weights
        d_scores_TE = d_logits_TE = None
        if chosen_E is not None:
            d_scores_TE = (chosen_E * (aux_weight * d_loss)).expand_as(logits_TE)
        if log_sum_T is not None:
            log_sum_T1 = log_sum_T.unsqueeze(1)
            softmax_TE = (logits_TE - log_sum_T1).exp() if scores_TE is None else scores_TE
            d_logits_TE = softmax_TE * (log_sum_T1 * (z_weight * d_loss))
        return d_scores_TE, d_logits_TE, None, None, None, None
