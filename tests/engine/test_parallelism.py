"""Meshes of sequence ranks beside the layer: refused by name on every rank, whatever door they come through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ds_moe_ep import ConfigError, GeluMLP, MoE
from ds_moe_ep.config.parallel_keys import refuse_key_alone
from ds_moe_ep.config.training import read_training
from tests.engine.layouts.tensor_models import mpu_of
from tests.ranks import RankPool

WIDTH = 8
DS_CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "gradient_clipping": 0.01,
    "steps_per_print": 10**9,
}


class Model(nn.Module):
    def __init__(self, ep_size: int, make: Callable[..., nn.Module] = MoE) -> None:
        super().__init__()
        self.enter = nn.Linear(WIDTH, WIDTH)
        self.moe = make(WIDTH, GeluMLP(WIDTH, 16), num_experts=4, ep_size=ep_size, drop_tokens=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.moe(self.enter(x))[0].square().mean()
        return loss


SEQUENCE = "sequence parallel size=2"
# Further keys of the ds_config, further arguments, what ds_moe_ep.initialize says, what the layer says elsewhere
ROADS: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]], str, str]] = {
    "two keys": (
        {"data_parallel_size": 2, "sequence_parallel_size": 2}, dict,
        "data_parallel_size=2 with sequence_parallel_size=2", SEQUENCE,
    ),
    "a mesh": ({}, lambda: {"mesh_param": (2, 2)}, "mesh_param=(2, 2)", SEQUENCE),
}  # fmt: skip


def refusals() -> dict[tuple[str, str, int], str]:
    """Errors of each door on this rank, by road, door and ep_size."""
    import deepspeed

    import ds_moe_ep
    from ds_moe_ep.engine.layouts.known_groups import forget_groups

    ds_moe_ep.init_distributed()
    said = {}
    for road, (keys, arguments, *_) in ROADS.items():
        given = arguments()
        for door, ep_size in ((ds_moe_ep.initialize, 2), (deepspeed.initialize, 1), (deepspeed.initialize, 2)):
            try:
                door(model=Model(ep_size), config=DS_CONFIG | keys, **given)
                text = "nothing"
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
            said[road, door.__module__.split(".")[0], ep_size] = text
            forget_groups()
    return said


@pytest.fixture(scope="module")
def said(pool: RankPool) -> list[dict[tuple[str, str, int], str]]:
    return pool.run(4, refusals, timeout_s=120)


@pytest.mark.parametrize("road", ROADS)
def test_ranks_that_share_sequences_are_refused_on_every_rank_with_the_way_out(
    said: list[dict[tuple[str, str, int], str]], road: str
) -> None:
    early, late = ROADS[road][2:]
    for door, ep_size, begins in (("ds_moe_ep", 2, early), ("deepspeed", 1, late), ("deepspeed", 2, late)):
        for rank, theirs in enumerate(said):
            text = theirs[road, door, ep_size]
            assert f"Error: {begins}: " in text, f"rank {rank}: {text}"
            assert "the weights of sequence ranks part" in text and "parallel_state_sp" in text


def one_step_with(tensor_size: int | None, keys: dict[str, Any]) -> list[torch.Tensor]:
    """This rank's parameters after a step, under an mpu where a tensor size is given."""
    import ds_moe_ep
    from ds_moe_ep.engine.layouts.known_groups import forget_groups

    ds_moe_ep.init_distributed()
    torch.manual_seed(0)
    arguments = {} if tensor_size is None else {"mpu": mpu_of(tensor_size, "tensor_model_parallel")}
    engine, *_ = ds_moe_ep.initialize(model=Model(2), config=DS_CONFIG | keys, **arguments)
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(dist.get_rank()))
    engine.backward(engine(x))
    engine.step()
    forget_groups()
    return [parameter.detach().clone() for parameter in engine.module.parameters()]


def steps() -> list[list[torch.Tensor]]:
    mesh = {"data_parallel_size": 4, "sequence_parallel_size": 1}
    return [one_step_with(None, {}), one_step_with(1, {}), one_step_with(None, mesh)]


def test_groups_of_one_rank_train_as_without_them(pool: RankPool) -> None:
    for plain, under_mpu, under_mesh in pool.run(4, steps):
        for first, second, third in zip(plain, under_mpu, under_mesh, strict=True):
            assert torch.equal(first, second) and torch.equal(first, third)


