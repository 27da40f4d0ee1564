"""Each kernel beside its plain-torch form and beside what memory allows. Needs CUDA and Triton."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.kernels.activation import gelu_backward, swiglu, swiglu_backward
from ds_moe_ep.kernels.choose import why_no_triton
from ds_moe_ep.kernels.gate import gate_gradients, gate_logits
from ds_moe_ep.kernels.grouped import Groups, grouped_rows
from ds_moe_ep.kernels.permute import RowMaps, permute, unpermute
from ds_moe_ep.kernels.rotary import split_rotated
from ds_moe_ep.kernels.sort import sort_choices
from ds_moe_ep.kernels.traffic import OperationSizes, traffic
from ds_moe_ep.moe.router import Router
from tests.gpu.layers import Sizes, alternate
from tests.gpu.mirror import TORUS
from tests.gpu.sections import Finding

GIGA = 1e9
SHARE_OF_COPY = 0.5  # of a copy's bandwidth: the least that a pass over memory should reach
BOUND = 2**-8  # of the largest number: units of fp16, where kernels and torch round in another order

Call = Callable[[bool], Sequence[Tensor]]  # with `use_triton`; what it computed


def kernels(of: Sizes, rounds: int) -> Iterator[Finding]:
    """Results by Triton beside plain torch's, milliseconds of both, GB/s of the least traffic beside a copy's."""
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
            yield from beside_torch(f"kernels.{name}.k{top_k}", operation, call, of, top_k, rounds, copy_gb_per_s)
    yield from routes(of, rounds)


def beside_torch(
    at: str, operation: str, call: Call, of: Sizes, top_k: int, rounds: int, copy_gb_per_s: float
) -> Iterator[Finding]:
    """One operation: how far Triton's results are from plain torch's, the times of both, and the rate."""
    difference = from_torch(call)
    bound = 0.0 if operation == "sort" else BOUND
    yield Finding(f"{at}.difference", difference, "of the largest", holds=difference <= bound)
    triton, torch_alone = alternate([lambda: call(True), lambda: call(False)], rounds)
    rate = traffic(operation, sizes_of(of, top_k)).num_bytes / GIGA / (triton.median_ms / 1e3)
    yield Finding(f"{at}.triton", triton.median_ms, "ms", min(triton.device_ms), max(triton.device_ms), rounds)
    span = min(torch_alone.device_ms), max(torch_alone.device_ms)
    yield Finding(f"{at}.torch", torch_alone.median_ms, "ms", *span, rounds)
    is_pass = operation not in ("sort", "gate backward")  # several kernels, of which some wait for others
    holds = rate >= SHARE_OF_COPY * copy_gb_per_s if is_pass and not of.is_small else None
    yield Finding(f"{at}.rate", rate, "GB/s", holds=holds, note=f"{100 * rate / copy_gb_per_s:.0f} % of a copy")


def from_torch(call: Call) -> float:
    """The largest difference of any result by Triton from that by plain torch."""
    ours, plain = ([each.detach().clone() for each in call(use)] for use in (True, False))
    return max(map(largest_difference, ours, plain))


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """|found - expected| at most, over the largest expected number; not a number anywhere is infinite."""
    found, expected = found.double(), expected.double()
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    return difference if difference == difference else float("inf")


def routes(of: Sizes, rounds: int) -> Iterator[Finding]:
    """The gate in one pass beside its steps: how many tokens choose alike (but for ties up to rounding), and times."""
    x_TD, _ = of.tokens()
    gates = []
    for kernels in ("auto", "torch"):
        torch.manual_seed(1)
        with torch.device(of.device):
            gates.append(Router(of.hidden_size, MoEConfig(num_experts=TORUS.size, top_k=2, kernels=kernels)))
    one_pass, steps = (partial(gate, x_TD) for gate in gates)
    alike = (one_pass().expert_ids_TK == steps().expert_ids_TK).double().mean()
    yield Finding("kernels.routes.alike", float(alike), "of all choices", holds=float(alike) > 0.999)
    for name, times in zip(("triton", "torch"), alternate([one_pass, steps], rounds), strict=True):
        yield Finding(
            f"kernels.routes.{name}", times.median_ms, "ms", min(times.device_ms), max(times.device_ms), rounds
        )


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


def calls(of: Sizes, top_k: int) -> Iterator[tuple[str, str, Call]]:
    """(name, operation of the traffic table, call with `use_triton`) of each kernel on drawn data."""
    x_TD, dy_TD = of.tokens()
    order_N = torch.randperm(of.num_tokens * top_k, device=of.device)
    maps = RowMaps(order_N, order_N.argsort().view(of.num_tokens, top_k))
    weights_TK = torch.rand(of.num_tokens, top_k, device=of.device, requires_grad=True)
    rows_ND = permute(x_TD, maps).requires_grad_()
    d_rows_ND = torch.randn_like(rows_ND)
    x_TD.requires_grad_()
    ids_TK = torch.randint(TORUS.size, (of.num_tokens, top_k), device=of.device)
    gate_ED = torch.randn(TORUS.size, of.hidden_size, device=of.device)
    d_logits_TE = torch.randn(of.num_tokens, TORUS.size, device=of.device)

    def sent(use: bool) -> Tensor:
        return permute(x_TD, maps, use)

    def weighted(use: bool) -> Tensor:
        return permute(x_TD, maps, use, weights_TK)

    def home(use: bool) -> Tensor:
        return unpermute(rows_ND, weights_TK, maps, use_triton=use)

    def sorted_choices(use: bool) -> Sequence[Tensor]:
        found = sort_choices(ids_TK, None, TORUS.size, use)
        return found.choice_of_row_N, found.row_of_choice_TK, found.count_E

    def gate_backward(use: bool) -> Sequence[Tensor]:
        return [
            each for each in gate_gradients(d_logits_TE, x_TD.detach(), gate_ED, (True, True), use) if each is not None
        ]

    yield "permute", "permute forward", lambda use: [sent(use)]
    yield "permute_backward", "permute backward", backward_of(sent, [x_TD], d_rows_ND)
    yield "permute_weighted", "weighted permute forward", lambda use: [weighted(use)]
    inputs = [x_TD, weights_TK]
    yield "permute_weighted_backward", "weighted permute backward", backward_of(weighted, inputs, d_rows_ND)
    yield "unpermute", "unpermute forward", lambda use: [home(use)]
    yield "unpermute_backward", "unpermute backward", backward_of(home, [rows_ND, weights_TK], dy_TD)
    yield "gate", "gate forward", lambda use: [gate_logits(x_TD, gate_ED, use)]
    yield "gate_backward", "gate backward", gate_backward
    yield "sort", "sort", sorted_choices
    yield from activations(of, top_k)
    if top_k == 1:
        yield from rotations(of)


def activations(of: Sizes, top_k: int) -> Iterator[tuple[str, str, Call]]:
    """The same of activations, on as many hidden numbers at each k."""
    shape = (of.num_tokens * top_k, of.width // top_k)
    d_active, gate, up = (torch.randn(shape, device=of.device, dtype=of.dtype) for _ in range(3))
    made = [torch.empty_like(gate) for _ in range(3)]

    def gelu_gradients(use: bool) -> Sequence[Tensor]:
        gelu_backward(d_active, gate, made[0], made[1], "none", use)
        return made[:2]

    def swiglu_rows(use: bool) -> Sequence[Tensor]:
        swiglu(gate, up, made[0], use)
        return made[:1]

    def swiglu_gradients(use: bool) -> Sequence[Tensor]:
        swiglu_backward(d_active, gate, up, *made, use)
        return made

    yield "gelu_backward", "gelu backward", gelu_gradients
    yield "swiglu", "swiglu", swiglu_rows
    yield "swiglu_backward", "swiglu backward", swiglu_gradients


def rotations(of: Sizes) -> Iterator[tuple[str, str, Call]]:
    """The same of the rotation of queries and keys, of heads as wide as the reference job's."""
    head_size = of.hidden_size // 16
    qkv_BSW = torch.randn(1, of.num_tokens, 3 * of.hidden_size, device=of.device, dtype=of.dtype, requires_grad=True)
    angles = torch.randn(of.num_tokens, head_size // 2, device=of.device)
    gradient = torch.randn(1, 16, of.num_tokens, head_size, device=of.device, dtype=of.dtype)

    def turned(use: bool) -> Sequence[Tensor]:
        return split_rotated(qkv_BSW, (angles.cos(), angles.sin()), head_size, use)

    yield "rotation", "rotation forward", lambda use: turned(use)[:2]
    yield "rotation_backward", "rotation backward", backward_of(turned, [qkv_BSW], gradient)


def backward_of(forward: Callable[[bool], Tensor | Sequence[Tensor]], inputs: Sequence[Tensor], d_y: Tensor) -> Call:
    """The backward pass alone, with `d_y` as the gradient of each output."""
    known: dict[bool, Tensor | Sequence[Tensor]] = {}

    def call(use: bool) -> Sequence[Tensor]:
        if use not in known:
            known[use] = forward(use)
        outputs = known[use]
        num_outputs = 1 if isinstance(outputs, Tensor) else len(outputs)
        return torch.autograd.grad(outputs, inputs, [d_y] * num_outputs, retain_graph=True)

    return call
