"""The sweep: its sizes by hand, what must rise and fall with them, the laws, and that a thousand devices stay cheap."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from ds_moe_ep.cli.main import main
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.names import LAWS, TOTALS
from ds_moe_ep.records.record import read_records
from ds_moe_ep.report.known_names import is_known
from ds_moe_ep.schedule.price import candidates
from ds_moe_ep.simulate.cluster.cluster import load_cluster
from ds_moe_ep.simulate.job.choose import with_knobs
from ds_moe_ep.simulate.step.ep_step import EpJob
from ds_moe_ep.simulate.step.predict import Prediction
from ds_moe_ep.simulate.step.setup import Setup, Step
from ds_moe_ep.simulate.step.source import PredictionSource
from ds_moe_ep.simulate.sweep.records import UNITS, sweep_records, sweep_values
from ds_moe_ep.simulate.sweep.sweep import (
    Sizes,
    Sweep,
    SweepPoint,
    cluster_at,
    read_sizes,
    setup_at,
    simulate_point,
    sweep,
)
from ds_moe_ep.simulate.sweep.tables import print_sweep
from ds_moe_ep.sizing.footprint import Memory
from ds_moe_ep.specification.laws import SHAPES
from ds_moe_ep.specification.stated import BASELINE, EP16, MODEL, TRAINING
from tests.policy.sources import ROOT

PATH = ROOT / "ds_configs" / "clusters" / "h100_4x4.json"
CLUSTER = load_cluster(PATH)
SETUP = Setup(model=MODEL, moe=EP16, training=TRAINING, cluster=CLUSTER)
SOURCE = PredictionSource(
    environment="simulated_h100_4x4", command="python -m ds_moe_ep plan", commit="abc", hardware="simulated"
)


@pytest.fixture(scope="module")
def swept() -> Sweep:
    """EP = 1 to 64 on the specification's kind of cluster."""
    return sweep(SETUP, Sizes(ep=(1, 2, 4, 8, 16, 32, 64)))


@pytest.mark.parametrize(
    ("text", "ep", "dp"),
    [
        ("ep=1..16", (1, 2, 4, 8, 16), (1,)),
        ("ep=3..20", (3, 6, 12), (1,)),
        ("ep=16 dp=1..4", (16,), (1, 2, 4)),
        ("dp=2  ep=8,4,8", (4, 8), (2,)),
        ("ep=5", (5,), (1,)),
    ],
)
def test_sizes_are_read(text: str, ep: tuple[int, ...], dp: tuple[int, ...]) -> None:
    assert read_sizes(text) == Sizes(ep=ep, dp=dp)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "names no ep"),
        ("dp=4", "names no ep"),
        ("ep=0..4", "at least 1"),
        ("ep=a", "at least 1"),
        ("ep=8..4", "is empty"),
        ("ep=4 ep=8", "no size of its own"),
        ("tp=4", "no size of its own"),
        ("ep=1..1024 dp=1..1024", "65,536 ranks"),
    ],
)
def test_what_is_no_size_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read_sizes(text)


@pytest.mark.parametrize(
    ("ranks", "nodes", "node_size", "shared_by"),
    [(1, 1, 1, 1), (2, 1, 2, 2), (4, 1, 4, 4), (6, 2, 3, 3), (16, 4, 4, 4), (1024, 256, 4, 4)],
)
def test_nodes_are_as_many_as_the_ranks_fill(ranks: int, nodes: int, node_size: int, shared_by: int) -> None:
    at = cluster_at(CLUSTER, ranks)
    assert (at.num_nodes, at.node_size, at.far.shared_by) == (nodes, node_size, shared_by)
    assert at.device == CLUSTER.device
    slow, fast = at.ends()
    assert slow.far.shared_by <= node_size and fast.far.shared_by <= node_size


def test_ranks_that_fill_no_equal_nodes_are_refused() -> None:
    with pytest.raises(ConfigError, match="take a multiple of 4"):
        cluster_at(CLUSTER, 7)


def test_experts_are_constant_up_to_their_number_and_one_a_rank_beyond() -> None:
    setups = {ep: setup_at(SETUP, "constant_rank", ep, 1) for ep in (1, 4, 16, 64, 1024)}
    experts = {ep: at.moe.num_experts for ep, at in setups.items() if at is not None}
    assert experts == {1: 16, 4: 16, 16: 16, 64: 64, 1024: 1024}


def test_a_rank_keeps_its_tokens_or_all_ranks_share_the_same_batch() -> None:
    for ep, dp in ((1, 1), (16, 1), (16, 64), (1024, 1)):
        of_rank, in_total = (setup_at(SETUP, total, ep, dp) for total in TOTALS)
        assert of_rank is not None and in_total is not None
        assert of_rank.batch_tokens == 64 * 10_000 * ep * dp
        assert in_total.batch_tokens == 1024 * 10_000
        assert of_rank.training.num_replicas == in_total.training.num_replicas == dp


