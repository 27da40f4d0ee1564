"""Choices in the order of their experts: a stable sort whose keys are few, with both of its row maps and the counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ds_moe_ep.kernels.choose import runs_triton


@dataclass(frozen=True)
class SortedChoices:
    """N = T*K choices by expert, in their own order within each; unused ones come last.

    `choice_of_row_N` says which choice fills a row, `row_of_choice_TK` which row a choice fills; `count_E` has the used
    choices of each expert.
    """

    choice_of_row_N: Tensor
    row_of_choice_TK: Tensor
    count_E: Tensor


def count_choices(expert_ids_TK: Tensor, is_used_TK: Tensor | None, num_experts: int) -> Tensor:
    """How many used k-th choices each expert has [K, E]. Local; no device sync."""
    ids_KT = expert_ids_TK.t()
    ones_KT = torch.ones_like(ids_KT) if is_used_TK is None else is_used_TK.t().to(ids_KT.dtype)
    return ids_KT.new_zeros(ids_KT.shape[0], num_experts).scatter_add_(1, ids_KT, ones_KT)


def sort_choices(
    expert_ids_TK: Tensor,
    is_used_TK: Tensor | None,
    num_experts: int,
    use_triton: bool | None = None,
    count_E: Tensor | None = None,
) -> SortedChoices:
    """The choices sorted by expert, those that are not used behind all others. Local; no device sync.

    `count_E`: the used choices of each expert, where the caller has counted them.
    """
    if use_triton is not False and expert_ids_TK.dtype == torch.int64 and _runs_triton(use_triton, expert_ids_TK):
        from ds_moe_ep.kernels.compiled import sort as kernels

        return SortedChoices(*kernels.sort_choices(expert_ids_TK.contiguous(), is_used_TK, num_experts))
    ids_N = expert_ids_TK.flatten()
    if is_used_TK is not None:
        ids_N = torch.where(is_used_TK.flatten(), ids_N, num_experts)
    choice_of_row_N = ids_N.argsort(stable=True)
    if count_E is None:
        count_E = ids_N.new_zeros(num_experts + 1).scatter_add_(0, ids_N, torch.ones_like(ids_N))[:num_experts]
    rows_N = torch.arange(ids_N.shape[0], device=ids_N.device)
    row_of_choice_N = torch.empty_like(choice_of_row_N).scatter_(0, choice_of_row_N, rows_N)
    return SortedChoices(choice_of_row_N, row_of_choice_N.view_as(expert_ids_TK), count_E)


def _runs_triton(use_triton: bool | None, ids_TK: Tensor) -> bool:
    return runs_triton(use_triton, ids_TK.new_empty(0, dtype=torch.float32))  # the kernels know one type of index
