"""A cluster is read with its units, sources and ranges, and what cannot be is refused by its path."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.simulate.cluster.cluster import PARTS, SCALES, Device, Link, load_cluster, read_cluster

FILES = sorted((Path(__file__).parents[2] / "ds_configs" / "clusters").glob("*.json"))


def number(value: Any, unit: str, **more: Any) -> dict[str, Any]:
    return {"value": value, "unit": unit, "source": "a test", **more}


def small() -> dict[str, Any]:
    """A small cluster with ranges on both kinds of numbers: those that are better high, and better low."""
    return {
        "name": "small",
        "num_nodes": 2,
        "node_size": 4,
        "device": {
            "memory_bytes": number(80, "GB"),
            "peak_bf16": number(989, "TFLOP/s"),
            "matmul_efficiency": number(70, "percent", range=[60, 80]),
            "launch_us": number(4, "us", range=[2, 6]),
        },
        "near": {"bandwidth": number(400, "GB/s")},
        "far": {"bandwidth": number(200, "GB/s", range=[150, 200]), "shared_by": number(4, "ranks")},
    }


def changed(*path: str, to: Any) -> dict[str, Any]:
    """The small cluster with one value replaced or added."""
    values = copy.deepcopy(small())
    place = values
    for key in path[:-1]:
        place = place.setdefault(key, {})
    place[path[-1]] = to
    return values


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_cluster_that_ships_can_be_read_and_its_ends_bracket_it(path: Path) -> None:
    cluster = load_cluster(path)
    slow, fast = cluster.ends()
    for name, kind in PARTS.items():
        for field in dataclasses.fields(kind):
            low, value, high = (getattr(getattr(one, name), field.name) for one in (slow, cluster, fast))
            assert low <= value <= high if field.metadata["better"] == "high" else low >= value >= high, field.name
    assert cluster.sources.keys() >= cluster.ranges.keys()


def test_there_are_clusters_to_read() -> None:
    assert {"h100_4x4", "h100_2x8"} <= {path.stem for path in FILES}


def test_numbers_are_read_in_microseconds_bytes_and_flops() -> None:
    cluster = read_cluster(small())
    assert cluster.device.memory_bytes == 80e9
    assert cluster.device.peak("bf16") == 989e12 / 1e6
    assert cluster.device.matmul_efficiency == pytest.approx(0.7)
    assert cluster.far.bandwidth == 200e9 / 1e6
    assert cluster.num_ranks == 8
    assert cluster.sources["far.bandwidth"] == "a test"


@pytest.mark.parametrize(
    ("kind", "unit", "expected"),
    [
        ("bytes", "bytes", 1),
        ("bytes", "GB", 1e9),
        ("bytes", "GiB", 1024**3),
        ("bytes/us", "GB/s", 1e9 / 1e6),
        ("bytes/us", "TB/s", 1e12 / 1e6),
        ("bytes/us", "MB/s", 1e6 / 1e6),
        ("bytes/us", "Mbit/s", 1e6 / 8 / 1e6),
        ("bytes/us", "Gbit/s", 1e9 / 8 / 1e6),
        ("flop/us", "TFLOP/s", 1e12 / 1e6),
        ("flop/us", "GFLOP/s", 1e9 / 1e6),
        ("us", "us", 1),
        ("us", "ms", 1000),
        ("us", "ns", 1e-3),
        ("us/byte", "us/MB", 1e-6),
        ("us/byte", "ns/byte", 1e-3),
        ("ratio", "ratio", 1),
        ("ratio", "percent", 0.01),
        ("rows", "rows", 1),
        ("ranks", "ranks", 1),
        ("cores", "cores", 1),
    ],
)
def test_a_unit_means_what_it_says(kind: str, unit: str, expected: float) -> None:
    assert SCALES[kind][unit] == pytest.approx(expected, rel=1e-12)


def test_every_unit_is_in_the_test_above() -> None:
    assert sum(len(units) for units in SCALES.values()) == 20


def test_numbers_that_a_file_leaves_out_bound_nothing() -> None:
    cluster = read_cluster(small())
    assert cluster.device.memory_bandwidth == math.inf
    assert (cluster.far.latency_us, cluster.far.efficiency, cluster.near.shared_by) == (0.0, 1.0, 1.0)
    assert cluster.host.cores == 0.0


def test_a_link_gives_rows_its_share_of_the_wire() -> None:
    assert Link(bandwidth=200e3, efficiency=0.85).rate == 170e3


def test_ends_are_the_slower_and_the_faster_side_of_every_range_and_leave_the_rest() -> None:
    slow, fast = read_cluster(small()).ends()
    assert [end.device.matmul_efficiency for end in (slow, fast)] == pytest.approx([0.6, 0.8])
    assert (slow.device.launch_us, fast.device.launch_us) == (6.0, 2.0)
    assert (slow.far.bandwidth, fast.far.bandwidth) == (150e3, 200e3)
    assert slow.near == fast.near
    assert slow.device.peak_bf16 == fast.device.peak_bf16 == 989e6


def test_without_ranges_both_ends_are_the_cluster() -> None:
    values = small()
    for part in ("device", "far"):
        for entry in values[part].values():
            entry.pop("range", None)
    cluster = read_cluster(values)
    assert cluster.ends() == (cluster, cluster)


def test_more_nodes_and_another_link_leave_the_rest_alone() -> None:
    cluster = read_cluster(small())
    assert cluster.with_nodes(8).num_ranks == 32
    assert cluster.with_far(latency_us=9.0).far == dataclasses.replace(cluster.far, latency_us=9.0)
    assert cluster.with_nodes(8).with_nodes(2) == cluster


def test_a_device_without_a_peak_for_the_precision_says_so_when_it_is_asked() -> None:
    with pytest.raises(ConfigError, match=r"cluster\.device\.peak_fp32: missing, and the run computes in fp32"):
        read_cluster(small()).device.peak("fp32")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "cluster=[]: expected an object"),
        ({}, "cluster.name: missing"),
        (changed("name", to=" "), "cluster.name=' ': needs a text"),
        (changed("num_nodes", to=0), "cluster.num_nodes=0: needs a whole number of at least 1"),
        (changed("num_nodes", to=True), "cluster.num_nodes=True: needs a whole number"),
        (changed("node_size", to=4.0), "cluster.node_size=4.0: needs a whole number"),
        (changed("nodes", to=4), "cluster.nodes=4: unknown key; did you mean 'notes'"),
        (changed("device", to=3), "cluster.device=3: expected an object of numbers"),
        (changed("device", to={}), "cluster.device.memory_bytes: missing (memory of one device); give it"),
        (changed("far", "bandwith", to=number(1, "GB/s")), "unknown key; did you mean 'bandwidth'?"),
        (
            changed("far", "bandwidth", to=200),
            "cluster.far.bandwidth=200: bytes per microsecond and direction; each number",
        ),
        (changed("far", "bandwidth", to={"value": 1, "unit": "GB/s"}), "each number has a unit and a source: write"),
        (changed("far", "bandwidth", "error", to=5), "cluster.far.bandwidth.error=5: unknown key"),
        (
            changed("far", "bandwidth", "unit", to="GB"),
            "cluster.far.bandwidth.unit='GB': no unit of this; choose one of 'GB/s'",
        ),
        (changed("far", "bandwidth", "unit", to=["GB/s"]), "cluster.far.bandwidth.unit=['GB/s']: no unit of this"),
        (
            changed("far", "bandwidth", "source", to=""),
            "cluster.far.bandwidth.source='': says where the number is from",
        ),
        (changed("far", "bandwidth", "value", to="200"), "needs numbers of at least 0"),
        (changed("far", "bandwidth", "value", to=True), "needs numbers of at least 0"),
        (changed("far", "bandwidth", "value", to=-1), "needs numbers of at least 0"),
        (changed("far", "bandwidth", "value", to=math.nan), "needs numbers of at least 0"),
        (changed("far", "bandwidth", to=number(0, "GB/s")), "at 0 nothing would ever end"),
        (changed("far", "efficiency", to=number(0, "ratio")), "at 0 nothing would ever end"),
        (changed("far", "efficiency", to=number(85, "ratio")), "a share of the whole is 1 at most, or 100 percent"),
        (changed("far", "efficiency", to=number(90, "percent", range=[80, 101])), "a share of the whole is 1 at most"),
        (
            changed("far", "bandwidth", "range", to=[210, 220]),
            "cluster.far.bandwidth.range=[210, 220]: two numbers with",
        ),
        (changed("far", "bandwidth", "range", to=[200]), "cluster.far.bandwidth.range=[200]: two numbers with"),
        (changed("far", "bandwidth", "range", to=[]), "cluster.far.bandwidth.range=[]: two numbers with"),
        (changed("far", "bandwidth", "range", to=5), "cluster.far.bandwidth.range=5: two numbers with"),
        (changed("far", "bandwidth", "range", to=[-5, 300]), "needs numbers of at least 0"),
        (changed("far", "shared_by", to=number(0.5, "ranks")), "needs numbers of at least 1"),
        (
            changed("far", "shared_by", to=number(8, "ranks")),
            "cluster.far.shared_by=8 with node_size=4: a node has no more",
        ),
        (changed("computes_on", to="gpu"), "cluster.computes_on='gpu': choose 'device' or 'host'"),
        (changed("computes_on", to="host"), "cluster.computes_on='host': says nothing without host.cores"),
    ],
)
def test_what_cannot_be_is_refused_with_its_path_and_a_way_out(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_cluster(values)


def test_a_file_that_is_missing_or_no_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cluster='.*none.json': cannot be read \(No such file"):
        load_cluster(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match=r"cluster='.*broken.json': no JSON \("):
        load_cluster(tmp_path / "broken.json")


def test_a_file_reads_as_the_values_in_it(tmp_path: Path) -> None:
    (tmp_path / "small.json").write_text(json.dumps(small()))
    assert load_cluster(tmp_path / "small.json") == read_cluster(small())


def test_every_number_of_every_part_says_what_it_is_and_which_end_is_better() -> None:
    for kind in PARTS.values():
        for field in dataclasses.fields(kind):
            assert field.metadata["better"] in ("high", "low")
            assert field.metadata["help"].strip()
            assert field.metadata["kind"] in SCALES
    assert Device in PARTS.values()
