"""Knobs of the router against plain loops in float64, and against the routers of Hugging Face's own blocks."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.moe.router import Router, say_even

NUM_TOKENS, WIDTH, NUM_EXPERTS = 40, 6, 8


@dataclass(frozen=True)
class Case:
    """A router, and its knob whose default must be seen as a difference."""

    name: str
    knobs: dict[str, Any]
    without: dict[str, Any]
    bias: bool = field(default=False)


CASES = [
    Case("groups", {"score": "sigmoid", "top_k": 3, "n_group": 4, "topk_group": 2}, {"n_group": 1, "topk_group": 1}),
    Case("one group", {"top_k": 2, "n_group": 2, "topk_group": 1}, {"n_group": 1}),
    Case(
        "best of a group",
        {"top_k": 3, "n_group": 4, "topk_group": 2, "group_score": "max"},
        {"group_score": "top2_sum"},
    ),
    Case(
        "deepseek",
        {"score": "sigmoid", "top_k": 3, "n_group": 4, "topk_group": 2, "route_scale": 2.5, "balance": "bias"},
        {"n_group": 1, "topk_group": 1},
        bias=True,
    ),
    Case("bias", {"score": "sigmoid", "top_k": 2, "balance": "bias"}, {"balance": "none"}, bias=True),
    Case("scale", {"top_k": 2, "route_scale": 1.5}, {"route_scale": 1.0}),
    Case("after top-k", {"top_k": 3, "renormalize": True}, {"renormalize": False}),
    Case("before top-k", {"top_k": 3, "renormalize": False}, {"renormalize": True}),
    Case("one choice before top-k", {"top_k": 1, "renormalize": False}, {"renormalize": True}),
    Case("biased gate", {"top_k": 2, "gate_bias": True}, {"gate_bias": False}),
]


def reference(x_TD: Tensor, gate_ED: Tensor, offset_E: Tensor, bias_E: Tensor, config: MoEConfig) -> Tensor:
    """Weights [T, E] in float64, token by token; zero where a token does not go."""
    rows = []
    size = config.num_experts // config.n_group
    for x_D in x_TD:
        logits_E = gate_ED @ x_D + offset_E
        scores_E = torch.exp(logits_E) / torch.exp(logits_E).sum()
        if config.score == "sigmoid":
            scores_E = 1 / (1 + torch.exp(-logits_E))
        ranked = (scores_E + bias_E).tolist()
        groups = [sorted(ranked[g * size : (g + 1) * size], reverse=True) for g in range(config.n_group)]
        worth = [sum(best[:2]) if config.group_score == "top2_sum" else best[0] for best in groups]
        visited = sorted(range(config.n_group), key=lambda g: -worth[g])[: config.topk_group]
        allowed = [e for e in range(config.num_experts) if e // size in visited]
        chosen = sorted(allowed, key=lambda e: -ranked[e])[: config.top_k]
        total = sum(scores_E[e] for e in chosen) if config.renormalizes else 1.0
        rows.append(
            torch.stack(
                [
                    config.route_scale * scores_E[e] / total if e in chosen else 0 * scores_E[e]
                    for e in range(config.num_experts)
                ]
            )
        )
    return torch.stack(rows)


def make(case: Case, changes: dict[str, Any], dtype: torch.dtype) -> tuple[Router, Tensor]:
    """A router of the case and its tokens, the same for every change."""
    torch.manual_seed(0)
    given: dict[str, Any] = {"balance": "none"} | case.knobs | changes
    router = Router(WIDTH, MoEConfig(num_experts=NUM_EXPERTS, **given))
    router.wg.weight.data = torch.randn(NUM_EXPERTS, WIDTH, generator=torch.Generator().manual_seed(1)) / 2
    if router.wg.bias is not None:
        router.wg.bias.data = torch.randn(NUM_EXPERTS, generator=torch.Generator().manual_seed(2))
    if router.balance is not None:
        router.balance.start_from(torch.randn(NUM_EXPERTS, generator=torch.Generator().manual_seed(3)) / 3)
    x_TD = torch.randn(NUM_TOKENS, WIDTH, generator=torch.Generator().manual_seed(4))
    return router.to(dtype), x_TD.to(dtype)


def dense(router: Router, x_TD: Tensor) -> Tensor:
    """The router's weights as [T, E]."""
    routing = router(x_TD)
    zeros_TE = routing.weights_TK.new_zeros(len(x_TD), NUM_EXPERTS)
    return zeros_TE.scatter(1, routing.expert_ids_TK, routing.weights_TK)


