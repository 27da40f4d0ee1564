"""The scaling benchmark: its worlds and its records; what a world does is tested in test_systems.py."""

from __future__ import annotations

import pytest

from ds_moe_ep.bench.harness.collector import Collector
from ds_moe_ep.bench.harness.processes import Finding
from ds_moe_ep.bench.scaling.command import SIZES, ScalingBenchmark, ScalingOptions, plan_of
from ds_moe_ep.records.names import LAWS, TOTALS
from ds_moe_ep.records.provenance import Provenance
from ds_moe_ep.records.record import Record

SOURCE = Provenance(command="python -m bench", commit="abc", hardware="2 cores")


def test_a_rank_keeps_its_tokens_or_all_ranks_share_the_same_number() -> None:
    of_rank = {size: plan_of(1.0, "constant_rank", size) for size in SIZES}
    assert {plan.tokens_of_step // plan.num_ranks for plan in of_rank.values()} == {8 * 128}
    assert {plan.step_compute_s for plan in of_rank.values()} == {1.0}
    in_total = {size: plan_of(1.0, "constant_total", size) for size in SIZES}
    assert {plan.tokens_of_step for plan in in_total.values()} == {128 * 128}
    assert in_total[1].step_compute_s == pytest.approx(16.0)
    for plans in (of_rank, in_total):
        assert [plan.num_ranks for plan in plans.values()] == list(SIZES)
        assert len({round(plan.token_us, 6) for plan in plans.values()}) == 1, "a device is as fast in every world"


def scaled(step_s: dict[int, float]) -> list[Record]:
    run = ScalingBenchmark(ScalingOptions())
    found = Collector(SOURCE, run.metric, run.derive, run.summary)
    for size, seconds in step_s.items():
        plan = plan_of(1.0, "constant_rank", size)
        of, tokens = plan.prefix("unshaped", "training", "ep16"), plan.tokens_of_step
        found.add(Finding(samples={f"{of}.tps": (tokens / seconds,), f"{of}.tpot": (1e6 * seconds / tokens,)}))
        found.add(Finding(samples={f"{of}.busy": (100 / seconds,), f"{of}.step": (1e3 * seconds,)}))
        for part, value in (("weights", 400.0), ("gradients", 400.0), ("optimizer", 800.0)):
            found.add(Finding(samples={f"{of}.memory.{part}": (value / size,)}))
    return found.records()


def test_the_laws_are_fitted_to_the_medians() -> None:
    records = {record.name: record for record in scaled({1: 1.0, 2: 1.0, 4: 1.0})}
    assert records["scaling.constant_rank.ep4.tps"].value == pytest.approx(4 * 1024)
    assert records["scaling.constant_rank.ep4.memory_per_expert"].value == pytest.approx(1600 / 4 / 16)
    assert not records["scaling.constant_rank.ep4.memory_per_expert"].emulated
    assert not [name for name in records if ".step" in name or "weights" in name], "they have no name of their own"
    assert records["scaling.constant_rank.fit.tps.coefficient"].value == pytest.approx(1024)
    assert records["scaling.constant_rank.fit.tps.r2"].value == pytest.approx(1.0)
    assert records["scaling.constant_rank.fit.memory_per_expert.r2"].value == pytest.approx(1.0)
    assert "scaling.constant_rank.fit.busy.r2" not in records, "all values are equal: nothing varies"


def test_a_world_that_does_not_scale_fits_badly() -> None:
    records = {record.name: record for record in scaled({1: 1.0, 2: 2.1, 4: 3.9})}
    assert records["scaling.constant_rank.fit.tps.r2"].value < 0


def test_the_table_has_every_size_and_the_fits() -> None:
    (table,) = ScalingBenchmark(ScalingOptions()).tables(scaled({1: 1.0, 2: 1.1}))
    assert len(table.rows) == len(TOTALS) * (len(SIZES) + 1)
    assert len(table.head) == 2 + len(LAWS)
