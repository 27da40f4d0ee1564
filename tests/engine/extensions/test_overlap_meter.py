"""The meter as a user sees it: shares with their control, parts, the monitor's rows, the trace; on gloo ranks.

Whether compute covers traffic depends on a busy machine's mood, so an expert that sleeps (the lanes' threads go on)
stands for compute that is longer than traffic, and an expert that does nothing for none at all.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_moe_ep.engine.extensions.measurement import Measurement, events, table
from ds_moe_ep.engine.extensions.overlap_meter import MEASUREMENTS_PER_CONTROL, role_of
from ds_moe_ep.schedule.spans import Overlap, Tags
from tests.ranks import RankPool

WORLD = 4
PEERS = ("near", "node +1")  # two nodes of two ranks
SLOW_S = 0.01


class SleepyMLP(nn.Module):
    """An expert that takes a while for any rows, without holding the host."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        y: Tensor = self.linear(x)
        return y


class TwoLayers(nn.Module):
    """Two MoE layers; with `one_expert` the gate sends every token to the first expert."""

    def __init__(self, seconds: float, ep_size: int, one_expert: bool) -> None:
        from ds_moe_ep import MoE

        super().__init__()
        make = lambda: MoE(8, SleepyMLP(seconds), num_experts=WORLD, ep_size=ep_size, drop_tokens=False)  # noqa: E731
        self.first, self.second = make(), make()
        if one_expert:
            for layer in (self.first, self.second):
                nn.init.zeros_(layer.deepspeed_moe.gate.wg.weight)  # equal scores: the first is chosen

    def forward(self, x: Tensor) -> Tensor:
        y, loss_1, _ = self.first(x)
        z, loss_2, _ = self.second(y)
        return z.square().mean() + loss_1 + loss_2


def make_engine(
    *, seconds: float = 0.0, ep_size: int = WORLD, one_expert: bool = False, folder: str = "", **knobs: Any
) -> Any:
    import ds_moe_ep

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 0.0 if one_expert else 1e-3}},
        "moe_ep": {"node_size": 2, "schedule": "peers", **knobs},
    }
    if folder:
        config["csv_monitor"] = {"enabled": True, "output_path": folder, "job_name": "job"}
    torch.manual_seed(0)
    return ds_moe_ep.initialize(model=TwoLayers(seconds, ep_size, one_expert), config=config)[0]


def train(engine: Any, num_steps: int) -> list[float]:
    """The loss of each micro-batch of this rank."""
    losses = []
    for _ in range(2 * num_steps):
        index = engine.micro_steps
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(100 * index + torch.distributed.get_rank()))
        loss = engine(x)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def measured_job(kwargs: Mapping[str, Any], num_steps: int) -> tuple[Any, ...]:
    engine = make_engine(**kwargs)
    train(engine, num_steps)
    meter = engine.moe_ep_meter
    own_keys = {span.tags.group for span in meter.spans if span.lane != "compute"}
    return meter.last, meter.control, own_keys, meter.report()


def all_parts() -> set[Tags]:
    phases = ("forward", "backward")
    layers = ("first", "second")
    parts = {Tags(layer, phase, peers) for layer in layers for phase in phases for peers in PEERS}
    parts |= {Tags(layer, phase) for layer in (*layers, "") for phase in phases}
    return parts | {Tags(layer) for layer in layers} | {Tags()}


def test_long_compute_hides_most_and_its_blocking_control_hides_nothing(pool: RankPool) -> None:
    for _ in range(6):  # where another load on the machine's cores keeps peers back, little is hidden
        results = pool.run(WORLD, measured_job, {"seconds": SLOW_S, "meter_every": 2}, 2)
        last, control, _, report = results[0]
        if last.hidden_percent > 5:
            break
    assert all(result[0] == last and result[1] == control for result in results), "sums are the same on all ranks"
    assert (last.step, control.step, last.num_ranks) == (2, 1, WORLD)
    assert set(last.parts) == set(control.parts) == all_parts()
    for key, part in control.parts.items():
        assert part.exposed_us == part.total_us > 0, f"{key}: nothing covers a blocking transfer"
    assert control.hidden_percent == 0
    assert last.hidden_percent > 5, "what is issued under a sleeping expert"
    check_sums(last)
    assert "first" in report and "node +1" in report and "dispatch lane" in report


