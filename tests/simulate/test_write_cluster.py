"""A cluster that was written is read back: numbers, sources, ranges; files are replaced whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.simulate.cluster.cluster import PARTS, Cluster, Device, Host, Link, load_cluster, read_cluster
from ds_moe_ep.simulate.cluster.write import cluster_values, json_of, unit_of, write_cluster
from tests.policy.sources import ROOT

FILES = sorted((ROOT / "ds_configs" / "clusters").glob("*.json"))
SOURCES = st.text("abc déü,;\"'", min_size=1, max_size=9).filter(str.strip)
CLUSTER = Cluster(
    name="two",
    num_nodes=1,
    node_size=2,
    device=Device(memory_bytes=8e10),
    near=Link(),
    far=Link(bandwidth=2e5, latency_us=3.5),
    sources={"device.memory_bytes": "a data sheet", "far.bandwidth": "measured", "far.latency_us": "measured"},
    ranges={"far.bandwidth": (1.5e5, 2e5)},
)


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    """Any cluster that a file may describe: each number given or left out, with a range or without."""
    node_size = draw(st.integers(1, 16))
    sources: dict[str, str] = {}
    ranges: dict[str, tuple[float, float]] = {}
    parts = {}
    for part, kind in PARTS.items():
        values = {}
        for f in dataclasses.fields(kind):
            path, kind_of = f"{part}.{f.name}", f.metadata["kind"]
            least = 1e-9 if kind_of in ("ratio", "bytes/us") else f.metadata["minimum"]
            if f.default is not dataclasses.MISSING and draw(st.booleans()):
                continue
            most = {"ratio": 1.0, "ranks": float(node_size)}.get(kind_of, 1e15)
            numbers = sorted(draw(st.floats(least, most, allow_subnormal=False)) for _ in range(3))
            values[f.name], sources[path] = numbers[1], draw(SOURCES)
            if draw(st.booleans()):
                ranges[path] = numbers[0], numbers[2]
        parts[part] = kind(**values)
    return Cluster(
        name=draw(SOURCES),
        num_nodes=draw(st.integers(1, 1024)),
        node_size=node_size,
        computes_on=draw(st.sampled_from(["device", "host"])) if parts["host"].cores else "device",
        sources=sources,
        ranges=ranges,
        **parts,
    )


def assert_same(one: Cluster, other: Cluster) -> None:
    """Equal up to 11 digits, which is what a written number has, less a conversion of its unit."""
    for name in ("name", "num_nodes", "node_size", "computes_on", "sources"):
        assert getattr(one, name) == getattr(other, name)
    for part in PARTS:
        mine, its = (dataclasses.asdict(getattr(cluster, part)) for cluster in (one, other))
        assert mine == pytest.approx(its, rel=1e-11)
    assert one.ranges.keys() == other.ranges.keys()
    for path, pair in one.ranges.items():
        assert pair == pytest.approx(other.ranges[path], rel=1e-11)


@settings(max_examples=150, deadline=None)
@given(clusters())
def test_what_was_written_is_read_back(cluster: Cluster) -> None:
    assert_same(read_cluster(json.loads(json_of(cluster_values(cluster)))), cluster)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_cluster_of_the_project_survives_the_way(path: Path, tmp_path: Path) -> None:
    cluster = load_cluster(path)
    write_cluster(tmp_path / "copy.json", cluster, "a note")
    assert_same(load_cluster(tmp_path / "copy.json"), cluster)
    assert json.loads((tmp_path / "copy.json").read_text(encoding="utf-8"))["notes"] == "a note"


def test_one_number_that_differs_is_seen() -> None:
    other = dataclasses.replace(CLUSTER, far=dataclasses.replace(CLUSTER.far, latency_us=3.5001))
    with pytest.raises(AssertionError):
        assert_same(read_cluster(cluster_values(other)), CLUSTER)


def test_each_number_stands_on_a_line_with_the_unit_that_is_easily_read() -> None:
    lines = json_of(cluster_values(CLUSTER)).splitlines()
    assert '    "memory_bytes": {"value": 80, "unit": "GB", "source": "a data sheet"}' in lines
    assert '    "bandwidth": {"value": 200, "unit": "GB/s", "range": [150, 200], "source": "measured"},' in lines
    assert "host" not in cluster_values(CLUSTER), "nobody gave a number of it"


@pytest.mark.parametrize(
    ("value", "kind", "unit"),
    [
        (12.5, "bytes/us", "MB/s"),
        (3.35e6, "bytes/us", "GB/s"),
        (4.5e4, "flop/us", "GFLOP/s"),
        (9.89e8, "flop/us", "TFLOP/s"),
        (0.02, "us", "ns"),
        (0.7, "ratio", "ratio"),
        (0.0, "us", "us"),
        (1e-30, "us", "us"),
    ],
)
def test_units(value: float, kind: str, unit: str) -> None:
    assert unit_of(value, kind) == unit


def test_a_number_without_a_source_says_so() -> None:
    bare = dataclasses.replace(CLUSTER, sources={}, ranges={})
    assert cluster_values(bare)["far"]["bandwidth"]["source"] == "unknown"
    read_cluster(cluster_values(bare))


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    write_cluster(path, CLUSTER)
    before = path.read_text(encoding="utf-8")
    endless = dataclasses.replace(CLUSTER, host=Host(cores=math.inf))
    with pytest.raises(ConfigError, match=r"cluster\.host\.cores=inf.*finite"):
        write_cluster(path, endless)
    assert path.read_text(encoding="utf-8") == before
    write_cluster(path, dataclasses.replace(CLUSTER, name="another"))
    assert load_cluster(path).name == "another" and [p.name for p in tmp_path.iterdir()] == ["mine.json"]
    with pytest.raises(ConfigError, match=r"out=.*cannot be written"):
        write_cluster(tmp_path / "no folder" / "x.json", CLUSTER)