def attach_under_sequences() -> str:
    import deepspeed
    from deepspeed.moe.layer import MoE as Native

    import ds_moe_ep

    ds_moe_ep.init_distributed()
    engine, *_ = deepspeed.initialize(model=Model(2, Native), config=DS_CONFIG, mesh_param=(2, 2))
    try:
        ds_moe_ep.attach_overlap(engine, {"schedule": "peers"})
    except ds_moe_ep.EngineError as error:
        return str(error)
    return "nothing"


def test_hooks_refuse_sequence_parallelism_by_its_own_name(pool: RankPool) -> None:
    for text in pool.run(4, attach_under_sequences):
        assert SEQUENCE in text and "tensor parallel" not in text


BATCH = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 1}


@pytest.mark.parametrize(
    ("keys", "begins"),
    [
        ({"sequence_parallel_size": 3}, "sequence_parallel_size=3: does not divide"),
        (
            {"sequence_parallel_size": 2, "data_parallel_size": 2},
            "data_parallel_size=2 with sequence_parallel_size=2: ",
        ),
        ({"sequence_parallel_size": "2"}, "sequence_parallel_size='2': needs a number of ranks"),
        ({"sequence_parallel_size": 0}, "sequence_parallel_size=0: needs a number of ranks"),
        (
            {"sequence_parallel_size": 1, "data_parallel_size": 2},
            "data_parallel_size=2 with sequence_parallel_size=1: ",
        ),
        ({"tensor_parallel": {"autotp_size": 3}}, "tensor_parallel.autotp_size=3: does not divide"),
        ({"tensor_parallel": {"autotp_size": True}}, "tensor_parallel.autotp_size=True: needs a number of ranks"),
    ],
)
def test_a_ds_config_that_shares_sequences_is_refused_before_its_batch_is_counted(
    keys: dict[str, Any], begins: str
) -> None:
    with pytest.raises(ConfigError) as error:
        read_training(BATCH | keys, ep_size=2, world_size=4)
    assert str(error.value).startswith(begins) and "; " in str(error.value)


@pytest.mark.parametrize(
    "keys", [{}, {"data_parallel_size": 2}, {"sequence_parallel_size": 1, "data_parallel_size": 4}]
)
def test_keys_that_share_nothing_leave_the_batch_as_it_is(keys: dict[str, Any]) -> None:
    assert read_training(BATCH | keys, ep_size=2, world_size=4).accumulation == 2


def test_a_key_without_groups_of_sequences_is_refused() -> None:
    with pytest.raises(ConfigError, match="sequence_parallel_size=2 without an mpu: it makes no groups"):
        refuse_key_alone({"sequence_parallel_size": 2})
    refuse_key_alone({"sequence_parallel_size": 1})


def test_the_batch_is_counted_over_the_copies_of_sequence_ranks() -> None:
    training = read_training(BATCH | {"sequence_parallel_size": 2}, ep_size=4, world_size=4)
    assert (training.num_copies, training.accumulation, training.num_replicas) == (2, 4, 1)


@pytest.mark.parametrize(("size", "ep_size"), [(2, 2), (2, 4), (4, 1), (4, 4)])
def test_the_batch_is_counted_over_tensor_ranks_of_autotp_as_deepspeed_does(size: int, ep_size: int) -> None:
    """An engine takes such a ds_config in tests/engine/layouts/test_dense_cut.py."""
    keys = {"tensor_parallel": {"autotp_size": size}}
    training = read_training(BATCH | keys, ep_size=ep_size, world_size=4)
    assert (training.num_copies, training.accumulation) == (4 // size, 2)
    assert training.batch == 2 * (4 // size) and training.num_replicas == 4 // ep_size
    of_mpu = read_training(BATCH, ep_size=ep_size, world_size=4, tensor_ranks=size)
    assert (of_mpu.num_copies, of_mpu.accumulation, of_mpu.batch) == (4 // size, 8 // (4 // size), 8)


def test_a_batch_that_implies_fewer_ranks_than_autotp_shares_is_refused() -> None:
    keys = {"gradient_accumulation_steps": 8, "tensor_parallel": {"autotp_size": 2}}
    with pytest.raises(ConfigError, match="does not divide the world of 1 ranks"):
        read_training(BATCH | keys, ep_size=1)
