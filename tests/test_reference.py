"""The reference itself: cases worked by hand, and DeepSpeed's native layer on one rank."""

import math

import torch

from ds_moe_ep.config.knobs import MoEConfig
from tests.reference import auxiliary_losses, choose, gelu_expert, keep, moe_reference, swiglu_expert

SCORES = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.1, 0.4], [0.7, 0.2, 0.1], [0.2, 0.7, 0.1]], dtype=torch.float64)
ALL = torch.ones(4)


def test_choices_are_the_best_scores_and_a_bias_moves_them() -> None:
    assert choose(SCORES, 2, ALL, None) == [[0, 1], [0, 2], [0, 1], [1, 0]]
    assert choose(SCORES, 1, torch.tensor([1, 0, 1, 1]), None) == [[0], [], [0], [1]]
    assert choose(SCORES, 1, ALL, torch.tensor([0.0, 0.0, 0.55])) == [[2], [2], [0], [1]]


def test_second_choices_stand_behind_all_first_ones_when_places_go_by_position() -> None:
    config = MoEConfig(num_experts=3, top_k=2, capacity_factor=1.0, drop_policy="position")
    choices = choose(SCORES, 2, ALL, None)
    # expert 0: tokens 0, 1, 2 choose it first, token 3 second; expert 1: token 3 first, then 0 and 2
    assert keep(choices, SCORES, config, capacity=2) == [[0, 1], [0, 2], [], [1]]
    assert keep(choices, SCORES, config, capacity=3) == [[0, 1], [0, 2], [0, 1], [1]]


def test_places_by_score_go_to_the_best_scores() -> None:
    config = MoEConfig(num_experts=3, top_k=2, capacity_factor=1.0, drop_policy="score")
    assert keep(choose(SCORES, 2, ALL, None), SCORES, config, capacity=1) == [[], [2], [0], [1]]


def test_auxiliary_loss_by_hand() -> None:
    def loss(top_k: int) -> float:
        choices = choose(SCORES, top_k, ALL, None)
        return float(auxiliary_losses([SCORES], [choices], MoEConfig(num_experts=3, top_k=top_k))[0])

    mean = [2.0 / 4, 1.3 / 4, 0.7 / 4]
    assert math.isclose(loss(1), 3 * (mean[0] * 3 / 4 + mean[1] * 1 / 4))
    assert math.isclose(loss(2), loss(1)), "only first choices count"
    assert math.isclose(loss(3), 3 * sum(mean) / 3)


def test_the_groups_auxiliary_loss_is_the_mean_over_its_ranks() -> None:
    config = MoEConfig(num_experts=4, ep_size=2, balance_scope="group")
    scores = [torch.rand(n, 4, dtype=torch.float64) for n in (5, 2)]
    choices = [choose(s, 1, torch.ones(len(s)), None) for s in scores]
    whole = MoEConfig(num_experts=4)
    expected = auxiliary_losses([torch.cat(scores)], [choices[0] + choices[1]], whole)[0]
    torch.testing.assert_close(torch.stack(auxiliary_losses(scores, choices, config)).mean(), expected)


def test_experts_equal_torchs_own_functions() -> None:
    torch.manual_seed(0)
    x, w = (
        torch.randn(3, 4),
        {"fc1.weight": torch.randn(5, 4), "fc1.bias": torch.randn(5), "fc2.weight": torch.randn(4, 5)},
    )
    inner = torch.nn.functional.linear(x, w["fc1.weight"], w["fc1.bias"])
    expected = torch.nn.functional.gelu(inner) @ w["fc2.weight"].T
    torch.testing.assert_close(gelu_expert(w)(x), expected)
    v = {"gate.weight": torch.randn(5, 4), "up.weight": torch.randn(5, 4), "down.weight": torch.randn(4, 5)}
    expected = (torch.nn.functional.silu(x @ v["gate.weight"].T) * (x @ v["up.weight"].T)) @ v["down.weight"].T
    torch.testing.assert_close(swiglu_expert(v)(x), expected)


def test_one_token_by_hand() -> None:
    gate = torch.tensor([[1.0], [0.0], [-1.0]], dtype=torch.float64)
    experts = [lambda rows, f=f: rows * f for f in (10.0, 100.0, 1000.0)]
    x = torch.tensor([[2.0]], dtype=torch.float64)
    e = [math.exp(2), 1.0, math.exp(-2)]
    one = moe_reference(MoEConfig(num_experts=3, top_k=1), gate, experts, [x])[0]
    assert math.isclose(float(one.output_TD), 20 * e[0] / sum(e))
    two = moe_reference(MoEConfig(num_experts=3, top_k=2, z_loss_weight=0.5), gate, experts, [x])[0]
    assert math.isclose(float(two.output_TD), (20 * e[0] + 200 * e[1]) / (e[0] + e[1]))
    assert math.isclose(float(two.l_aux), 3 * e[0] / sum(e) + 0.5 * math.log(sum(e)) ** 2)
    assert two.exp_counts_E == [1, 1, 0]


def test_each_rank_has_its_own_capacity() -> None:
    config = MoEConfig(num_experts=2, top_k=1, capacity_factor=1.0, min_capacity=1)
    gate = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    shards = [torch.ones(4, 1, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)]
    outputs = moe_reference(config, gate, [lambda rows: rows] * 2, shards)
    assert [o.num_dropped for o in outputs] == [2, 1]
    assert (outputs[0].output_TD[:, 0] > 0).tolist() == [True, True, False, False]
