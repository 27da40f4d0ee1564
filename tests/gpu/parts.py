"""Parts of a step, each by itself on the device: attention, products of few rows, weight gradients. Needs CUDA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_moe_ep.kernels.attention import blockwise_causal_attention
from ds_moe_ep.kernels.weight_sums import add_weight_product
from tests.gpu.layers import Sizes, alternate
from tests.gpu.sections import Finding

ROWS = (156, 312, 625, 1250, 2500, 5000, 10000)
NUM_HEADS = 16
TERA = 1e12

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def parts(of: Sizes, rounds: int) -> Iterator[Finding]:
    """TFLOP/s of attention, of an expert's products by number of rows, and of weight gradients as they are summed."""
    if not of.is_cuda:
        return
    yield from attention(of, rounds)
    yield from products(of, rounds)
    yield from weight_gradients(of, rounds)


def attention(of: Sizes, rounds: int) -> Iterator[Finding]:
    head_dim = of.hidden_size // NUM_HEADS
    shape = (1, NUM_HEADS, of.num_tokens, head_dim)
    q, k, v = (torch.randn(shape, device=of.device, dtype=of.dtype, requires_grad=True) for _ in range(3))
    gradient = torch.randn_like(q)
    flops = 2 * of.num_tokens**2 * of.hidden_size  # two products, the lower half of the scores

    def forward(attend: Attention) -> None:
        attend(q, k, v)

    def both(attend: Attention) -> None:
        torch.autograd.grad(attend(q, k, v), [q, k, v], gradient)

    ways: dict[str, Attention] = {
        "torch": partial(F.scaled_dot_product_attention, is_causal=True),
        "blocks": blockwise_causal_attention,  # what the package takes for heads that no flash kernel has
    }
    for way, attend in ways.items():
        for name, work, times in (("forward", forward, 1.0), ("step", both, 3.5)):
            at = f"parts.attention.heads{NUM_HEADS}x{head_dim}.{way}.{name}"
            yield rate(at, partial(work, attend), times * flops, rounds)


def products(of: Sizes, rounds: int) -> Iterator[Finding]:
    up = torch.randn(of.width, of.hidden_size, device=of.device, dtype=of.dtype)
    down = torch.randn(of.hidden_size, of.width, device=of.device, dtype=of.dtype)
    for num_rows in ROWS:
        x = torch.randn(num_rows, of.hidden_size, device=of.device, dtype=of.dtype)
        hidden = x @ up.t()
        flops = 2 * num_rows * of.hidden_size * of.width
        yield rate(f"parts.product.up.rows{num_rows}", lambda x=x: x @ up.t(), flops, rounds)  # type: ignore[misc]
        yield rate(f"parts.product.down.rows{num_rows}", lambda h=hidden: h @ down.t(), flops, rounds)  # type: ignore[misc]


def weight_gradients(of: Sizes, rounds: int) -> Iterator[Finding]:
    """One product of all rows, and four that add up: in fp32, and in the type itself."""
    num_rows, blocks = of.num_tokens // 4, 4
    x = torch.randn(of.num_tokens, of.hidden_size, device=of.device, dtype=of.dtype)
    hidden = torch.randn(of.num_tokens, of.width, device=of.device, dtype=of.dtype)
    sum32 = torch.zeros(of.width, of.hidden_size, device=of.device)
    sum16 = torch.zeros_like(sum32, dtype=of.dtype)
    spans = [slice(block * num_rows, (block + 1) * num_rows) for block in range(blocks)]

    def in_fp32() -> None:
        for span in spans:
            add_weight_product(sum32, hidden[span], x[span])

    def in_its_type() -> None:
        for span in spans:
            sum16.addmm_(hidden[span].t(), x[span])

    flops = 2 * of.num_tokens * of.hidden_size * of.width
    for name, work in (
        ("one product", lambda: torch.mm(hidden.t(), x, out=sum16)),
        ("4 blocks into fp32", in_fp32),
        ("4 blocks into fp16", in_its_type),
    ):
        yield rate(f"parts.weight_gradient.{name}", work, flops, rounds)


def rate(name: str, work: Callable[[], object], flops: float, rounds: int) -> Finding:
    """TFLOP/s of the work; what the device refuses is a finding that does not hold."""
    try:
        (times,) = alternate([work], rounds)
    except (RuntimeError, NotImplementedError) as error:
        return Finding(name, 0.0, "TFLOP/s", holds=False, note=str(error).splitlines()[0][:100])
    rates = sorted(flops / (ms / 1e3) / TERA for ms in times.device_ms)
    return Finding(name, flops / (times.median_ms / 1e3) / TERA, "TFLOP/s", rates[0], rates[-1], len(rates))
