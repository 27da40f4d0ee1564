"""torch's products of half-precision numbers into fp32, which CUDA alone has, on the CPU and by its releases' rules.

Rules read from aten/src/ATen/native/cuda/Blas.cpp: everything that some release before pytorch/pytorch#167931 demands
or leaves undone, and those behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Release = Literal["older", "newer"]


class CudaProducts(TorchDispatchMode):
    """Computes aten's products with an `out_dtype`, and raises where a release would."""

    def __init__(self, release: Release) -> None:
        super().__init__()
        self.release = release
        self.called: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().removeprefix("aten::")
        if name == "mm.dtype":
            self.called.append(name)
            left, right, out_dtype = args
            check_types(left, right, out_dtype)
            return left.to(out_dtype) @ right.to(out_dtype)
        if name in ("addmm.dtype", "addmm.dtype_out", "baddbmm.dtype", "baddbmm.dtype_out"):
            self.called.append(name)
            return self._sum(name, *args, **kwargs)
        return func(*args, **kwargs)

    def _sum(
        self, name: str, start: Tensor, left: Tensor, right: Tensor, out_dtype: torch.dtype,
        beta: float = 1, alpha: float = 1, out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        check_types(left, right, out_dtype)
        shape = (*left.shape[:-1], right.shape[-1])
        if self.release == "older" and name.startswith("addmm"):
            assert start.dtype == right.dtype, f"self and mat2 must have the same dtype, but got {start.dtype}"
        if self.release == "older" and name.startswith("baddbmm"):
            assert start.shape == shape, "self must have the same shape as the output"
            assert out is None or out is start, "the result begins with what lies in `out`, not with self"
        product = alpha * (left.to(out_dtype) @ right.to(out_dtype))
        whole = product if beta == 0 else beta * start.to(out_dtype) + product  # not a number times 0 is 0 here
        return whole if out is None else out.copy_(whole)


def check_types(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> None:
    assert left.dtype == right.dtype, "input dtypes must be the same"
    is_wide = out_dtype == torch.float32 and left.dtype in (torch.float16, torch.bfloat16)
    assert is_wide or out_dtype == left.dtype, "out_dtype must be the same as input dtype or fp32 for fp16/bf16 inputs"


@contextmanager
def as_on_cuda(release: Release) -> Iterator[CudaProducts]:
    """A scope in which tensors of the CPU take the branches of those on CUDA; its products obey a release of torch."""
    with (
        mock.patch.object(torch.Tensor, "is_cuda", property(lambda tensor: True)),
        mock.patch.object(torch.Tensor, "is_cpu", property(lambda tensor: False)),
        CudaProducts(release) as products,
    ):
        yield products
