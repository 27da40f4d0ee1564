"""Tapes of one layer's routes: one writes down where tokens go, pass by pass; the other sends them there again.

A choice is coded as one number: an expert from 0 where it was computed, -1 where it took no part, and -2 - expert where
a capacity dropped it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ds_moe_ep.errors import EngineError
from ds_moe_ep.kernels.eager import is_inside_backward

NO_PART = -1


class Choices(Protocol):
    """Routes of a pass, as a tape reads them."""

    @property
    def expert_ids_TK(self) -> Tensor: ...

    @property
    def is_used_TK(self) -> Tensor | None: ...

    @property
    def is_kept_TK(self) -> Tensor | None: ...


@dataclass(frozen=True)
class Chosen:
    """The choices of one recorded pass, on the device of its tokens; `is_whole` where each was computed."""

    expert_ids_TK: Tensor
    is_used_TK: Tensor
    is_kept_TK: Tensor
    is_whole: bool


class Tape(Protocol):
    """Either tape, in the place where a layer's router chooses."""

    def chosen(self, x_TD: Tensor) -> Chosen | None:
        """The choices that the tokens of a pass are to have; None where the router chooses."""

    def take(self, routes: Choices) -> None:
        """Hears the routes of a pass."""


class RouteRecorder:
    """Writes routes down on the host, which waits for each; leaves out recomputed passes, which make the same ones."""

    def __init__(self) -> None:
        self.passes: list[Tensor] = []  # int32 [T, K], coded

    def chosen(self, x_TD: Tensor) -> None:
        return None

    @torch.no_grad()
    def take(self, routes: Choices) -> None:
        if is_inside_backward():
            return
        coded_TK = routes.expert_ids_TK
        if routes.is_kept_TK is not None:
            coded_TK = torch.where(routes.is_kept_TK, coded_TK, NO_PART - 1 - coded_TK)
        if routes.is_used_TK is not None:
            coded_TK = coded_TK.masked_fill(~routes.is_used_TK, NO_PART)
        self.passes.append(coded_TK.to("cpu", torch.int32))


class RouteReplayer:
    """Gives the passes of a layer their recorded choices, in their order; a recomputation gets those of its first pass.

    Which pass a recomputation belongs to is told by the sum of its tokens, which are the same again.
    """

    def __init__(self, name: str, passes: Sequence[Tensor]) -> None:
        self._name, self._passes = name or "the layer", passes
        self._sums: list[Tensor] = []  # of the tokens of each pass so far

    @torch.no_grad()
    def chosen(self, x_TD: Tensor) -> Chosen:
        total = x_TD.detach().float().sum().view(torch.int32)  # its bits: a sum that is no number equals itself
        index = self._recomputed(total) if is_inside_backward() else self._next(total)
        coded_TK = self._passes[index]
        if len(coded_TK) != len(x_TD):
            raise EngineError(
                f"{self._name}: pass {index + 1} of the record has {len(coded_TK)} tokens, and this one {len(x_TD)}; "
                "replay the batches that were recorded, in their order"
            )
        is_whole = bool((coded_TK >= 0).all())
        coded_TK = coded_TK.to(x_TD.device, torch.int64)
        is_used_TK, is_kept_TK = coded_TK != NO_PART, coded_TK >= 0
        ids_TK = torch.where(is_kept_TK, coded_TK, NO_PART - 1 - coded_TK).clamp(min=0)
        return Chosen(ids_TK, is_used_TK, is_kept_TK, is_whole)

    def take(self, routes: Choices) -> None:
        """Nothing: they are the record's."""

    def _next(self, total: Tensor) -> int:
        if len(self._sums) == len(self._passes):
            raise EngineError(
                f"{self._name}: the record has {len(self._passes)} passes, and this is one more; replay as many as "
                "were recorded, or begin again"
            )
        self._sums.append(total)
        return len(self._sums) - 1

    def _recomputed(self, total: Tensor) -> int:
        """The last pass of these tokens; without a look at them where there was one pass alone."""
        for index in reversed(range(len(self._sums))):
            if len(self._sums) == 1 or torch.equal(self._sums[index], total):
                return index
        raise EngineError(
            f"{self._name}: recomputes a pass whose tokens are none of those replayed before; recompute alike (random "
            "numbers too), and inside of the replay"
        )
