"""Experts whose functions add to their weights' gradients by themselves, as Megatron-DeepSpeed's linear layers do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ds_moe_ep.comm.transport import Loopback
from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.errors import EngineError
from ds_moe_ep.moe.layer import ExpertParallel
from tests.engine.layouts.megatron_models import AddingLinear

WIDTH = 8


class Expert(nn.Module):
    def __init__(self, adds: bool) -> None:
        super().__init__()
        self.adds = adds
        self.up, self.down = nn.Parameter(torch.empty(16, WIDTH)), nn.Parameter(torch.empty(WIDTH, 16))
        for weight in self.parameters():
            nn.init.normal_(weight, generator=torch.Generator().manual_seed(1))

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return AddingLinear.apply(x, weight) if self.adds else x @ weight.t()

    def forward(self, x: Tensor) -> Tensor:
        return self.product(functional.gelu(self.product(x, self.up)), self.down)


def gradients(adds: bool, use_reentrant: bool | None = None) -> list[Tensor]:
    """Of two passes' tokens and of the weights; in a checkpoint where it says of which kind."""
    torch.manual_seed(0)
    layer = ExpertParallel(WIDTH, Expert(adds), MoEConfig(num_experts=4, top_k=2))
    layer.connect(Loopback())
    inputs = [torch.randn(10, WIDTH, requires_grad=True) for _ in range(2)]
    for x_TD in inputs:
        y_TD, loss, _ = layer(x_TD) if use_reentrant is None else checkpoint(layer, x_TD, use_reentrant=use_reentrant)
        (y_TD.square().sum() + loss).backward()
    return [leaf.grad.clone() for leaf in (*inputs, *layer.parameters()) if leaf.grad is not None]


@pytest.mark.parametrize("use_reentrant", [None, True])
def test_their_gradients_are_those_of_functions_that_return_them(use_reentrant: bool | None) -> None:
    for mine, expected in zip(gradients(True, use_reentrant), gradients(False), strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(mine, expected)


def test_where_they_would_add_to_copies_of_their_weights_they_are_refused_by_name() -> None:
    with pytest.raises(EngineError, match=r"returns no gradient for its parameter of shape \(\d+, \d+\).*reentrant"):
        gradients(True, use_reentrant=False)
    assert len(gradients(False, use_reentrant=False)) == len(gradients(False))
