"""The soak: its routing workload and verdicts, two real runs that agree, and a run that leaks and differs."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.bench.harness.collector import Collector
from ds_moe_ep.bench.harness.processes import Finding
from ds_moe_ep.records.names import SOAK_VERDICTS
from ds_moe_ep.records.provenance import Provenance
from ds_moe_ep.records.record import Record, read_records
from ds_moe_ep.report.known_names import is_known
from tests.ranks import run_ranks
from tests.soak import __main__ as soak_command
from tests.soak.findings import derive, extremes, metric, slope
from tests.soak.plan import SoakPlan
from tests.soak.ranks import soak

SOURCE = Provenance(command="python -m bench", commit="abc", hardware="2 cores")
PLAN = SoakPlan(num_ranks=2, steps=24, sample_every=3, hash_every=6, num_tokens=32, expert_width=64)
PERTURBED_STEP = 9
KEPT = 2**18  # numbers of fp32: 1 MiB


def sound_model(plan: SoakPlan) -> Any:
    from tests.soak.model import SoakModel

    return SoakModel(plan)


def faulty_model(plan: SoakPlan) -> Any:
    """Keeps a tensor and a socket of every step; once, on one rank, moves every number of a batch by its last bit."""
    from tests.soak.model import Output, SoakModel

    class Faulty(SoakModel):
        kept: tuple[object, ...] = ()
        step = 0

        def forward(self, x_TD: Tensor, classes_T: Tensor) -> Output:
            self.kept = (*self.kept, torch.ones(KEPT), socket.socket())
            self.step += 1
            if self.step == PERTURBED_STEP and dist.get_rank() == 1:
                assert len(x_TD)
                x_TD = torch.nextafter(x_TD, torch.full_like(x_TD, torch.inf))
            return super().forward(x_TD, classes_T)

    return Faulty(plan)


def soak_of_rank(plan: SoakPlan, make_model: Callable[[SoakPlan], Any]) -> list[Finding]:
    found: list[Finding] = []
    soak(plan, found.append, make_model)
    return found


def run_soak(run: int, make_model: Callable[[SoakPlan], Any]) -> list[Finding]:
    """Findings of rank 0 in one run."""
    return list(run_ranks(PLAN.num_ranks, soak_of_rank, replace(PLAN, run=run), make_model, timeout_s=120)[0])


def records_of(runs: Sequence[Sequence[Finding]]) -> dict[str, Record]:
    found = Collector(SOURCE, metric, partial(derive, PLAN, len(runs)), extremes)
    for finding in (finding for run in runs for finding in run if finding.kind != "phase"):
        found.add(finding)
    return {record.name: record for record in found.records()}


def verdicts_of(records: dict[str, Record]) -> dict[str, bool]:
    return {what: bool(records[f"soak.verdict.{what}"].value) for what in SOAK_VERDICTS}


@pytest.fixture(scope="module")
def first_run() -> list[Finding]:
    return run_soak(1, sound_model)


@pytest.fixture(scope="module")
def records(first_run: list[Finding]) -> dict[str, Record]:
    """Of two runs."""
    return records_of([first_run, run_soak(2, sound_model)])


def test_two_runs_hold_all_verdicts(records: dict[str, Record]) -> None:
    notes = [records[f"soak.verdict.{what}"].notes for what in SOAK_VERDICTS]
    assert verdicts_of(records) == dict.fromkeys(SOAK_VERDICTS, True), notes
    assert [records[f"soak.hash.step{step:05d}"].value for step in (6, 12, 18, 24)] == [2, 2, 2, 2]


def test_the_records_of_a_run_are_complete_and_the_report_knows_each(records: dict[str, Record]) -> None:
    assert [name for name in records if not is_known(name)] == []
    for run in (1, 2):
        series = [records[f"soak.run{run}.memory.step{step:05d}"] for step in PLAN.samples()]
        assert all(record.n == PLAN.num_ranks and record.value > 1e8 for record in series)
        for what in ("handles", "sockets", "threads"):
            start, steady, end, after = (
                records[f"soak.run{run}.{what}.{when}"].value for when in ("start", "steady", "end", "after")
            )
            assert start == after < steady == end, "an engine has groups and lanes of its own, and gives them back"
    loads = [records[f"soak.load.step{step:05d}"] for step in range(1, PLAN.steps + 1)]
    assert all(1 <= record.value <= PLAN.num_ranks == record.n for record in loads)
    bursts = [record for step, record in enumerate(loads, start=1) if PLAN.is_burst(step)]
    assert len(bursts) == records["soak.weather.bursts"].value > 0
    assert all(record.value == PLAN.num_ranks for record in bursts), "all rows go to one expert"
    assert records["soak.weather.idle_ranks"].value >= len(bursts)
    assert records["soak.loss.step00024"].value < records["soak.loss.step00006"].value


@pytest.fixture(scope="module")
def faulty_records(first_run: list[Finding]) -> dict[str, Record]:
    """Of a sound run and a faulty one."""
    return records_of([first_run, run_soak(2, faulty_model)])


def test_what_a_run_leaks_is_found(faulty_records: dict[str, Record]) -> None:
    verdicts = verdicts_of(faulty_records)
    assert [what for what in ("memory", "allocated", "tensors", "handles") if verdicts[what]] == []
    assert verdicts["finite"]
    gained = faulty_records["soak.run2.growth.tensors"]
    assert gained.spread == pytest.approx((PLAN.steps, PLAN.steps), abs=2), "of every rank"
    assert faulty_records["soak.run1.growth.tensors"].value < 2


def test_a_difference_of_last_bits_on_one_rank_is_found_from_its_step_on(faulty_records: dict[str, Record]) -> None:
    assert not verdicts_of(faulty_records)["same"]
    assert [faulty_records[f"soak.hash.step{step:05d}"].value for step in (6, 12, 18, 24)] == [2, 1, 1, 1]


def test_one_run_has_nothing_to_agree_with(first_run: list[Finding]) -> None:
    assert "soak.verdict.same" not in records_of([first_run])


def test_a_run_that_is_cut_short_keeps_what_is_complete(first_run: list[Finding]) -> None:
    records = records_of([first_run[: len(first_run) // 2]])
    assert "soak.run1.memory.step00003" in records and "soak.hash.step00006" in records
    assert {name for name in records if "verdict" in name} == {"soak.verdict.finite"}


def test_the_routing_workload_follows_from_seed_step_and_rank() -> None:
    from tests.soak.model import RoutingWorkload

    plan = SoakPlan()
    first, second = RoutingWorkload(plan), RoutingWorkload(plan)
    for step, rank in ((1, 0), (7, 3)):
        assert all(torch.equal(a, b) for a, b in zip(first.batch(step, rank), second.batch(step, rank), strict=True))
    sizes = [plan.tokens_of(step, rank) for step in range(1, 101) for rank in range(plan.num_ranks)]
    assert 0 in sizes and min(size for size in sizes if size) == 32 and max(sizes) == 96
    assert 20 <= sum(plan.is_burst(step) for step in range(1, 1001)) <= 80
    assert [replace(plan, seed=1).is_burst(step) for step in range(100)] != [plan.is_burst(s) for s in range(100)]


def test_ranks_stand_on_as_many_nodes_as_fit() -> None:
    shapes = {ranks: (p.num_nodes, p.node_size) for ranks in (2, 3, 4, 6, 16) if (p := SoakPlan(num_ranks=ranks))}
    assert shapes == {2: (2, 1), 3: (3, 1), 4: (2, 2), 6: (3, 2), 16: (4, 4)}


def test_the_slope_sees_growth_and_no_single_jump() -> None:
    steps = list(range(10, 110, 10))
    assert slope(steps, [100 + 0.5 * step for step in steps]) == pytest.approx(0.5)
    assert slope(steps, [100.0] * 5 + [900.0] + [100.0] * 4) == 0


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--ranks", "1"], "--ranks=1: give a whole number of 2 or more"),
        (["--steps", "30"], "take 40 steps"),
        (["--runs", "0"], "--runs=0: give a whole number of 1 or more"),
        (["--sample-every", "0"], "--sample-every=0"),
    ],
)
def test_what_cannot_be_judged_is_refused(words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert soak_command.main(words) == 2
    assert complaint in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_the_command_writes_records_and_tells_the_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "soak.jsonl"
    words = ["--ranks", "2", "--steps", "40", "--runs", "2", "--hash-every", "20", "--no-caches", "--out", str(out)]
    assert soak_command.main(words) == 0
    assert "all runs computed the same bits" in capsys.readouterr().out
    names = {record.name for record in read_records(out)}
    assert {f"soak.verdict.{what}" for what in SOAK_VERDICTS} <= names