def test_sizes_beyond_the_batch_are_left_out_and_named() -> None:
    small = dataclasses.replace(SETUP, training=dataclasses.replace(TRAINING, accumulation=1))  # 16 sequences
    found = sweep(small, Sizes(ep=(16, 32)))
    assert [point.ep for point in found.of("constant_rank")] == [16, 32]
    assert [point.ep for point in found.of("constant_total")] == [16]
    assert found.notes == ("constant tokens in total: no EP=32 x 1, for 16 sequences are too few",)


def test_micro_batches_shrink_where_a_rank_has_few_sequences() -> None:
    wide = dataclasses.replace(SETUP, training=dataclasses.replace(TRAINING, micro_batch=8, accumulation=8))
    at = setup_at(wide, "constant_total", 16, 16)
    assert at is not None and (at.training.micro_batch, at.training.accumulation) == (4, 1)


def test_a_layout_and_sizes_that_do_not_divide_are_refused() -> None:
    training = dataclasses.replace(TRAINING, layout=BASELINE, ep_size=1)
    with pytest.raises(ConfigError, match="has a layout"):
        sweep(dataclasses.replace(SETUP, training=training), Sizes(ep=(1,)))
    with pytest.raises(ConfigError, match="cannot share 16 experts evenly"):
        sweep(SETUP, Sizes(ep=(6,)))


def test_throughput_rises_and_memory_of_an_expert_falls_with_ep(swept: Sweep) -> None:
    for total in TOTALS:
        points = swept.of(total)
        tps = [point.value("tps").value for point in points]
        assert tps == sorted(tps)
        assert [point.value("tpot").value for point in points] == pytest.approx([1e6 / its for its in tps])
        memory = [point.value("memory_per_expert").value for point in points]
        assert memory == sorted(memory, reverse=True)
        assert all(point.value("tps").low <= point.value("tps").value <= point.value("tps").high for point in points)


def test_links_between_nodes_cost_something_where_there_are_nodes(swept: Sweep) -> None:
    """The control: on links a thousand times as fast only points on several nodes gain by the far ones."""
    free = dataclasses.replace(SETUP, cluster=CLUSTER.with_far(bandwidth=1e3 * CLUSTER.far.bandwidth, latency_us=0.0))
    for point in swept.of("constant_rank"):
        other = setup_at(free, "constant_rank", point.ep, 1)
        assert other is not None
        gain = simulate_point(other, "constant_rank").value("tps").value / point.value("tps").value
        assert gain == pytest.approx(1) if point.ep <= 4 else gain > 1.0001


def test_one_rank_has_no_traffic_and_is_busiest(swept: Sweep) -> None:
    first, *others = swept.of("constant_rank")
    assert first.prediction.step.hidden is None and first.setup.moe.is_serial
    assert first.value("busy").value > max(point.value("busy").value for point in others)


def test_what_does_not_fit_is_marked(swept: Sweep) -> None:
    """16 experts of 17 GB with their optimizer states on one device of 80 GB do not fit; one does."""
    fits = {point.ep: point.fits for point in swept.of("constant_rank")}
    assert not fits[1] and not fits[4] and fits[16] and fits[64]


