"""A kernel that shows whether Triton compiles here. Importing this file needs triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, empty_like

BLOCK = 128


@triton.jit  # type: ignore[untyped-decorator]
def _add_one_kernel(
    values_pointer: tl.tensor, sums_pointer: tl.tensor, size: tl.tensor, BLOCK_SIZE: tl.constexpr
) -> None:
    places = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    inside = places < size
    values = tl.load(values_pointer + places, mask=inside)
    tl.store(sums_pointer + places, values + 1, mask=inside)


def add_one(values: Tensor) -> Tensor:
    """Each value plus one, by a Triton kernel."""
    sums = empty_like(values)
    _add_one_kernel[(triton.cdiv(values.numel(), BLOCK),)](values, sums, values.numel(), BLOCK_SIZE=BLOCK)
    return sums
