"""Rotated queries and keys out of one projection, plain and by Triton's interpreter, against autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ds_moe_ep.kernels import rotary
from ds_moe_ep.kernels.rotary import split_rotated
from tests.kernels.interpreter import under_interpreter

TOLERANCE = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
SHAPES = [(1, 1, 1, 2), (2, 5, 3, 6), (1, 3, 2, 512), (2, 3, 20, 64), (0, 3, 2, 8)]  # sequences, tokens, heads, width


def written_out(qkv_BSW: Tensor, cos: Tensor, sin: Tensor, head_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same by complex numbers."""
    angles = torch.complex(cos, sin)

    def turned(part: Tensor) -> Tensor:
        pairs = torch.complex(*part.chunk(2, dim=-1)) * angles
        return torch.cat((pairs.real, pairs.imag), -1)

    query, key, value = qkv_BSW.unflatten(-1, (-1, 3, head_size)).transpose(1, 3).unbind(1)
    return turned(query), turned(key), value


def check(shape: tuple[int, int, int, int], dtype: torch.dtype, use_triton: bool) -> None:
    num_sequences, num_tokens, num_heads, head_size = shape
    torch.manual_seed(0)
    qkv_BSW = torch.randn(num_sequences, num_tokens, 3 * num_heads * head_size).to(dtype).requires_grad_()
    exact_BSW = qkv_BSW.detach().double().requires_grad_()
    angle = torch.randn(num_tokens, head_size // 2)
    cos, sin = angle.cos(), angle.sin()
    ours = split_rotated(qkv_BSW, (cos, sin), head_size, use_triton)
    exact = written_out(exact_BSW, cos.double(), sin.double(), head_size)
    for one, other in zip(ours, exact, strict=True):
        assert one.dtype == dtype and one.shape == (num_sequences, num_heads, num_tokens, head_size)
        torch.testing.assert_close(
            one.detach().double(), other.detach(), rtol=2 * TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )
    weights = [torch.randn(one.shape, dtype=torch.float64) for one in ours]
    (got,) = torch.autograd.grad(ours, qkv_BSW, [w.to(dtype) for w in weights])
    (expected,) = torch.autograd.grad(exact, exact_BSW, [w.to(dtype).double() for w in weights])
    torch.testing.assert_close(got.double(), expected, rtol=2 * TOLERANCE[dtype], atol=2 * TOLERANCE[dtype])
    if qkv_BSW.numel():
        other = split_rotated(qkv_BSW, (cos, -sin), head_size, use_triton)
        assert not torch.allclose(other[0], ours[0], atol=1e-2) and torch.equal(other[2], ours[2])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_plain_torch_turns_pairs_as_complex_numbers_do(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check(shape, dtype, use_triton=False)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@under_interpreter
def test_the_kernel_turns_pairs_as_complex_numbers_do(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check(shape, dtype, use_triton=True)


@under_interpreter
def test_gradients_of_any_strides_are_taken_as_they_lie() -> None:
    angle = torch.randn(4, 8)
    results = []
    for use_triton in (False, True):
        qkv_BSW = torch.linspace(0, 1, 2 * 4 * 96).view(2, 4, 96).requires_grad_()
        query, key, value = split_rotated(qkv_BSW, (angle.cos(), angle.sin()), 16, use_triton)
        (query.transpose(1, 2).square().sum() + key.sum() + (value * value).sum()).backward()
        results.append(qkv_BSW.grad)
    torch.testing.assert_close(*results)


def test_blocks_of_positions_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv_BSW, angle = torch.randn(2, 9, 96).bfloat16(), torch.randn(9, 8)
    whole = split_rotated(qkv_BSW, (angle.cos(), angle.sin()), 16)
    monkeypatch.setattr(rotary, "BLOCK_ELEMENTS", 2 * 96 * 2)
    assert len(rotary._positions(qkv_BSW)) == 5
    cut = split_rotated(qkv_BSW, (angle.cos(), angle.sin()), 16)
    assert all(torch.equal(one, other) for one, other in zip(whole, cut, strict=True))
