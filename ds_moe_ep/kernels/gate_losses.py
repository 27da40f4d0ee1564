"""The losses that keep a gate balanced, as one node of autograd: step by step they are a dozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ds_moe_ep.kernels.eager import not_compiled


def gate_losses(
    scores_TE: Tensor, logits_TE: Tensor, share_E: Tensor | None, aux_weight: float, z_weight: float, is_softmax: bool
) -> Tensor:
    """aux_weight * E * sum(mean score * share) + z_weight * mean(logsumexp(logits)^2), of at least one token.

    Differentiable to scores and logits. `share_E` None leaves out the first term; `is_softmax`: the scores are the
    softmax of these logits.
    """
    loss: Tensor = _GateLosses.apply(scores_TE, logits_TE, share_E, aux_weight, z_weight, is_softmax)  # type: ignore[no-untyped-call]
    return loss


class _GateLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        scores_TE: Tensor,
        logits_TE: Tensor,
        share_E: Tensor | None,
        aux_weight: float,
        z_weight: float,
        is_softmax: bool,
    ) -> Tensor:
        num_tokens, num_experts = scores_TE.shape
        ctx.weights = aux_weight * num_experts / num_tokens, 2 * z_weight / num_tokens
        log_sum_T1, terms = None, []
        if share_E is not None:
            terms.append(aux_weight * (num_experts * (scores_TE.mean(0) * share_E).sum()))
        if z_weight:
            log_sum_T1 = logits_TE.logsumexp(1, keepdim=True)
            terms.append(z_weight * (log_sum_T1.square().sum() / num_tokens))
        ctx.save_for_backward(scores_TE if is_softmax else None, logits_TE, share_E, log_sum_T1)
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]

    @staticmethod
    @once_differentiable
    @not_compiled
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        scores_TE, logits_TE, share_E, log_sum_T1 = ctx.saved_tensors
        aux_weight, z_weight = ctx.weights
        d_scores_TE = d_logits_TE = None
        if share_E is not None:
            d_scores_TE = (share_E * (aux_weight * d_loss)).expand_as(logits_TE)
        if log_sum_T1 is not None:
            softmax_TE = (logits_TE - log_sum_T1).exp() if scores_TE is None else scores_TE
            d_logits_TE = softmax_TE * (log_sum_T1 * (z_weight * d_loss))
        return d_scores_TE, d_logits_TE, None, None, None, None
