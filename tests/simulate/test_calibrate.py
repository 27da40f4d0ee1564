"""Calibration: known parameters come back from Records made of them; runs that no curve follows show their error."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from ds_moe_ep.cli.main import main
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.record import Record, write_records
from ds_moe_ep.simulate.calibrate import overlap_fit
from ds_moe_ep.simulate.calibrate.calibrate import calibrate, calibrate_files, errors_of
from ds_moe_ep.simulate.calibrate.overlap_case import overlap_cases, simulate_case
from ds_moe_ep.simulate.calibrate.overlap_fit import with_parameters
from ds_moe_ep.simulate.calibrate.probe_fit import fit_probe
from ds_moe_ep.simulate.calibrate.probe_samples import is_held_out, least_squares
from ds_moe_ep.simulate.cluster.cluster import Cluster, Device, Host, Link, load_cluster, read_cluster
from ds_moe_ep.simulate.cluster.write import cluster_values, write_cluster

ROWS = [2**n for n in range(3, 14)]
BYTES = [8, *(2**n for n in range(10, 29, 2))]
GPU = Cluster(
    name="gpus",
    num_nodes=2,
    node_size=4,
    device=Device(memory_bytes=8e10, peak_bf16=1e9, memory_bandwidth=3e6),
    near=Link(bandwidth=4e5),
    far=Link(bandwidth=2e5, efficiency=0.5, shared_by=1.0),
    ranges={"far.efficiency": (0.4, 0.6), "far.latency_us": (0.0, 9.0)},
)
CPU = dataclasses.replace(
    GPU,
    name="cpus",
    computes_on="host",
    device=Device(memory_bytes=1e9),
    near=Link(),
    far=Link(),
    host=Host(cores=4.0, transfer_us=7.0),
    ranges={},
)


def record(name: str, value: float, unit: str, spread: float = 0.0) -> Record:
    return Record(
        name=f"probe.{name}",
        value=value,
        unit=unit,
        spread=(value * (1 - spread), value * (1 + spread)),
        n=5,
        command="python -m ds_moe_ep bench probe",
        commit="abc",
        hardware="a box",
        emulated=False,
    )


def matmuls(precision: str, reached: float, half_rows: float, spread: float = 0.0) -> list[Record]:
    """Products that follow the curve; `reached` in TFLOP/s."""
    return [
        record(f"matmul.{precision}.rows{rows}", reached * rows / (rows + half_rows), "TFLOP/s", spread)
        for rows in ROWS
    ]


def line(name: str, latency_us: float, us_per_byte: float, spread: float = 0.0) -> list[Record]:
    return [record(f"{name}.bytes{size}", latency_us + size * us_per_byte, "us", spread) for size in BYTES]


def of_gpus() -> list[Record]:
    """A probe of 60 % of 1,000 TFLOP/s, half of it at 128 rows, of 320 GB/s near, 160 GB/s far shared by 4."""
    found = [*matmuls("bf16", 600.0, 128.0), record("attention.bf16", 300.0, "TFLOP/s")]
    found += [record("memory", 2.4, "TB/s"), record("launch", 4.0, "us", 0.25), record("sync", 0.02, "ms")]
    return [
        *found,
        *line("near.one", 9.0, 1 / 3.2e5),
        *line("far.one", 18.0, 1 / 1.6e5),
        *line("far.all", 18.0, 4 / 1.6e5),
    ]


@pytest.mark.parametrize("hold_out", [0.0, 0.5, 0.7])
def test_known_parameters_are_recovered_exactly(hold_out: float) -> None:
    fit = fit_probe(GPU, of_gpus(), hold_out)
    device, near, far = fit.cluster.device, fit.cluster.near, fit.cluster.far
    assert (device.peak_bf16, device.matmul_efficiency, device.half_rows) == (1e9, 0.6, 128.0)
    assert (device.attention_efficiency, device.memory_efficiency, device.memory_bandwidth) == (0.3, 0.8, 3e6)
    assert (device.launch_us, device.sync_us) == (4.0, 20.0)
    assert (near.latency_us, near.bandwidth, near.efficiency, near.shared_by) == (9.0, 4e5, 0.8, 1.0)
    assert (far.latency_us, far.bandwidth, far.efficiency, far.shared_by) == (18.0, 2e5, 0.8, 4.0)
    assert max(abs(point.error) for point in fit.points) < 1e-4
    assert sum(point.is_held_out for point in fit.points) == (
        0 if hold_out == 0 else pytest.approx(44 * hold_out, abs=3)
    )


def test_runs_that_no_curve_follows_show_their_error() -> None:
    records = of_gpus()
    strange = [
        dataclasses.replace(r, value=r.value / 3, spread=(r.value / 3, r.value / 3))
        if r.name.startswith("probe.matmul") and is_held_out(ROWS.index(int(r.name.rsplit("rows")[1])), 0.5)
        else r
        for r in records
    ]
    found = calibrate(strange, GPU)
    products = [point for point in found.points if point.group == "products in bf16"]
    held_out, fitted = (errors_of(p for p in products if p.is_held_out is its) for its in (True, False))
    assert held_out is not None and held_out.median == pytest.approx(2.0, rel=1e-3), "three times as fast as measured"
    assert fitted is not None and fitted.worst < 1e-4, "and the runs of the fit could not tell"


def test_sources_and_ranges_say_where_a_number_is_from() -> None:
    records = [*matmuls("bf16", 600.0, 128.0, spread=0.1), *line("far.one", 18.0, 1 / 1.6e5)]
    cluster = fit_probe(GPU, records, 0.5).cluster
    assert cluster.sources["device.matmul_efficiency"] == "probe abc, a box"
    assert cluster.ranges["device.matmul_efficiency"] == pytest.approx((0.54, 0.66), rel=1e-3)
    assert cluster.ranges["device.half_rows"] == pytest.approx((128 * 0.9 / 1.1, 128 * 1.1 / 0.9), rel=0.01)
    assert "far.efficiency" not in cluster.ranges, "an exact line leaves no range, the assumed one least of all"
    slow, fast = cluster.ends()
    assert slow.device.matmul_efficiency < fast.device.matmul_efficiency


def test_a_peak_that_is_missing_or_exceeded_is_what_was_measured() -> None:
    bare = dataclasses.replace(GPU, device=Device(memory_bytes=8e10))
    for device in (bare.device, Device(memory_bytes=8e10, peak_bf16=5e8)):
        fitted = fit_probe(dataclasses.replace(GPU, device=device), of_gpus(), 0.5).cluster.device
        assert (fitted.peak_bf16, fitted.matmul_efficiency, fitted.half_rows) == (6e8, 1.0, 128.0)
        assert (fitted.memory_bandwidth, fitted.memory_efficiency) == (2.4e6, 1.0)
    spread = fit_probe(bare, matmuls("bf16", 600.0, 128.0, spread=0.1), 0.5).cluster
    assert spread.ranges["device.peak_bf16"] == pytest.approx((5.4e8, 6.6e8)), "it is the peak that is uncertain"
    assert read_cluster(cluster_values(spread)) == spread
    both = [*matmuls("bf16", 600.0, 128.0), *matmuls("fp32", 30.0, 128.0)]
    assert fit_probe(bare, both, 0.5).cluster.device.peak_fp32 == pytest.approx(3e7)
    chosen = fit_probe(bare, both, 0.5, precision="fp32").cluster.device
    assert (chosen.peak_fp32, chosen.peak_bf16) == (3e7, 6e8)
    known = fit_probe(dataclasses.replace(GPU, device=Device(memory_bytes=1, peak_bf16=1e9)), both, 0.5)
    assert known.cluster.device.peak_fp32 * known.cluster.device.matmul_efficiency == pytest.approx(3e7)


def test_what_the_host_explains_is_no_latency_and_no_rate_of_a_link() -> None:
    host = [record("host.cores", 2, "cores"), record("host.pairwise", 50, "us"), record("host.byte", 500, "us/MB")]
    records = [*host, *line("near.one", 60.0, 4e-4), *line("near.all", 60.0, 9e-4), *line("far.one", 90.0, 0.08)]
    cluster = fit_probe(CPU, records, 0.5).cluster
    assert (cluster.host.cores, cluster.host.pairwise_us, cluster.host.transfer_us) == (2.0, 50.0, 7.0)
    assert cluster.host.byte_us == pytest.approx(5e-4)
    assert (cluster.near.latency_us, cluster.near.bandwidth, cluster.near.shared_by) == (10.0, float("inf"), 1.0)
    assert (cluster.far.latency_us, cluster.far.bandwidth) == (40.0, 12.5)


def test_far_links_of_one_node_stay_as_they_were() -> None:
    fit = fit_probe(GPU, line("near.one", 9.0, 1 / 3.2e5), 0.5)
    assert fit.cluster.far == GPU.far and fit.cluster.device == GPU.device
    assert fit.fitted == ("near.latency_us", "near.efficiency")


def test_the_later_of_two_records_counts() -> None:
    fit = fit_probe(GPU, [record("launch", 9.0, "us"), record("launch", 4.0, "us")], 0.5)
    assert fit.cluster.device.launch_us == 4.0


def test_relative_least_squares_agree_with_a_case_done_by_hand() -> None:
    # y = a + b*x through (1, 2) and (2, 3) is a = b = 1; all y alike at x = 1, 2 make b = 0
    alike = [1.0, 1.0]
    assert least_squares([(1.0, 2.0), (2.0, 3.0)], alike) == pytest.approx((1.0, 1.0))
    assert least_squares([(1.0, 4.0), (2.0, 4.0)], alike) == pytest.approx((4.0, 0.0))
    # a line that falls, or that starts below 0, ends at the bound: the weights are 1/y^2
    assert least_squares([(1.0, 2.0), (2.0, 1.0)], alike) == pytest.approx((1.2, 0.0))  # (1/2 + 1/1) / (1/4 + 1)
    assert least_squares([(1.0, 1.0), (2.0, 4.0)], alike) == pytest.approx((0.0, 1.2))  # (1 + 2/4) / (1 + 4/16)
    assert least_squares([(1.0, 2.0), (2.0, 1.0)], [1.0, 0.5]) == pytest.approx((18 / 17, 0.0))  # (1/2 + 4) / (1/4 + 4)


def test_a_run_that_was_disturbed_decides_little() -> None:
    steady = line("far.one", 18.0, 1 / 1.6e5)
    disturbed = dataclasses.replace(steady[2], value=90.0, spread=(20.0, 200.0))
    latency_us = fit_probe(GPU, [*steady, disturbed], 0.0).cluster.far.latency_us
    as_steady = dataclasses.replace(disturbed, spread=(90.0, 90.0))
    assert latency_us == pytest.approx(18.0, rel=0.01)
    assert fit_probe(GPU, [*steady, as_steady], 0.0).cluster.far.latency_us > 18.4


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "0, none of the probe or of the overlap benchmark; measure with python -m ds_moe_ep bench probe"),
        ([dataclasses.replace(record("x", 1, "us"), name="layer.time")], "1, none of the probe"),
        ([record("unheard.of", 1, "us")], "none for a number of a cluster"),
        (matmuls("bf16", 600.0, 128.0)[:2], "at 2 sizes, of which 1 are left to fit, and a line needs 2"),
        (line("far.one", 9.0, 1e-5)[:1], r"probe\.far\.one was measured at 1 sizes"),
        ([record("launch", 1, "hours")], r"probe\.launch\.unit='hours': no unit of this; it needs one of 'us', 'ms'"),
        ([record("matmul.bf16.rows8", 0, "GFLOP/s")], "more than 0; measure again"),
        ([record(f"matmul.bf16.rows{n}", n, "GFLOP/s") for n in ROWS], "no end yet; probe for longer"),
    ],
)
def test_what_cannot_be_fitted_is_refused_with_the_way_out(records: Sequence[Record], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        calibrate(records, GPU)


def test_shares_and_precisions_that_have_no_meaning_are_refused() -> None:
    for share in (-0.1, 1.0):
        with pytest.raises(ConfigError, match="hold_out"):
            calibrate(of_gpus(), GPU, hold_out=share)
    with pytest.raises(ConfigError, match="precision='fp32': was not measured; choose one of bf16"):
        calibrate(of_gpus(), GPU, precision="fp32")


def overlap_records(environment: Cluster) -> list[Record]:
    """The overlap benchmark as it would be on a test bed that is as the simulator thinks."""
    sides, shapings = ("serial", "2 chunks", "wire"), ("0.3 of step", "1 of step")
    named = [
        dataclasses.replace(
            record("x", 1.0, "ms"),
            name=f"overlap.emulated.{shaping}.{side}.{phase}.time",
            command="python -m ds_moe_ep.bench.overlap --compute-s 0.5",
        )
        for shaping in shapings
        for side in sides
        for phase in ("forward", "backward", "step")
    ]
    found = []
    for case in overlap_cases(named):
        simulated = simulate_case(case, environment)
        for phase, empty in case.measured.items():
            value = simulated[phase] / 1e3
            found.append(dataclasses.replace(empty, value=value, spread=(value, value)))
    return found


COSTS = {
    "host.forward_us": 2e3,
    "host.backward_us": 3e3,
    "host.pairwise_us": 300.0,
    "host.collective_us": 150.0,
    "host.byte_us": 4e-3,
}


@pytest.mark.parametrize(
    ("found_by_search", "least", "most"), [(COSTS, 0.0, 1e-3), ({"host.forward_us": 1.0}, 0.02, 1.0)]
)
def test_the_overlap_benchmarks_costs_come_with_their_error_on_cases_held_out(
    found_by_search: Mapping[str, float], least: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search itself, which takes its time, is tested with the fit of the overlap benchmark."""
    monkeypatch.setattr(overlap_fit, "compass_search", lambda loss, start: dict(found_by_search))
    ranges = {"host.forward_us": (1.0, 9e3), "host.cores": (1.0, 4.0)}
    base = dataclasses.replace(CPU, far=Link(shared_by=4.0), host=Host(cores=2.0), ranges=ranges)
    records = overlap_records(with_parameters(base, COSTS))
    found = calibrate([*records, record("launch", 4.0, "us")], base)
    held_out = errors_of(point for point in found.points if point.is_held_out)
    assert held_out is not None and held_out.number == 3 and len(found.points) == 6
    assert least <= held_out.worst <= most
    assert found.cluster.device.launch_us == 4.0 and found.cluster.host.forward_us == found_by_search["host.forward_us"]
    assert found.cluster.sources["host.forward_us"].startswith("overlap benchmark abc, a box")
    assert found.fitted == ("device.launch_us", *found_by_search)
    assert set(found.cluster.ranges) == {"host.cores"}, "an assumed range says nothing of a fitted number"


def test_the_command_prints_the_fit_and_its_error_and_replaces_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_records(tmp_path / "probe.jsonl", of_gpus())
    write_cluster(tmp_path / "base.json", GPU)
    out = tmp_path / "mine.json"
    out.write_text("what stood there before", encoding="utf-8")
    words = ["calibrate", str(tmp_path / "probe.jsonl"), "--cluster", str(tmp_path / "base.json"), "--out", str(out)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    for expected in ("device.half_rows", "far.shared_by", "products in bf16", "held out", "64 rows"):
        assert expected in printed
    assert "no Records" not in printed
    assert load_cluster(out) == calibrate_files([tmp_path / "probe.jsonl"], tmp_path / "base.json").cluster
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.json", "mine.json", "probe.jsonl"]


def test_the_command_says_what_is_wrong_with_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_cluster(tmp_path / "base.json", GPU)
    assert main(["calibrate", str(tmp_path / "no.jsonl"), "--cluster", str(tmp_path / "base.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    write_records(tmp_path / "empty.jsonl", [])
    assert main(["calibrate", str(tmp_path / "empty.jsonl"), "--cluster", str(tmp_path / "base.json")]) == 2
    assert "bench probe" in capsys.readouterr().err
