"""The overlap benchmark: its arithmetic, its records and tables, and one small race over the loopback."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ds_moe_ep.bench.harness.processes import Finding
from ds_moe_ep.bench.overlap import command as overlap
from ds_moe_ep.bench.overlap.findings import OverlapFindings, compute_ms, link_mbit, markdown_tables
from ds_moe_ep.bench.overlap.ranks import OverlapPlan, Shaping
from ds_moe_ep.bench.rivals.cases import CASES
from ds_moe_ep.records.record import read_records
from ds_moe_ep.schedule.shaping import HEADERS

PLAN = OverlapPlan(
    case=next(case for case in CASES if case.name == "k1_even"),
    sides=("peers", "serial", "native", "wire"),
    shapings=(Shaping("0.5 of step", 100.0),),
    device="emulated",
    row_us=1000.0,
    rounds=2,
    warm_ups=0,
    num_nodes=4,
    ranks_per_node=4,
    bed=None,
    port=1,
)


def test_the_link_follows_from_the_ratio() -> None:
    # 1,024 rows of 1 KiB a rank, 3 of 4 leave the node, 4 ranks: 3 MiB an exchange. A pass computes 1,024 x 1 ms.
    assert compute_ms(PLAN, "forward") == pytest.approx(1024) and compute_ms(PLAN, "step") == pytest.approx(3072)
    seconds = 2 * 3 * 2**20 * HEADERS * 8 / (link_mbit(PLAN, 0.5, "forward") * 1e6)
    assert seconds == pytest.approx(0.5 * 1.024)
    assert link_mbit(PLAN, 1.0, "step") == pytest.approx(link_mbit(PLAN, 1.5, "forward"))


def collected(plan: OverlapPlan) -> OverlapFindings:
    found = OverlapFindings(plan, "python -m bench", "abc", "2 cores")
    times = {"peers": (3.2, 3.3), "serial": (5.0, 6.0), "native": (4.0, 4.0), "wire": (2.0, 2.2)}
    for side, seconds in times.items():
        for value in seconds:
            found.add(Finding("0.5 of step", side, "step", (value,)))
    for side, exposed in (("peers", 0.1), ("serial", 2.0), ("wire", 2.0)):
        found.add(Finding("0.5 of step", side, "step.total", (2.0,)))
        found.add(Finding("0.5 of step", side, "step.exposed", (exposed,)))
    return found


def test_records_compare_within_a_round_and_against_what_cannot_be_beaten() -> None:
    records = {record.name: record for record in collected(PLAN).records()}
    of = "overlap.emulated.0.5 of step"
    assert records[f"{of}.peers.step.to_serial"].value == pytest.approx((3.2 / 5 + 3.3 / 6) / 2)
    assert records[f"{of}.peers.step.to_native"].value == pytest.approx(3.25 / 4)
    assert records[f"{of}.peers.step.hidden"].value == pytest.approx(95)
    assert records[f"{of}.serial.step.hidden"].value == pytest.approx(0)
    assert records[f"{of}.peers.step.over_limit"].value == pytest.approx(3.25 / 3.072), "compute is the longer one"
    assert records[f"{of}.wire.step.traffic"].value == pytest.approx(2000)
    assert all(record.emulated for record in records.values())
    real = {record.name: record for record in collected(replace(PLAN, device="real")).records()}
    assert real["overlap.real.0.5 of step.peers.step.over_limit"].value == pytest.approx(3.25 / 2.1)
    assert not any(record.emulated for record in real.values())


def test_the_table_has_a_row_a_side_and_a_dash_where_nothing_was_measured() -> None:
    lines = markdown_tables(collected(PLAN).records()).splitlines()
    assert lines[0].startswith("| 0.5 of step | forward | backward | step |")
    cells = "3250 (3225-3275) | 0.59 (0.57-0.62) | 0.81 (0.81-0.82) | 1.06 (1.05-1.07)"
    assert lines[2] == f"| peers | - | - | {cells} | - / - / 95 |"
    assert lines[4].startswith("| native |") and "| traffic alone |" in "\n".join(lines)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--sides", "peer"], "peers"),
        (["--nodes", "2"], "product is 16"),
        (["--device", "real"], "--links"),
        (["--no-testbed"], "--links none"),
        (["--warm-ups", "0"], "--warm-ups=0: give a whole number of 1 or more"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert overlap.main(words) == 2
    assert complaint in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.slow
def test_a_short_race_over_the_loopback_writes_records(tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    words = ["--links", "none", "--no-testbed", "--compute-s", "0.05", "--rounds", "2", "--out", str(out)]
    assert overlap.main([*words, "--sides", "peers", "serial", "hooked native", "native", "autoep", "wire"]) == 0
    records = {record.name: record for record in read_records(out)}
    assert records["overlap.emulated.unshaped.serial.step.hidden"].value == pytest.approx(0, abs=1)
    assert {name.split(".")[3] for name in records} == {"peers", "serial", "hooked native", "native", "autoep", "wire"}
