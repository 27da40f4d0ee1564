"""Products of half-precision numbers into fp32 as CUDA makes them: the calls that every release of torch takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ds_moe_ep.kernels import attention_path
from ds_moe_ep.kernels.attention import blockwise_causal_attention
from ds_moe_ep.kernels.linear import add_wide_products
from ds_moe_ep.kernels.weight_sums import add_weight_product
from tests.kernels.cuda_products import Release, as_on_cuda
from tests.kernels.test_attention import inputs, results, torchs

EACH_RELEASE = pytest.mark.parametrize("release", ["older", "newer"])
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@EACH_RELEASE
@HALVES
def test_weight_gradients_of_several_blocks_are_summed_in_fp32(release: Release, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    blocks = [(torch.randn(rows, 6).to(dtype), torch.randn(rows, 4).to(dtype)) for rows in (3, 8, 5)]
    total: Tensor | None = None
    with as_on_cuda(release) as products:
        for dy, x in blocks:
            total = add_weight_product(total, dy, x)
    assert total is not None and total.dtype == torch.float32
    assert products.called == ["mm.dtype", *["baddbmm.dtype_out"] * 2]
    exact = sum((dy.double().t() @ x.double() for dy, x in blocks), torch.zeros(6, 4, dtype=torch.float64))
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-5)


@EACH_RELEASE
@HALVES
def test_attention_by_blocks_equals_torchs(
    release: Release, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_path, "MIN_QUERIES", 5)
    monkeypatch.setattr(attention_path, "BLOCK_BYTES", 1)
    tensors = inputs(17, 8, dtype)
    expected = results(torchs, [each.detach().double().requires_grad_() for each in tensors])
    with as_on_cuda(release) as products:
        found = results(blockwise_causal_attention, tensors)
    assert set(products.called) == {"baddbmm.dtype_out"}
    for ours, exact in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=2**-6 * float(exact.abs().max()))


@EACH_RELEASE
def test_what_lay_in_the_sum_counts_as_often_as_asked_for(release: Release) -> None:
    left, right = torch.ones(1, 2, 3).half(), torch.ones(1, 3, 2).half()
    for before, expected in ((0.0, 6.0), (1.0, 7.0), (0.5, 6.5)):
        total = torch.full((1, 2, 2), float("nan") if before == 0 else 1.0)
        with as_on_cuda(release):
            add_wide_products(total, left, right, 2.0, before)
        assert (total == expected).all()


def test_forms_that_an_older_release_refuses_are_told_from_those_that_all_take() -> None:
    aten, fp32 = torch.ops.aten, torch.float32
    total, left, right = torch.zeros(1, 2, 2), torch.ones(1, 2, 3).half(), torch.ones(1, 3, 2).half()
    refused = {
        "must have the same dtype": lambda: aten.addmm.dtype_out(total[0], left[0], right[0], fp32, out=total[0]),
        "must have the same shape": lambda: aten.baddbmm.dtype(torch.zeros(1), left, right, fp32, beta=0),
        "begins with what lies": lambda: aten.baddbmm.dtype_out(total, left, right, fp32, out=torch.empty(1, 2, 2)),
    }
    for message, call in refused.items():
        with as_on_cuda("older"), pytest.raises(AssertionError, match=message):
            call()
        with as_on_cuda("newer"):
            call()
