"""Answers of a gate: which experts each token visits and with what weight, and the scores that this comes from."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Routes:
    """Which experts T tokens visit, K choices each, and with what weight: what a dispatcher needs of any gate.

    `place_TK` is the row of a choice among those of its expert, from 0; it and `capacity` are None without a limit.
    `is_used_TK` is None where every choice takes part; `is_kept_TK` also leaves out what a capacity drops.
    `weighs_rows`: weights multiply the rows on their way to the experts, not the results.
    """

    expert_ids_TK: Tensor
    weights_TK: Tensor
    is_used_TK: Tensor | None = None
    is_kept_TK: Tensor | None = None
    place_TK: Tensor | None = None
    capacity: int | None = None
    weighs_rows: bool = False

    @property
    def count_E(self) -> Tensor | None:
        """Used choices of each expert, where they are counted already."""
        return None


@dataclass(frozen=True, kw_only=True)
class Routing(Routes):
    """The router's answer: the routes, and the scores over E experts that they come from.

    `counts_KE` has the used k-th choices of each expert, before any drop.
    """

    scores_TE: Tensor
    logits_TE: Tensor
    counts_KE: Tensor

    @functools.cached_property
    def count_E(self) -> Tensor:
        return self.counts_KE[0].long() if self.counts_KE.shape[0] == 1 else self.counts_KE.sum(0)

    def load_E(self, choices: slice = slice(None)) -> Tensor:
        """Choices of each expert (before any drop), as the scores' type; no gradient."""
        return self.counts_KE[choices].sum(0).to(self.scores_TE.dtype)

    @property
    def first_choices_E(self) -> Tensor:
        """First choices of each expert (before any drop), as the scores' type; no gradient."""
        first_E = self.count_E if self.counts_KE.shape[0] == 1 else self.counts_KE[0]
        return first_E.to(self.scores_TE.dtype)

    def chosen_TE(self, choices: slice = slice(None)) -> Tensor:
        """1 where a token chose an expert (before any drop), as the scores' type; no gradient."""
        ids_TK = self.expert_ids_TK[:, choices]
        ones_TK = torch.ones_like(ids_TK, dtype=self.scores_TE.dtype)
        if self.is_used_TK is not None:
            ones_TK = ones_TK * self.is_used_TK[:, choices]
        return torch.zeros_like(self.scores_TE, requires_grad=False).scatter_(1, ids_TK, ones_TK)
