"""Experts of DeepSpeed's layer that change after the hooks came: the layer computes what it computes without hooks."""

from __future__ import annotations

from collections.abc import Callable

import deepspeed
import torch
from torch import nn

import ds_moe_ep
from tests.engine.hooks.hooked_layers import hooked
from tests.engine.native_layers import first_of_equals, native_layer, run_layer
from tests.moe.layer_cases import LayerCase, LayerResult, errors
from tests.moe.test_changed_experts import Adapter, Doubled
from tests.ranks import RankPool


def case() -> LayerCase:
    config = ds_moe_ep.MoEConfig(num_experts=4, ep_size=2, top_k=2, node_size=1, schedule="peers")
    return LayerCase(name="changed", config=config, expert="gelu_bias", rows=(10, 6))


def adapt(expert: nn.Module) -> None:
    torch.manual_seed(5)
    expert.fc1 = Adapter(expert.fc1)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "an adapter": adapt,
    "a hook": lambda expert: expert.fc2.register_forward_hook(lambda m, i, o: 2 * o),
    "a forward of its own": lambda expert: setattr(expert, "forward", lambda x: expert.fc2(expert.fc1(x).tanh())),
    "a parametrization": lambda e: nn.utils.parametrize.register_parametrization(e.fc1, "weight", Doubled()),
}


def each_change() -> tuple[dict[str, tuple[LayerResult, LayerResult, LayerResult]], list[str]]:
    """Each change: hooked before it, without hooks, and unchanged; what is refused on the module that holds them."""
    deepspeed.init_distributed("gloo")
    results = {}
    with first_of_equals():
        unchanged = run_layer(native_layer(case()), case())
        for name, change in CHANGES.items():
            plain, layer = native_layer(case()), native_layer(case())
            with hooked(layer, schedule="peers", node_size=1):
                run_layer(layer, case())
                for each in (plain, layer):
                    each.zero_grad()
                    for expert in each.deepspeed_moe.experts.deepspeed_experts:
                        change(expert)
                results[name] = (run_layer(layer, case()), run_layer(plain, case()), unchanged)
        return results, refusals(native_layer(case()))


def refusals(layer: nn.Module) -> list[str]:
    texts = []
    with hooked(layer, schedule="peers"):
        handle = layer.deepspeed_moe.experts.register_forward_hook(lambda m, i, o: None)
        try:
            run_layer(layer, case())
        except ds_moe_ep.EngineError as error:
            texts.append(str(error))
        handle.remove()
    return texts


def test_experts_that_change_under_the_hooks_are_computed_as_they_are(pool: RankPool) -> None:
    by_rank = pool.run(2, each_change, timeout_s=100)
    for name in CHANGES:
        mine, plain, unchanged = ([results[name][side] for results, _ in by_rank] for side in range(3))
        assert max(errors(mine, plain).values()) <= 2e-6, name
        assert float((plain[0].output - unchanged[0].output).abs().max()) > 1e-3, f"{name}: the change changes nothing"
    for _, texts in by_rank:
        assert len(texts) == 1 and "hang on its `experts`" in texts[0]
