"""The router's parts that parity with a reference does not reach: places, noise, the balancing bias."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.moe.router import Router, places


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 12),
    choices=st.integers(1, 3),
    experts=st.integers(1, 4),
    data=st.data(),
    ranked=st.booleans(),
)
def test_places_are_the_positions_in_each_experts_queue(
    tokens: int, choices: int, experts: int, data: st.DataObject, ranked: bool
) -> None:
    ids = st.lists(st.integers(0, experts - 1), min_size=choices, max_size=choices)
    ids_TK = torch.tensor(data.draw(st.lists(ids, min_size=tokens, max_size=tokens)), dtype=torch.int64)
    ids_TK = ids_TK.view(tokens, choices)
    priority_TK = torch.rand(tokens, choices) if ranked else None
    place_TK = places(ids_TK, None, priority_TK, experts)
    arrivals = [(t, k) for k in range(choices) for t in range(tokens)]
    for expert in range(experts):
        queue = [(t, k) for t, k in arrivals if ids_TK[t, k] == expert]
        if priority_TK is not None:
            queue.sort(key=lambda tk: -float(priority_TK[tk]))
        assert [int(place_TK[tk]) for tk in queue] == list(range(len(queue)))


@pytest.mark.parametrize("num_experts", [1, 2, 3])
def test_choices_that_take_no_part_stand_behind_every_capacity(num_experts: int) -> None:
    is_used_TK = torch.tensor([[True], [False], [True]])
    place_TK = places(torch.zeros(3, 1, dtype=torch.int64), is_used_TK, None, num_experts)
    assert place_TK[0] == 0 and place_TK[2] == 1 and place_TK[1] > 10**9


def make_router(**knobs: object) -> Router:
    torch.manual_seed(0)
    return Router(8, MoEConfig(num_experts=4, **knobs))


def test_noise_acts_in_training_only_and_on_the_choice_only() -> None:
    x_TD = torch.randn(512, 8, generator=torch.Generator().manual_seed(1))
    quiet = make_router()(x_TD)
    noisy = make_router(noise="rsample")
    assert (noisy(x_TD).expert_ids_TK != quiet.expert_ids_TK).any()
    torch.testing.assert_close(noisy(x_TD).scores_TE, quiet.scores_TE)
    jittered = make_router(noise="jitter")
    assert not torch.equal(jittered(x_TD).scores_TE, quiet.scores_TE)
    torch.testing.assert_close(jittered(x_TD).scores_TE, quiet.scores_TE, atol=0.05, rtol=0)
    for router in (noisy.eval(), jittered.eval()):
        assert torch.equal(router(x_TD).expert_ids_TK, quiet.expert_ids_TK)


def test_rsample_draws_the_choice_from_the_softmax() -> None:
    router = make_router(noise="rsample")
    x_TD = torch.randn(1, 8).expand(20_000, 8)
    share_E = router(x_TD).chosen_TE().mean(0)
    torch.testing.assert_close(share_E, router(x_TD[:1]).scores_TE[0], atol=0.015, rtol=0)  # 4 sigma of 20,000 draws


def test_the_second_expert_is_drawn_without_the_first() -> None:
    router = make_router(top_k=2, sample_second=True)
    ids_TK = router(torch.randn(1, 8).expand(2_000, 8)).expert_ids_TK
    assert (ids_TK[:, 0] == ids_TK[0, 0]).all() and (ids_TK[:, 1] != ids_TK[:, 0]).all()
    assert len(ids_TK[:, 1].unique()) == 3


def test_with_a_bias_the_second_expert_is_still_drawn_by_score() -> None:
    router = make_router(top_k=2, sample_second=True, balance="bias")
    x_TD = 4 * torch.randn(1, 8).expand(20_000, 8)
    routing = router(x_TD)
    rest_E = routing.scores_TE[0].clone()
    rest_E[routing.expert_ids_TK[0, 0]] = 0
    share_E = torch.bincount(routing.expert_ids_TK[:, 1], minlength=4) / 20_000
    torch.testing.assert_close(share_E, rest_E / rest_E.sum(), atol=0.015, rtol=0)  # 4 sigma of 20,000 draws


def test_a_new_bias_step_takes_effect_on_a_router_that_has_a_bias() -> None:
    router = make_router(balance="bias")
    router.configure(MoEConfig(num_experts=4, balance="bias", bias_step=0.5))
    assert router.balance is not None
    router.balance.steps_E += 1
    assert router.balance.bias_E.tolist() == [0.5] * 4


def test_scores_stay_in_fp32_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = make_router()(torch.randn(4, 8))
    assert routing.scores_TE.dtype == routing.weights_TK.dtype == torch.float32


def load(router: Router, x_TD: Tensor) -> Tensor:
    return router(x_TD).chosen_TE().sum(0)


def test_the_bias_evens_the_load_out_without_touching_the_weights() -> None:
    router = make_router(balance="bias", bias_step=0.002)
    router.wg.weight.data[0] += 0.6  # expert 0 is everybody's first choice
    x_TD = torch.rand(1024, 8, generator=torch.Generator().manual_seed(1))
    before_E = load(router, x_TD)
    assert router.balance is not None
    router.balance.load_E.zero_()
    loads = []
    for _ in range(500):
        loads.append(load(router, x_TD))
        router.balance.step(lambda values: values)
    mean_E = torch.stack(loads[-100:]).mean(0)
    assert before_E.max() > 3 * 256 and mean_E.max() < 1.1 * 256  # single steps swing by a few hundredths of score
    after = router(x_TD)
    torch.testing.assert_close(after.weights_TK, after.scores_TE.gather(1, after.expert_ids_TK))


def test_the_bias_steps_by_sign_and_is_whole_in_every_precision() -> None:
    router = make_router(balance="bias", bias_step=0.25).bfloat16()
    assert router.balance is not None
    router.balance.load_E += torch.tensor([10, 2, 4, 0])
    router.balance.step(lambda values: values)
    assert router.balance.steps_E.tolist() == [-1, 1, 0, 1]
    assert router.balance.bias_E.tolist() == [-0.25, 0.25, 0.0, 0.25]
    assert router.balance.load_E.sum() == 0
    assert "balance.steps_E" in router.state_dict() and "balance.load_E" not in router.state_dict()
    assert not any("expert" in key for key in router.state_dict())  # DeepSpeed would split such a key off


@pytest.mark.parametrize("training", [True, False])
def test_capacity_follows_the_mode(training: bool) -> None:
    router = make_router(capacity_factor=1.0, eval_capacity_factor=2.0, min_capacity=1).train(training)
    assert router(torch.randn(16, 8)).capacity == (4 if training else 8)
