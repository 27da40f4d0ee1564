"""The gate computes what its modules say now, and the module that holds the experts is not bypassed in silence."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.moe.layer import ExpertParallel
from tests.moe.test_changed_experts import Adapter, D, Doubled, Expert, layer_with, set_to


def test_a_changed_gate_routes_as_it_computes_now() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, D)
    for change in (
        set_to("wg", lambda gate: Adapter(gate.wg)),
        set_to("wg", lambda gate: nn.Linear(D, 4, bias=True)),
        lambda gate: gate.wg.register_forward_hook(lambda m, i, o: -o),
        lambda gate: parametrize.register_parametrization(gate.wg, "weight", Doubled()),
    ):
        layer = ExpertParallel(D, Expert(), MoEConfig(num_experts=4, top_k=2))
        before = layer.gate(x).logits_TE
        change(layer.gate)
        logits = layer.gate(x).logits_TE
        assert torch.allclose(logits, layer.gate.wg(x), atol=1e-6)
        assert not torch.allclose(logits, before)
        layer(x)[0].sum().backward()
        assert all(p.grad is not None for p in layer.gate.parameters())


def test_what_hangs_on_the_module_that_holds_the_experts_is_refused() -> None:
    for change in (
        lambda experts: experts.register_forward_hook(lambda m, i, o: None),
        lambda experts: setattr(experts, "forward", lambda x: x),
    ):
        layer, _ = layer_with(Expert())
        change(layer.experts)
        with pytest.raises(ConfigError, match="deepspeed_experts"):
            layer(torch.randn(2, D))
