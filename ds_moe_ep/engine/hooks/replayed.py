"""Routers that DeepSpeed made, with choices of a record: weights and losses by DeepSpeed's operations, in its order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.moe.sharded_moe import TopKGate
from torch import Tensor, nn

from ds_moe_ep.errors import EngineError
from ds_moe_ep.moe.replay.tape import Chosen


def native_answer(gate: TopKGate, x_TD: Tensor, used_token: Tensor | None, chosen: Chosen) -> tuple[Any, ...]:
    """The sparse routes of a dropless `TopKGate` for these choices; without places."""
    logits_TE = F.linear(x_TD.float(), gate.wg.weight.float())
    gates_TE, ids_TK, k = F.softmax(logits_TE, dim=1), chosen.expert_ids_TK, gate.k
    is_used_TK = chosen.is_kept_TK
    if used_token is not None:
        is_used_TK = is_used_TK & (used_token.reshape(-1, 1) != 0)
    num_experts = gates_TE.shape[1]
    mask_TE = torch.zeros_like(gates_TE, dtype=torch.bool, requires_grad=False).scatter_(1, ids_TK, is_used_TK)
    first_TE = mask_TE
    if k == 2:
        first_TE = torch.zeros_like(mask_TE).scatter_(1, ids_TK[:, :1], is_used_TK[:, :1])
    mean_E, share_E = torch.mean(gates_TE, dim=0), torch.mean(first_TE.float(), dim=0)
    if k == 1:
        l_aux = torch.sum(mean_E * share_E) * num_experts
        weights_TK = (gates_TE * mask_TE).sum(dim=1, keepdim=True)
    elif k == 2:
        l_aux = torch.mean(mean_E * share_E) * num_experts * num_experts
        second_TE = mask_TE & ~first_TE
        parts = [torch.einsum("se,se->s", gates_TE, each.float()) for each in (first_TE, second_TE)]
        total_T = torch.clamp(parts[0] + parts[1], min=torch.finfo(gates_TE.dtype).eps)
        weights_TK = torch.stack([part / total_T for part in parts], 1)
    else:
        l_aux = torch.mean(mean_E * share_E) * num_experts * num_experts / k
        masked_TE = gates_TE * mask_TE
        total_T1 = torch.clamp(torch.sum(masked_TE, dim=-1, keepdim=True), min=torch.finfo(gates_TE.dtype).eps)
        weights_TK = (masked_TE / total_T1).gather(1, ids_TK)
    experts_TK = ids_TK.masked_fill(~is_used_TK, -1)
    return l_aux, None, num_experts, experts_TK.t(), None, weights_TK.t(), mask_TE.sum(0)


@contextmanager
def sent_by(router: nn.Module, chosen: Chosen | None, name: str) -> Iterator[None]:
    """A scope in which a call of AutoEP's router gives these choices; as it is with None."""
    if chosen is None:
        yield
        return
    if not chosen.is_whole:
        raise EngineError(
            f"{name}: AutoEP computes every choice, and the record leaves some out; record it with AutoEP"
        )
    router.__dict__["forward"] = partial(_autoep_answer, router, chosen.expert_ids_TK)
    try:
        yield
    finally:
        del router.__dict__["forward"]


def _autoep_answer(
    router: Any, ids_TK: Tensor, x_TD: Tensor, expert_bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(weights and experts [T, K], counts) of AutoEP's router for these choices."""
    from deepspeed.moe.ep_count import count_tokens_per_expert

    scores_TE = router.gate(x_TD).to(torch.float32)
    scores_TE = torch.sigmoid(scores_TE) if router.score_func == "sigmoid" else F.softmax(scores_TE, dim=1)
    weights_TK = scores_TE.gather(dim=1, index=ids_TK)
    if router.route_norm:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
    return weights_TK * router.route_scale, ids_TK, count_tokens_per_expert(ids_TK, router.num_experts)
