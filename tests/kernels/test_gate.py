"""The gate, plain by blocks and by Triton's interpreter, against torch's own operations in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.kernels.gate import ChoiceNoise, GateRule, gate_logits, gate_routes
from ds_moe_ep.moe.replay.tape import RouteRecorder, RouteReplayer, Tape
from ds_moe_ep.moe.router import Router
from tests.kernels.interpreter import under_interpreter

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
SHAPES = [(1, 1, 1), (5, 33, 3), (40, 128, 16), (67, 200, 40)]  # tokens, width, experts


def inputs(num_tokens: int, width: int, num_experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(num_tokens)
    return torch.randn(num_tokens, width).to(dtype), torch.randn(num_experts, width) * width**-0.5


def close(ours: Tensor | None, exact: Tensor | None, tolerance: float) -> None:
    assert ours is not None and exact is not None
    scale = float(exact.abs().max().clamp(min=1e-2)) if exact.numel() else 1.0
    torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance * scale)


def check_logits(shape: tuple[int, int, int], dtype: torch.dtype, use_triton: bool) -> None:
    x_TD, weight_ED = inputs(*shape, dtype)
    x, weight = x_TD.clone().requires_grad_(), weight_ED.clone().requires_grad_()
    exact_x, exact_weight = x_TD.double().requires_grad_(), weight_ED.double().requires_grad_()
    logits_TE, exact_TE = gate_logits(x, weight, use_triton), F.linear(exact_x, exact_weight)
    assert logits_TE.dtype == torch.float32
    close(logits_TE.detach(), exact_TE.detach(), TOLERANCE[torch.float32])
    d_logits_TE = torch.randn_like(logits_TE)
    logits_TE.backward(d_logits_TE)
    exact_TE.backward(d_logits_TE.double())
    assert x.grad is not None and x.grad.dtype == dtype
    close(x.grad, exact_x.grad, TOLERANCE[dtype])
    close(weight.grad, exact_weight.grad, TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (1700, 24, 8)])
def test_logits_of_plain_torch_equal_a_linear_layer(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_logits(shape, dtype, use_triton=False)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, dtype) for shape in SHAPES for dtype in TOLERANCE), ((600, 8, 300), torch.bfloat16)],
)
@under_interpreter
def test_logits_of_the_kernels_equal_a_linear_layer(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_logits(shape, dtype, use_triton=True)


def test_the_blocks_of_plain_torch_change_no_bit_of_the_logits_or_of_the_tokens_gradients() -> None:
    x_TD, weight_ED = inputs(1700, 64, 8, torch.bfloat16)
    x = x_TD.clone().requires_grad_()
    logits_TE = gate_logits(x, weight_ED)
    assert torch.equal(logits_TE, F.linear(x_TD.float(), weight_ED))
    d_logits_TE = torch.randn_like(logits_TE)
    logits_TE.backward(d_logits_TE)
    assert x.grad is not None and torch.equal(x.grad, (d_logits_TE @ weight_ED).bfloat16())


def plain_routes(
    x: Tensor, weight: Tensor, bias_E: Tensor | None, rule: GateRule
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits_TE = F.linear(x, weight)
    scores_TE = logits_TE.softmax(1) if rule.is_softmax else logits_TE.sigmoid()
    key_TE = logits_TE if bias_E is None else scores_TE + bias_E.double()
    ids_TK = key_TE.topk(rule.num_choices, dim=1).indices
    weights_TK = scores_TE.gather(1, ids_TK)
    if rule.renormalizes:
        weights_TK = weights_TK / weights_TK.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)
    return logits_TE, scores_TE, weights_TK, ids_TK


ROUTED: list[tuple[Any, ...]] = [  # shape, number of choices; whether it renormalizes, has a bias, has unused tokens
    ((1, 1, 1), 1, False, False, False),
    ((40, 128, 16), 1, False, False, True),
    ((37, 33, 3), 2, True, True, False),
    ((67, 200, 40), 8, True, False, True),
    ((67, 20, 8), 8, False, True, True),
    ((5, 20, 300), 8, True, True, False),
]


@pytest.mark.parametrize(
    ("shape", "num_choices", "renormalizes", "has_bias", "has_used", "is_softmax", "dtype"),
    [  # each with both scores, in two of the types
        (*case, is_softmax, list(TOLERANCE)[(index + is_softmax) % 3])
        for index, case in enumerate(ROUTED)
        for is_softmax in (True, False)
    ],
)
@under_interpreter
def test_routes_and_gradients_equal_torchs_own_operations(
    shape: tuple[int, int, int],
    num_choices: int,
    renormalizes: bool,
    has_bias: bool,
    has_used: bool,
    is_softmax: bool,
    dtype: torch.dtype,
) -> None:
    x_TD, weight_ED = inputs(*shape, dtype)
    bias_E = torch.linspace(-0.3, 0.3, shape[2]) if has_bias else None
    is_used_T = torch.arange(shape[0]) % 3 != 1 if has_used else None
    rule = GateRule(num_choices, is_softmax, renormalizes)
    x, weight = x_TD.clone().requires_grad_(), weight_ED.clone().requires_grad_()
    exact_x, exact_weight = x_TD.double().requires_grad_(), weight_ED.double().requires_grad_()
    routes, exact = gate_routes(x, weight, bias_E, is_used_T, rule), plain_routes(exact_x, exact_weight, bias_E, rule)
    assert torch.equal(routes.expert_ids_TK, exact[3])
    used_T = torch.ones(shape[0], dtype=torch.bool) if is_used_T is None else is_used_T
    for k in range(num_choices):
        expected_E = torch.bincount(exact[3][used_T, k], minlength=shape[2])
        assert routes.counts_KE[k].tolist() == expected_E.tolist()
    for ours, theirs in zip(routes[:3], exact[:3], strict=True):
        close(ours.detach(), theirs.detach(), TOLERANCE[torch.float32])
    factors = [torch.randn_like(each) for each in routes[:3]]
    for which in ((0, 1, 2), (2,), (0, 1)):  # of what a loss reads
        for tensor in (x, weight, exact_x, exact_weight):
            tensor.grad = None
        loss = torch.stack([(routes[i] * factors[i]).sum() for i in which]).sum()
        loss.backward(retain_graph=True)
        torch.stack([(exact[i] * factors[i].double()).sum() for i in which]).sum().backward(retain_graph=True)
        close(x.grad, exact_x.grad, TOLERANCE[dtype])
        close(weight.grad, exact_weight.grad, 10 * TOLERANCE[torch.float32])


@pytest.mark.parametrize(("first", "num_choices"), [(0, 1), (0, 4), (1, 2)])
@pytest.mark.parametrize("num_experts", [5, 40])
@under_interpreter
def test_noise_moves_the_choices_from_the_first_that_it_is_for(num_experts: int, first: int, num_choices: int) -> None:
    x_TD, weight_ED = inputs(50, 33, num_experts, torch.float32)
    noise_TE, rule = 2 * torch.randn(50, num_experts), GateRule(num_choices, True, True)
    routes = gate_routes(x_TD, weight_ED, None, None, rule, ChoiceNoise(noise_TE, first))
    logits_TE = F.linear(x_TD, weight_ED)
    key_TE, expected = logits_TE.clone(), []
    for k in range(num_choices):
        key_TE = key_TE + noise_TE if k == first else key_TE
        expected.append(key_TE.argmax(1))
        key_TE = key_TE.scatter(1, expected[-1].unsqueeze(1), float("-inf"))
    assert torch.equal(routes.expert_ids_TK, torch.stack(expected, 1))
    close(routes.logits_TE, logits_TE.double(), TOLERANCE[torch.float32])  # weights and losses see no noise
    scores_TK = logits_TE.softmax(1).gather(1, routes.expert_ids_TK)
    close(routes.weights_TK, (scores_TK / scores_TK.sum(1, keepdim=True)).double(), TOLERANCE[torch.float32])
    quiet = gate_routes(x_TD, weight_ED, None, None, rule)
    assert not torch.equal(quiet.expert_ids_TK, routes.expert_ids_TK)
    assert first == 0 or torch.equal(quiet.expert_ids_TK[:, 0], routes.expert_ids_TK[:, 0])


@pytest.mark.parametrize("knobs", [{"noise": "rsample"}, {"noise": "rsample", "top_k": 4}, {"sample_second": True}])
@under_interpreter
def test_a_router_draws_the_same_experts_in_one_pass_and_step_by_step(knobs: dict[str, object]) -> None:
    routings = []
    for kernels in ("triton", "torch"):
        router = Router(24, MoEConfig(**{"num_experts": 8, "top_k": 2, "kernels": kernels, **knobs}))  # type: ignore[arg-type]
        torch.manual_seed(3)
        with torch.no_grad():
            router.wg.weight.copy_(torch.randn(8, 24))
        assert router._takes_one_pass(torch.zeros(1, 24), kernels == "triton") == (kernels == "triton")
        routings.append(router(torch.randn(60, 24)))
    assert torch.equal(routings[0].expert_ids_TK, routings[1].expert_ids_TK)
    torch.testing.assert_close(routings[0].weights_TK, routings[1].weights_TK, rtol=1e-5, atol=1e-6)
    assert torch.equal(routings[0].load_E(), routings[1].load_E())


@pytest.mark.parametrize("knobs", [{"top_k": 1}, {"top_k": 3, "score": "sigmoid", "balance": "bias"}], ids=str)
@under_interpreter
def test_a_replayed_pass_has_the_bits_of_the_recorded_one(knobs: dict[str, Any]) -> None:
    x_TD, weight_ED = inputs(40, 128, 16, torch.float32)

    def run(tape: Tape) -> list[Tensor]:
        router = Router(128, MoEConfig(num_experts=16, kernels="triton", **knobs))
        router.wg.weight.data = weight_ED.clone()
        router.tape = tape
        if router.balance is not None:
            router.balance.start_from(torch.linspace(-0.3, 0.3, 16))
        assert router._takes_one_pass(x_TD, True)
        x = x_TD.clone().requires_grad_()
        routing = router(x)
        (routing.weights_TK.square().sum() + routing.logits_TE.sum()).backward()
        assert x.grad is not None and router.wg.weight.grad is not None
        return [routing.expert_ids_TK, routing.weights_TK, routing.load_E(), x.grad, router.wg.weight.grad]

    recorder = RouteRecorder()
    recorded, replayed = run(recorder), run(RouteReplayer("", recorder.passes))
    shifted = [(ids_TK + 1) % 16 for ids_TK in recorder.passes]
    other = run(RouteReplayer("", shifted))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(replayed, recorded, strict=True))
    assert torch.equal(other[0], shifted[0].long()) and not torch.equal(other[1], recorded[1])  # the control


@pytest.mark.parametrize(
    "knobs",
    [{"noise": "jitter"}, {"noise": "rsample", "sample_second": True}, {"noise": "rsample", "balance": "bias"}],
)
def test_other_draws_go_step_by_step(knobs: dict[str, object]) -> None:
    router = Router(24, MoEConfig(**{"num_experts": 8, "top_k": 2, **knobs}))  # type: ignore[arg-type]
    assert not router._takes_one_pass(torch.zeros(1, 24), True)
    router.eval()
    assert router._takes_one_pass(torch.zeros(1, 24), True)


@under_interpreter
def test_another_rule_gives_other_weights() -> None:
    x_TD, weight_ED = inputs(40, 128, 16, torch.float32)
    weights = [gate_routes(x_TD, weight_ED, None, None, GateRule(2, *rule)).weights_TK for rule in RULES]
    assert all(float((weights[0] - other).abs().max()) > 1e-3 for other in weights[1:])


RULES = [(True, True), (True, False), (False, True)]


@under_interpreter
def test_equal_logits_take_the_first_expert_and_no_number_stays_within_the_experts() -> None:
    x_TD = torch.ones(3, 4)
    weight_ED = torch.zeros(5, 4)
    assert gate_routes(x_TD, weight_ED, None, None, GateRule(3, True, True)).expert_ids_TK.tolist() == [[0, 1, 2]] * 3
    x_TD[1] = float("nan")
    ids_TK = gate_routes(x_TD, weight_ED, None, None, GateRule(3, True, True)).expert_ids_TK
    assert ids_TK[1].tolist() == [0, 1, 2] and ids_TK[0].tolist() == [0, 1, 2]
    nowhere = gate_routes(x_TD[:0], weight_ED, None, None, GateRule(2, False, False))
    assert nowhere.weights_TK.shape == (0, 2) and nowhere.counts_KE.sum() == 0
