"""GELU and SwiGLU on rows, and gradients that make the active rows again instead of reading kept ones.

An active row is the activation's output, which the second matrix product of an expert reads: forward for its result,
backward for its weight gradient. Made again in the pass over memory that the input gradient takes anyway, it need not
be kept in between. All functions write into given tensors and have no gradient themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_moe_ep.kernels.choose import runs_triton
from ds_moe_ep.kernels.linear import is_slow_half

BLOCK_ELEMENTS = 2**17  # of a thread, on the CPU: what lies between two passes stays in its cache
_GELU: Any = torch._C._nn.gelu  # torch.ops takes three times as long to call; F.gelu may be a profiler's
_GELU_BACKWARD = torch.ops.aten.gelu_backward.grad_input


class Clamp(NamedTuple):
    """Bounds of a SwiGLU as gpt-oss has them: (up + 1) * gate * sigmoid(alpha * gate), both at most `limit`."""

    alpha: float
    limit: float


def gelu(hidden_nF: Tensor, active_nF: Tensor, approximate: str) -> None:
    """Writes the active rows; `approximate` is "none" (erf) or "tanh"."""
    _GELU(hidden_nF, approximate=approximate, out=active_nF)


def swiglu(
    gate_nF: Tensor, up_nF: Tensor, active_nF: Tensor, use_triton: bool | None = None, clamp: Clamp | None = None
) -> None:
    """Writes silu(gate) * up, or its clamped form, into `active_nF`, which may be one of the inputs."""
    if clamp is not None:
        for gate, up, active in row_blocks(gate_nF, up_nF, active_nF):
            gate, up = gate.clamp(max=clamp.limit), up.clamp(-clamp.limit, clamp.limit)
            torch.mul(up + 1, gate * torch.sigmoid(gate * clamp.alpha), out=active)
        return
    if _runs_triton(use_triton, gate_nF, up_nF, active_nF):
        from ds_moe_ep.kernels.compiled import activation

        activation.swiglu(gate_nF, up_nF, active_nF)
        return
    for gate, up, active in row_blocks(gate_nF, up_nF, active_nF):
        if is_slow_half(gate):  # one rounding, as the kernel's
            active.copy_(F.silu(gate.float()) * up)
        else:
            torch.mul(F.silu(gate), up, out=active)


def gelu_backward(
    d_active_nF: Tensor,
    hidden_nF: Tensor,
    d_hidden_nF: Tensor,
    active_nF: Tensor | None,
    approximate: str,
    use_triton: bool | None = None,
) -> None:
    """Writes the gradient of the hidden rows, and the active rows where `active_nF` is given.

    `approximate` is "none" (erf) or "tanh". Outputs may lie over inputs: `d_hidden_nF` over `hidden_nF` and
    `active_nF` over `d_active_nF`, or crosswise.
    """
    outputs = [d_hidden_nF] if active_nF is None else [d_hidden_nF, active_nF]
    if _runs_triton(use_triton, d_active_nF, hidden_nF, *outputs):
        from ds_moe_ep.kernels.compiled import activation

        activation.gelu_backward(d_active_nF, hidden_nF, d_hidden_nF, active_nF, approximate)
        return
    if active_nF is None or d_hidden_nF.data_ptr() != hidden_nF.data_ptr():  # two passes, and nothing in between
        _GELU_BACKWARD(d_active_nF, hidden_nF, approximate=approximate, grad_input=d_hidden_nF)
        if active_nF is not None:
            _GELU(hidden_nF, approximate=approximate, out=active_nF)
        return
    for d_active, hidden, d_hidden, active in row_blocks(d_active_nF, hidden_nF, d_hidden_nF, active_nF):
        gradient = torch.empty_like(hidden)
        _GELU_BACKWARD(d_active, hidden, approximate=approximate, grad_input=gradient)
        _GELU(hidden, approximate=approximate, out=active)
        d_hidden.copy_(gradient)


def swiglu_backward(
    d_active_nF: Tensor,
    gate_nF: Tensor,
    up_nF: Tensor,
    d_gate_nF: Tensor,
    d_up_nF: Tensor,
    active_nF: Tensor | None,
    use_triton: bool | None = None,
    clamp: Clamp | None = None,
) -> None:
    """Writes the gradients of both hidden rows, and the active rows of `swiglu` where `active_nF` is given.

    Outputs may lie over inputs: `d_gate_nF` over `gate_nF`, `d_up_nF` over `up_nF`, `active_nF` over `d_active_nF`.
    """
    outputs = [d_gate_nF, d_up_nF] if active_nF is None else [d_gate_nF, d_up_nF, active_nF]
    if clamp is not None:
        for d_active, gate, up, *its_outputs in row_blocks(d_active_nF, gate_nF, up_nF, *outputs):
            _clamped_backward(d_active, gate, up, its_outputs, clamp)
        return
    if _runs_triton(use_triton, d_active_nF, gate_nF, up_nF, *outputs):
        from ds_moe_ep.kernels.compiled import activation

        activation.swiglu_backward(d_active_nF, gate_nF, up_nF, d_gate_nF, d_up_nF, active_nF)
        return
    for d_active, gate, up, d_gate, d_up, *active in row_blocks(d_active_nF, gate_nF, up_nF, *outputs):
        if is_slow_half(gate):
            wide, of_up = gate.float(), up.float()
            made = [torch.empty_like(wide) for _ in range(2 + len(active))]
            swiglu_backward(d_active.float(), wide, of_up, made[0], made[1], made[2] if active else None, False)
            for output, value in zip((d_gate, d_up, *active), made, strict=True):
                output.copy_(value)
            continue
        silu = F.silu(gate)
        d_silu = d_active * up  # the last use of `up` but for the active rows, and of `d_active` but for `d_up`
        if active:
            made_again = silu * up
        torch.mul(d_active, silu, out=d_up)
        torch.ops.aten.silu_backward.grad_input(d_silu, gate, grad_input=d_gate)
        if active:
            active[0].copy_(made_again)


def _clamped_backward(d_active: Tensor, gate: Tensor, up: Tensor, outputs: list[Tensor], clamp: Clamp) -> None:
    """The gradients of the clamped form: none where a bound holds."""
    below, within = gate.clamp(max=clamp.limit), up.clamp(-clamp.limit, clamp.limit)
    share = torch.sigmoid(below * clamp.alpha)
    glu = below * share
    slope = share + clamp.alpha * glu * (1 - share)
    made = [d_active * (within + 1) * slope * (gate <= clamp.limit), d_active * glu * (up.abs() <= clamp.limit)]
    made += [(within + 1) * glu] if len(outputs) == 3 else []
    for output, value in zip(outputs, made, strict=True):
        output.copy_(value)


def row_blocks(*rows: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The tensors cut alike by rows, on the CPU; whole on other devices, where a launch costs more than a pass."""
    first = rows[0]
    per_block = BLOCK_ELEMENTS * torch.get_num_threads()
    num_blocks = min(first.shape[0], -(-first.numel() // per_block)) if first.is_cpu else 1
    return [rows] if num_blocks <= 1 else zip(*(tensor.tensor_split(num_blocks) for tensor in rows), strict=True)


def _runs_triton(use_triton: bool | None, *rows: Tensor) -> bool:
    return runs_triton(use_triton, *rows) and all(tensor.is_contiguous() for tensor in rows)