def check_sums(last: Measurement) -> None:
    """Layers and passes follow each other, so they add up; groups of a pass may run side by side."""
    for layer in ("first", "second"):
        passes = [last.parts[Tags(layer, phase)] for phase in ("forward", "backward")]
        assert sum(part.total_us for part in passes) == pytest.approx(last.parts[Tags(layer)].total_us)
        for phase in ("forward", "backward"):
            groups = [last.parts[Tags(layer, phase, peers)] for peers in PEERS]
            whole = last.parts[Tags(layer, phase)]
            assert max(group.total_us for group in groups) <= whole.total_us + 1e-6
            assert sum(group.total_us for group in groups) >= whole.total_us - 1e-6
            assert sum(group.exposed_us for group in groups) >= whole.exposed_us - 1e-6
    assert sum(last.parts[Tags(layer)].total_us for layer in ("first", "second")) == pytest.approx(last.total_us)
    assert last.parts[Tags()] == Overlap(last.total_us, last.exposed_us)
    assert sum(lane.total_us for lane in last.lanes.values()) >= last.total_us - 1e-6


def test_ranks_without_rows_list_the_same_parts(pool: RankPool) -> None:
    """Every token goes to expert 0: ranks 1 to 3 receive nothing, and send to rank 0 alone."""
    for last, control, own_keys, _ in pool.run(WORLD, measured_job, {"one_expert": True, "meter_every": 2}, 2):
        assert set(last.parts) == set(control.parts) == all_parts()
        assert own_keys == {key for key in all_parts() if key.peers}
        assert control.hidden_percent == 0


def test_depth_0_measures_what_its_control_does(pool: RankPool) -> None:
    for last, control, _, _ in pool.run(WORLD, measured_job, {"seconds": 0.002, "depth": 0, "meter_every": 2}, 2):
        assert last.hidden_percent == control.hidden_percent == 0
        assert last.exposed_us == last.total_us > 0


def test_layers_of_one_rank_have_no_communication(pool: RankPool) -> None:
    for last, control, own_keys, report in pool.run(2, measured_job, {"ep_size": 1, "meter_every": 1}, 2):
        assert set(last.parts) == {Tags("", "forward"), Tags("", "backward"), Tags()} and own_keys == set()
        assert last.hidden_percent is control.hidden_percent is None
        assert "n/a" in report


def steps_job() -> tuple[Any, ...]:
    from ds_moe_ep.comm.recorder import Off

    engine = make_engine(meter_every=3)
    layers = [layer.deepspeed_moe.dispatcher for layer in (engine.module.first, engine.module.second)]
    states, losses = [], []
    for _ in range(7):
        states.append([(isinstance(layer.recorder, Off), layer.is_blocking) for layer in layers])
        losses += train(engine, 1)
    off = make_engine()
    kept = [layer.deepspeed_moe.dispatcher.recorder for layer in (off.module.first, off.module.second)]
    return states, losses, train(off, 7), hasattr(off, "moe_ep_meter"), all(isinstance(r, Off) for r in kept)


def test_only_the_measured_step_and_its_control_record_and_no_step_changes_the_training(pool: RankPool) -> None:
    plain, control, measured = (True, False), (False, True), (False, False)
    for states, losses, losses_when_off, has_meter, is_off in pool.run(WORLD, steps_job):
        assert states == [[s, s] for s in (plain, control, measured, plain, plain, measured, plain)]
        assert losses == losses_when_off, "bit for bit"
        assert not has_meter and is_off


@pytest.mark.parametrize("every", [1, 2, 3, 10])
def test_every_measured_step_has_a_control_at_most_ten_measurements_old(every: int) -> None:
    roles, since = [], None
    for step in range(1, 40 * every):
        role = role_of(step, every, since is None or since >= MEASUREMENTS_PER_CONTROL)
        roles.append(role)
        if role == "control":
            since = 0
        elif role == "measured":
            assert since is not None
            since += 1
            assert since <= 10
    measured = [step for step, role in enumerate(roles, start=1) if role == "measured"]
    assert all(step % every == 0 for step in measured)
    assert roles.count("measured") >= (35 if every == 1 else 39)
    assert 3 <= roles.count("control") <= 5


def monitor_job(folder: str) -> tuple[Any, ...]:
    engine = make_engine(folder=folder, meter_every=2)
    train(engine, 4)
    return engine.moe_ep_meter.last, engine.moe_ep_meter.control


def rows_of(path: Path) -> list[tuple[int, float]]:
    with path.open() as file:
        return [(int(row[0]), float(row[1])) for row in csv.reader(file) if row[0].isdigit()]


