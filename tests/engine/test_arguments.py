"""DeepSpeed's arguments: each is honoured or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.engine.arguments import DEFAULTS, config_of_arguments
from ds_moe_ep.engine.layer import MoE
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.moe.experts import GeluMLP

HONOURED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"capacity_factor": 1.0, "eval_capacity_factor": 1.0, "drop_policy": "random", "renormalizes": False}),
    ({"num_experts": 6, "ep_size": 3}, {"num_experts": 6, "ep_size": 3, "num_local_experts": 2}),
    ({"use_rts": False}, {"drop_policy": "position"}),
    ({"num_experts": 4, "k": 2}, {"top_k": 2, "drop_policy": "position", "sample_second": True, "renormalizes": True}),
    ({"num_experts": 4, "k": 2, "top2_2nd_expert_sampling": False}, {"sample_second": False}),
    ({"num_experts": 4, "k": 3}, {"top_k": 3, "drop_policy": "score"}),
    ({"drop_tokens": False}, {"capacity_factor": None, "eval_capacity_factor": None, "drop_policy": "position"}),
    ({"capacity_factor": 1.5, "eval_capacity_factor": 2.0}, {"capacity_factor": 1.5, "eval_capacity_factor": 2.0}),
    ({"min_capacity": 9}, {"min_capacity": 9}),
    ({"noisy_gate_policy": "Jitter"}, {"noise": "jitter"}),
    ({"noisy_gate_policy": "RSample"}, {"noise": "rsample"}),
    ({"noisy_gate_policy": "None"}, {"noise": "none"}),
]


@pytest.mark.parametrize(("given", "expected"), HONOURED)
def test_an_argument_becomes_the_knob_of_the_same_meaning(given: dict[str, Any], expected: dict[str, Any]) -> None:
    config = config_of_arguments({**DEFAULTS, **given})
    assert {name: getattr(config, name) for name in expected} == expected


def test_every_argument_is_tried_above_or_refused_below() -> None:
    tried = {name for given, _ in HONOURED for name in given} | {"use_tutel", "enable_expert_tensor_parallelism"}
    assert tried == set(DEFAULTS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"use_tutel": True}, "MoE.use_tutel=True.*leave it False"),
        ({"enable_expert_tensor_parallelism": True}, "MoE.enable_expert_tensor_parallelism=True.*give more ranks"),
        ({"noisy_gate_policy": "Jiter"}, "MoE.noisy_gate_policy='Jiter'.*did you mean 'Jitter'"),
        ({"num_experts": 4, "ep_size": 3}, "num_experts=4 cannot be shared by ep_size=3"),
        ({"num_experts": 4, "k": 5}, "top_k=5: a token cannot visit more experts"),
    ],
)
def test_an_argument_without_meaning_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoE(8, GeluMLP(8, 16), **given)


def test_arguments_beside_a_config_are_refused_instead_of_ignored() -> None:
    with pytest.raises(ConfigError, match=r"MoE\.k=2 stands beside config"):
        MoE(8, GeluMLP(8, 16), k=2, config=MoEConfig(num_experts=4))


def test_a_template_is_copied_for_each_expert_and_kept_whole_for_the_residual() -> None:
    template = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    layer = MoE(8, template, num_experts=2, use_residual=True)
    experts = layer.deepspeed_moe.experts.deepspeed_experts
    assert layer.mlp is template and all(expert is not template for expert in experts)
    assert experts[0][0].weight.data_ptr() != experts[1][0].weight.data_ptr()
