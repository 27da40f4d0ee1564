"""The door: what the section turns, what happens after a step, and what is told to the monitor."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_moe_ep.errors import ConfigError, EngineError
from tests.ranks import RankPool


class TinyModel(nn.Module):
    def __init__(self, **arguments: Any) -> None:
        from ds_moe_ep import GeluMLP, MoE

        super().__init__()
        self.moe = MoE(8, GeluMLP(8, 16), num_experts=4, drop_tokens=False, **arguments)

    def forward(self, x: Tensor) -> Tensor:
        y, l_aux, _ = self.moe(x)
        return y.square().mean() + l_aux


def ds_config(**moe_ep: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
        "steps_per_print": 2,
        "moe_ep": moe_ep,
    }


def train(config: dict[str, Any], num_micro_batches: int = 8, **arguments: Any) -> Any:
    import ds_moe_ep

    torch.manual_seed(0)
    engine, *_ = ds_moe_ep.initialize(model=TinyModel(**arguments), config=config)
    for index in range(num_micro_batches):
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(100 * index + torch.distributed.get_rank()))
        engine.backward(engine(x))
        engine.step()
    return engine


def section_job() -> dict[str, Any]:
    engine = train(ds_config(schedule="chunks", chunks=3, top_k=2, depth=1), ep_size=2)
    layer = engine.module.moe
    return {
        "config": layer.config,
        "schedule": str(layer.deepspeed_moe.dispatcher.connection.forward),
        "router_k": layer.deepspeed_moe.gate.config.top_k,
    }


def test_the_sections_knobs_reach_the_layer_and_the_others_stay(pool: RankPool) -> None:
    for result in pool.run(2, section_job):
        config = result["config"]
        assert (config.schedule, config.chunks, config.top_k, config.num_experts) == ("chunks", 3, 2, 4)
        assert result["schedule"] == "D0 D1 E0 C0 D2 E1 C1 E2 C2" and result["router_k"] == 2


def bias_job() -> tuple[list[list[int]], int]:
    steps, engine = [], train(ds_config(balance="bias"), num_micro_batches=0, ep_size=2)
    rank = torch.distributed.get_rank()
    for index in range(4):
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(10 * index + rank))
        engine.backward(engine(x))
        engine.step()
        steps.append(engine.module.moe.deepspeed_moe.gate.balance.steps_E.tolist())
    return steps, engine.global_steps


def test_the_bias_moves_once_an_optimizer_step_and_alike_on_all_ranks(pool: RankPool) -> None:
    (ours, global_steps), (theirs, _) = pool.run(2, bias_job)
    assert ours == theirs and global_steps == 2
    assert ours[0] == [0, 0, 0, 0], "a micro-batch between two optimizer steps moves nothing"
    assert ours[1] != ours[0] and ours[2] == ours[1] and ours[3] != ours[2]
    assert all(abs(steps) <= 2 for steps in ours[3])


def meter_job(schedule: str, depth: int) -> tuple[float, float, float | None]:
    engine = train(ds_config(schedule=schedule, depth=depth, meter_every=2), num_micro_batches=10, ep_size=2)
    last = engine.moe_ep_meter.last
    return last.total_us, last.exposed_us, engine.moe_ep_meter.hidden_percent()


def test_the_meter_finds_nothing_hidden_by_the_blocking_control(pool: RankPool) -> None:
    for total_us, exposed_us, percent in pool.run(2, meter_job, "serial", 0):
        assert total_us > 0 and exposed_us == pytest.approx(total_us, rel=0.02)
        assert percent == pytest.approx(0, abs=2)


def test_the_meter_measures_every_nth_step_with_overlap(pool: RankPool) -> None:
    results = pool.run(2, meter_job, "peers", 2)
    assert results[0] == results[1], "the figure is the sum over ranks"
    total_us, exposed_us, percent = results[0]
    assert 0 <= exposed_us <= total_us and percent is not None


def monitor_job(folder: str) -> None:
    config = ds_config() | {"csv_monitor": {"enabled": True, "output_path": folder, "job_name": "job"}}
    train(config, ep_size=2)


def test_the_load_goes_to_the_engines_monitor(pool: RankPool, tmp_path: Path) -> None:
    pool.run(2, monitor_job, str(tmp_path))
    (path,) = (tmp_path / "job").glob("*load_max_over_mean*.csv")
    with path.open() as file:
        rows = [row for row in csv.reader(file) if row[0].isdigit()]
    samples_a_step = 8 * 2 * 2  # micro-batch, accumulation, ranks
    assert [int(row[0]) for row in rows] == [2 * samples_a_step, 4 * samples_a_step]  # every steps_per_print
    assert all(1 <= float(row[1]) <= 4 for row in rows)


def test_a_monitor_without_steps_per_print_reports_nothing_and_trains(pool: RankPool, tmp_path: Path) -> None:
    pool.run(1, silent_monitor_job, str(tmp_path))
    assert not list(tmp_path.rglob("*load_max_over_mean*.csv"))


def silent_monitor_job(folder: str) -> None:
    config = ds_config() | {"csv_monitor": {"enabled": True, "output_path": folder, "job_name": "job"}}
    del config["steps_per_print"]
    train(config)


def test_a_section_that_changes_top_k_takes_what_only_top_1_allows_with_it() -> None:
    from ds_moe_ep.config.knobs import MoEConfig
    from ds_moe_ep.engine.own_layers import with_given_knobs

    made = MoEConfig(num_experts=4, capacity_factor=1.0, drop_policy="random")
    assert with_given_knobs(made, MoEConfig(top_k=2), frozenset({"top_k"})).drop_policy == "position"
    assert with_given_knobs(made, MoEConfig(top_k=3), frozenset({"top_k"})).drop_policy == "score"
    drawn = MoEConfig(num_experts=4, top_k=2, sample_second=True)
    assert not with_given_knobs(drawn, MoEConfig(), frozenset({"top_k"})).sample_second


def door_job(through: str) -> list[float]:
    import deepspeed

    import ds_moe_ep

    torch.manual_seed(0)
    model = TinyModel(ep_size=2)
    config = {key: value for key, value in ds_config().items() if key != "moe_ep"}
    door = deepspeed.initialize if through == "deepspeed" else ds_moe_ep.initialize
    engine, *_ = door(model=model, config=config, model_parameters=list(model.parameters()))
    losses = []
    for index in range(4):
        loss = engine(torch.randn(8, 8, generator=torch.Generator().manual_seed(index)))
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    return losses


def test_the_layer_works_with_a_plain_deepspeed_initialize(pool: RankPool) -> None:
    plain, ours = pool.run(2, door_job, "deepspeed"), pool.run(2, door_job, "ds_moe_ep")
    assert plain == ours and len(set(plain[0])) == 4


REFUSED = {
    "moe_ep.shedule='x'": (lambda: ds_config(shedule="x"), "did you mean 'schedule'"),
    "moe_ep.layout=2x1": (lambda: ds_config(layout={"tp_size": 2}), "build_pipeline"),
    "moe_ep (moe).ep_size=4": (lambda: ds_config(ep_size=4), "made with ep_size=2"),
    "zero_optimization.stage=3": (lambda: ds_config() | {"zero_optimization": {"stage": 3}}, "use stage 1 or 2"),
}


def refused_job(name: str) -> str:
    import ds_moe_ep

    try:
        ds_moe_ep.initialize(model=TinyModel(ep_size=2), config=REFUSED[name][0]())
    except (ConfigError, EngineError) as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_on_every_rank(pool: RankPool, name: str) -> None:
    for message in pool.run(2, refused_job, name):
        assert name in message and REFUSED[name][1] in message