def test_each_measured_step_goes_to_the_engines_monitor(pool: RankPool, tmp_path: Path) -> None:
    last, control = pool.run(WORLD, monitor_job, str(tmp_path))[0]
    folder, samples_a_step = tmp_path / "job", 8 * 2 * WORLD
    names = {path.stem.removeprefix("Train_moe_ep_") for path in folder.glob("Train_moe_ep_*.csv")}
    kinds = ("exposed_ms", "hidden_ms", "total_ms", "hidden_percent", "hidden_percent_blocking_control")
    parts = [f"{layer}_{phase}" for layer in ("first", "second") for phase in ("forward", "backward")]
    assert names == {f"{part}_{kind}" for part in parts for kind in kinds} | set(kinds[3:])
    for path in folder.glob("Train_moe_ep_*.csv"):
        assert [step for step, _ in rows_of(path)] == [2 * samples_a_step, 4 * samples_a_step]
    newest = {name: rows_of(folder / f"Train_moe_ep_{name}.csv")[-1][1] for name in names}
    part = last.parts[Tags("second", "backward")]
    assert newest["second_backward_total_ms"] == pytest.approx(part.total_us / WORLD / 1000)
    assert newest["second_backward_exposed_ms"] == pytest.approx(part.exposed_us / WORLD / 1000)
    assert newest["second_backward_hidden_percent"] == pytest.approx(part.hidden_percent)
    assert newest["hidden_percent"] == pytest.approx(last.hidden_percent)
    assert newest["hidden_percent_blocking_control"] == control.hidden_percent == 0


def trace_job(path: str) -> str:
    from ds_moe_ep import EngineError

    engine, early = make_engine(meter_every=2), ""
    try:
        engine.moe_ep_meter.write_trace(path)
    except EngineError as error:
        early = str(error)
    train(engine, 3)
    engine.moe_ep_meter.write_trace(path)
    return early


def test_the_trace_has_every_op_of_all_ranks(pool: RankPool, tmp_path: Path) -> None:
    path = tmp_path / "made" / "out.json"
    for early in pool.run(WORLD, trace_job, str(path)):
        assert "moe_ep.meter_every=2: no step was measured" in early
    trace_events = json.loads(path.read_text())["traceEvents"]
    spans = [event for event in trace_events if event["ph"] == "X"]
    lanes = {e["tid"]: e["args"]["name"] for e in trace_events if e["name"] == "thread_name"}
    for rank in range(WORLD):
        mine = [event for event in spans if event["pid"] == rank]
        # 2 layers x 2 micro-batches x 3 pieces, forward and backward; 1 block of weight gradients, backward
        assert {lane: sum(lanes[e["tid"]] == lane for e in mine) for lane in lanes.values()} == {
            "dispatch": 24,
            "combine": 24,
            "compute": 24 + 4,
        }
        assert {e["args"]["layer"] for e in mine} == {"first", "second"}
        assert {e["args"]["phase"] for e in mine} == {"forward", "backward"}
        assert {"dispatch near (1/2)", "compute node +1", "combine node +1"} <= {e["name"] for e in mine}
        assert min(e["ts"] for e in mine) == 0 and all(e["dur"] >= 0 for e in mine)


def measurement(total_us: float, exposed_us: float) -> Measurement:
    part = Overlap(total_us, exposed_us)
    parts = {Tags("moe", "forward", "near"): part, Tags("moe", "forward"): part, Tags("moe"): part, Tags(): part}
    return Measurement(total_us, exposed_us, 10, 2, parts, {"dispatch": part, "combine": Overlap(0, 0)})


def test_table_and_events_show_milliseconds_of_the_mean_rank_beside_the_control() -> None:
    lines = table(measurement(8000, 2000), measurement(12000, 12000)).splitlines()
    assert lines[0] == "communication of step 10, mean of 2 ranks; blocking: step 10"
    assert lines[2].split() == ["moe", "forward", "near", "4.00", "1.00", "3.00", "75.0", "0.0"]
    assert lines[-1].split() == ["all", "all", "combine", "lane", "0.00", "0.00", "0.00", "n/a", "n/a"]
    assert table(measurement(8000, 2000), None).splitlines()[2].split()[-1] == "n/a"
    assert {name: value for name, value, _ in events(measurement(8000, 2000), measurement(9, 9), 64)} == {
        "Train/moe_ep/hidden_percent": 75,
        "Train/moe_ep/hidden_percent_blocking_control": 0,
        "Train/moe_ep/moe/forward/exposed_ms": 1,
        "Train/moe_ep/moe/forward/hidden_ms": 3,
        "Train/moe_ep/moe/forward/total_ms": 4,
        "Train/moe_ep/moe/forward/hidden_percent": 75,
        "Train/moe_ep/moe/forward/hidden_percent_blocking_control": 0,
    }
    assert events(measurement(0, 0), None, 64) == [
        (f"Train/moe_ep/moe/forward/{what}_ms", 0.0, 64) for what in ("exposed", "hidden", "total")
    ]
