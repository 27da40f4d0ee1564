"""Each kernel beside its plain-torch form and beside what memory allows. Needs CUDA and Triton."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ds_moe_ep.kernels.activation import gelu_backward
from ds_moe_ep.kernels.choose import why_no_triton
from ds_moe_ep.kernels.gate import gate_logits
from ds_moe_ep.kernels.grouped import Groups, grouped_rows
from ds_moe_ep.kernels.permute import RowMaps, permute, unpermute
from ds_moe_ep.kernels.sort import sort_choices
from ds_moe_ep.kernels.traffic import OperationSizes, traffic
from tests.gpu.layers import Sizes, alternate
from tests.gpu.mirror import TORUS
from tests.gpu.sections import Finding

GIGA = 1e9
SHARE_OF_COPY = 0.5  # of a copy's bandwidth: the least that a pass over memory should reach


def kernels(of: Sizes, rounds: int) -> Iterator[Finding]:
    """Milliseconds by Triton and by plain torch, GB/s of the least traffic, and its share of a copy's."""
    yield from grouped_products(of, rounds)
    if not of.is_cuda:
        return
    if reason := why_no_triton("cuda"):
        yield Finding("kernels.triton", 0.0, "installed", holds=False, note=reason)
        return
    copied = torch.empty(of.num_tokens, of.hidden_size, device=of.device, dtype=of.dtype)
    (copy,) = alternate([copied.clone], rounds)
    copy_gb_per_s = 2 * copied.nbytes / GIGA / (copy.median_ms / 1e3)
    yield Finding("kernels.copy", copy_gb_per_s, "GB/s")
    for top_k in (1, 2):
        for name, operation, call in calls(of, top_k):
            least = traffic(operation, sizes_of(of, top_k))
            triton, plain = alternate([lambda c=call: c(True), lambda c=call: c(False)], rounds)  # type: ignore[misc]
            rate = least.num_bytes / GIGA / (triton.median_ms / 1e3)
            at = f"kernels.{name}.k{top_k}"
            yield Finding(f"{at}.triton", triton.median_ms, "ms", min(triton.device_ms), max(triton.device_ms), rounds)
            yield Finding(f"{at}.torch", plain.median_ms, "ms", min(plain.device_ms), max(plain.device_ms), rounds)
            is_wide = operation != "sort"
            holds = rate >= SHARE_OF_COPY * copy_gb_per_s if is_wide and not of.is_small else None
            yield Finding(f"{at}.rate", rate, "GB/s", holds=holds, note=f"{100 * rate / copy_gb_per_s:.0f} % of a copy")


def grouped_products(of: Sizes, rounds: int) -> Iterator[Finding]:
    """Milliseconds of a matrix of 8 experts of Qwen3-235B's shape, as one product and as one per expert; in bf16."""
    num_rows, width, inner = (256, 64, 32) if of.is_small else (16_384, 4096, 1536)
    shares = (3, 1, 0, 2, 5, 1, 2, 2)  # uneven rows, one expert without any
    groups = Groups.of([num_rows * share // sum(shares) for share in shares], of.device)
    x_nD = torch.randn(groups.num_rows, width, device=of.device).bfloat16()
    w_LFD = (torch.randn(len(shares), inner, width, device=of.device) * width**-0.5).bfloat16()

    def loop() -> torch.Tensor:
        y_nF = x_nD.new_empty(groups.num_rows, inner)
        for expert, start, stop in groups.spans():
            torch.mm(x_nD[start:stop], w_LFD[expert].t(), out=y_nF[start:stop])
        return y_nF

    def grouped() -> torch.Tensor:
        return grouped_rows(x_nD, w_LFD.transpose(1, 2), groups)

    difference = float((grouped() - loop()).abs().max() / loop().abs().max())
    yield Finding("kernels.grouped.difference", difference, "of the largest", holds=difference <= 2**-7)
    for name, times in zip(("grouped", "loop"), alternate([grouped, loop], rounds), strict=True):
        span = min(times.device_ms), max(times.device_ms)
        yield Finding(f"kernels.grouped.{name}", times.median_ms, "ms", *span, rounds)


def sizes_of(of: Sizes, top_k: int) -> OperationSizes:
    return OperationSizes(
        num_tokens=of.num_tokens,
        width=of.hidden_size,
        num_choices=top_k,
        num_experts=TORUS.size,
        expert_width=of.width // top_k,  # as many hidden numbers at each k
    )


def calls(of: Sizes, top_k: int) -> Iterator[tuple[str, str, Callable[[bool], object]]]:
    """(name, operation of the traffic table, call with `use_triton`) of each kernel on drawn data."""
    x_TD, _ = of.tokens()
    order_N = torch.randperm(of.num_tokens * top_k, device=of.device)
    maps = RowMaps(order_N, order_N.argsort().view(of.num_tokens, top_k))
    weights_TK = torch.rand(of.num_tokens, top_k, device=of.device)
    rows_ND = permute(x_TD, maps)
    ids_TK = torch.randint(TORUS.size, (of.num_tokens, top_k), device=of.device)
    gate_ED = torch.randn(TORUS.size, of.hidden_size, device=of.device)
    hidden_nF = torch.randn(of.num_tokens * top_k, of.width // top_k, device=of.device, dtype=of.dtype)
    d_active_nF, d_hidden_nF, active_nF = (torch.empty_like(hidden_nF).copy_(hidden_nF) for _ in range(3))
    yield "permute", "permute forward", lambda use: permute(x_TD, maps, use)
    yield "permute_weighted", "weighted permute forward", lambda use: permute(x_TD, maps, use, weights_TK)
    yield "unpermute", "unpermute forward", lambda use: unpermute(rows_ND, weights_TK, maps, use_triton=use)
    yield "gate", "gate forward", lambda use: gate_logits(x_TD, gate_ED, use)
    yield "sort", "sort", lambda use: sort_choices(ids_TK, None, TORUS.size, use)
    yield (
        "gelu_backward",
        "gelu backward",
        lambda use: gelu_backward(d_active_nF, hidden_nF, d_hidden_nF, active_nF, "none", use),
    )
