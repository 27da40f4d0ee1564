"""A model and tokens that route evenly, whatever layer does the routing.

With emulated devices nothing is learned, and an untrained router would send most tokens to one expert. So the routes
are fixed as in `cases.py`, for a whole model: gates have orthonormal rows, the embedding of token v is noise outside of
their span plus twice the row of expert v mod E, and emulated attention and experts leave a token's direction alone.
Every sequence holds every token equally often.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LOGIT = 2.0


def even_gate(num_experts: int, hidden_size: int) -> Tensor:
    """wg_ED with orthonormal rows that sum to zero each: a layer norm before the gate changes no order of logits."""
    generator = torch.Generator().manual_seed(2026)
    draws_DE = torch.randn(hidden_size, num_experts, generator=generator, dtype=torch.float64)
    orthonormal_DE: Tensor = torch.linalg.qr(draws_DE - draws_DE.mean(0))[0]
    return orthonormal_DE.t().float().contiguous()


def even_embedding(num_tokens: int, num_experts: int, hidden_size: int) -> Tensor:
    """Embeddings [V, D] that `even_gate` sends to expert v mod E."""
    wg_ED = even_gate(num_experts, hidden_size)
    noise_VD = torch.randn(num_tokens, hidden_size, generator=torch.Generator().manual_seed(2027))
    return noise_VD - noise_VD @ wg_ED.t() @ wg_ED + LOGIT * wg_ED[torch.arange(num_tokens) % num_experts]


def route_evenly(model: nn.Module, num_experts: int) -> None:
    """Sets the gates and the embedding of a model, whole or a stage of it."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and len(parameter) == num_experts and ("gate" in name or "router" in name):
                parameter.copy_(even_gate(num_experts, parameter.shape[1]))
            elif name.endswith("embedding.weight"):
                parameter.copy_(even_embedding(len(parameter), num_experts, parameter.shape[1]))


def even_windows(num_sequences: int, num_tokens: int, num_ids: int, seed: int) -> Tensor:
    """Token ids [B, S + 1] in which each of the ids stands equally often, as far as S allows."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(num_sequences, num_tokens, generator=generator).argsort(1)
    ids_BS = (order + torch.arange(num_sequences)[:, None] * num_tokens) % num_ids
    return torch.cat((ids_BS, ids_BS[:, :1]), dim=1)
