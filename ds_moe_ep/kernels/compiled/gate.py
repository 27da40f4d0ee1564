"""The gate in one pass over the tokens, and its gradients: tokens are widened to fp32 on the way to the product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_TOKENS = 32
BLOCK_WIDTH = 64
MIN_EXPERTS = 16  # of a tile: the shortest edge of a product on tensor cores
MAX_EXPERTS = 64  # of a tile: more would not fit into registers beside the tokens
MAX_SPLITS = 16  # partial sums of the weight's gradient
PRECISION: tl.constexpr = tl.constexpr("tf32x3")  # three products: the digits of fp32, on tensor cores
SMALLEST: tl.constexpr = tl.constexpr(1.1920928955078125e-07)  # fp32's step at 1: the least sum that weights divide by
WARPS = 4


def logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """Logits [T, E] in fp32."""
    (num_tokens, width), num_experts = x_TD.shape, len(weight_ED)
    logits_TE = weight_ED.new_empty(num_tokens, num_experts)
    if num_tokens == 0:
        return logits_TE
    tile = expert_tile(num_experts)
    grid = (triton.cdiv(num_tokens, BLOCK_TOKENS), triton.cdiv(num_experts, tile))
    with torch.cuda.device_of(x_TD):
        logits_kernel[grid](
            x_TD, weight_ED, logits_TE, num_tokens, width, num_experts,
            TILE=tile, BLOCK_TOKENS=BLOCK_TOKENS, BLOCK_WIDTH=BLOCK_WIDTH, num_warps=WARPS,
        )  # fmt: skip
    return logits_TE


def routes(
    x_TD: Tensor,
    weight_ED: Tensor,
    bias_E: Tensor | None,
    is_used_T: Tensor | None,
    num_choices: int,
    is_softmax: bool,
    renormalizes: bool,
    noise_TE: Tensor | None = None,
    noise_from: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits and scores [T, E], weights and expert ids [T, K], and the k-th choices of each expert [K, E].

    Noise is added to the logits that choices from the `noise_from`-th on are made from; there is no bias beside it.
    """
    assert noise_TE is None or bias_E is None, "the choice is made from logits with noise, or from biased scores"
    (num_tokens, width), num_experts = x_TD.shape, len(weight_ED)
    logits_TE, scores_TE = (weight_ED.new_empty(num_tokens, num_experts) for _ in range(2))
    weights_TK = weight_ED.new_empty(num_tokens, num_choices)
    ids_TK = torch.empty_like(weights_TK, dtype=torch.int64)
    counts_KE = torch.zeros(num_choices, num_experts, dtype=torch.int32, device=x_TD.device)
    shape = choice_shape(num_experts)
    if num_tokens == 0:
        return logits_TE, scores_TE, weights_TK, ids_TK, counts_KE
    with torch.cuda.device_of(x_TD):
        routes_kernel[(triton.cdiv(num_tokens, shape["BLOCK_TOKENS"]),)](
            x_TD,
            weight_ED,
            weight_ED if bias_E is None else bias_E.contiguous(),
            x_TD if is_used_T is None else is_used_T.contiguous(),
            logits_TE if noise_TE is None else noise_TE.contiguous(),
            logits_TE,
            scores_TE,
            weights_TK,
            ids_TK,
            counts_KE,
            num_tokens,
            width,
            num_experts,
            K=num_choices,
            K_TILE=triton.next_power_of_2(num_choices),
            IS_SOFTMAX=is_softmax,
            RENORMALIZES=renormalizes,
            HAS_BIAS=bias_E is not None,
            HAS_USED=is_used_T is not None,
            HAS_NOISE=noise_TE is not None,
            NOISE_FROM=noise_from,
            **shape,
        )
    return logits_TE, scores_TE, weights_TK, ids_TK, counts_KE


def logit_gradients(
    scores_TE: Tensor,
    ids_TK: Tensor,
    d_logits_TE: Tensor | None,
    d_scores_TE: Tensor | None,
    d_weights_TK: Tensor | None,
    rule: tuple[int, bool, bool],
) -> Tensor:
    """The whole gradient of the logits, from those of the logits, the scores and the weights."""
    num_choices, is_softmax, renormalizes = rule
    whole_TE = torch.empty_like(scores_TE)
    (num_tokens, num_experts), shape = scores_TE.shape, gradient_shape(scores_TE.shape[1])
    if num_tokens == 0:
        return whole_TE
    given = [scores_TE if each is None else each.contiguous() for each in (d_logits_TE, d_scores_TE, d_weights_TK)]
    with torch.cuda.device_of(scores_TE):
        logit_gradients_kernel[(triton.cdiv(num_tokens, shape["BLOCK_TOKENS"]),)](
            scores_TE,
            ids_TK,
            *given,
            whole_TE,
            num_tokens,
            num_experts,
            K=num_choices,
            IS_SOFTMAX=is_softmax,
            RENORMALIZES=renormalizes,
            HAS_LOGITS=d_logits_TE is not None,
            HAS_SCORES=d_scores_TE is not None,
            HAS_WEIGHTS=d_weights_TK is not None,
            **shape,
        )
    return whole_TE


