"""Matrix products of many experts in one launch: rows lie by expert, and each expert's rows meet its own matrix.

A batched product where all experts have as many rows, as with a capacity; torch's grouped product where it is one
kernel; a product per expert else. torch._grouped_mm is one kernel for bf16 on CUDA devices of compute capability 9 and
10 alone: elsewhere on CUDA it copies the ends of the groups to the host, which waits for them, and loops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

CAPABILITIES = (9, 10)  # major, of the devices for which torch has the kernel
CPU_TYPES = (torch.float32, torch.bfloat16, torch.float16)  # there it loops without a wait
ALIGNMENT_BYTES = 16  # of matrices and of their rows, as torch's grouped product demands
ONES = 8  # columns of the narrowest aligned matrix of half-precision numbers


@dataclass(frozen=True)
class Groups:
    """Rows per expert [L], and on the device the row behind each expert's last one, int32 [L]."""

    rows_L: tuple[int, ...]
    ends_L: Tensor

    @classmethod
    def of(cls, rows_L: Sequence[int], device: torch.device) -> Groups:
        """From numbers of the host; it waits for their copy to the device."""
        return cls(tuple(rows_L), torch.tensor(list(accumulate(rows_L)), dtype=torch.int32, device=device))

    @cached_property
    def num_rows(self) -> int:
        return sum(self.rows_L)

    @cached_property
    def equal(self) -> tuple[int, int] | None:
        """The span of adjacent experts that have all rows, equally many each; None where there are no such ones."""
        used = [expert for expert, rows in enumerate(self.rows_L) if rows]
        if not used or len({self.rows_L[expert] for expert in used}) > 1 or used[-1] - used[0] >= len(used):
            return None
        return used[0], used[-1] + 1

    def spans(self) -> list[tuple[int, int, int]]:
        """Each expert with rows: its number, its first row, the row behind its last one."""
        ends = list(accumulate(self.rows_L))
        return [
            (expert, end - rows, end) for expert, (rows, end) in enumerate(zip(self.rows_L, ends, strict=True)) if rows
        ]

    def expert_of_row(self) -> Tensor:
        """The expert of each row, on the device."""
        rows_L = torch.diff(self.ends_L, prepend=self.ends_L.new_zeros(1))
        experts_L = torch.arange(len(self.rows_L), device=self.ends_L.device)
        return torch.repeat_interleave(experts_L, rows_L, output_size=self.num_rows)


def is_one_kernel(rows_nI: Tensor) -> bool:
    """True where torch's grouped product of such rows is one kernel, or a loop that waits for nothing."""
    if rows_nI.is_cuda:
        is_known = torch.version.hip is None and torch.cuda.get_device_capability(rows_nI.device)[0] in CAPABILITIES
        return is_known and rows_nI.dtype == torch.bfloat16
    return rows_nI.dtype in (CPU_TYPES if rows_nI.is_cpu else (torch.bfloat16,))  # torch counts bf16 on meta tensors


def lie_together(matrices: Sequence[Tensor]) -> Tensor | None:
    """The matrices as one tensor [L, ...] over their own memory; None where they lie at other than equal distances."""
    first = matrices[0]
    offsets = [matrix.storage_offset() for matrix in matrices]
    step = offsets[1] - offsets[0] if len(offsets) > 1 else first.numel()
    is_even = offsets == [offsets[0] + step * index for index in range(len(offsets))] and step >= first.numel()
    storage = first.untyped_storage()._cdata
    alike = all(
        matrix.shape == first.shape
        and matrix.dtype == first.dtype
        and matrix.is_contiguous()
        and matrix.untyped_storage()._cdata == storage
        for matrix in matrices
    )
    if not (alike and is_even) or step * first.element_size() % ALIGNMENT_BYTES or not _is_aligned(first):
        return None
    return first.detach().as_strided((len(matrices), *first.shape), (step, *first.stride()))


def _is_aligned(matrix: Tensor) -> bool:
    rows_are = matrix.dim() < 2 or matrix.shape[-1] * matrix.element_size() % ALIGNMENT_BYTES == 0
    return rows_are and (matrix.is_meta or matrix.data_ptr() % ALIGNMENT_BYTES == 0)


def grouped_rows(x_nI: Tensor, matrices_LIO: Tensor, groups: Groups) -> Tensor:
    """Rows [n, O]: each expert's rows times its matrix. No gradient; no device sync."""
    if (equal := groups.equal) is not None:
        first, last = equal
        return torch.bmm(x_nI.view(last - first, -1, x_nI.shape[1]), matrices_LIO[first:last]).flatten(0, 1)
    if x_nI.numel() and is_one_kernel(x_nI) and _takes(x_nI, matrices_LIO):
        return torch._grouped_mm(x_nI, matrices_LIO, groups.ends_L)
    y_nO = x_nI.new_empty(len(x_nI), matrices_LIO.shape[2])
    for expert, start, stop in groups.spans():
        torch.mm(x_nI[start:stop], matrices_LIO[expert], out=y_nO[start:stop])
    return y_nO


def grouped_weights(dy_nO: Tensor, x_nI: Tensor, groups: Groups) -> Tensor:
    """Matrices [L, O, I]: dy.T @ x over each expert's rows, zeros for one without rows. No gradient; no device sync."""
    num_experts, shape = len(groups.rows_L), (dy_nO.shape[1], x_nI.shape[1])
    equal = groups.equal
    if equal == (0, num_experts):
        dy, x = (rows.view(num_experts, -1, rows.shape[1]) for rows in (dy_nO, x_nI))
        return torch.bmm(dy.transpose(1, 2), x)
    if groups.num_rows and is_one_kernel(x_nI) and _takes(x_nI, dy_nO):
        made_LOI = torch._grouped_mm(dy_nO.t(), x_nI, groups.ends_L)
    else:
        made_LOI = x_nI.new_empty(num_experts, *shape)
        for expert, start, stop in groups.spans():
            torch.mm(dy_nO[start:stop].t(), x_nI[start:stop], out=made_LOI[expert])
    for expert, rows in enumerate(groups.rows_L):
        if not rows:
            made_LOI[expert].zero_()
    return made_LOI


def grouped_sums(dy_nO: Tensor, groups: Groups) -> Tensor:
    """The sums [L, O] of each expert's rows: the product with a few columns of ones, summed as a product is."""
    sums_LO: Tensor = grouped_weights(dy_nO, dy_nO.new_ones(len(dy_nO), ONES), groups)[:, :, 0]
    return sums_LO


def add_of_expert(rows_nO: Tensor, bias_LO: Tensor, groups: Groups) -> None:
    """Adds to each row the vector of its expert."""
    rows_nO += bias_LO.index_select(0, groups.expert_of_row())


def _takes(*matrices: Tensor) -> bool:
    """True where the rows of each matrix are as wide as torch's grouped product demands."""
    return all(matrix.shape[-1] * matrix.element_size() % ALIGNMENT_BYTES == 0 for matrix in matrices) and all(
        matrix.shape[-2] * matrix.element_size() % ALIGNMENT_BYTES == 0 for matrix in matrices if matrix.dim() == 3
    )
