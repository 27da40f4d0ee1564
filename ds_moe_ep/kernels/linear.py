"""Matrix products whose rows do not depend on how many rows are computed together.

A schedule computes the same rows in pieces of any size; overlapped then equals serial bit for bit as long as each row
of a product comes out the same. In fp32 and bf16 the CPU library keeps that promise from MIN_ROWS rows on (below,
it sums along the inner dimension in another order), so fewer rows are padded. A GPU library may choose another kernel
for another number of rows; there, equality holds up to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

MIN_ROWS = 4


def linear_rows(x_RI: Tensor, matrix_IO: Tensor, bias_O: Tensor | None, out_RO: Tensor) -> None:
    """Writes x @ matrix + bias into `out`; no gradient. The matrix is a linear layer's weight, transposed."""
    num_rows = x_RI.shape[0]
    if num_rows < MIN_ROWS:
        _few_rows(x_RI, matrix_IO, bias_O, out_RO)
    elif x_RI.is_cpu and x_RI.dtype == torch.float16:  # `is_slow_half`, which each product would call
        product_RO = x_RI.float() @ matrix_IO.float()
        out_RO.copy_(product_RO if bias_O is None else product_RO + bias_O)
    elif bias_O is None:
        torch.mm(x_RI, matrix_IO, out=out_RO)
    else:
        torch.addmm(bias_O, x_RI, matrix_IO, out=out_RO)


def linear_grad_rows(dy_RO: Tensor, weight_OI: Tensor, out_RI: Tensor) -> None:
    """Writes dy @ weight, the gradient of a linear layer's input, into `out`."""
    linear_rows(dy_RO, weight_OI, None, out_RI)


def add_linear_grad_rows(dy_RO: Tensor, weight_OI: Tensor, out_RI: Tensor) -> None:
    """Adds dy @ weight to `out`. On the CPU the product is made apart, since a sum into it need not be row-stable."""
    if not dy_RO.is_cpu:
        out_RI.addmm_(dy_RO, weight_OI)
        return
    if is_slow_half(dy_RO):
        out_RI.copy_(out_RI.float() + dy_RO.float() @ weight_OI.float())
        return
    product_RI = torch.empty_like(out_RI)
    linear_grad_rows(dy_RO, weight_OI, product_RI)
    out_RI += product_RI


def add_wide_products(
    total_BMN: Tensor, left_BMI: Tensor, right_BIN: Tensor, factor: float = 1.0, before: float = 1.0
) -> None:
    """Makes fp32 sums `before` times themselves and adds factor * left @ right, of half-precision numbers on CUDA.

    The library sums in fp32 as it multiplies. Of torch's products with another type of results this one alone, with
    the sum as its own start, does so in every release: before pytorch/pytorch#167931, in 2.9 too, baddbmm neither
    widens a start of another shape nor copies one, and addmm may refuse one of another type than the factors.
    """
    if total_BMN.is_meta:  # where this form has no shapes, and one matrix stands for all
        torch.ops.aten.addmm.dtype_out(total_BMN[0], left_BMI[0], right_BIN[0], total_BMN.dtype, out=total_BMN[0])
        return
    torch.ops.aten.baddbmm.dtype_out(
        total_BMN, left_BMI, right_BIN, total_BMN.dtype, beta=before, alpha=factor, out=total_BMN
    )


def is_slow_half(rows: Tensor) -> bool:
    """True for fp16 on the CPU, whose library takes hundreds of times as long for it as for fp32."""
    return rows.dtype == torch.float16 and rows.is_cpu


def _few_rows(x_RI: Tensor, matrix_IO: Tensor, bias_O: Tensor | None, out_RO: Tensor) -> None:
    """The same as padded rows."""
    num_rows = x_RI.shape[0]
    if num_rows:
        padded = x_RI.new_zeros(MIN_ROWS, x_RI.shape[1])
        padded[:num_rows] = x_RI
        wide = out_RO.new_empty(MIN_ROWS, out_RO.shape[1])
        linear_rows(padded, matrix_IO, bias_O, wide)
        out_RO.copy_(wide[:num_rows])