def lawful(ep: int) -> SweepPoint:
    """A point that follows all four laws exactly: a step of 10 s, busy for 1 - 1/EP of it, 16 GB over EP ranks."""
    setup = setup_at(SETUP, "constant_rank", ep, 1)
    assert setup is not None
    busy_us = 1e7 * (1 - 1 / ep)
    step = Step(setup=setup, step_us=1e7, parts_us={}, traffic_us=0.0, exposed_us=0.0, busy_us=busy_us)
    nothing = {"gradients": 0, "optimizer": 0, "activations": 0, "buffers": 0, "step": 0, "host_optimizer": 0}
    memory = Memory(weights=16 * 10**9 // ep, **nothing)
    return SweepPoint(total="constant_rank", ep=ep, dp=1, prediction=Prediction(step, step, step), memory=memory)


def test_points_that_follow_the_laws_fit_them_exactly() -> None:
    found = Sweep(points=tuple(map(lawful, (1, 2, 4, 8, 16))))
    fits = {its.law: its for its in found.law_fits("constant_rank")}
    assert fits.keys() == SHAPES.keys()
    assert all(its.r2 == pytest.approx(1) for its in fits.values())
    assert fits["tps"].coefficient == pytest.approx(64 * 10_000 / 10)  # a rank's tokens in 10 s
    assert fits["busy"].coefficient == pytest.approx(1)
    assert fits["memory_per_expert"].coefficient == pytest.approx(1e9)
    assert found.law_fits("constant_total") == ()


def test_copies_of_one_size_are_fitted_to_no_law_of_ep() -> None:
    found = sweep(SETUP, Sizes(ep=(16,), dp=(1, 4)))
    assert found.law_fits("constant_rank") == ()
    one, four = found.of("constant_rank")
    assert 3.5 < four.value("tps").value / one.value("tps").value < 4
    assert four.value("memory_per_expert").value < one.value("memory_per_expert").value, "ZeRO shares their states"


def test_a_skewed_load_is_read_for_each_size() -> None:
    peers = with_knobs(SETUP, {"schedule": "peers"})
    even, skewed = (sweep(peers, Sizes(ep=(2, 8)), load=load).of("constant_rank") for load in ("even", "zipf:1.0"))
    assert [len(point.setup.loads) for point in skewed] == [2, 8]
    for one, other in zip(even, skewed, strict=True):
        assert other.value("tps").value < one.value("tps").value


def test_every_record_has_a_place_in_the_report_and_a_unit(swept: Sweep) -> None:
    records = list(sweep_records(swept, SOURCE))
    names = {record.name: record for record in records}
    assert len(names) == len(records)
    assert all(is_known(name) for name in names)
    assert all(record.emulated for record in records)
    for law in LAWS:
        record = names[f"sweep.simulated_h100_4x4.constant_rank.ep16.dp1.{law}"]
        assert record.unit == UNITS[law]
    tps = names["sweep.simulated_h100_4x4.constant_rank.ep16.dp1.tps"]
    assert tps.spread[0] < tps.value < tps.spread[1]
    assert names["sweep.simulated_h100_4x4.constant_total.fit.tps.r2"].value > 0.9


def test_the_table_and_the_values_have_every_point(swept: Sweep) -> None:
    told = io.StringIO()
    print_sweep(swept, Console(file=told, width=100))
    assert told.getvalue().count("peers") >= 4 and "TPS ~ EP" in told.getvalue()
    assert "more memory than a device has" in told.getvalue()
    values = sweep_values(swept)
    assert len(values["points"]) == len(TOTALS) * 7 and len(values["fits"]) == len(TOTALS) * len(LAWS)
    assert values["points"][4]["tps"][0] == swept.points[4].value("tps").value


def test_the_command_prints_the_curve_writes_its_records_and_draws_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep.jsonl"
    plan = ["plan", "--config", str(ROOT / "ds_configs" / "ep16.json"), "--cluster", str(PATH), "--sweep"]
    job = [*plan, "ep=4..8"]
    assert main([*job, "--out", str(out)]) == 0
    assert "TPOT ~ 1/EP" in capsys.readouterr().out
    names = {record.name for record in read_records(out)}
    assert "sweep.simulated_h100_4x4.constant_total.ep8.dp1.tps" in names
    assert (tmp_path / "sweep.png").is_file() and (tmp_path / "sweep.svg").is_file()
    assert main([*job, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [point["ep"] for point in values["points"]] == [4, 8] * 2
    assert main([*job, "--compare", "other.json"]) == 2
    assert "a sweep is of one job" in capsys.readouterr().err
    assert main([*plan, "ep=1", "--out", str(tmp_path / "no" / "folder.jsonl")]) == 2


def num_tasks(ep: int, **knobs: object) -> int:
    setup = setup_at(SETUP, "constant_rank", ep, 1)
    assert setup is not None
    return len(EpJob(with_knobs(setup, knobs)).micro_batch().tasks)


def test_the_number_of_tasks_grows_no_faster_than_the_ranks() -> None:
    """A group of peers per node makes most pieces: from 256 to 512 ranks they double, and so do the tasks."""
    assert num_tasks(512, schedule="peers") < 2.05 * num_tasks(256, schedule="peers") < 10_000
    assert num_tasks(1024, schedule="peers", peer_group_size=256) < 2_000
    assert {"schedule": "peers", "peer_group_size": 256, "row_cuts": 1} in candidates(Torus(256, 4))


@pytest.mark.slow
def test_a_thousand_devices_take_less_than_ten_seconds_of_a_core_and_a_gigabyte() -> None:
    script = (
        "import resource, sys\n"
        "from tests.simulate.test_sweep import SETUP, Sizes, sweep\n"
        "for sizes in (Sizes(ep=(1024,)), Sizes(ep=(16,), dp=(64,))):\n"
        "    assert len(sweep(SETUP, sizes).points) == 2\n"
        # VmHWM, since ru_maxrss begins at what the parent had
        "    own = [line for line in open('/proc/self/status') if line.startswith('VmHWM')]\n"
        "    print(int(own[0].split()[1]) // 1024, resource.getrusage(resource.RUSAGE_SELF).ru_utime)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stderr
    (_, first_s), (used_mib, both_s) = (map(float, line.split()) for line in done.stdout.splitlines())
    assert used_mib < 1024 and first_s < 10 and both_s - first_s < 10, done.stdout
