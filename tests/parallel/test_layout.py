"""Layouts that cannot be cut are refused by name, with a way out, before anything is built."""

from __future__ import annotations

from typing import Any

import pytest

from ds_moe_ep.config.knobs import SMALL, SPECIFICATION, Layout, ModelConfig, MoEConfig
from ds_moe_ep.config.section import read_section
from ds_moe_ep.errors import ConfigError

CUT = {"tp_size": 2, "pp_size": 2}


@pytest.mark.parametrize(
    ("layout", "model", "moe", "message"),
    [
        ({"tp_size": 3}, {}, {}, r"layout\.tp_size=3 does not divide moe_ep\.model\.num_heads=8"),
        ({"tp_size": 8}, {"expert_width": 100}, {}, r"tp_size=8 does not divide moe_ep\.model\.expert_width=100"),
        ({"tp_size": 4}, {"shared_expert_width": 6}, {}, r"does not divide moe_ep\.model\.shared_expert_width=6"),
        ({"pp_size": 3}, {}, {}, r"layout\.pp_size=3 does not divide moe_ep\.model\.num_layers=4"),
        ({"tp_size": 8}, {}, {"ep_size": 3, "num_experts": 3}, r"ep_size=3 with moe_ep\.layout\.tp_size=8: .*parts of"),
        ({"tp_size": 2}, {"expert_bias": True}, {}, r"expert_bias=true with .*tp_size=2.*set it to false"),
        ({"pp_size": 2}, {}, {"balance": "bias"}, r"balance='bias' with moe_ep\.layout and ep_size=1.*set it to 'aux"),
        ({"tp_size": 2}, {}, {"noise": "jitter"}, r"noise='jitter' with moe_ep\.layout\.tp_size=2.*set it to 'none'"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_refused_by_name(
    layout: dict[str, Any], model: dict[str, Any], moe: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Layout(**layout).check(ModelConfig(**vars(SMALL) | model), MoEConfig(**moe))


@pytest.mark.parametrize("layout", [Layout(), Layout(tp_size=8, pp_size=2), Layout(tp_size=2, pp_size=4)])
def test_what_can_be_cut_passes(layout: Layout) -> None:
    for model in (SMALL, SPECIFICATION):
        layout.check(model, MoEConfig())


def test_a_pipeline_without_tensor_shares_may_have_biases_and_noise() -> None:
    Layout(pp_size=2).check(ModelConfig(expert_bias=True), MoEConfig(noise="jitter"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tpsize": 2}, r"moe_ep\.layout\.tpsize=2: unknown key; did you mean 'tp_size'"),
        ({"tp_size": 0}, r"moe_ep\.layout\.tp_size=0.*it needs at least 1"),
        ({"pp_size": 2.0}, r"moe_ep\.layout\.pp_size=2\.0.*it needs int"),
        ({"pp_size": 3}, r"moe_ep\.layout\.pp_size=3 does not divide"),
    ],
)
def test_a_section_tells_a_wrong_layout_at_the_door(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_section({"moe_ep": {"model": "small", "layout": values}})
