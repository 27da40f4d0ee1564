"""The dense MoE layer, one process, plain loops: what every parallel result is compared with.

Written from the definitions, not from the package: GShard (arXiv 2006.16668, algorithm 1), Switch (arXiv 2101.03961,
equations 2 to 6), ST-MoE's z-loss (arXiv 2202.08906, equation 5), and what DeepSpeed makes of them:

1. scores = softmax or sigmoid of x @ gate^T; a token's choices are its k best scores (plus the bias, if there is one).
2. An auxiliary loss E * sum_e(mean score of e * share of tokens that choose e); k = 2 counts first choices alone, k > 2
   divides by k. Dropped rows count; unused tokens are nobody's choice, yet their scores are in the mean. Sigmoid
   scores are divided by their sum first (DeepSeek-V3, arXiv 2412.19437, equation 18).
3. Each rank drops, for each of the experts, what exceeds the capacity: the last to come, or those of the lowest score.
   "First come": all first choices in the order of tokens, then all second ones, and so on (GShard).
4. The kept scores of a token, divided by their sum unless k = 1, weight its experts' outputs.

The batch is a list of shards, one per rank: capacity and the losses are a rank's own, experts see everybody's rows.
Gradients are autograd's through these loops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_moe_ep.config.knobs import MoEConfig

Expert = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ShardOutput:
    """Results of one rank."""

    output_TD: Tensor
    aux_loss: Tensor  # unweighted
    z_loss: Tensor  # unweighted
    l_aux: Tensor  # weighted sum of both
    exp_counts_E: list[int]  # choices before anything is dropped
    num_dropped: int
    choices: list[list[int]]  # each token's experts, the best first


def gelu_expert(weights: dict[str, Tensor]) -> Expert:
    """fc2(gelu(fc1(x))) with the exact GELU, from weights named as in a state dict."""

    def apply(rows: Tensor) -> Tensor:
        inner = _linear(rows, weights, "fc1")
        return _linear(0.5 * inner * (1 + torch.erf(inner / math.sqrt(2))), weights, "fc2")

    return apply


def swiglu_expert(weights: dict[str, Tensor]) -> Expert:
    """down(silu(gate(x)) * up(x)), from weights named as in a state dict."""

    def apply(rows: Tensor) -> Tensor:
        gate = _linear(rows, weights, "gate")
        return _linear(gate * torch.sigmoid(gate) * _linear(rows, weights, "up"), weights, "down")

    return apply


def _linear(rows: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    product = rows @ weights[f"{name}.weight"].T
    return product + weights[f"{name}.bias"] if f"{name}.bias" in weights else product


def moe_reference(
    config: MoEConfig,
    gate_ED: Tensor,
    experts: Sequence[Expert],
    shards: Sequence[Tensor],
    used_tokens: Sequence[Tensor] | None = None,
    bias_E: Tensor | None = None,
    training: bool = True,
    routes: Sequence[list[list[int]]] | None = None,
) -> list[ShardOutput]:
    """One output a shard. The gate computes in the gate's dtype, the experts in that of the shards.

    `routes`: the experts of each shard's tokens, where a record says them and not the gate.
    """
    used = [torch.ones(len(x_TD)) for x_TD in shards] if used_tokens is None else used_tokens
    logits = [x_TD.to(gate_ED.dtype) @ gate_ED.T for x_TD in shards]
    scores = [torch.softmax(l_TE, dim=1) if config.score == "softmax" else torch.sigmoid(l_TE) for l_TE in logits]
    groups = config.n_group, config.topk_group
    choices = [choose(s_TE, config.top_k, u_T, bias_E, *groups) for s_TE, u_T in zip(scores, used, strict=True)]
    choices = choices if routes is None else list(routes)
    losses = auxiliary_losses(scores, choices, config)
    outputs = []
    for x_TD, logits_TE, scores_TE, chosen, aux in zip(shards, logits, scores, choices, losses, strict=True):
        kept = keep(chosen, scores_TE, config, _capacity(config, len(x_TD), training))
        z = (torch.logsumexp(logits_TE, dim=1) ** 2).mean() if len(x_TD) else logits_TE.sum()
        counts = [sum(e in experts_of_token for experts_of_token in chosen) for e in range(config.num_experts)]
        weighted = (config.aux_loss_weight * aux if config.balance == "aux_loss" else 0.0) + config.z_loss_weight * z
        outputs.append(
            ShardOutput(
                output_TD=combine(x_TD, kept, scores_TE, experts, config),
                aux_loss=aux,
                z_loss=z,
                l_aux=weighted,
                exp_counts_E=counts,
                num_dropped=sum(counts) - sum(len(experts_of_token) for experts_of_token in kept),
                choices=chosen,
            )
        )
    return outputs


def choose(
    scores_TE: Tensor, top_k: int, used: Tensor, bias_E: Tensor | None, n_group: int = 1, topk_group: int = 1
) -> list[list[int]]:
    """Each token's experts, the best first; none for a token that is not used.

    They are of the groups whose best two scores have the largest sums (DeepSeek-V3, section 2.1.2).
    """
    ranked_TE = scores_TE if bias_E is None else scores_TE + bias_E
    size, choices = scores_TE.shape[1] // n_group, []
    for token, row in enumerate(ranked_TE.tolist()):
        worth = [sum(sorted(row[first : first + size])[-2:]) for first in range(0, len(row), size)]
        visited = sorted(range(n_group), key=lambda g, worth=worth: -worth[g])[:topk_group]
        best_first = sorted((e for e in range(len(row)) if e // size in visited), key=lambda e: (-row[e], e))
        choices.append(best_first[:top_k] if used[token] else [])
    return choices


def keep(choices: list[list[int]], scores_TE: Tensor, config: MoEConfig, capacity: int | None) -> list[list[int]]:
    """The choices that find a place in their expert's capacity."""
    if capacity is None:
        return choices
    queue: list[list[int]] = [[] for _ in range(config.num_experts)]  # tokens in the order in which they are served
    for place in range(config.top_k):
        for token, chosen in enumerate(choices):
            if chosen:
                queue[chosen[place]].append(token)
    if config.drop_policy == "score":
        for expert, tokens in enumerate(queue):
            scores = scores_TE[:, expert].tolist()
            tokens.sort(key=lambda token, scores=scores: -scores[token])
    served = [set(tokens[:capacity]) for tokens in queue]
    return [[e for e in chosen if token in served[e]] for token, chosen in enumerate(choices)]


