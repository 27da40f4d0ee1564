"""A row's product is the same whatever rows are computed with it."""

from __future__ import annotations

import pytest
import torch

from ds_moe_ep.kernels.linear import MIN_ROWS, linear_grad_rows, linear_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "inner"), [(16, 32), (64, 128), (256, 1024)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_any_run_of_rows_equals_the_same_rows_of_the_whole(
    dtype: torch.dtype, width: int, inner: int, with_bias: bool
) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(70, width, dtype=dtype), torch.randn(inner, width, dtype=dtype)
    bias = torch.randn(inner, dtype=dtype) if with_bias else None
    whole, back = torch.empty(70, inner, dtype=dtype), torch.empty(70, width, dtype=dtype)
    linear_rows(x, weight.t(), bias, whole)
    linear_grad_rows(whole, weight, back)
    torch.testing.assert_close(whole, torch.nn.functional.linear(x, weight, bias))
    for num_rows in (0, 1, 2, 3, 4, 5, 7, 16, 33, 64):
        for start in (0, 3):
            rows = slice(start, start + num_rows)
            part, back_part = torch.empty_like(whole[rows]), torch.empty_like(back[rows])
            linear_rows(x[rows], weight.t(), bias, part)
            linear_grad_rows(whole[rows], weight, back_part)
            assert torch.equal(part, whole[rows]), f"{num_rows} rows from {start}"
            assert torch.equal(back_part, back[rows]), f"{num_rows} rows from {start}"


def test_the_padding_is_needed_for_fp32_rows_below_the_minimum() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(64, 256), torch.randn(1024, 256)
    whole = x @ weight.t()
    differs = [n for n in range(1, MIN_ROWS) if not torch.equal(x[:n] @ weight.t(), whole[:n])]
    if not differs:
        pytest.skip("this CPU library sums alike for every number of rows: the padding is not needed here")
    assert differs
