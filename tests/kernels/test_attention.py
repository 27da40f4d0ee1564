"""Attention by blocks of queries against torch's own, forward and gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ds_moe_ep.kernels import attention, attention_path
from ds_moe_ep.kernels.attention import blockwise_causal_attention
from ds_moe_ep.kernels.attention_path import queries_per_block
from tests.account.counting import Account

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-6}


def inputs(num_tokens: int, head_size: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(num_tokens)
    made = [torch.randn(2, num_tokens, 3, head_size).to(dtype).transpose(1, 2) for _ in range(3)]
    return [each.requires_grad_() for each in made]


def results(function: object, tensors: list[Tensor]) -> list[Tensor]:
    out = function(*tensors)  # type: ignore[operator]
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors, weight)]


def torchs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("num_tokens", "head_size"), [(1, 8), (17, 8), (48, 512), (33, 3)])
def test_blocks_of_any_size_equal_torchs_attention(
    num_tokens: int, head_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_path, "MIN_QUERIES", 1)
    tensors = inputs(num_tokens, head_size, dtype)
    expected = results(torchs, [each.detach().double().requires_grad_() for each in tensors])
    for per_block in (1, 5, 16, 1000):
        monkeypatch.setattr(attention_path, "BLOCK_BYTES", 4 * 6 * num_tokens * per_block)
        assert queries_per_block(2, 3, num_tokens) == per_block
        for ours, exact in zip(results(blockwise_causal_attention, tensors), expected, strict=True):
            assert ours.dtype == dtype
            scale = float(exact.abs().max())
            torch.testing.assert_close(ours.double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)


def test_keys_behind_a_query_count_nothing_and_others_do() -> None:
    query, key, value = (each.detach() for each in inputs(20, 8, torch.float32))
    out = blockwise_causal_attention(query, key, value)
    value[:, :, 12] = 1000.0
    changed = blockwise_causal_attention(query, key, value)
    assert torch.equal(out[:, :, :12], changed[:, :, :12])
    assert ((out - changed)[:, :, 12:].abs() > 0.1).all()
    everything = F.scaled_dot_product_attention(query, key, value)
    assert not torch.allclose(changed, everything, atol=0.1)


def test_scores_of_a_block_stay_within_their_bound() -> None:
    per_block = queries_per_block(1, 16, 10_000)
    assert 500 < per_block < 1000 and 4 * 16 * 10_000 * per_block <= attention_path.BLOCK_BYTES
    assert queries_per_block(64, 64, 100_000) == attention_path.MIN_QUERIES


def test_blocks_skip_what_lies_behind_them() -> None:
    seen = attention._blocks(10, 4)
    assert seen == [(slice(0, 4), slice(0, 4)), (slice(4, 8), slice(0, 8)), (slice(8, 10), slice(0, 10))]
    pairs = sum((queries.stop - queries.start) * keys.stop for queries, keys in attention._blocks(10_000, 838))
    assert pairs < 0.55 * 10_000**2


def test_a_pass_at_the_reference_jobs_sizes_keeps_few_blocks_of_scores_at_a_time() -> None:
    """Counted on tensors that are no memory: 16 heads of 512, 10,000 tokens, whose scores take 6.4 GB in all."""
    account, shape = Account(), (1, 16, 10_000, 512)
    of_tensors = 2 * math.prod(shape)  # bytes of queries, as of keys, values and what comes out
    with torch.device("meta"), account:
        query, key, value = (torch.empty(shape, dtype=torch.float16, requires_grad=True) for _ in range(3))
        out = blockwise_causal_attention(query, key, value)
        assert account.peak_bytes <= 4 * of_tensors + 4 * attention_path.BLOCK_BYTES
        torch.autograd.grad(out, (query, key, value), torch.empty_like(out))
    # Backward: their gradients, and two sums in fp32. Here products widen what they read, as on no device.
    assert account.peak_bytes <= (8 + 4) * of_tensors + 6 * attention_path.BLOCK_BYTES < 4 * 16 * 10_000**2