def auxiliary_losses(scores: list[Tensor], choices: list[list[list[int]]], config: MoEConfig) -> list[Tensor]:
    """Each shard's E * sum_e(mean score * share of the choices), as DeepSpeed counts them for k = 1, 2 and more.

    With balance_scope "group" means and shares are those of all tokens of the shard's expert-parallel group, and a
    shard's part of the mean is `ep_size` times its own tokens' part: the mean over shards is the group's loss.
    """
    size = config.ep_size if config.balance_scope == "group" else 1
    losses = []
    for first in range(0, len(scores), size):
        group = range(first, first + size)
        num_tokens = sum(len(scores[shard]) for shard in group)
        for shard in group:
            probs_TE = scores[shard] / (scores[shard].sum(1, keepdim=True) if config.score == "sigmoid" else 1)
            loss = probs_TE.sum() * 0
            for expert in range(config.num_experts if num_tokens else 0):
                chosen = [e for s in group for token in choices[s] for e in (token[:1] if config.top_k == 2 else token)]
                share = chosen.count(expert) / num_tokens / (config.top_k if config.top_k > 2 else 1)
                loss = loss + config.num_experts * size * probs_TE[:, expert].sum() / num_tokens * share
            losses.append(loss)
    return losses


def combine(
    x_TD: Tensor, kept: list[list[int]], scores_TE: Tensor, experts: Sequence[Expert], config: MoEConfig
) -> Tensor:
    """Each token's weighted sum of its experts' outputs, accumulated in the gate's dtype."""
    is_kept_TE = torch.zeros_like(scores_TE, dtype=torch.bool)
    for token, chosen in enumerate(kept):
        is_kept_TE[token, chosen] = True
    weights_TE = torch.where(is_kept_TE, scores_TE, 0)
    if config.renormalizes:
        sums_T1 = weights_TE.sum(1, keepdim=True)
        weights_TE = weights_TE / torch.where(sums_T1 > 0, sums_T1, 1)
    total_TD = torch.zeros_like(x_TD, dtype=scores_TE.dtype)
    for index, expert in enumerate(experts):
        tokens = is_kept_TE[:, index].nonzero()[:, 0]
        if len(tokens):
            rows = expert(x_TD[tokens]).to(total_TD.dtype)
            total_TD = total_TD.index_add(0, tokens, weights_TE[tokens, index][:, None] * rows)
    return total_TD.to(x_TD.dtype)


def _capacity(config: MoEConfig, num_tokens: int, training: bool) -> int | None:
    """GShard's capacity of an expert for one rank's tokens."""
    factor = config.capacity_factor if training else config.eval_capacity_factor
    if factor is None:
        return None
    return max(math.ceil(num_tokens * config.top_k * factor / config.num_experts), config.min_capacity)