def gradients(
    d_logits_TE: Tensor, x_TD: Tensor, weight_ED: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the tokens and of the weight; None for what is not wanted."""
    (num_tokens, width), num_experts = x_TD.shape, len(weight_ED)
    dx_TD = torch.empty_like(x_TD) if wanted[0] else None
    if num_tokens == 0:
        return dx_TD, torch.zeros_like(weight_ED) if wanted[1] else None
    d_weight_ED, tile = None, expert_tile(num_experts)
    blocks = triton.cdiv(width, BLOCK_WIDTH)
    shape = {"TILE": tile, "BLOCK_TOKENS": BLOCK_TOKENS, "BLOCK_WIDTH": BLOCK_WIDTH, "num_warps": WARPS}
    with torch.cuda.device_of(x_TD):
        if dx_TD is not None:
            token_gradients_kernel[(triton.cdiv(num_tokens, BLOCK_TOKENS), blocks)](
                d_logits_TE, weight_ED, dx_TD, num_tokens, width, num_experts, **shape
            )
        if wanted[1]:
            num_splits = min(MAX_SPLITS, triton.cdiv(num_tokens, BLOCK_TOKENS))
            per_split = triton.cdiv(triton.cdiv(num_tokens, num_splits), BLOCK_TOKENS) * BLOCK_TOKENS
            parts_SED = weight_ED.new_empty(num_splits, num_experts, width)
            grid = (blocks, triton.cdiv(num_experts, tile), num_splits)
            weight_gradients_kernel[grid](
                d_logits_TE, x_TD, parts_SED, num_tokens, width, num_experts, per_split, **shape
            )
            d_weight_ED = parts_SED.sum(0)
    return dx_TD, d_weight_ED


def expert_tile(num_experts: int) -> int:
    """Experts of a tile, in the kernels that go over them tile by tile."""
    return int(min(MAX_EXPERTS, max(MIN_EXPERTS, triton.next_power_of_2(num_experts))))


def choice_shape(num_experts: int) -> dict[str, int]:
    """The tiles of the kernels that choose, which see all experts of a token at once."""
    tile = int(max(MIN_EXPERTS, triton.next_power_of_2(num_experts)))
    if tile <= MAX_EXPERTS:
        return {"TILE": tile, "BLOCK_TOKENS": BLOCK_TOKENS, "BLOCK_WIDTH": BLOCK_WIDTH, "num_warps": WARPS}
    times = 2 if tile <= 4 * MAX_EXPERTS else 4  # a block's logits over more warps, beside fewer columns of the product
    shape = {"TILE": tile, "BLOCK_TOKENS": BLOCK_TOKENS // 2}
    return {**shape, "BLOCK_WIDTH": BLOCK_WIDTH // times, "num_warps": times * WARPS}


def gradient_shape(num_experts: int) -> dict[str, int]:
    """The tiles of the logits' gradients: those of the choice, whose registers hold the widest for fewer tokens."""
    shape = choice_shape(num_experts)
    num_tokens = shape["BLOCK_TOKENS"] // (2 if shape["TILE"] > 4 * MAX_EXPERTS else 1)
    return {"TILE": shape["TILE"], "BLOCK_TOKENS": num_tokens, "num_warps": shape["num_warps"]}


@triton.jit
def product(
    x, weight, token, expert, num_tokens, width, num_experts,
    TILE: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """The logits of a block of tokens over a tile of experts."""
    total = tl.zeros([BLOCK_TOKENS, TILE], tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        column = start + tl.arange(0, BLOCK_WIDTH)
        inside = (column < width)[None, :]
        rows = x + token[:, None].to(tl.int64) * width + column[None, :]
        values = tl.load(rows, mask=inside & (token < num_tokens)[:, None], other=0.0).to(tl.float32)
        rows = weight + expert[:, None].to(tl.int64) * width + column[None, :]
        weights = tl.load(rows, mask=inside & (expert < num_experts)[:, None], other=0.0)
        total = tl.dot(values, tl.trans(weights), total, input_precision=PRECISION)
    return total


@triton.jit
def logits_kernel(
    x, weight, logits, num_tokens, width, num_experts,
    TILE: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Logits of a block of tokens over a tile of experts."""
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    expert = tl.program_id(1) * TILE + tl.arange(0, TILE)
    total = product(x, weight, token, expert, num_tokens, width, num_experts, TILE, BLOCK_TOKENS, BLOCK_WIDTH)
    known = (token < num_tokens)[:, None] & (expert < num_experts)[None, :]
    tl.store(logits + token[:, None].to(tl.int64) * num_experts + expert[None, :], total, mask=known)


@triton.jit
def routes_kernel(
    x, weight, bias, is_used, noise, logits, scores, weights, ids, counts,
    num_tokens, width, num_experts,
    K: tl.constexpr, K_TILE: tl.constexpr, IS_SOFTMAX: tl.constexpr, RENORMALIZES: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_USED: tl.constexpr, HAS_NOISE: tl.constexpr, NOISE_FROM: tl.constexpr,
    TILE: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Logits, scores, weights, ids and counts of a block of tokens."""
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    expert = tl.arange(0, TILE)
    inside = token < num_tokens
    exists = (expert < num_experts)[None, :]
    total = product(x, weight, token, expert, num_tokens, width, num_experts, TILE, BLOCK_TOKENS, BLOCK_WIDTH)
    at = token[:, None].to(tl.int64) * num_experts + expert[None, :]
    tl.store(logits + at, total, mask=inside[:, None] & exists)
    if IS_SOFTMAX:
        shifted = tl.where(exists, total, float("-inf"))
        power = tl.exp(shifted - tl.max(shifted, 1)[:, None])
        score = power / tl.sum(power, 1)[:, None]
    else:
        score = tl.sigmoid(total)
    tl.store(scores + at, score, mask=inside[:, None] & exists)
    key = total
    if HAS_BIAS:
        key = score + tl.load(bias + expert, mask=expert < num_experts, other=0.0)[None, :]
    key = tl.where(key == key, key, float("inf"))  # what is no number is chosen first, as by torch
    counted = inside
    if HAS_USED:
        counted = inside & (tl.load(is_used + token, mask=inside, other=0) != 0)
    is_left = (expert < num_experts)[None, :] & (token >= 0)[:, None]
    choice = tl.arange(0, K_TILE)[None, :]
    chosen_scores = tl.zeros([BLOCK_TOKENS, K_TILE], tl.float32)
    chosen_ids = tl.zeros([BLOCK_TOKENS, K_TILE], tl.int32)
    for k in tl.static_range(K):
        if HAS_NOISE and k == NOISE_FROM:
            key += tl.load(noise + at, mask=inside[:, None] & exists, other=0.0)
        best = tl.max(tl.where(is_left, key, float("-inf")), 1)
        index = tl.min(tl.where(is_left & (key >= best[:, None]), expert[None, :], TILE), 1)
        is_chosen = expert[None, :] == index[:, None]
        is_left = is_left & (expert[None, :] != index[:, None])
        chosen_ids = tl.where(choice == k, index[:, None], chosen_ids)
        chosen_scores = tl.where(choice == k, tl.sum(tl.where(is_chosen, score, 0.0), 1)[:, None], chosen_scores)
        count = tl.sum((is_chosen & counted[:, None]).to(tl.int32), 0)
        tl.atomic_add(counts + k * num_experts + expert, count, mask=(expert < num_experts) & (count > 0))
    if RENORMALIZES:
        chosen_scores /= tl.maximum(tl.sum(chosen_scores, 1), SMALLEST)[:, None]
    at_choice = token[:, None].to(tl.int64) * K + choice
    is_choice = inside[:, None] & (choice < K)
    tl.store(ids + at_choice, chosen_ids.to(tl.int64), mask=is_choice)
    tl.store(weights + at_choice, chosen_scores, mask=is_choice)


@triton.jit
def logit_gradients_kernel(
    scores, ids, d_logits, d_scores, d_weights, whole, num_tokens, num_experts,
    K: tl.constexpr, IS_SOFTMAX: tl.constexpr, RENORMALIZES: tl.constexpr, HAS_LOGITS: tl.constexpr,
    HAS_SCORES: tl.constexpr, HAS_WEIGHTS: tl.constexpr, TILE: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """Gradients of the logits of a block of tokens."""
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    expert = tl.arange(0, TILE)
    inside = token < num_tokens
    known = inside[:, None] & (expert < num_experts)[None, :]
    at = token[:, None].to(tl.int64) * num_experts + expert[None, :]
    score = tl.load(scores + at, mask=known, other=0.0)
    d = tl.zeros([BLOCK_TOKENS, TILE], tl.float32)
    if HAS_SCORES:
        d += tl.load(d_scores + at, mask=known, other=0.0).to(tl.float32)
    if HAS_WEIGHTS:
        total = tl.zeros([BLOCK_TOKENS], tl.float32)
        pulled = tl.zeros([BLOCK_TOKENS], tl.float32)  # the sum of gradient times score
        chosen_d = tl.zeros([BLOCK_TOKENS, TILE], tl.float32)
        is_chosen = tl.zeros([BLOCK_TOKENS, TILE], tl.float32)
        for k in tl.static_range(K):
            index = tl.load(ids + token.to(tl.int64) * K + k, mask=inside, other=-1).to(tl.int32)
            gradient = tl.load(d_weights + token.to(tl.int64) * K + k, mask=inside, other=0.0).to(tl.float32)
            chosen = expert[None, :] == index[:, None]
            chosen_d += tl.where(chosen, gradient[:, None], 0.0)
            is_chosen += tl.where(chosen, 1.0, 0.0)
            score_k = tl.sum(tl.where(chosen, score, 0.0), 1)
            total += score_k
            pulled += gradient * score_k
        if RENORMALIZES:
            divisor = tl.maximum(total, SMALLEST)
            pull = tl.where(total > SMALLEST, pulled / divisor, 0.0)  # a sum that was raised to it has no gradient
            chosen_d = (chosen_d - is_chosen * pull[:, None]) / divisor[:, None]
        d += chosen_d
    if IS_SOFTMAX:
        d -= tl.sum(d * score, 1)[:, None]
    else:
        d *= 1.0 - score
    d *= score
    if HAS_LOGITS:
        d += tl.load(d_logits + at, mask=known, other=0.0).to(tl.float32)
    tl.store(whole + at, d, mask=known)


@triton.jit
def token_gradients_kernel(
    d_logits, weight, dx, num_tokens, width, num_experts,
    TILE: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """A block of columns of the gradients of a block of tokens."""
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside, exists = (token < num_tokens)[:, None], (column < width)[None, :]
    total = tl.zeros([BLOCK_TOKENS, BLOCK_WIDTH], tl.float32)
    for start in range(0, num_experts, TILE):
        expert = start + tl.arange(0, TILE)
        rows = d_logits + token[:, None].to(tl.int64) * num_experts + expert[None, :]
        d = tl.load(rows, mask=inside & (expert < num_experts)[None, :], other=0.0).to(tl.float32)
        rows = weight + expert[:, None].to(tl.int64) * width + column[None, :]
        weights = tl.load(rows, mask=(expert < num_experts)[:, None] & exists, other=0.0)
        total = tl.dot(d, weights, total, input_precision=PRECISION)
    tl.store(dx + token[:, None].to(tl.int64) * width + column[None, :], total, mask=inside & exists)


@triton.jit
def weight_gradients_kernel(
    d_logits, x, parts, num_tokens, width, num_experts, per_split,
    TILE: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """A block of columns of the weight's gradient, from one split of the tokens."""
    column = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    expert = tl.program_id(1) * TILE + tl.arange(0, TILE)
    split = tl.program_id(2).to(tl.int64)
    known, exists = (expert < num_experts)[None, :], (column < width)[None, :]
    total = tl.zeros([TILE, BLOCK_WIDTH], tl.float32)
    for start in range(0, per_split, BLOCK_TOKENS):
        token = split * per_split + start + tl.arange(0, BLOCK_TOKENS)
        inside = (token < num_tokens)[:, None]
        rows = d_logits + token[:, None].to(tl.int64) * num_experts + expert[None, :]
        d = tl.load(rows, mask=inside & known, other=0.0).to(tl.float32)
        rows = x + token[:, None].to(tl.int64) * width + column[None, :]
        values = tl.load(rows, mask=inside & exists, other=0.0).to(tl.float32)
        total = tl.dot(tl.trans(d), values, total, input_precision=PRECISION)
    rows = parts + (split * num_experts + expert[:, None]).to(tl.int64) * width + column[None, :]
    tl.store(rows, total, mask=(expert < num_experts)[:, None] & exists)
