"""One expert of AutoEP's, computed beside its layer."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def autoep_expert(experts: Any, weights: Mapping[str, Tensor], rows_nD: Tensor) -> Tensor:
    """One expert of AutoEP's on rows, in their type, by torch's operations: w1 the gate, w3 up, w2 down."""
    found = importlib.import_module("deepspeed.moe.ep_experts")
    kind = (experts.activation, experts.activation_alpha, experts.activation_limit)
    gate_nF, up_nF = rows_nD @ weights["w1"].t(), rows_nD @ weights["w3"].t()
    hidden_nF: Tensor = found.apply_expert_activation(gate_nF, up_nF, *kind, fused=False)
    return hidden_nF @ weights["w2"].t()
