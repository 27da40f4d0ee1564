"""Corners of hooked layers: rare draws of the gate, hooks of users, several kinds of layers, memory."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.engine.hooks.hooked_layers import KNOBS, hooked, rank
from tests.moe.layer_cases import D, OddExpert
from tests.ranks import RankPool


def native(expert: nn.Module, **arguments: Any) -> nn.Module:
    """DeepSpeed's layer of 4 experts on 2 ranks, with first values of one seed."""
    import deepspeed
    from deepspeed.moe.layer import MoE

    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    layer = MoE(D, expert, **{"num_experts": 4, "ep_size": 2, "k": 1, "drop_tokens": False, **arguments})
    layer.set_deepspeed_parallelism()
    return layer


def draws_of_zero() -> tuple[float, float]:
    """A dropless top-1 gate whose random selection draws an exact 0 leaves that token out: ours against DeepSpeed's."""
    from deepspeed.moe import sharded_moe

    from ds_moe_ep import GeluMLP

    layer, x = native(GeluMLP(D, 2 * D)), torch.randn(12, D)

    def draw(shape: torch.Size) -> Tensor:
        drawn = torch.full(shape, 0.5)
        drawn[3] = 0.0
        return drawn

    with patch.dict(sharded_moe.exp_selection_uniform_map, {torch.device("cpu"): draw}):
        plain = layer(x)[0]
        with hooked(layer, **KNOBS[0]):
            mine = layer(x)[0]
    return float((mine - plain).abs().max()), float(mine[3].abs().max())


def test_a_token_that_random_selection_leaves_out_gives_zeros_as_in_deepspeed(pool: RankPool) -> None:
    assert pool.run(2, draws_of_zero) == [(0.0, 0.0)] * 2


class Doubling(nn.Module):
    """DeepSpeed's module of experts with something on top."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.deepspeed_experts = experts.deepspeed_experts

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def errors_of_experts() -> list[str]:
    import ds_moe_ep
    from ds_moe_ep import GeluMLP

    def error_of(layer: nn.Module) -> str:
        try:
            ds_moe_ep.attach_overlap(nn.ModuleDict({"moe": layer}))
        except ds_moe_ep.EngineError as error:
            return str(error)
        return ""

    own, watched = native(GeluMLP(D, 2 * D)), native(GeluMLP(D, 2 * D))
    own.deepspeed_moe.experts = Doubling(own.deepspeed_moe.experts)
    watched.deepspeed_moe.experts.register_forward_hook(lambda *_: None)
    return [error_of(own), error_of(watched)]


def test_a_module_of_experts_that_would_be_passed_by_is_refused(pool: RankPool) -> None:
    for own, watched in pool.run(2, errors_of_experts):
        assert "its experts are a Doubling" in own
        assert "hooks of modules" in watched


def seen_by_hooks(kind: str) -> tuple[int, float]:
    """How often a hook of a parameter fires through a hooked layer in a backward pass, and what it makes of a gradient.

    The hook halves. "module": also a hook on an expert of a known form, which must fire.
    """
    from ds_moe_ep import GeluMLP

    layer = native(OddExpert() if kind == "opaque" else GeluMLP(D, 2 * D))
    x, fired = torch.randn(12, D), []
    expert = layer.deepspeed_moe.experts.deepspeed_experts[0]
    parameter = next(expert.parameters())

    def halve(gradient: Tensor) -> Tensor:
        fired.append("parameter")
        return gradient / 2

    layer(x)[0].square().sum().backward()
    plain, parameter.grad = parameter.grad, None
    parameter.register_hook(halve)
    with hooked(layer, **KNOBS[0]):
        if kind == "module":
            expert.register_forward_hook(lambda *_: fired.append("module"))
        layer(x)[0].square().sum().backward()
    assert kind != "module" or "module" in fired
    off = (2 * parameter.grad - plain).abs().max() / plain.abs().max()
    return fired.count("parameter"), float(off)


def test_hooks_of_parameters_fire_once_and_those_of_experts_are_heard(pool: RankPool) -> None:
    for kind in ("known", "opaque", "module"):
        for times, off in pool.run(2, seen_by_hooks, kind):
            assert times == 1, kind
            assert off <= 2e-6, kind


def weights_after_forward() -> int:
    """Views of an expert's weights that a pass of a known form holds between forward and backward, ZeRO-3's way."""
    from ds_moe_ep.comm.open import open_transport
    from ds_moe_ep.moe.dispatcher import Dispatcher
    from ds_moe_ep.moe.experts import KnownExperts
    from ds_moe_ep.moe.match_expert import Form
    from ds_moe_ep.moe.routes import Routes
    from tests.moe.layer_runs import config

    knobs = replace(config(num_experts=4, ep_size=2, top_k=1), schedule="peers")
    dispatcher = Dispatcher(knobs)
    dispatcher.connect(open_transport([[0, 1]], knobs))
    stack = nn.Parameter(torch.randn(2, 8, D)), nn.Parameter(torch.randn(2, D, 8))
    views = [list(each.unbind()) for each in stack]
    named = [{"up.weight": up, "down.weight": down} for up, down in zip(*views, strict=True)]
    held = [weakref.ref(view) for pair in views for view in pair]
    routes = Routes(expert_ids_TK=torch.arange(8).remainder(4)[:, None], weights_TK=torch.ones(8, 1))
    experts = KnownExperts(Form("gelu", {"up": "a", "down": "b"}), named)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach().clone(), lambda tensor: tensor):
        y_TD, _ = dispatcher(torch.randn(8, D, requires_grad=True), routes, experts, True)
    del experts, named, views
    alive = sum(ref() is not None for ref in held)
    y_TD.sum().backward()
    assert all(each.grad is not None for each in stack)
    return alive


def test_a_pass_holds_no_weights_between_forward_and_backward(pool: RankPool) -> None:
    assert pool.run(2, weights_after_forward) == [0, 0]


class TwoKinds(nn.Module):
    """Layers of 4 and of 2 experts, as in a pyramid, and of ep_size 2 and 1."""

    def __init__(self) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        from ds_moe_ep import GeluMLP

        sizes = ((4, 2), (2, 2), (4, 1))
        self.layers = nn.ModuleList(MoE(D, GeluMLP(D, D), num_experts=n, ep_size=ep, use_rts=False) for n, ep in sizes)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)[0]
        return x.square().mean()


def pyramid(folder: str) -> tuple[list[str], bool]:
    """Layers hooked in a model of several kinds, with a monitor on; whether its checkpoint loads again."""
    import deepspeed

    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    csv = {"enabled": True, "output_path": f"{folder}/csv{rank()}", "job_name": "pyramid"}
    config = {
        "train_micro_batch_size_per_gpu": 12,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "steps_per_print": 1,
        "csv_monitor": csv,
    }
    model = TwoKinds()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    with hooked(engine, **KNOBS[0]) as handle:
        names = list(handle.layers)
        engine.backward(engine(torch.randn(12, D)))
        engine.step()
        engine.save_checkpoint(folder)
        path, _ = engine.load_checkpoint(folder)
    dist.barrier()
    return names, path is not None


def test_layers_of_several_sizes_train_report_and_save(pool: RankPool, tmp_path: Any) -> None:
    assert pool.run(2, pyramid, str(tmp_path)) == [(["layers.0", "layers.1"], True)] * 2
