"""The layer's cases: how many experts tokens visit and how the load falls, with inputs that force it.

A case fixes the expert ids of every token first and then makes gate weights and tokens that lead any gate
of the form softmax(x @ wg.T) there: the rows of wg are orthonormal, a token is noise without a part in
their span plus 2 * wg[first choice] + 1 * wg[second choice]. So two layers that hold the same gate weights
route identically, with a margin that rounding cannot bridge, and no gate is patched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

FIRST_LOGIT = 2.0  # of a token's first choice; choice c gets FIRST_LOGIT / (c + 1), all others 0


@dataclass(frozen=True, kw_only=True)
class LayerCase:
    """One layer on one load. All sizes are per rank where a rank holds them."""

    name: str
    top_k: int
    load: Literal["even", "random", "skewed"]
    hidden_size: int = 256
    width: int = 1024
    num_experts: int = 16
    num_tokens: int = 1024
    skew: float = 5.0  # rows of the fullest expert, in means
    seed: int = 2026

    @property
    def num_rows(self) -> int:
        """Row copies that leave a rank: N = T * K."""
        return self.num_tokens * self.top_k


CASES: tuple[LayerCase, ...] = (
    LayerCase(name="k1_even", top_k=1, load="even"),
    LayerCase(name="k2_even", top_k=2, load="even"),
    LayerCase(name="k1_random", top_k=1, load="random"),
    LayerCase(name="k2_random", top_k=2, load="random"),
    LayerCase(name="k4_random", top_k=4, load="random"),
    LayerCase(name="k1_skewed", top_k=1, load="skewed"),
    LayerCase(name="k2_skewed", top_k=2, load="skewed"),
)


@dataclass(frozen=True)
class ExpertWeights:
    """Weights of one GELU expert in the order of nn.Sequential(Linear, GELU, Linear)."""

    w1_FD: Tensor
    b1_F: Tensor
    w2_DF: Tensor
    b2_D: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return self.w1_FD, self.b1_F, self.w2_DF, self.b2_D


def rows_per_expert(case: LayerCase) -> list[int]:
    """Rows that one rank sends to each expert when the load is even or skewed; they sum to num_rows."""
    if case.load == "even":
        return _shared(case.num_rows, case.num_experts)
    hot = min(round(case.skew * case.num_rows / case.num_experts), case.num_tokens)
    return [hot, *_shared(case.num_rows - hot, case.num_experts - 1)]


def _shared(total: int, parts: int) -> list[int]:
    return [total // parts + (index < total % parts) for index in range(parts)]


def expert_ids(case: LayerCase, rank: int) -> Tensor:
    """ids_TK of a rank's tokens, distinct within a token; the same on every call.

    Even and skewed: experts are dealt to the choices in sorted order, T apart, so that the choices of one
    token differ as long as no expert has more than T rows; then tokens and choices are shuffled. Random:
    uniform draws.
    """
    generator = _generator(case, 100 + rank)
    if case.load == "random":
        draws_TE = torch.rand(case.num_tokens, case.num_experts, generator=generator)
        return draws_TE.topk(case.top_k, dim=1).indices
    return deal(rows_per_expert(case), case.top_k, generator)


def deal(rows_E: list[int], top_k: int, generator: torch.Generator) -> Tensor:
    """ids_TK in which each expert stands as often as `rows_E` says: T times at most, once in a token."""
    dealt_N = torch.repeat_interleave(torch.arange(len(rows_E)), torch.tensor(rows_E))
    ids_TK = dealt_N.view(top_k, -1).t()
    order_TK = torch.rand(ids_TK.shape, generator=generator).argsort(dim=1)
    ids_TK = ids_TK.gather(1, order_TK)
    return ids_TK[torch.randperm(len(ids_TK), generator=generator)].contiguous()


def gate_weight(case: LayerCase) -> Tensor:
    """wg_ED with orthonormal rows, the same on every rank."""
    generator = _generator(case, 1)
    draws_DE = torch.randn(case.hidden_size, case.num_experts, generator=generator, dtype=torch.float64, device="cpu")
    orthonormal_DE: Tensor = torch.linalg.qr(draws_DE)[0]
    return orthonormal_DE.t().float().contiguous()


def tokens(case: LayerCase, rank: int) -> Tensor:
    """x_TD that a gate with `gate_weight` sends to `expert_ids`."""
    return tokens_for(case, rank, expert_ids(case, rank))


def tokens_for(case: LayerCase, rank: int, ids_TK: Tensor) -> Tensor:
    """x_TD that a gate with `gate_weight` sends to these experts."""
    wg_ED = gate_weight(case).double()
    noise_TD = torch.randn(len(ids_TK), case.hidden_size, generator=_generator(case, 200 + rank), dtype=torch.float64)
    x_TD = noise_TD - (noise_TD @ wg_ED.t()) @ wg_ED
    for choice in range(case.top_k):
        x_TD += FIRST_LOGIT / (choice + 1) * wg_ED[ids_TK[:, choice]]
    return x_TD.float()


def output_gradient(case: LayerCase, rank: int) -> Tensor:
    """dy_TD that the backward pass starts from."""
    return torch.randn(case.num_tokens, case.hidden_size, generator=_generator(case, 300 + rank))


def expert_weights(case: LayerCase, expert: int) -> ExpertWeights:
    """Weights of one expert of the layer, by its global index, scaled as nn.Linear does."""
    generator = _generator(case, 1000 + expert)

    def uniform(fan_in: int, *shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator, device="cpu") * 2 - 1) / math.sqrt(fan_in)

    d, f = case.hidden_size, case.width
    return ExpertWeights(uniform(d, f, d), uniform(d, f), uniform(f, d, f), uniform(f, d))


def _generator(case: LayerCase, offset: int) -> torch.Generator:
    return torch.Generator().manual_seed(case.seed * 10_000 + offset)
