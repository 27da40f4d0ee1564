"""GELU and SwiGLU: one pass over memory each, elements by blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
WARPS = 4  # 8 elements per thread: 16 bytes of fp16 or bf16 per load


def swiglu(gate_nF: Tensor, up_nF: Tensor, active_nF: Tensor) -> None:
    """Writes silu(gate) * up."""
    if (size := gate_nF.numel()) == 0:
        return
    with torch.cuda.device_of(gate_nF):
        swiglu_kernel[(triton.cdiv(size, BLOCK),)](gate_nF, up_nF, active_nF, size, BLOCK=BLOCK, num_warps=WARPS)


def gelu_backward(
    d_active_nF: Tensor, hidden_nF: Tensor, d_hidden_nF: Tensor, active_nF: Tensor | None, approximate: str
) -> None:
    """Writes the gradient of the hidden rows, and the active rows where a place for them is given."""
    if (size := hidden_nF.numel()) == 0:
        return
    with torch.cuda.device_of(hidden_nF):
        gelu_backward_kernel[(triton.cdiv(size, BLOCK),)](
            d_active_nF,
            hidden_nF,
            d_hidden_nF,
            hidden_nF if active_nF is None else active_nF,
            size,
            IS_TANH=approximate == "tanh",
            WRITES_ACTIVE=active_nF is not None,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


def swiglu_backward(
    d_active_nF: Tensor, gate_nF: Tensor, up_nF: Tensor, d_gate_nF: Tensor, d_up_nF: Tensor, active_nF: Tensor | None
) -> None:
    """Writes the gradients of both hidden rows, and the active rows where a place for them is given."""
    if (size := gate_nF.numel()) == 0:
        return
    with torch.cuda.device_of(gate_nF):
        swiglu_backward_kernel[(triton.cdiv(size, BLOCK),)](
            d_active_nF,
            gate_nF,
            up_nF,
            d_gate_nF,
            d_up_nF,
            gate_nF if active_nF is None else active_nF,
            size,
            WRITES_ACTIVE=active_nF is not None,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


@triton.jit
def swiglu_kernel(gate, up, active, size, BLOCK: tl.constexpr):
    """A block of silu(gate) * up."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(active + at, g * tl.sigmoid(g) * u, mask=inside)


@triton.jit
def gelu_backward_kernel(
    d_active,
    hidden,
    d_hidden,
    active,
    size,
    IS_TANH: tl.constexpr,
    WRITES_ACTIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of the gradient of hidden rows, and of the active rows."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    d = tl.load(d_active + at, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32)
    if IS_TANH:  # (1 + tanh(u)) / 2 is sigmoid(2 u), which loses no digits near 0
        share = tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
        slope = share + x * share * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        slope = share + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    tl.store(d_hidden + at, d * slope, mask=inside)
    if WRITES_ACTIVE:
        tl.store(active + at, x * share, mask=inside)


@triton.jit
def swiglu_backward_kernel(
    d_active,
    gate,
    up,
    d_gate,
    d_up,
    active,
    size,
    WRITES_ACTIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of the gradients of both hidden rows, and of the active rows."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    d = tl.load(d_active + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(g)
    silu = g * share
    tl.store(d_up + at, d * silu, mask=inside)
    tl.store(d_gate + at, d * u * share * (1.0 + g * (1.0 - share)), mask=inside)
    if WRITES_ACTIVE:
        tl.store(active + at, silu * u, mask=inside)
