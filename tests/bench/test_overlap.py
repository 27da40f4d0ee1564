"""The overlap benchmark: its arithmetic, its records and tables, and one short run over the loopback."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ds_moe_ep.bench.candidates.layers import AUTOEP, BIAS, NATIVE, NO_REMEDY, PHASES, REPLICAS
from ds_moe_ep.bench.harness.collector import Collector
from ds_moe_ep.bench.harness.processes import Finding
from ds_moe_ep.bench.overlap import command as overlap
from ds_moe_ep.bench.overlap.command import OverlapBenchmark, OverlapOptions
from ds_moe_ep.bench.testbed import Environment
from ds_moe_ep.records.provenance import Provenance
from ds_moe_ep.records.record import Record, read_records
from ds_moe_ep.records.render import to_markdown
from ds_moe_ep.schedule.shaping import HEADERS

SOURCE = Provenance(command="python -m bench", commit="abc", hardware="2 cores")
OF = "0.5 of step"
OF_WORKLOADS_IN_ORDER = (NO_REMEDY, REPLICAS, BIAS, NATIVE, AUTOEP)


def benchmark() -> OverlapBenchmark:
    run = OverlapBenchmark(OverlapOptions(sides=("peers", "serial", "native", "wire"), compute_s=1.024, ratios=(0.5,)))
    run.plan = replace(run.plan, environments=(Environment(OF, 100.0),))
    return run


def test_the_link_follows_from_the_ratio() -> None:
    # 1,024 rows of 1 KiB per rank, 3 of 4 leave the node, 4 ranks: 3 MiB per exchange. A pass computes 1,024 x 1 ms.
    plan = benchmark().plan
    assert plan.compute_ms("forward") == pytest.approx(1024) and plan.compute_ms("step") == pytest.approx(3072)
    seconds = 2 * 3 * 2**20 * HEADERS * 8 / (plan.link_mbit(0.5, "forward") * 1e6)
    assert seconds == pytest.approx(0.5 * 1.024)
    assert plan.link_mbit(1.0, "step") == pytest.approx(plan.link_mbit(1.5, "forward"))


def records_of(run: OverlapBenchmark) -> list[Record]:
    found = Collector(SOURCE, run.metric, run.derive, run.summary)
    times_s = {"peers": (3.2, 3.3), "serial": (5.0, 6.0), "native": (4.0, 4.0), "wire": (2.0, 2.2)}
    for index in range(2):
        times = {f"{run.plan.prefix(OF, name, 'step')}.time": (1e3 * s[index],) for name, s in times_s.items()}
        found.add(Finding(samples=times))
    traffic = {"peers.step.hidden": 95.0, "serial.step.hidden": 0.0, "wire.step.traffic": 2000.0}
    found.add(Finding(samples={f"overlap.{run.plan.device}.{OF}.{name}": (v,) for name, v in traffic.items()}))
    return found.records()


def test_records_compare_within_a_round_and_against_what_cannot_be_beaten() -> None:
    run = benchmark()
    records = {record.name: record for record in records_of(run)}
    of = f"overlap.emulated.{OF}"
    assert records[f"{of}.peers.step.to_serial"].value == pytest.approx((3.2 / 5 + 3.3 / 6) / 2)
    assert records[f"{of}.peers.step.to_native"].value == pytest.approx(3.25 / 4)
    assert records[f"{of}.peers.step.hidden"].value == pytest.approx(95)
    assert records[f"{of}.peers.step.over_limit"].value == pytest.approx(3.25 / 3.072), "compute is the longer one"
    assert f"{of}.wire.step.over_limit" not in records and f"{of}.serial.step.to_serial" not in records
    assert all(record.emulated for record in records.values())
    run.plan = replace(run.plan, device="real")
    real = {record.name: record for record in records_of(run)}
    assert real[f"overlap.real.{OF}.peers.step.over_limit"].value == pytest.approx(3.25 / 2.1)
    assert not any(record.emulated for record in real.values())


def test_the_table_has_a_row_per_candidate_and_a_dash_where_nothing_was_measured() -> None:
    run = benchmark()
    (table,) = run.tables(records_of(run))
    assert table.title == OF and table.head[:4] == ("candidate", *PHASES)
    lines = to_markdown(table).replace("\N{EN DASH}", "-").splitlines()
    cells = "3,250 (3,225-3,275) | 0.59 (0.57-0.62) | 0.81 (0.81-0.82) | 1.06 (1.05-1.07)"
    assert f"| peers | - | - | {cells} | - / - / 95 |" in lines
    assert any(line.startswith("| native |") for line in lines)
    assert any(line.startswith("| traffic alone | - | - | 2,000 |") for line in lines)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--sides", "peer"], "peers"),
        (["--nodes", "2"], "product is 16"),
        (["--device", "real"], "--links"),
        (["--no-testbed"], "--links none"),
        (["--warm-ups", "-1"], "--warm-ups=-1: give a whole number of 0 or more"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert overlap.main(words) == 2
    assert complaint in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.slow
def test_a_short_run_over_the_loopback_writes_records(tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    words = ["--links", "none", "--no-testbed", "--compute-s", "0.05", "--rounds", "2", "--out", str(out)]
    assert overlap.main([*words, "--sides", "peers", "serial", "hooked native", "native", "autoep", "wire"]) == 0
    records = {record.name: record for record in read_records(out)}
    assert records["overlap.emulated.unshaped.serial.step.hidden"].value == pytest.approx(0, abs=1)
    assert {name.split(".")[3] for name in records} == {"peers", "serial", "hooked native", "native", "autoep", "wire"}


def test_windows_of_a_workload_are_compared_with_no_remedy_and_with_balanced_loads() -> None:
    options = OverlapOptions(workload=("W0", "W1"), micro_batches=(4,), links=(None,), no_testbed=True)
    run = OverlapBenchmark(options)
    assert run.plan.candidates == OF_WORKLOADS_IN_ORDER
    even, hot = run.plan.places
    assert (even, hot) == ("unshaped, W0, 4 micro-batches", "unshaped, W1, 4 micro-batches")
    found = Collector(SOURCE, run.metric, run.derive, run.summary)
    for place, no_remedy_ms, bias_ms in ((even, 100.0, 110.0), (hot, 400.0, 120.0)):
        for name, ms in ((NO_REMEDY, no_remedy_ms), (BIAS, bias_ms)):
            found.add(Finding(samples={f"{run.plan.prefix(place, name, 'step')}.time": (ms,)}))
    records = {record.name: record.value for record in found.records()}
    assert records[f"{run.plan.prefix(hot, 'bias', 'step')}.to_no_remedy"] == pytest.approx(0.3)
    assert records[f"{run.plan.prefix(hot, 'bias', 'step')}.to_balanced"] == pytest.approx(1.2)
    assert records[f"{run.plan.prefix(hot, NO_REMEDY, 'step')}.to_balanced"] == pytest.approx(4.0)
    (table,) = run.tables(found.records())
    assert [row[:2] for row in table.rows] == [(even, NO_REMEDY), (even, "bias"), (hot, NO_REMEDY), (hot, "bias")]


@pytest.mark.slow
def test_windows_of_unequal_loads_take_the_time_of_their_fullest_rank(tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    words = ["--links", "none", "--no-testbed", "--compute-s", "0.05", "--rounds", "2", "--out", str(out)]
    assert overlap.main([*words, "--workload", "W0", "W1", "--micro-batches", "2", "--sides", NO_REMEDY]) == 0
    values = {record.name: record.value for record in read_records(out)}
    of = "overlap.emulated.unshaped, W1, 2 micro-batches"
    assert 1.5 < values[f"{of}.{NO_REMEDY}.step.to_balanced"] < 4.5


def test_copies_and_sums_are_compared_with_the_same_schedule_of_one_level() -> None:
    run = OverlapBenchmark(OverlapOptions(case="k2_random", sides=("peers", "peers, copies"), ratios=(1.0,)))
    (place,) = run.plan.places
    found = Collector(SOURCE, run.metric, run.derive, run.summary)
    for name, ms in (("peers", 100.0), ("peers, copies", 80.0)):
        found.add(Finding(samples={f"{run.plan.prefix(place, name, 'step')}.time": (ms,)}))
    records = {record.name: record.value for record in found.records()}
    assert records[f"{run.plan.prefix(place, 'peers, copies', 'step')}.to_one_level"] == pytest.approx(0.8)
    assert f"{run.plan.prefix(place, 'peers', 'step')}.to_one_level" not in records
    _, compared = run.tables(found.records())
    assert [(row[0], row[3]) for row in compared.rows] == [("peers, copies", "0.800")]