def off(case: Case, changes: dict[str, Any], dtype: torch.dtype) -> tuple[float, float]:
    """The largest error of the weights and of the gate's gradient, against the reference of the case as it is."""
    router, x_TD = make(case, changes, dtype)
    config = MoEConfig(num_experts=NUM_EXPERTS, **{"balance": "none", **case.knobs})
    plain, _ = make(case, {}, torch.float64)
    gate_ED = plain.wg.weight.detach().requires_grad_()
    zeros_E = torch.zeros(NUM_EXPERTS, dtype=torch.float64)
    offset_E = zeros_E if plain.wg.bias is None else plain.wg.bias.detach()
    bias_E = zeros_E if plain.balance is None else plain.balance.bias_E.double()
    expected_TE = reference(x_TD.double(), gate_ED, offset_E, bias_E, config)
    found_TE = dense(router, x_TD)
    pull_TE = torch.randn(expected_TE.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (expected_TE * pull_TE).sum().backward()
    (found_TE * pull_TE.to(found_TE.dtype)).sum().backward()
    assert gate_ED.grad is not None and router.wg.weight.grad is not None
    gradient_off = (router.wg.weight.grad.double() - gate_ED.grad).abs().max().item()
    return (found_TE - expected_TE).abs().max().item(), gradient_off


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_routes_are_those_of_plain_loops_in_float64(case: Case) -> None:
    assert max(off(case, {}, torch.float64)) <= 1e-12
    assert max(off(case, {"router_dtype": "fp64"}, torch.float32)) <= 1e-5  # the gate's weight is rounded to fp32
    assert off(case, case.without, torch.float64)[0] > 1e-2  # the control


def test_with_groups_as_nodes_no_token_visits_more_nodes_than_the_limit() -> None:
    case = CASES[0]
    router, x_TD = make(case, {}, torch.float32)
    nodes_TK = router(x_TD).expert_ids_TK // (NUM_EXPERTS // 4)
    assert max(len(set(nodes)) for nodes in nodes_TK.tolist()) == 2
    free, x_TD = make(case, case.without, torch.float32)
    assert max(len(set(nodes)) for nodes in (free(x_TD).expert_ids_TK // 2).tolist()) == 3


def hugging_face_router(family: str, **config: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A router of transformers with random weights, and the knobs that stand for it."""
    from transformers import AutoConfig
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
    from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    groups = {"n_group": 4, "topk_group": 2, "route_scale": 2.5}
    makers: dict[str, tuple[Any, str, dict[str, Any]]] = {
        "deepseek_v2": (
            DeepseekV2TopkRouter,
            "num_experts",
            {"group_score": "max", "renormalize": False, **groups},
        ),
        "deepseek_v3": (
            DeepseekV3TopkRouter,
            "n_routed_experts",
            {"score": "sigmoid", "balance": "bias", **groups},
        ),
        "gpt_oss": (GptOssTopKRouter, "num_local_experts", {"renormalize": True, "gate_bias": True}),
        "mixtral": (MixtralTopKRouter, "num_local_experts", {"renormalize": True}),
        "olmoe": (OlmoeTopKRouter, "num_experts", {"renormalize": False}),
        "qwen2_moe": (Qwen2MoeTopKRouter, "num_experts", {"renormalize": config.get("norm_topk_prob")}),
        "qwen3_moe": (Qwen3MoeTopKRouter, "num_experts", {"renormalize": config.get("norm_topk_prob")}),
    }
    cls, name, knobs = makers[family]
    given = {"hidden_size": WIDTH, "num_experts_per_tok": 3, name: NUM_EXPERTS, **config}
    if family.startswith("deepseek"):
        given |= {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
    router = cls(AutoConfig.for_model(family, **given))
    torch.manual_seed(0)
    for tensor in (*router.parameters(), *router.buffers()):
        tensor.data.normal_(std=0.5)
    return router, {"num_experts": NUM_EXPERTS, "top_k": 3, "balance": "none", **knobs}


@pytest.mark.parametrize(
    ("family", "config", "control"),
    [
        ("deepseek_v2", {"topk_method": "group_limited_greedy", "num_attention_heads": 1}, {"group_score": "top2_sum"}),
        ("deepseek_v3", {"norm_topk_prob": True}, {"n_group": 1, "topk_group": 1}),
        ("gpt_oss", {}, {"renormalize": False}),
        ("mixtral", {}, {"renormalize": False}),
        ("olmoe", {"norm_topk_prob": False}, {"renormalize": True}),
        ("qwen2_moe", {"norm_topk_prob": False}, {"renormalize": True}),
        ("qwen2_moe", {"norm_topk_prob": True}, {"renormalize": False}),
        ("qwen3_moe", {"norm_topk_prob": True}, {"score": "sigmoid"}),
    ],
)
def test_routes_are_those_of_the_family_of_hugging_face(
    family: str, config: dict[str, Any], control: dict[str, Any]
) -> None:
    theirs, knobs = hugging_face_router(family, **config)
    x_TD = torch.randn(NUM_TOKENS, WIDTH, generator=torch.Generator().manual_seed(6))
    _, weights_TK, ids_TK = theirs(x_TD)
    expected_TE = torch.zeros(NUM_TOKENS, NUM_EXPERTS).scatter(1, ids_TK, weights_TK.float())
    for changes, is_equal in ({}, True), (control, False):
        router = Router(WIDTH, MoEConfig(**{**knobs, **changes}))
        router.wg.load_state_dict(
            {name: value for name, value in theirs.state_dict().items() if name in ("weight", "bias")}
        )
        if router.balance is not None:
            router.balance.start_from(theirs.e_score_correction_bias)
        assert torch.allclose(dense(router, x_TD), expected_TE, atol=1e-6) == is_equal, changes


def test_the_gates_product_has_the_type_that_is_asked_for() -> None:
    x_TD = torch.randn(NUM_TOKENS, WIDTH, generator=torch.Generator().manual_seed(6)).bfloat16()
    torch.manual_seed(0)
    routers = {
        kind: Router(WIDTH, MoEConfig(num_experts=NUM_EXPERTS, router_dtype=kind)).bfloat16()
        for kind in ("fp32", "fp64", "tokens")
    }
    for router in routers.values():
        router.wg.load_state_dict(routers["fp32"].wg.state_dict())
    found = {kind: router(x_TD) for kind, router in routers.items()}
    exact_TE = x_TD.double() @ routers["fp32"].wg.weight.double().T
    assert torch.equal(found["fp64"].logits_TE, exact_TE)
    assert torch.equal(found["fp32"].logits_TE, x_TD.float() @ routers["fp32"].wg.weight.float().T)
    assert torch.equal(found["tokens"].logits_TE, (x_TD @ routers["fp32"].wg.weight.T).float())
    assert not torch.equal(found["tokens"].logits_TE, found["fp32"].logits_TE)
    assert {routing.weights_TK.dtype for routing in found.values()} == {torch.float32}


def test_forced_even_routing_is_even_keeps_the_gates_scores_and_is_said_loudly(
    caplog: pytest.LogCaptureFixture,
) -> None:
    say_even.cache_clear()
    with caplog.at_level(logging.WARNING):
        make(Case("another layer", {"force_even": True}, {}), {}, torch.float32)
        router, x_TD = make(Case("even", {"top_k": 3, "force_even": True, "renormalize": False}, {}), {}, torch.float32)
    assert [record.levelname for record in caplog.records if "EXPERTS TAKE TOKENS IN TURN" in record.message] == [
        "WARNING"
    ]
    routing = router(x_TD)
    assert routing.load_E().tolist() == [NUM_TOKENS * 3 / NUM_EXPERTS] * NUM_EXPERTS
    assert all(len(set(ids)) == 3 for ids in routing.expert_ids_TK.tolist())
    assert torch.equal(routing.weights_TK, routing.scores_TE.gather(1, routing.expert_ids_TK))
    used_T = torch.arange(NUM_TOKENS) % 5 != 0  # 32 tokens
    assert router(x_TD, used_T).load_E().tolist() == [32 * 3 / NUM_EXPERTS] * NUM_EXPERTS
    free, x_TD = make(Case("free", {"top_k": 3}, {}), {}, torch.float32)
    assert max(free(x_TD).load_E().tolist()) > NUM_TOKENS * 3 / NUM_EXPERTS  # the control


def test_a_bias_that_was_learnt_before_is_exact_in_bf16_and_steps_from_there() -> None:
    start_E = torch.randn(NUM_EXPERTS, generator=torch.Generator().manual_seed(8))
    router = Router(WIDTH, MoEConfig(num_experts=NUM_EXPERTS, balance="bias", bias_step=0.25))
    assert router.balance is not None
    router.balance.start_from(start_E)
    router = router.bfloat16()
    assert torch.equal(router.balance.bias_E, start_E)
    router.balance.load_E += torch.arange(NUM_EXPERTS)
    router.balance.step(lambda values: values)
    moved_E = start_E + 0.25 * torch.sign(3.5 - torch.arange(NUM_EXPERTS))
    assert torch.equal(router.balance.bias_E, moved_E)
    again = Router(WIDTH, router.config).bfloat16()
    again.load_state_dict(router.state_dict())
    assert again.balance is not None and torch.equal(again.balance.bias_E, moved_E)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"n_group": 3}, r"moe_ep\.n_group=3 does not divide num_experts=8"),
        ({"n_group": 2, "topk_group": 3}, r"moe_ep\.topk_group=3: there are n_group=2"),
        ({"n_group": 4, "top_k": 3}, r"moe_ep\.top_k=3: topk_group=1 of n_group=4 groups hold 2 experts"),
        ({"n_group": 8}, r"moe_ep\.group_score='top2_sum' with n_group=8: a group holds 1 expert"),
    ],
)
def test_groups_that_cannot_be_are_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoEConfig(num_experts=NUM_EXPERTS, **knobs)
