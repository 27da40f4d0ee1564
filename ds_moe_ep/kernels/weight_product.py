"""Weight gradients as sums of products: dy.T @ x over blocks of rows, added up in at least fp32.

Where the library multiplies half-precision numbers into an fp32 sum, a further product costs no pass over memory beside
its own. The CPU library does not: there each product is made in the rows' type, and added.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP32 = torch.float32


def add_weight_product(total_OI: Tensor | None, dy_nO: Tensor, x_nI: Tensor) -> Tensor:
    """The sum with dy.T @ x added to it, in place where it is at least fp32; None stands for no products yet."""
    sum_type = torch.promote_types(x_nI.dtype, FP32)
    if x_nI.dtype == sum_type:
        return dy_nO.t() @ x_nI if total_OI is None else total_OI.addmm_(dy_nO.t(), x_nI)
    if x_nI.is_cpu:
        product_OI = dy_nO.t() @ x_nI
        return product_OI if total_OI is None else total_OI.to(sum_type) + product_OI
    if total_OI is None:
        return torch.mm(dy_nO.t(), x_nI, out_dtype=sum_type)
    total_OI = torch.ops.aten.addmm.dtype_out(total_OI, dy_nO.t(), x_nI, sum_type, out=total_OI)
    return total_OI
