"""Weight gradients as sums of products: dy.T @ x over blocks of rows, added up in at least fp32.

Where the library multiplies half-precision numbers into an fp32 sum, a further product costs no pass over memory beside
its own. The CPU library does not: there each product is made in the rows' type, and added.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_moe_ep.kernels.linear import add_wide_products, is_slow_half

FP32 = torch.float32
Weights = dict[str, Tensor | None]


def add_weight_product(total_OI: Tensor | None, dy_nO: Tensor, x_nI: Tensor) -> Tensor:
    """The sum with dy.T @ x added to it, in place where it is at least fp32; None stands for no products yet."""
    sum_type = torch.promote_types(x_nI.dtype, FP32)
    if x_nI.dtype == sum_type:
        return dy_nO.t() @ x_nI if total_OI is None else total_OI.addmm_(dy_nO.t(), x_nI)
    if is_slow_half(x_nI):
        return add_weight_product(total_OI, dy_nO.float(), x_nI.float())
    if x_nI.is_cpu:
        product_OI = dy_nO.t() @ x_nI
        return product_OI if total_OI is None else total_OI.to(sum_type) + product_OI
    if total_OI is None:
        return torch.mm(dy_nO.t(), x_nI, out_dtype=sum_type)
    add_wide_products(total_OI.unsqueeze(0), dy_nO.t().unsqueeze(0), x_nI.unsqueeze(0))
    return total_OI


class GradSums:
    """The gradients of one expert's weights. None for what is frozen.

    One product over all rows is made in the weights' own type: the matrix unit sums it in fp32, and rounds once.
    Several are summed at least in fp32.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self._trained = {name for name, weight in weights.items() if weight is not None and weight.requires_grad}
        self._sums: dict[str, Tensor | None] = {}

    def add(self, part: str, x_nI: Tensor, dy_nO: Tensor, is_only: bool = False) -> None:
        """Adds the gradients of one Linear's weight and bias, from rows of its inputs and its outputs' gradient.

        `is_only`: nothing else will be added to them.
        """
        if not x_nI.shape[0]:
            return
        weight, bias, sums = f"{part}.weight", f"{part}.bias", self._sums
        if weight in self._trained:
            if is_only and not is_slow_half(x_nI):
                sums[weight] = dy_nO.t() @ x_nI
            else:
                sums[weight] = add_weight_product(sums.get(weight), dy_nO, x_nI)
        if bias in self._trained:
            part_O = dy_nO.sum(0)
            sums[bias] = part_O if is_only else sum_of(sums.get(bias), part_O)

    def take(self) -> list[Tensor | None]:
        """The sums in the weights' own type and order."""
        sums, self._sums = self._sums, {}
        return [
            in_type_of(w, sums.pop(name, None), name in self._trained)
            for name, w in self.weights.items()
            if w is not None
        ]


def in_type_of(weight: Tensor, grad: Tensor | None, is_trained: bool) -> Tensor | None:
    """A parameter's gradient in its own type: zeros where no row gave one, None where it is frozen."""
    if grad is not None:
        return grad.to(weight.dtype)
    return torch.zeros_like(weight) if is_trained else None


def sum_of(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """The sum of two parts of a gradient, at least in fp32: in bf16 every part would cost a rounding."""
    if total is None or part is None:
        return part if total is None else total
    return total.to(torch.promote_types(total.dtype, torch.float32)) + part
