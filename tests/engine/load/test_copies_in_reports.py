"""What a run with copies tells of itself: its load is that without them, each expert group's copies lie where they lie.

Two expert groups of two ranks each, which place copies otherwise; the control is the same job without slots.
"""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from ds_moe_ep.engine.load.monitor import CELL, PICTURE
from ds_moe_ep.live.folder import RunFolder
from ds_moe_ep.live.lines import RunReport
from ds_moe_ep.schedule.placement import Placement
from tests.engine.small_model import NUM_EXPERTS, Job, batches, make_model, train_steps
from tests.moe.replica_cases import slots_of
from tests.ranks import RankPool

JOB = Job(stage=1, ep_size=2, accumulation=2, steps=4)
GUESTS = {0: ((4,), (None,)), 2: ((None,), (1,))}  # by a group's first rank: of each of its ranks


class Told(NamedTuple):
    """What a rank saw: choices of each pass, and gradients of each expert weight that its hooks heard of."""

    routes: list[Tensor]
    gradients: dict[str, int]


def told_by(replicas: int, folder: str) -> Told:
    import ds_moe_ep

    job = Job(**{**vars(JOB), "replicas": replicas})
    config: dict[str, Any] = {"watch": f"{folder}/run {replicas}", "report_every": 1, "heat_map_every": 2}
    listeners = {
        kind: {"enabled": True, "output_path": folder, "job_name": f"{kind} {replicas}"}
        for kind in ("csv_monitor", *(("tensorboard",) if importlib.util.find_spec("tensorboard") else ()))
    }
    engine, *_ = ds_moe_ep.initialize(model=make_model(job), config={**job.ds_config, **listeners, "moe_ep": config})
    for each in slots_of(engine.module):
        placement = Placement(2, NUM_EXPERTS // 2, 1, GUESTS[each.link.ranks[0]])
        each.choose = each.choose_anew = lambda rows_E, before, placement=placement: placement
    heard: dict[str, int] = {}
    for name, parameter in engine.module.named_parameters():
        if "deepspeed_experts" in name:
            heard[name] = 0
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: heard.update({name: heard[name] + 1}))
    with ds_moe_ep.record_routes(engine) as record:
        train_steps(engine, job, batches(job))
    routes = [coded_TK for layer in record.layers.values() for coded_TK in layer.passes]
    return Told(routes, heard)


def told(folder: str) -> list[Told]:
    import ds_moe_ep

    ds_moe_ep.init_distributed()
    return [told_by(replicas, folder) for replicas in (1, 0)]


def reports_of(folder: Path) -> list[RunReport]:
    reader = RunFolder(folder)
    reader.refresh()
    (run,) = reader.runs.values()
    return [report for entry in run.entries if (report := entry.read()) is not None]


@pytest.fixture(scope="module")
def ran(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[Told]]]:
    folder = tmp_path_factory.mktemp("runs")
    return folder, pool.run(4, told, str(folder), timeout_s=120)


def test_routes_are_those_without_copies_and_a_gradient_is_heard_of_once_per_backward_pass(
    ran: tuple[Path, list[list[Told]]],
) -> None:
    for mine, plain in ran[1]:
        assert len(mine.routes) == 2 * JOB.steps * JOB.accumulation
        assert all(torch.equal(a, b) for a, b in zip(mine.routes, plain.routes, strict=True))
        assert mine.gradients == plain.gradients and set(mine.gradients.values()) == {JOB.steps * JOB.accumulation}


def test_reports_have_the_load_without_copies_and_the_copies_of_every_group(
    ran: tuple[Path, list[list[Told]]],
) -> None:
    mine, plain = (reports_of(ran[0] / f"run {replicas}") for replicas in (1, 0))
    assert [report.step for report in mine] == [1, 2, 3, 4]
    for with_copies, without in zip(mine, plain, strict=True):
        for layer, other in zip(with_copies.layers, without.layers, strict=True):
            assert layer.rows_E == other.rows_E and layer.dropped_E == other.dropped_E
            assert layer.guests_RS == ((4,), (-1,), (-1,), (1,)) and layer.num_replicas == 2
            assert other.guests_RS == () and other.num_replicas == 0
            assert sum(layer.rank_rows_R) == pytest.approx(sum(other.rank_rows_R), abs=0.03), "hundredths are kept"
        rows = [[layer.rank_rows_R for layer in report.layers] for report in (with_copies, without)]
        assert rows[0] != rows[1], "copies take rows"


def test_the_monitor_has_the_copies_in_use_and_a_picture_every_so_many_steps(
    ran: tuple[Path, list[list[Told]]],
) -> None:
    for replicas in (1, 0):
        path = ran[0] / f"csv_monitor {replicas}" / "Train_moe_ep_layers.0_replicas_in_use.csv"
        with path.open() as file:
            assert {float(row[1]) for row in csv.reader(file) if row[0].isdigit()} == {2.0 * replicas}
    if importlib.util.find_spec("tensorboard") is None:
        pytest.skip("tensorboard is not installed: no picture can be written")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(ran[0] / "tensorboard 1"))
    events.Reload()
    images = events.Images(PICTURE)
    samples = JOB.accumulation * 12 * JOB.world_size
    assert [image.step for image in images] == [samples, 2 * samples, 4 * samples], "the first, and every second step"
    assert {(image.width, image.height) for image in images} == {(NUM_EXPERTS * CELL, 2 * CELL)}
