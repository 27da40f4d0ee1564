"""The audit: every figure has its row, its numbers are those of the simulation, and its verdicts turn with them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from ds_moe_ep.cli.main import main
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.record import read_records
from ds_moe_ep.simulate.audit import command
from ds_moe_ep.simulate.audit.audit import HEAD, AuditRow, audit
from ds_moe_ep.simulate.audit.records import audit_values
from ds_moe_ep.simulate.audit.runs import Runs, hardware_of
from ds_moe_ep.simulate.cluster.cluster import load_cluster
from ds_moe_ep.specification.claims import CLAIMS
from ds_moe_ep.specification.stated import BATCH_TOKENS, HARDWARE, STATED
from tests.policy.sources import ROOT

PATH = ROOT / "ds_configs" / "clusters" / "h100_4x4.json"
CLUSTER = load_cluster(PATH)

FIGURES = {  # each row of the specification's checked figures, and the rows of the audit that answer it
    "one expert's parameters": ["expert"],
    "memory a GPU at EP=16": ["memory_ep16"],
    "memory a GPU at TP8/PP2": ["memory_tp8_pp2"],
    "tokens per expert": ["expert_tokens"],
    "distribution time": ["distribution"],
    "expert computation": ["expert_time"],
    "communication hidden": ["hidden"],
    "TPS, baseline / proposed": ["tps", "ratio"],
    "batches a second": ["batches"],
    "TPOT": ["tpot"],
    "latency pieces of the baseline": ["pieces_tp8_pp2"],
    "latency pieces of the proposal": ["pieces_ep16"],
    "GPU efficiency gain": ["gain"],
    "utilization": ["utilization"],
    "activations of one batch at one expert": ["activations"],
    "pipeline bubble, 4 micro-batches, 2 stages": ["bubble"],
    "bytes moved a GPU a layer, forward": ["bytes"],
    "CUDA_DEVICE_MAX_CONNECTIONS=1": ["connections"],
    "scaling": ["law_tps", "law_tpot", "law_busy", "law_memory_per_expert"],
}


@pytest.fixture(scope="module")
def rows() -> dict[str, AuditRow]:
    """The audit on the specification's cluster, by key."""
    return {row.figure.key: row for row in audit(CLUSTER)}


def test_every_figure_of_the_specification_has_a_row(rows: dict[str, AuditRow]) -> None:
    assert sorted(rows) == sorted(key for keys in FIGURES.values() for key in keys)
    assert [claim.key for claim in CLAIMS] == list(rows)
    for row in rows.values():
        assert all(row.cells) and len(row.cells) == len(HEAD)


def test_what_is_not_simulated_is_what_shapes_alone_decide(rows: dict[str, AuditRow]) -> None:
    alone = {key for key, row in rows.items() if row.simulated is None}
    assert alone == {"expert", "expert_tokens", "activations", "bytes", "connections"}


def test_the_specifications_cluster_has_the_hardware_that_figures_are_derived_on() -> None:
    assert hardware_of(CLUSTER) == HARDWARE


def test_the_headline_is_stated_with_the_utilization_that_it_needs_and_the_plans_own_bar(
    rows: dict[str, AuditRow],
) -> None:
    tps = rows["tps"]
    assert "450 k is 61 % of peak in training" in tps.verdict
    estimate = tps.numbers["ep16"]
    assert estimate.unit == "tokens/s" and estimate.low < estimate.value < estimate.high < 743e3
    assert f"{float(f'{estimate.value:.3g}'):,.0f}" in tps.cells[4]
    assert rows["ratio"].numbers["training"].value == pytest.approx(estimate.value / tps.numbers["tp8_pp2"].value)


def test_times_and_rates_of_one_simulation_agree(rows: dict[str, AuditRow]) -> None:
    for system in ("tp8_pp2", "ep16"):
        tps = rows["tps"].numbers[system].value
        assert rows["batches"].numbers[system].value == pytest.approx(tps / BATCH_TOKENS)
        assert rows["tpot"].numbers[system].value == pytest.approx(1e6 / tps)
        pieces = rows[f"pieces_{system}"].numbers
        assert sum(piece.value for piece in pieces.values()) == pytest.approx(1e6 / tps)


def test_no_simulated_time_is_shorter_than_what_is_derived(rows: dict[str, AuditRow]) -> None:
    derived = {(key, n.what): n.derived or 0.0 for key, row in rows.items() for n in row.figure.numbers}
    assert rows["distribution"].numbers["each_way"].low >= derived["distribution", "link_a_node"]
    assert rows["expert_time"].numbers["forward"].low >= derived["expert_time", "forward"]
    assert rows["tps"].numbers["ep16"].high <= derived["tps", "ep16"]
    assert rows["tps"].numbers["ep16_forward"].high <= derived["tps", "ep16_forward"]
    assert rows["bubble"].numbers["share"].low >= derived["bubble", "share"]


