"""Matrix products of a layer's experts alone: a limit that no layer can beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ds_moe_ep.bench.candidates.cases import LayerCase, expert_ids, expert_weights

Product = tuple[Tensor, Tensor, Tensor]  # left, right, output


@dataclass(frozen=True)
class ExpertMatmuls:
    """Products whose outputs are allocated once: no bias, activation, copy or traffic."""

    products: tuple[Product, ...]

    def prepare(self) -> None:
        """Nothing: outputs are overwritten."""

    def run(self) -> None:
        for left, right, out in self.products:
            torch.mm(left, right, out=out)
        if self.products and self.products[0][0].is_cuda:
            torch.cuda.synchronize()


def expert_matmuls(case: LayerCase, rank: int, ep_size: int, device: torch.device) -> ExpertMatmuls:
    """The six products of each local expert, both passes, on the rows that it really gets."""
    local = case.num_experts // ep_size
    ids_N = torch.cat([expert_ids(case, peer).flatten() for peer in range(ep_size)])
    rows_E = torch.bincount(ids_N, minlength=case.num_experts).tolist()
    first = (rank % ep_size) * local
    products: list[Product] = []
    for expert in range(first, first + local):
        weights = expert_weights(case, expert)
        w1_FD, w2_DF = weights.w1_FD.to(device), weights.w2_DF.to(device)
        x_RD = torch.randn(rows_E[expert], case.hidden_size, device=device)
        h_RF = torch.randn(rows_E[expert], case.width, device=device)
        out_RD, out_RF = torch.empty_like(x_RD), torch.empty_like(h_RF)
        dw1_FD, dw2_DF = torch.empty_like(w1_FD), torch.empty_like(w2_DF)
        products += [(x_RD, w1_FD.t(), out_RF), (h_RF, w2_DF.t(), out_RD)]  # forward
        products += [(x_RD, w2_DF, out_RF), (h_RF, w1_FD, out_RD)]  # dh, dx
        products += [(x_RD.t(), h_RF, dw2_DF), (h_RF.t(), x_RD, dw1_FD)]  # dw2, dw1
    return ExpertMatmuls(tuple(products))
