"""Routing and balance loss computed again in float64, from a layer's tokens, its gate's matrix and its rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.engine.views.observe import ObservedPass
from ds_moe_ep.engine.views.parts import RoutingRule

NUM_DRAWS = 16  # of moved logits, for tokens whose choice is a near tie

Move = Callable[[Tensor], Tensor]


def scores_of(logits_TE: Tensor, rule: RoutingRule) -> Tensor:
    """The scores that weights are taken from."""
    return logits_TE.softmax(1) if rule.score == "softmax" else logits_TE.sigmoid()


def choose(scores_TE: Tensor, bias_E: Tensor | None, rule: RoutingRule) -> Tensor:
    """The experts that the rule chooses, as a mask [T, E]."""
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if rule.num_groups:
        grouped_TGe = choice_TE.view(len(choice_TE), rule.num_groups, -1)
        best_TG = grouped_TGe.amax(2) if rule.group_score == "max" else grouped_TGe.topk(2, dim=2).values.sum(2)
        groups_TG = torch.zeros_like(best_TG, dtype=torch.bool)
        groups_TG.scatter_(1, best_TG.topk(rule.kept_groups, dim=1).indices, True)
        choice_TE = grouped_TGe.masked_fill(~groups_TG[:, :, None], float("-inf")).flatten(1)
    ids_TK = choice_TE.topk(rule.top_k, dim=1).indices
    return torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(1, ids_TK, True)


def weights_of(scores_TE: Tensor, ids_TK: Tensor, kept_TK: Tensor, rule: RoutingRule) -> Tensor:
    """The routing weights [T, K] of chosen experts; zero for a choice without a place."""
    weights_TK = scores_TE.gather(1, ids_TK) * kept_TK
    if rule.renormalizes:
        weights_TK = weights_TK / weights_TK.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)
    return weights_TK * rule.scale


def strangely_routed(
    seen: ObservedPass, logits_TE: Tensor, moved_logits: Sequence[Tensor], rule: RoutingRule
) -> tuple[Tensor, Tensor]:
    """Tokens whose experts are others than the rule's and no near tie, and the mask [T, E] that the rule asks for."""
    assert seen.ids_TK is not None and seen.kept_TK is not None
    told_TK = seen.kept_TK if seen.hides_dropped else torch.ones_like(seen.kept_TK)
    found_TE = torch.zeros_like(logits_TE).scatter_add_(1, seen.ids_TK, told_TK.to(logits_TE)) > 0

    def is_strange(asked_TE: Tensor) -> Tensor:
        wrong_TE = found_TE & ~asked_TE if seen.hides_dropped else found_TE != asked_TE
        return wrong_TE.any(1)

    asked_TE = choose(scores_of(logits_TE, rule), seen.bias_E, rule)
    is_strange_T = is_strange(asked_TE)
    for each in moved_logits:
        if not is_strange_T.any():
            break
        is_strange_T &= is_strange(choose(scores_of(each, rule), seen.bias_E, rule))
    return is_strange_T.nonzero()[:, 0], asked_TE


def counted_ids(seen: ObservedPass, logits_TE: Tensor, rule: RoutingRule) -> Tensor:
    """The experts [T, K] that a balance loss counts: those chosen before any drop."""
    assert seen.ids_TK is not None
    return scores_of(logits_TE.detach(), rule).topk(rule.top_k, dim=1).indices if seen.hides_dropped else seen.ids_TK


def balance_loss(logits_TE: Tensor, ids_TK: Tensor, config: MoEConfig, rule: RoutingRule) -> Tensor:
    """The balance loss of one rank's tokens, with its weight: GShard's, and the z-loss (one sum per expert)."""
    loss = logits_TE.new_zeros(())
    num_tokens = len(logits_TE)
    if not num_tokens:
        return loss
    scores_TE = scores_of(logits_TE, rule)
    if rule.score == "sigmoid":
        scores_TE = scores_TE / scores_TE.sum(1, keepdim=True)
    if config.has_aux_loss:
        counted_TK = ids_TK[:, :1] if config.top_k <= 2 else ids_TK
        share_E = torch.bincount(counted_TK.flatten(), minlength=config.num_experts) / counted_TK.numel()
        loss = loss + config.aux_loss_weight * config.num_experts * (scores_TE.mean(0) * share_E).sum()
    if config.z_loss_weight:
        loss = loss + config.z_loss_weight * logits_TE.logsumexp(1).square().mean()
    return loss
