"""A plain layer of two all-to-all-v: what a user writes who takes the field's usual exchange and nothing else.

Route, sort the choices by expert, exchange the counts, send each rank its rows in one collective, compute, send the
results back in another one. The default group carries everything; no rank asks another whether it is in the same pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_moe_ep.bench.candidates.cases import LayerCase

Splits = list[int]


class AllToAllLayer(nn.Module):
    """One layer on this rank, with the expert parameters and the answers of DeepSpeed's."""

    def __init__(self, case: LayerCase, num_ranks: int) -> None:
        super().__init__()
        self.num_ranks, self.top_k = num_ranks, case.top_k
        self.gate = nn.ModuleDict({"wg": nn.Linear(case.hidden_size, case.num_experts, bias=False)})
        experts = nn.ModuleList(
            nn.Sequential(nn.Linear(case.hidden_size, case.width), nn.GELU(), nn.Linear(case.width, case.hidden_size))
            for _ in range(case.num_experts // num_ranks)
        )
        self.experts = nn.ModuleDict({"deepspeed_experts": experts})

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output [T, D], the auxiliary loss of Switch and GShard, and the choices per expert [E]."""
        scores_TE = self.gate["wg"](x_TD).softmax(1)
        weights_TK, ids_TK = scores_TE.topk(self.top_k, dim=1)
        num_experts = scores_TE.shape[1]
        first_E = torch.bincount(ids_TK[:, 0], minlength=num_experts)
        loss = num_experts * (scores_TE.mean(0) * (first_E / len(x_TD))).sum()
        if self.top_k > 1:
            weights_TK = weights_TK / weights_TK.sum(1, keepdim=True)
        choice_of_row_N = ids_TK.flatten().argsort(stable=True)
        token_of_row_N = choice_of_row_N // self.top_k
        count_E = torch.bincount(ids_TK.flatten(), minlength=num_experts)
        received_PL = torch.empty_like(count_E).view(self.num_ranks, -1)
        dist.all_to_all_single(received_PL, count_E.view(self.num_ranks, -1))
        leaving, coming = count_E.view(self.num_ranks, -1).sum(1).tolist(), received_PL.sum(1).tolist()
        rows_RD = _Exchange.apply(x_TD[token_of_row_N], coming, leaving)  # type: ignore[no-untyped-call]
        results_ND = _Exchange.apply(self._compute(rows_RD, received_PL), leaving, coming)  # type: ignore[no-untyped-call]
        weights_N1 = weights_TK.flatten()[choice_of_row_N].unsqueeze(1)
        y_TD = torch.zeros_like(x_TD).index_add(0, token_of_row_N, results_ND * weights_N1)
        return y_TD, loss, count_E

    def _compute(self, rows_RD: Tensor, received_PL: Tensor) -> Tensor:
        """The experts' outputs for rows in the order in which they came, by (peer, expert)."""
        experts = self.experts["deepspeed_experts"]
        assert isinstance(experts, nn.ModuleList)
        if len(experts) == 1:
            only_RD: Tensor = experts[0](rows_RD)
            return only_RD
        expert_of_row_R = torch.arange(len(experts)).repeat(self.num_ranks).repeat_interleave(received_PL.flatten())
        by_expert_R = expert_of_row_R.argsort(stable=True)
        parts = rows_RD[by_expert_R].split(received_PL.sum(0).tolist())
        out_RD = torch.cat([expert(part) for expert, part in zip(experts, parts, strict=True)])
        return out_RD[by_expert_R.argsort()]


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, coming: Splits, leaving: Splits) -> Tensor:
        ctx.splits = coming, leaving
        return _exchanged(rows_ND, coming, leaving)

    @staticmethod
    def backward(ctx: Any, d_rows_ND: Tensor) -> tuple[Tensor, None, None]:
        coming, leaving = ctx.splits
        return _exchanged(d_rows_ND, leaving, coming), None, None


def _exchanged(rows_ND: Tensor, coming: Splits, leaving: Splits) -> Tensor:
    received_RD = rows_ND.new_empty(sum(coming), rows_ND.shape[1])
    dist.all_to_all_single(received_RD, rows_ND.contiguous(), coming, leaving)
    return received_RD
