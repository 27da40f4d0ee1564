"""The probe: what it compares, what it refuses, and real gloo ranks whose Records make a cluster."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from ds_moe_ep.bench.harness.collector import Collector
from ds_moe_ep.bench.harness.processes import Finding
from ds_moe_ep.bench.probe import command as probe
from ds_moe_ep.bench.probe.command import ProbeOptions, make_plan
from ds_moe_ep.bench.probe.findings import metric
from ds_moe_ep.bench.probe.links import ways_of
from ds_moe_ep.comm.launcher import World
from ds_moe_ep.records.provenance import Provenance
from ds_moe_ep.records.record import Record, read_records
from ds_moe_ep.simulate.calibrate.calibrate import Calibration, Errors, calibrate, errors_of
from ds_moe_ep.simulate.cluster.cluster import Cluster, Device, Link, read_cluster
from ds_moe_ep.simulate.cluster.write import cluster_values
from tests.ranks import run_ranks

SOURCE = Provenance(command="python -m bench", commit="abc", hardware="2 cores")
SMALL = ["--device", "cpu", "--hidden-size", "64", "--expert-width", "256", "--seconds", "2"]
BASE = Cluster(
    name="here", num_nodes=2, node_size=2, device=Device(memory_bytes=1e9), near=Link(), far=Link(), computes_on="host"
)
WIDE = 1.0  # a held-out run may take twice its time, or half of it: the machine does other things as well


@pytest.mark.parametrize(
    ("nodes", "near", "far"),
    [
        ([0], [], []),
        ([0, 0], [(0, 1)], []),
        ([0, 1], [], [(0, 1)]),
        ([0, 0, 0], [(0, 1)], []),
        ([0, 0, 1, 1], [(0, 1), (2, 3)], [(0, 2), (1, 3)]),
        ([0, 1, 0, 1], [(0, 2), (1, 3)], [(0, 1), (2, 3)]),
        ([0, 0, 1, 2, 2, 3], [(0, 1), (3, 4)], [(0, 2), (3, 5)]),
    ],
)
def test_pairs_are_disjoint_and_near_or_far(
    nodes: list[int], near: list[tuple[int, int]], far: list[tuple[int, int]]
) -> None:
    assert ways_of(nodes) == {"near": near, "far": far}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seconds", "0"], "--seconds=0: give a number that is more than 0"),
        (["--ranks", "-1"], "--ranks=-1: give a whole number of 0 or more"),
        (["--device", "cpu", "--ranks", "3", "--node-size", "2"], "does not divide 3 ranks"),
        (["--device", "cpu", "--hidden-size", "100"], "shared by 8 heads"),
    ],
)
def test_what_cannot_be_probed_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert probe.main(words) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_a_job_gives_the_ranks_and_a_cpu_never_sees_fp16() -> None:
    world = World(rank=3, size=8, local_rank=3, local_size=8, address="a", port=1, serves_store=False, wants_gpu=False)
    plan = make_plan(ProbeOptions(ranks=2), world)
    assert (plan.num_ranks, plan.device, plan.port) == (8, "cpu", 0)
    assert list(plan.precisions) == ["fp32", "bf16"]
    assert list(dataclasses.replace(plan, device="cuda").precisions) == ["bf16", "fp16", "fp32"]


def test_findings_become_records_that_say_what_was_shaped() -> None:
    found = Collector(SOURCE, partial(metric, is_shaped=True))
    found.add(Finding("device", "nodes of 2, 2 ranks"))
    for value in (3.0, 1.0, 2.0):
        found.add(Finding(samples={"probe.far.one.bytes8": (value,)}))
    found.add(Finding(samples={"probe.matmul.fp32.rows8": (5.0, 5.0)}))
    far, matmul = found.records()
    assert (far.name, far.value, far.unit, far.spread, far.n) == ("probe.far.one.bytes8", 2.0, "us", (1.5, 2.5), 3)
    assert far.emulated and not matmul.emulated
    assert far.hardware == "2 cores; nodes of 2, 2 ranks"


def records_of(probed: Callable[[], object], expected: object, out: Path) -> list[Record]:
    """What the command wrote. Another load on the machine can disturb a measurement: one of three has to fit."""
    for _ in range(3):
        out.unlink(missing_ok=True)
        assert probed() == expected
        records = list(read_records(out))
        if held_out_in(calibrate(records, BASE)).median < WIDE:
            break
    return records


def held_out_in(found: Calibration) -> Errors:
    held_out = errors_of(p for p in found.points if p.is_held_out and p.group == "products in fp32")
    assert held_out is not None and held_out.number >= 3
    return held_out


def calibrated(records: list[Record]) -> Calibration:
    """A cluster made of the Records, with what every machine must show."""
    found = calibrate(records, BASE)
    assert read_cluster(cluster_values(found.cluster)).device.half_rows == found.cluster.device.half_rows
    assert held_out_in(found).median < WIDE
    device, host = found.cluster.device, found.cluster.host
    assert 1e2 < device.peak_fp32 < 1e7, "between 0.1 and 10,000 GFLOP/s"
    assert 1e2 < device.memory_bandwidth < 1e7, "between 0.1 GB/s and 10 TB/s"
    assert 0 < device.attention_efficiency <= 1
    assert host.cores >= 1 and 1 < host.pairwise_us < 1e5 and 0 < host.collective_us < 1e5
    return found


def test_two_ranks_of_this_machine_make_a_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "probe.jsonl"
    records = records_of(lambda: probe.main([*SMALL, "--ranks", "2", "--out", str(out)]), 0, out)
    names = {record.name for record in records}
    assert {"probe.matmul.fp32.rows8", "probe.memory", "probe.near.one.bytes8", "probe.host.pairwise"} <= names
    assert not any(".far." in name or "fp16" in name for name in names)
    assert all(record.n >= 3 or record.spread == (record.value, record.value) for record in records)
    found = calibrated(records)
    assert found.cluster.far == BASE.far
    assert "matmul.fp32.rows8" in capsys.readouterr().out


def in_a_job(out: str) -> int:
    """The command as a launcher starts it on every rank."""
    return probe.main([*SMALL, "--node-size", "2", "--shaped", "--out", out])


def test_ranks_of_a_job_try_near_and_far_links(tmp_path: Path) -> None:
    out = tmp_path / "probe.jsonl"
    store = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}  # the tests serve it
    found = records_of(lambda: run_ranks(4, in_a_job, str(out), process_group=False, env=store), [0] * 4, out)
    records = {record.name: record for record in found}
    for way in ("near", "far"):
        assert records[f"probe.{way}.senders"].value == 2
        assert records[f"probe.{way}.one.bytes8"].value > 0 and records[f"probe.{way}.all.bytes8"].value > 0
    assert records["probe.far.one.bytes8"].emulated and not records["probe.memory"].emulated
    found = calibrated(list(records.values()))
    assert {"far.latency_us", "near.latency_us"} <= set(found.fitted)
    assert [path.name for path in tmp_path.iterdir()] == ["probe.jsonl"]
