"""The releases of DeepSpeed: which names the older ones lack, and what stands in for them.

A name is looked up in the installed release, whatever its number: one between two tested releases has what it has.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.moe.sharded_moe import TopKGate
from torch import Tensor


@dataclass(frozen=True)
class Later:
    """A name of DeepSpeed, or an argument of that name, which not every tested release has."""

    since: str  # the first tested release that has it
    module: str
    name: str
    argument: str = ""
    stand_in: Callable[..., Any] | None = None  # None: what needs it is refused by name

    @functools.cache  # noqa: B019 (there are as many as LATER has)
    def find(self) -> Any:
        """The installed release's own, or None."""
        try:
            found = operator.attrgetter(self.name)(importlib.import_module(self.module))
        except (ImportError, AttributeError):
            return None
        return found if not self.argument or self.argument in inspect.signature(found).parameters else None

    def get(self) -> Any:
        """The installed release's own, or its stand-in."""
        return self.find() or self.stand_in


def dense_routes(gate: TopKGate, x_TD: Tensor, used_token: Tensor | None) -> tuple[Any, ...]:
    """The answer of `TopKGate.forward(..., sparse_routes=True)`, by a gate that gives dense weights [T, E, C] alone.

    A token's choices come in the order of experts, and not of scores. One whose weight is an exact 0 is left out.
    """
    l_aux, weights_TEC, mask_TEC, exp_counts = gate(x_TD, used_token)
    used_TE = mask_TEC.any(2)
    experts_TK = used_TE.to(torch.int32).sort(dim=1, descending=True, stable=True).indices[:, : gate.k]
    is_used_TK = used_TE.gather(1, experts_TK)
    places_TK = mask_TEC.to(torch.int32).argmax(2).gather(1, experts_TK)
    weights_TK = weights_TEC.sum(2).gather(1, experts_TK)
    experts_TK = experts_TK.masked_fill(~is_used_TK, -1)
    return l_aux, mask_TEC.shape[2], mask_TEC.shape[1], experts_TK.t(), places_TK.t(), weights_TK.t(), exp_counts


LATER = {
    "sparse routes": Later("0.19.8", "deepspeed.moe.sharded_moe", "TopKGate.forward", "sparse_routes", dense_routes),
    "AutoEP": Later("0.19.8", "deepspeed.module_inject.auto_ep_layer", "AutoEPMoELayer"),
}