def test_the_baseline_runs_in_its_four_micro_batches_as_large_as_fit() -> None:
    runs = Runs(CLUSTER)
    training = runs.base_setup.training
    assert (training.layout.tp_size, training.layout.pp_size, training.accumulation) == (8, 2, 4)
    assert training.micro_batch == 8, "11 fit, and parts of a message are equal for multiples of 8"


def test_simulated_verdicts_turn_with_the_cluster(rows: dict[str, AuditRow]) -> None:
    """The control: a link a hundred times slower hides nothing, a device ten times faster reaches what is stated."""
    assert "simulated: exceeded" in rows["hidden"].verdict
    slow = {row.figure.key: row for row in audit(CLUSTER.with_far(bandwidth=CLUSTER.far.bandwidth / 100))}
    assert "not reached" in slow["hidden"].verdict
    assert "as long at best" in slow["distribution"].verdict
    assert "EP16 not reached" in rows["tps"].verdict.partition("(training)")[0]
    device = dataclasses.replace(CLUSTER.device, peak_fp16=10 * CLUSTER.device.peak_fp16)
    fast = {row.figure.key: row for row in audit(dataclasses.replace(CLUSTER, device=device))}
    assert "EP16 exceeded" in fast["tps"].verdict.partition("(training)")[0]


def test_simulated_verdicts_turn_with_what_is_stated() -> None:
    other = dataclasses.replace(STATED, hidden=0.999, ratio=1.97, tps=(143_000, 281_000), r2=(1.0, 1.0, -1e9, 1.0))
    rows = {row.figure.key: row for row in audit(CLUSTER, other)}
    assert "not reached" in rows["hidden"].verdict
    assert "simulated: reached (training)" in rows["ratio"].verdict
    assert "TP8/PP2 reached, EP16 reached" in rows["tps"].verdict
    assert rows["law_busy"].verdict.endswith("simulated: holds")
    assert rows["law_tpot"].verdict.endswith("simulated: does not hold")


def test_what_needs_no_recomputation_is_simulated_without_it_only_where_it_fits(rows: dict[str, AuditRow]) -> None:
    kept, again = (rows["tps"].numbers[name].value for name in ("ep16_without_recompute", "ep16"))
    assert 1.2 < kept / again < 4 / 3, "a third less arithmetic"
    device = dataclasses.replace(CLUSTER.device, memory_bytes=50e9)
    assert Runs(dataclasses.replace(CLUSTER, device=device)).ep16_kept is None


@pytest.mark.parametrize(("memory_bytes", "fits"), [(80e9, True), (40e9, False)])
def test_memory_says_where_a_job_does_not_fit(memory_bytes: float, fits: bool) -> None:
    device = dataclasses.replace(CLUSTER.device, memory_bytes=memory_bytes)
    (claim,) = (claim for claim in CLAIMS if claim.key == "memory_ep16")
    assert claim.simulate is not None
    found = claim.simulate(Runs(dataclasses.replace(CLUSTER, device=device)), STATED)
    assert ("does not fit, times are of devices with more than 36.0 GB free" not in found.text) == fits


def test_another_number_of_devices_is_refused() -> None:
    with pytest.raises(ConfigError, match="jobs are of 16 devices"):
        audit(CLUSTER.with_nodes(8))


def test_the_command_prints_tables_and_json_and_writes_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rows: dict[str, AuditRow]
) -> None:
    out = tmp_path / "audit.jsonl"
    assert main(["audit", "--cluster", str(PATH), "--json", "--out", str(out)]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values == json.loads(json.dumps(audit_values(tuple(rows.values()))))
    records = {record.name: record for record in read_records(out)}
    start = "audit.simulated_h100_4x4.tps.ep16"
    assert records[f"{start}.stated"].value == 450_000 and "section 4.1" in records[f"{start}.stated"].notes
    assert records[f"{start}.derived"].value == pytest.approx(743e3, rel=1e-3)
    low, high = records[f"{start}.simulated"].spread
    assert low < records[f"{start}.simulated"].value < high
    monkeypatch.setattr(command, "audit", lambda cluster: tuple(rows.values()))  # the same again, in another form
    assert main(["audit", "--cluster", str(PATH), "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| figure | section | stated | derived | simulated | verdict |"
    assert len(lines) == 2 + len(rows)
    assert main(["audit", "--cluster", str(PATH)]) == 0
    assert "The specification's figures on" in capsys.readouterr().out
