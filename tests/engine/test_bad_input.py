"""Bad input gives an error that names path=value, the rule and the way out: on every rank, in seconds, no hang."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ds_moe_ep import ConfigError, EngineError, ExpertParallel, GeluMLP, MoE, MoEConfig, open_transport
from tests.moe.layer_cases import D, F
from tests.ranks import RankPool, run_ranks

LIMIT_S = 20.0
Caught = tuple[str, str]

DS_CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}},
}


def caught(function: Callable[..., object], *args: object) -> Caught:
    """On a rank: the class and message of the error that `function` raises."""
    try:
        function(*args)
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def assert_on_every_rank(results: Sequence[Caught], name: str, *parts: str) -> None:
    for rank, (raised, message) in enumerate(results):
        assert raised == name, f"rank {rank}: {raised}: {message}"
        for part in parts:
            assert part in message, f"rank {rank}: {message}"
        assert is_helpful(message), f"rank {rank}: {message}"


def is_helpful(message: str) -> bool:
    """`path=value: the rule; the way out`, or a sentence that begins with path=value and ends with the way out."""
    return re.match(r"[\w.\[\]() -]+=.+[:;] .+", message) is not None or re.search(r": .+; .+", message) is not None


# --- arguments of the layer


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"use_tutel": True}, ["MoE.use_tutel=True"]),
        ({"enable_expert_tensor_parallelism": True}, ["MoE.enable_expert_tensor_parallelism=True"]),
        ({"noisy_gate_policy": "Jiter"}, ["MoE.noisy_gate_policy='Jiter'", "did you mean 'Jitter'"]),
        ({"num_experts": 60, "ep_size": 16}, ["num_experts=60", "ep_size=16", "64"]),
        ({"num_experts": 4, "k": 5}, ["=5", "num_experts=4"]),
        ({"num_experts": 4, "k": 0}, ["=0"]),
        ({"num_experts": 0}, ["num_experts=0"]),
        ({"num_experts": 4, "capacity_factor": -1.0}, ["capacity_factor=-1.0"]),
        ({"num_experts": 4, "min_capacity": -1}, ["min_capacity=-1"]),
        ({"num_experts": "4"}, ["num_experts='4'"]),
        ({"num_experts": 4, "config": MoEConfig(num_experts=4)}, ["MoE.num_experts=4", "config"]),
        ({"k": 2, "config": MoEConfig(num_experts=4)}, ["MoE.k=2", "config"]),
    ],
)
def test_layer_arguments_that_make_no_sense_are_refused_by_name(arguments: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        MoE(D, GeluMLP(D, F), **arguments)
    for part in parts:
        assert part in str(error.value)
    assert is_helpful(str(error.value))


def test_an_unknown_layer_argument_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="num_expert"):
        MoE(D, GeluMLP(D, F), num_expert=4)  # type: ignore[call-arg]


# --- the way in


class Model(nn.Module):
    def __init__(self, width: int = D, **knobs: Any) -> None:
        super().__init__()
        self.layer = MoE(width, GeluMLP(width, F), config=MoEConfig(**({"num_experts": 8} | knobs)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output, l_aux, _ = self.layer(x)
        return output.mean() + l_aux


def start(section: Any, knobs: dict[str, Any], extra: dict[str, Any]) -> Any:
    """ds_moe_ep.initialize with a section "moe_ep" and a layer of these knobs."""
    import ds_moe_ep

    ds_config = DS_CONFIG | ({} if section is None else {"moe_ep": section}) | extra
    model = Model(**knobs)
    return ds_moe_ep.initialize(model=model, config=ds_config, model_parameters=list(model.parameters()))[0]


@pytest.mark.parametrize(
    ("section", "knobs", "extra", "name", "parts"),
    [
        ({"ep_siz": 2}, {}, {}, "ConfigError", ["moe_ep.ep_siz=2", "did you mean 'ep_size'"]),
        ({"schedule": "peer"}, {}, {}, "ConfigError", ["moe_ep.schedule='peer'", "'peers'"]),
        ({"depth": "two"}, {}, {}, "ConfigError", ["moe_ep.depth='two'"]),
        ([1], {}, {}, "ConfigError", ["moe_ep=[1]"]),
        (None, {}, {"moe-ep": {}}, "ConfigError", ["moe-ep", "'moe_ep'"]),
        ({"ep_size": 2}, {"ep_size": 4}, {}, "ConfigError", ["ep_size=2", "ep_size=4"]),
        ({"num_experts": 16}, {"ep_size": 4}, {}, "ConfigError", ["num_experts=16", "num_experts=8"]),
        (
            {},
            {"ep_size": 4},
            {"zero_optimization": {"stage": 3}},
            "ConfigError",
            ["zero_optimization.stage=3", "stage 1"],
        ),
        (None, {"ep_size": 3, "num_experts": 9}, {}, "TopologyError", ["ep_size=3", "4 ranks"]),
        (None, {"ep_size": 8}, {}, "TopologyError", ["ep_size=8", "4 ranks"]),
    ],
)
def test_initialize_refuses_on_every_rank(
    pool: RankPool, section: Any, knobs: dict[str, Any], extra: dict[str, Any], name: str, parts: list[str]
) -> None:
    results = pool.run(4, caught, start, section, knobs, extra, timeout_s=LIMIT_S)
    assert_on_every_rank(results, name, *parts)


def start_without(what: str) -> None:
    import ds_moe_ep

    model = nn.Linear(D, D) if what == "layer" else None if what == "model" else Model()
    ds_moe_ep.initialize(model=model, config=None if what == "config" else DS_CONFIG)


@pytest.mark.parametrize(
    ("what", "name"), [("model", "ConfigError"), ("config", "ConfigError"), ("layer", "EngineError")]
)
def test_initialize_says_what_is_missing(pool: RankPool, what: str, name: str) -> None:
    assert_on_every_rank(pool.run(2, caught, start_without, what, timeout_s=LIMIT_S), name, "=")


def start_differently(difference: str) -> None:
    knobs: dict[str, Any] = {"ep_size": 4}
    if dist.get_rank() == 2:
        knobs |= {"knob": {"top_k": 2}, "width": {"width": 2 * D}, "experts": {"num_experts": 12}}[difference]
    start(None, knobs, {})


@pytest.mark.parametrize("difference", ["knob", "width", "experts"])
def test_ranks_whose_configurations_differ_are_told_so_on_every_rank(pool: RankPool, difference: str) -> None:
    results = pool.run(4, caught, start_differently, difference, timeout_s=LIMIT_S)
    assert_on_every_rank(results, "EngineError", "ranks [2]", "rank 0")


def start_with_other_section() -> None:
    start({"schedule": "chunks" if dist.get_rank() == 1 else "peers"}, {"ep_size": 4}, {})


def test_ranks_whose_sections_differ_are_told_so_on_every_rank(pool: RankPool) -> None:
    results = pool.run(4, caught, start_with_other_section, timeout_s=LIMIT_S)
    assert_on_every_rank(results, "EngineError", "ranks [1]", "rank 0")


# --- groups


def test_a_layer_used_before_it_is_connected_says_how_to_connect_it() -> None:
    layer = ExpertParallel(D, GeluMLP(D, F), MoEConfig(num_experts=4, ep_size=2))
    with pytest.raises(EngineError, match=r"moe_ep.ep_size=2: .*connect"):
        layer(torch.zeros(3, D))
    with pytest.raises(EngineError, match=r"moe_ep.ep_size=2: .*initialize"):
        MoE(D, GeluMLP(D, F), num_experts=4, ep_size=2)(torch.zeros(3, D))


def connect_without_groups() -> list[Caught]:
    """The error of a transport, and of a layer."""
    config = MoEConfig(num_experts=4, ep_size=2)
    layer = MoE(D, GeluMLP(D, F), config=config)
    return [caught(open_transport, [[0, 1]], config), caught(layer.set_deepspeed_parallelism)]


def test_process_groups_that_were_never_made_are_named() -> None:
    by_rank = run_ranks(2, connect_without_groups, process_group=False, timeout_s=LIMIT_S)
    for results in zip(*by_rank, strict=True):
        assert_on_every_rank(results, "EngineError", "torch.distributed is not initialized", "init_distributed")


def open_groups(groups: list[list[int]], ep_size: int) -> None:
    config = MoEConfig(num_experts=4, ep_size=ep_size)
    ExpertParallel(D, GeluMLP(D, F), config).connect(open_transport(groups, config))


def test_groups_that_do_not_partition_the_world_are_refused(pool: RankPool) -> None:
    for groups in ([[0, 1]], [[0, 1], [1, 2, 3]]):
        results = pool.run(4, caught, open_groups, groups, 2, timeout_s=LIMIT_S)
        assert any(name == "TopologyError" for name, _ in results), results
    results = pool.run(4, caught, open_groups, [[0, 1], [2, 3]], 4, timeout_s=LIMIT_S)
    assert_on_every_rank(results, "ConfigError", "ep_size=4", "2 ranks")


# --- inputs


def feed(how: str, bad_ranks: list[int]) -> None:
    import deepspeed

    deepspeed.init_distributed("gloo")
    layer = MoE(D, GeluMLP(D, F), config=MoEConfig(num_experts=8, ep_size=4))
    layer.set_deepspeed_parallelism()
    x = torch.zeros(5, D)
    if dist.get_rank() in bad_ranks:
        x = {"width": torch.zeros(5, D + 1), "dtype": torch.zeros(5, D).bfloat16(), "flat": torch.zeros(())}[how]
    layer(x)


@pytest.mark.parametrize(("how", "part"), [("width", "17"), ("dtype", "bfloat16"), ("flat", "shape")])
def test_an_input_of_the_wrong_kind_is_refused_on_every_rank(pool: RankPool, how: str, part: str) -> None:
    results = pool.run(4, caught, feed, how, [0, 1, 2, 3], timeout_s=LIMIT_S)
    assert_on_every_rank(results, "ConfigError", "input.", part)


@pytest.mark.parametrize("how", ["width", "dtype"])
def test_an_input_of_the_wrong_kind_on_one_rank_reaches_every_rank(pool: RankPool, how: str) -> None:
    results = pool.run(4, caught, feed, how, [2], timeout_s=LIMIT_S)
    assert [name for name, _ in results] == ["EngineError", "EngineError", "ConfigError", "EngineError"], results
    assert all("rank 2" in message for name, message in results if name == "EngineError")


def feed_bad_mask(bad_ranks: list[int]) -> None:
    import deepspeed

    deepspeed.init_distributed("gloo")
    layer = MoE(D, GeluMLP(D, F), config=MoEConfig(num_experts=8, ep_size=2))
    layer.set_deepspeed_parallelism()
    layer(torch.zeros(5, D), torch.ones(4 if dist.get_rank() in bad_ranks else 5))


def test_a_mask_of_another_length_is_refused_on_every_rank(pool: RankPool) -> None:
    results = pool.run(2, caught, feed_bad_mask, [0, 1], timeout_s=LIMIT_S)
    assert_on_every_rank(results, "ConfigError", "used_token", "4", "5")
    results = pool.run(2, caught, feed_bad_mask, [1], timeout_s=LIMIT_S)
    assert [name for name, _ in results] == ["EngineError", "ConfigError"], results
