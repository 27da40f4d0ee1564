"""The modules that fill an MoE layer of the model: its experts' template and its shared expert."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ds_moe_ep.config.knobs import ModelConfig
from ds_moe_ep.model import fused
from ds_moe_ep.moe.experts import GeluMLP, SwiGLU


def make_expert(model: ModelConfig) -> nn.Module:
    """The template of one routed expert."""
    make = SwiGLU if model.expert == "swiglu" else GeluMLP
    return make(model.hidden_size, model.expert_width, bias=model.expert_bias)


def make_shared_expert(model: ModelConfig) -> nn.Module | None:
    """The expert that every token visits, or None where its width is 0.

    A GELU expert runs as apex's dense-GELU-dense where that is offered: it sees all tokens at once, while the
    routed experts run by pieces under the schedule.
    """
    if model.shared_expert_width == 0:
        return None
    kernel = fused.offered().dense_gelu_dense
    if model.expert == "gelu" and kernel is not None:
        return FusedGeluMLP(model.hidden_size, model.shared_expert_width, bias=model.expert_bias, kernel=kernel)
    make = SwiGLU if model.expert == "swiglu" else GeluMLP
    return make(model.hidden_size, model.shared_expert_width, bias=model.expert_bias)


class FusedGeluMLP(GeluMLP):
    """A GeluMLP that runs as one fused kernel on CUDA, with the same parameters and names.

    cublasLt's GELU is the tanh form (at most 5e-4 from the exact one, about the rounding of fp16 at 1), so
    the torch path, which serves other devices, takes it too.
    """

    def __init__(
        self, hidden_size: int, width: int, bias: bool = False, *, kernel: Callable[..., torch.Tensor]
    ) -> None:
        super().__init__(hidden_size, width, bias=bias, approximate="tanh")
        self.kernel = kernel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The MLP's output, in the shape of `x`."""
        return self.fused(x) if x.is_cuda else super().forward(x)

    def fused(self, x: torch.Tensor) -> torch.Tensor:
        """The output by the kernel, which knows rows and needs biases: without them it adds zeros."""
        first, second = self.fc1, self.fc2
        biases = dict(self.named_parameters())
        bias1 = biases.get("fc1.bias", x.new_zeros(first.out_features))
        bias2 = biases.get("fc2.bias", x.new_zeros(second.out_features))
        y_TD = self.kernel(x.reshape(-1, x.shape[-1]), first.weight, bias1, second.weight, bias2)
        return y_TD.view(x.shape)
