"""The gate: logits of tokens over experts in fp32, without a copy of the tokens in fp32, and the choice made from them.

1. `gate_logits`: the product alone, for gates that cannot go in one pass. Tokens of a narrower type are widened block
   by block, forward and backward.
2. `gate_routes`: where Triton runs, the product, the scores, the k best experts, their weights and the load in one pass
   over the tokens. The router's own steps are its plain-torch form.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_moe_ep.kernels.choose import runs_triton
from ds_moe_ep.kernels.eager import not_compiled, without_autocast

BLOCK_TOKENS = 512  # widened at a time
MAX_EXPERTS = 512  # of one pass: a block holds the logits of its tokens all at once


class GateRule(NamedTuple):
    """How scores become a choice: K experts per token, their weights divided by their sum or not."""

    num_choices: int
    is_softmax: bool
    renormalizes: bool


class ChoiceNoise(NamedTuple):
    """Noise on the logits that the choices from the `first`-th on are made from."""

    noise_TE: Tensor
    first: int = 0


class GateRoutes(NamedTuple):
    """Answer of the gate for T tokens; `counts_KE` has the k-th choices of each expert by tokens that take part."""

    logits_TE: Tensor
    scores_TE: Tensor
    weights_TK: Tensor
    expert_ids_TK: Tensor
    counts_KE: Tensor | None


def gate_logits(
    x_TD: Tensor, weight_ED: Tensor, use_triton: bool | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Logits [T, E] in `dtype`, at least fp32 (by default the weight's), outside of autocast. Differentiable, local."""
    kind = weight_ED.dtype if dtype is None else dtype
    if x_TD.dtype == kind and not runs_triton(use_triton, x_TD, weight_ED):
        return F.linear(x_TD, weight_ED.to(kind))
    logits_TE: Tensor = _GateLogits.apply(x_TD, weight_ED, use_triton, kind)  # type: ignore[no-untyped-call]
    return logits_TE


def gate_routes(
    x_TD: Tensor,
    weight_ED: Tensor,
    bias_E: Tensor | None,
    is_used_T: Tensor | None,
    rule: GateRule,
    noise: ChoiceNoise | None = None,
) -> GateRoutes:
    """The routes by Triton: `bias_E` moves the choice alone, `is_used_T` says which tokens count. Differentiable.

    Noise moves the choice alone too, and stands beside no bias. Among equal logits the first expert is chosen; a logit
    that is no number counts as the largest.
    """
    return GateRoutes(*_GateRoutes.apply(x_TD, weight_ED, bias_E, is_used_T, rule, noise))  # type: ignore[no-untyped-call]


class _GateLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor, use_triton: bool | None, kind: torch.dtype) -> Tensor:
        ctx.use_triton, ctx.dtype = use_triton, weight_ED.dtype
        weight_ED = weight_ED.to(kind)
        ctx.save_for_backward(x_TD, weight_ED)
        if runs_triton(use_triton, x_TD, weight_ED):
            from ds_moe_ep.kernels.compiled import gate as kernels

            return kernels.logits(x_TD.contiguous(), weight_ED.contiguous())
        if x_TD.shape[0] < 2 * BLOCK_TOKENS:
            return x_TD.to(kind) @ weight_ED.t()
        logits_TE = weight_ED.new_empty(x_TD.shape[0], weight_ED.shape[0])
        for x, logits in _token_blocks(x_TD, logits_TE):
            torch.mm(x.to(weight_ED.dtype), weight_ED.t(), out=logits)
        return logits_TE

    @staticmethod
    @not_compiled
    def backward(ctx: Any, d_logits_TE: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_ED = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        dx_TD, d_weight_ED = gate_gradients(d_logits_TE, x_TD, weight_ED, wanted, ctx.use_triton)
        return dx_TD, None if d_weight_ED is None else d_weight_ED.to(ctx.dtype), None, None


class _GateRoutes(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_ED: Tensor,
        bias_E: Tensor | None,
        is_used_T: Tensor | None,
        rule: GateRule,
        noise: ChoiceNoise | None,
    ) -> tuple[Tensor, ...]:
        from ds_moe_ep.kernels.compiled import gate as kernels

        routes = kernels.routes(x_TD.contiguous(), weight_ED.contiguous(), bias_E, is_used_T, *rule, *(noise or ()))
        logits_TE, scores_TE, weights_TK, expert_ids_TK, counts_KE = routes
        ctx.save_for_backward(x_TD, weight_ED, scores_TE, expert_ids_TK)
        ctx.rule = rule
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(expert_ids_TK, counts_KE)
        return logits_TE, scores_TE, weights_TK, expert_ids_TK, counts_KE

    @staticmethod
    @not_compiled
    def backward(
        ctx: Any, d_logits_TE: Tensor | None, d_scores_TE: Tensor | None, d_weights_TK: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        from ds_moe_ep.kernels.compiled import gate as kernels

        x_TD, weight_ED, scores_TE, expert_ids_TK = ctx.saved_tensors
        given = d_logits_TE, d_scores_TE, d_weights_TK
        whole_TE = kernels.logit_gradients(scores_TE, expert_ids_TK, *given, ctx.rule)
        return *gate_gradients(whole_TE, x_TD, weight_ED, ctx.needs_input_grad[:2], True), None, None, None, None


def gate_gradients(
    d_logits_TE: Tensor, x_TD: Tensor, weight_ED: Tensor, wanted: tuple[bool, bool], use_triton: bool | None
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of tokens, in their own type, and of the gate's weight; None for what is not wanted."""
    if runs_triton(use_triton, x_TD, weight_ED, d_logits_TE):
        from ds_moe_ep.kernels.compiled import gate as kernels

        given = d_logits_TE.contiguous(), x_TD.contiguous(), weight_ED.contiguous()
        return kernels.gradients(*given, wanted)
    dx_TD = d_weight_ED = None
    with without_autocast(x_TD.device.type):
        if x_TD.shape[0] < 2 * BLOCK_TOKENS:
            dx_TD = (d_logits_TE @ weight_ED).to(x_TD.dtype) if wanted[0] else None
            d_weight_ED = d_logits_TE.t() @ x_TD.to(weight_ED.dtype) if wanted[1] else None
            return dx_TD, d_weight_ED
        dx_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format) if wanted[0] else None
        d_weight_ED = torch.zeros_like(weight_ED) if wanted[1] else None
        if dx_TD is not None:
            for dx, d_logits in _token_blocks(dx_TD, d_logits_TE):
                dx.copy_(d_logits @ weight_ED)
        if d_weight_ED is not None:
            for x, d_logits in _token_blocks(x_TD, d_logits_TE):
                d_weight_ED.addmm_(d_logits.t(), x.to(weight_ED.dtype))
    return dx_TD, d_weight_ED


def _token_blocks(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    num_blocks = tensors[0].shape[0] // BLOCK_TOKENS
    return [tensors] if num_blocks <= 1 else zip(*(tensor.tensor_split(num_blocks) for tensor in tensors), strict=True)
