"""The balancing bias of a hooked AutoEP layer: AutoEP chooses with it and leaves it as it is, a step moves it here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ds_moe_ep.kernels.eager import is_inside_backward

WAY_OUT = "train a family whose files have one (DeepSeek-V3) or put MoE in its place, or leave moe_ep.balance out"


class AutoEPBias:
    """AutoEP's own buffer, moved one step against the load (arXiv 2408.15664, algorithm 1) as `BiasBalance` moves its.

    Its name, and so its place in checkpoints, stays AutoEP's. It is fp32 from here on, whatever the engine trains in:
    steps of a thousandth would be lost in bf16.
    """

    def __init__(self, layer: Any, step_size: float) -> None:
        self._owner, self._name = owner_of(layer)
        self._step_size = step_size
        buffers = self._owner._buffers
        bias_E = buffers[self._name]
        assert bias_E is not None
        buffers[self._name] = bias_E.float()
        self._load_E = torch.zeros(bias_E.shape, dtype=torch.int64, device=bias_E.device)

    @staticmethod
    def problem_of(layer: Any) -> str:
        """Why there is no bias of the layer to move, or an empty string."""
        owner, name = owner_of(layer)
        bias = getattr(owner, name, None)
        if bias is None:
            return f"it has no bias to move; {WAY_OUT}"
        if owner._buffers.get(name) is not bias:
            return f"its {name} is a parameter, which the optimizer moves; leave moe_ep.balance out"
        return ""

    @property
    def bias_E(self) -> Tensor:
        """The bias as AutoEP adds it to the scores."""
        bias_E: Tensor = getattr(self._owner, self._name)
        return bias_E

    @torch.no_grad()
    def observe(self, counts_E: Tensor) -> None:
        """Adds the choices of one forward pass of training to the load; a recomputation makes the same ones again."""
        if not is_inside_backward():
            self._load_E += counts_E.to(torch.int64)

    @torch.no_grad()
    def step(self, sum_over_world: Callable[[Tensor], Tensor]) -> None:
        """Moves the bias against the load since the last step. Collective through `sum_over_world`."""
        if self._step_size:
            load_E = sum_over_world(self._load_E)
            self.bias_E.add_(torch.sign(load_E.sum() - load_E * len(load_E)), alpha=self._step_size)
        self.forget()

    def forget(self) -> None:
        """Drops the load since the last step: that batch moves nothing. Local."""
        self._load_E.zero_()


def owner_of(layer: Any) -> tuple[nn.Module, str]:
    """The module and the name of the bias that AutoEP chooses with: its own, or the one that came with the weights."""
    if layer.expert_bias is None:
        return layer.router, "e_score_correction_bias"
    return layer, "expert_bias"
