"""Activations and their gradients, plain and by Triton's interpreter, against autograd in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ds_moe_ep.kernels.activation import gelu_backward, row_blocks, swiglu, swiglu_backward
from tests.kernels.interpreter import under_interpreter

TOLERANCE = {torch.float32: 4e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}  # torch's own tanh gives 4e-6 away
SHAPES = [(0, 32), (1, 1), (3, 33), (5, 1024), (2, 4096)]


def tensors(shape: tuple[int, int], dtype: torch.dtype, num: int) -> list[Tensor]:
    torch.manual_seed(0)
    made = [(3 * torch.randn(shape)).to(dtype) for _ in range(num)]
    for each in made[1:]:
        each.flatten()[:2] = torch.tensor([-30.0, 30.0][: min(2, each.numel())], dtype=dtype)
    return made


def close(ours: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), exact, rtol=4 * TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])


def check_gelu(shape: tuple[int, int], dtype: torch.dtype, approximate: str, use_triton: bool | None) -> None:
    d_active, hidden = tensors(shape, dtype, 2)
    exact = hidden.double().requires_grad_()
    active = F.gelu(exact, approximate=approximate)
    active.backward(d_active.double())
    assert exact.grad is not None
    for has_active in (True, False):
        places = [torch.full_like(hidden, float("nan")) for _ in range(2)]
        gelu_backward(d_active, hidden, places[0], places[1] if has_active else None, approximate, use_triton)
        close(places[0], exact.grad, dtype)
        if has_active:
            close(places[1], active.detach(), dtype)
    over, hidden_over = d_active.clone(), hidden.clone()
    gelu_backward(over, hidden_over, hidden_over, over, approximate, use_triton)
    close(hidden_over, exact.grad, dtype)
    close(over, active.detach(), dtype)
    crosswise = d_active.clone(), hidden.clone()
    gelu_backward(*crosswise, *crosswise, approximate, use_triton)
    close(crosswise[0], exact.grad, dtype)
    close(crosswise[1], active.detach(), dtype)


def check_swiglu(shape: tuple[int, int], dtype: torch.dtype, use_triton: bool | None) -> None:
    d_active, gate, up = tensors(shape, dtype, 3)
    exact_gate, exact_up = gate.double().requires_grad_(), up.double().requires_grad_()
    active = F.silu(exact_gate) * exact_up
    active.backward(d_active.double())
    assert exact_gate.grad is not None and exact_up.grad is not None
    # Plain torch rounds in between: silu, and its product with the gradient, to the rows' type.
    out = torch.empty_like(gate)
    swiglu(gate, up, out, use_triton)
    bound = {"rtol": 8 * TOLERANCE[dtype], "atol": 8 * TOLERANCE[dtype] * 30}
    torch.testing.assert_close(out.double(), active.detach(), **bound)
    for has_active in (True, False):
        given = [tensor.clone() for tensor in (d_active, gate, up)]
        swiglu_backward(*given, given[1], given[2], given[0] if has_active else None, use_triton)
        torch.testing.assert_close(given[1].double(), exact_gate.grad, **bound)
        torch.testing.assert_close(given[2].double(), exact_up.grad, **bound)
        torch.testing.assert_close(given[0].double(), active.detach() if has_active else d_active.double(), **bound)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_plain_gradients_equal_autograd_also_where_outputs_lie_over_inputs(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    for approximate in ("none", "tanh"):
        check_gelu(shape, dtype, approximate, use_triton=False)
    check_swiglu(shape, dtype, use_triton=False)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@under_interpreter
def test_the_kernels_gradients_equal_autograd_also_where_outputs_lie_over_inputs(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    for approximate in ("none", "tanh"):
        check_gelu(shape, dtype, approximate, use_triton=True)
    check_swiglu(shape, dtype, use_triton=True)


@pytest.mark.parametrize("use_triton", [False, True])
@under_interpreter
def test_the_other_gelu_is_told_apart(use_triton: bool) -> None:
    d_active, hidden = tensors((4, 512), torch.float32, 2)
    first, second = torch.empty_like(hidden), torch.empty_like(hidden)
    gelu_backward(d_active, hidden, first, None, "none", use_triton)
    gelu_backward(d_active, hidden, second, None, "tanh", use_triton)
    assert 1e-5 < float((first - second).abs().max()) < 5e-2


def test_many_rows_are_cut_into_blocks_that_change_no_bit() -> None:
    d_active, hidden = tensors((3000, 256), torch.float32, 2)
    assert len(list(row_blocks(hidden))) > 1
    d_hidden, active = torch.empty_like(hidden), torch.empty_like(hidden)
    gelu_backward(d_active, hidden, d_hidden, active, "tanh")
    assert torch.equal(active, F.gelu(hidden, approximate="tanh"))
    assert torch.equal(d_hidden, torch.ops.aten.gelu_backward(d_active, hidden, approximate="tanh"))
